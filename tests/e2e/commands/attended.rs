//! Restores that say how it went and stay: `--status-fd`, `--pidfile`, `--exec-cmd`, and the parent that attends.

use std::{
    ffi::OsString,
    fs,
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use e2e::{Look, Options, Row, Workload, proc, reaper, rows};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};

use super::{counter, nothing_left};

/// A restore whose engine stays the parent, started and not waited for.
fn attended(row: &Row, images: &Path) -> Child {
    let words = row.restorer.restore_words(images, &row.options).into_iter().filter(|word| word != "-d");
    let mut command = Command::new(row.restorer.binary());
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("starting the engine")
}

fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !there() {
        assert!(Instant::now() < end, "{what} does not happen");
        sleep(reaper::POLL);
    }
}

/// The exit status of an engine that gets a signal for a program which does something about it.
fn status_after(row: &Row, program: &[&str], signal: Signal) -> Option<i32> {
    let program = Workload::program(program).start();
    sleep(Duration::from_millis(200));
    let images = row.dump(&program);
    let mut engine = attended(row, &images);
    wait_for("the tree", || images.join("pid").exists() && proc::stat(program.pid()).is_some_and(|(s, _)| s != 't'));
    // The engine restores with all signals blocked, and has them wait before: none can come too early.
    kill(Pid::from_raw(i32::try_from(engine.id()).expect("a pid")), signal).expect("the engine is there");
    let status = engine.wait().expect("waiting for the engine");
    nothing_left(&program.tree());
    status.code()
}

rows! {
    /// A signal reaches the program, which ends as it likes; the engine ends with the same status.
    signal_and_status => |row| {
        let program = ["/bin/sh", "-c", "trap 'exit 7' USR1; while :; do :; done"];
        assert_eq!(status_after(row, &program, Signal::SIGUSR1), Some(7));
    };

    /// A program that dies of the signal: 128 and its number, as a shell says it.
    killed_by_a_signal => |row| {
        assert_eq!(status_after(row, &["/usr/bin/sleep", "100"], Signal::SIGTERM), Some(128 + 15));
        assert_eq!(status_after(row, &["/usr/bin/sleep", "100"], Signal::SIGALRM), Some(128 + 14));
    };

    /// A zero byte and the end of file, while the engine goes on to attend.
    status_descriptor => |row| {
        let mut program = counter().start();
        let images = row.dump(&program);
        let fifo = program.file("status");
        mkfifo(&fifo, Mode::S_IRWXU).expect("mkfifo");
        let row = row.with(Options { restore: ["--status-fd", "7"].map(OsString::from).into(), ..Options::default() });
        let words: Vec<OsString> =
            row.restorer.restore_words(&images, &row.options).into_iter().filter(|word| word != "-d").collect();
        let reader = {
            let fifo = fifo.clone();
            std::thread::spawn(move || fs::read(fifo))
        };
        let mut engine = Command::new("sh")
            .args(["-c", "exec 7>\"$0\"; exec \"$@\""])
            .arg(&fifo)
            .arg(row.restorer.binary())
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starting the engine");
        let said = reader.join().expect("the reader").expect("reading");
        assert_eq!(said, [0]);
        assert!(engine.try_wait().expect("waiting").is_none(), "the engine ended although the program runs");
        program.go();
        program.wait_for_log_line("ok");
        assert_eq!(engine.wait().expect("waiting").code(), Some(0));
    };

    /// A dump says so as well, and nothing where it fails.
    status_descriptor_of_a_dump => |row| {
        let mut program = counter().start();
        let by = "exec 7>\"$0/status\"; exec \"$@\"";
        for (words, expected) in [(&["--status-fd", "7", "-R"][..], &[0][..]), (&["--status-fd", "7", "--freeze-cgroup", "/proc"], &[])] {
            let images = row.next_images(&program);
            fs::create_dir(&images).expect("mkdir");
            let words = row.dumper.dump_words(&program, &images, &Options::dump(words));
            row.dumper.call_by(by, &words, &images, "dump");
            let mut said = Vec::new();
            fs::File::open(images.join("status")).and_then(|mut file| file.read_to_end(&mut said)).expect("reading");
            assert_eq!(said, expected);
        }
        // A number that is no descriptor.
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &Options::dump(&["--status-fd", "77"])).expect_refusal("--status-fd 77");
        program.finish();
    };

    /// A pid file that is there belongs to somebody: nothing is restored.
    pid_file_exists => |row| {
        let mut program = counter().start();
        let tree = program.tree();
        let images = row.dump(&program);
        let mut words = row.restorer.restore_words(&images, &row.options);
        fs::write(images.join("pid"), "1").expect("writing a pid file");
        row.restorer.call(&words, &images, "restore").expect_refusal("pid file");
        nothing_left(&tree);
        assert_eq!(fs::read_to_string(images.join("pid")).expect("still there"), "1");
        // One that cannot be written is no reason to leave anything behind either.
        let at = words.iter().position(|word| word == "--pidfile").expect("there is one") + 1;
        words[at] = "no/such/directory".into();
        row.restorer.call(&words, &images, "restore").expect_refusal("no/such/directory");
        nothing_left(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// `--exec-cmd`: the command takes the engine's place as the parent.
    exec_command => |row| {
        let mut program = counter().start();
        let before = Look::at(&program);
        let images = row.dump(&program);
        let said = program.file("said");
        let command = format!("sed -n 's/^PPid:.//p' /proc/{}/status > {}; echo $$ >> {}", program.pid(), said.display(), said.display());
        let options = Options {
            restore: ["--exec-cmd", "--", "/bin/sh", "-c", &command].map(OsString::from).into(),
            ..Options::default()
        };
        let words: Vec<OsString> =
            row.restorer.restore_words(&images, &options).into_iter().filter(|word| word != "-d").collect();
        row.restorer.call(&words, &images, "restore").expect_success();
        let text = fs::read_to_string(said).expect("the command ran");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 2 && lines[0] == lines[1], "the parent and the command: {lines:?}");
        before.compare(&Look::at(&program));
        program.finish();
    };
}
