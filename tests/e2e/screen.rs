//! The screen of `track`, in a tmux of its own.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use e2e::{Engine, Options, Program, Survey, Workload, engine::adopt};

const ENGINE: Engine = Engine::Ours(Survey::Ebpf);

/// A terminal with the screen in it. The server ends when this is dropped.
struct Screen {
    name: String,
}

impl Screen {
    fn of(program: &Program) -> Self {
        let screen = Self { name: format!("e2e-screen-{}", program.pid()) };
        let images = program.file("images").display().to_string();
        let track = format!("{} track {} --interval 200 -D {images}", ENGINE.binary().display(), program.pid());
        let line = format!("{track}; echo status $?; exec sleep 1000");
        screen.tmux(&["new-session", "-d", "-x", "120", "-y", "40", &line]);
        screen
    }

    fn tmux(&self, words: &[&str]) -> String {
        let mut tmux = Command::new("tmux");
        tmux.args(["-L", &self.name, "-f", "/dev/null"]).args(words).env("LC_ALL", "C.UTF-8").env_remove("TMUX");
        let output = tmux.output().expect("starting tmux");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn text(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    fn press(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    /// Waits until it shows what is wanted.
    fn until(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let text = self.text();
            if wanted(&text) {
                return text;
            }
            assert!(Instant::now() < end, "it does not show {what}:\n{text}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn shows(&self, what: &str) -> String {
        self.until(what, |text| text.contains(what))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _: std::io::Result<std::process::Output> =
            Command::new("tmux").args(["-L", &self.name, "kill-server"]).output();
    }
}

#[test]
fn keys_and_sizes() {
    let mut program = Workload::new("tree.py", "family").start();
    let screen = Screen::of(&program);
    screen.shows(&format!("tree of {}", program.pid()));
    let text = screen.shows("eBPF: all programs run");
    for part in [
        "memory",
        "working set",
        "a dump now would freeze",
        "sockets",
        "calls by state",
        "would refuse a dump",
        "q quit",
    ] {
        assert!(text.contains(part), "there is no {part:?} in\n{text}");
    }
    for pid in program.tree() {
        assert!(text.contains(&pid.to_string()), "no process {pid} in\n{text}");
    }
    assert!(text.contains("by rate"));
    screen.press("s");
    screen.shows("by memory");
    screen.press("s");
    screen.shows("by pid");
    screen.press("p");
    screen.shows("PAUSED");
    screen.press("p");
    screen.until("that it goes on", |text| !text.contains("PAUSED"));
    screen.tmux(&["resize-window", "-x", "80", "-y", "20"]);
    let text = screen.until("less", |text| text.lines().count() <= 20 && text.contains("tree of"));
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    screen.tmux(&["resize-window", "-x", "150", "-y", "50"]);
    screen.until("more", |text| text.lines().any(|line| line.trim_end().chars().count() > 140));
    // No is an answer.
    screen.press("D");
    screen.shows("kill its tree? y/n");
    screen.press("n");
    screen.shows("no dump was made");
    screen.press("q");
    screen.shows("status 0");
    program.finish();
}

/// Pre-dumped and dumped from the screen, which ends with the tree; what it wrote brings the program back.
#[test]
fn dumps() {
    let mut program = Workload::new("counter.py", "counter").start();
    let screen = Screen::of(&program);
    screen.shows("eBPF: all programs run");
    screen.press("d");
    screen.shows("pre-dumped 1 processes");
    let tree = program.tree();
    screen.press("D");
    screen.shows("y/n");
    screen.press("y");
    screen.shows("has ended");
    screen.shows("status 0");
    program.expect_gone(&tree);
    let images = program.file("images").join(format!("track-{}-2", program.pid()));
    let log = std::fs::read_to_string(images.join("dump.log")).expect("its log");
    assert!(!log.contains("all memory is written"), "it does not build on the pre-dump:\n{log}");
    adopt(&program, &images, ENGINE.restore(&images, &Options::default()));
    program.finish();
}

/// Whoever attaches to a session has the same screen, and leaves the session alone.
#[test]
fn of_a_session_elsewhere() {
    let mut program = Workload::new("threads.c", "many").start();
    let pid = program.pid().to_string();
    assert!(crate::sessions::track(&[&pid, "-d", "--interval", "200"]).status.success());
    let screen = Screen::of(&program);
    screen.shows("eBPF: all programs run");
    screen.press("q");
    screen.shows("status 0");
    let list = crate::sessions::track(&["--list"]);
    assert!(String::from_utf8_lossy(&list.stdout).contains(&format!("{pid} (")), "the session has ended");
    let screen = Screen { name: format!("{}b", screen.name) };
    let line = format!("{} track {pid}; echo status $?; exec sleep 1000", ENGINE.binary().display());
    screen.tmux(&["new-session", "-d", "-x", "120", "-y", "40", &line]);
    screen.shows("tree of");
    assert!(crate::sessions::track(&["--stop", &pid]).status.success());
    screen.shows("has ended");
    screen.shows("status 0");
    program.finish();
}

/// The tree dies: it says so, gives the terminal back, and ends well.
#[test]
fn a_tree_that_dies() {
    let program = Workload::new("threads.c", "many").start();
    let screen = Screen::of(&program);
    screen.shows("tree of");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(program.pid()), nix::sys::signal::Signal::SIGKILL)
        .expect("a signal");
    let text = screen.shows("status 0");
    assert!(text.contains(&format!("the tree of process {} has ended", program.pid())), "{text}");
    assert!(!text.contains("q quit"), "the terminal is not as it was:\n{text}");
    // It takes lines again.
    screen.tmux(&["send-keys", "typed"]);
    screen.shows("typed");
}
