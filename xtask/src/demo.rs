//! `cargo xtask demo`: a live program is tracked, dumped with a short freeze, is gone, is restored, and goes on.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::reaper;

use crate::process::engine;

/// One line for the list of tasks.
pub const ABOUT: &str = "from nothing to a program that is dumped and restored (as root)";

/// Counts, and keeps what it counts in memory and nowhere else; a hundred of its 65 536 pages of memory change with every
/// number, and each time it looks whether the numbers before are still there. What else its caller had open (an editor's
/// pipes, say) is none of the demo's.
const PROGRAM: &str = "
import os, time
os.closerange(3, 4096)
n, page, pages = 0, 4096, 65536
memory = bytearray(b'criu' * (page * pages // 4))
def slot(i):
    return slice(i % pages * page, i % pages * page + 8)
while True:
    n += 1
    for i in range(n * 100, n * 100 + 100):
        memory[slot(i)] = i.to_bytes(8, 'little')
    for i in range(max(n - 50, 1) * 100, n * 100):
        assert memory[slot(i)] == i.to_bytes(8, 'little'), f'page {i % pages} is not what it was'
    print(f'pid {os.getpid()} counts {n}', flush=True)
    time.sleep(0.1)
";

/// Installs, builds, and shows.
pub fn run(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "takes no arguments");
    let begin = Instant::now();
    crate::setup::build_only()?;
    crate::build::run(&[])?;
    let built = begin.elapsed();
    // What a detached restore brings back becomes a child of ours: it can be waited for when it is ended.
    reaper::become_subreaper();
    let place = Place::new()?;
    let counter = Counter::start(&place)?;
    let pid = counter.pid;
    title(&format!("A program runs, as pid {pid}"));
    let mut shown = 0;
    show_until(&place.output, &mut shown, 10)?;

    let pid_text = pid.to_string();
    title("Dump it while it runs on, to see what that costs: all of its memory is written in the freeze");
    timed(engine_command(&["dump", "-R", "-t", &pid_text, "-D", &place.whole]))?;

    title("Track it: from here on, what it writes is known; its memory is written while it runs");
    timed(engine_command(&["track", "-d", &pid_text]))?;
    timed(engine_command(&["pre-dump", "-t", &pid_text, "-D", &place.early]))?;
    timed(engine_command(&["track", "--list"]))?;

    title("Dump it: only what was written since is left for the freeze");
    let words = ["dump", "-t", &pid_text, "-D", &place.images, "--track-mem", "--prev-images-dir", "../early"];
    let dump = timed(engine_command(&words))?;
    let gone = reaper::wait_gone(&BTreeSet::from([pid]), Duration::from_secs(2)).is_empty();
    ensure!(gone && !Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is still there");
    let before = lines(&place.output);
    before[shown..].iter().for_each(|line| println!("    {line}"));
    shown = before.len();
    let last = before.last().context("the program has printed nothing")?;
    println!("It is gone: there is no /proc/{pid}. What is left of it: {}", size_of_dir(&place.images)?);
    std::thread::sleep(Duration::from_secs(1));
    ensure!(lines(&place.output).len() == shown, "the program still counts");
    println!("A second later the last line is still \"{last}\".");

    title("Restore it");
    let restore = timed(engine_command(&["restore", "-d", "-D", &place.images]))?;
    let until = shown + 5;
    show_until(&place.output, &mut shown, until)?;
    ensure_unbroken(&lines(&place.output))?;
    println!("It goes on exactly where it was: no number is missing, and none came twice.");

    title("How long it took");
    println!("    install and build {built:.1?} · dump {dump:.1?} · restore {restore:.1?}");
    Ok(())
}

/// A directory for the images and for what the program prints, gone in the end.
struct Place {
    dir: PathBuf,
    images: String,
    /// Images of the pre-dump, on which the dump builds.
    early: String,
    /// Images of the dump for comparison.
    whole: String,
    output: PathBuf,
}

impl Place {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("criu-ebpf-demo-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = |name: &str| dir.join(name).display().to_string();
        let (images, early, whole) = (path("images"), path("early"), path("whole"));
        Ok(Self { images, early, whole, output: dir.join("output"), dir })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

/// The program, which does not outlive the demo, whosever child it is.
struct Counter {
    pid: i32,
}

impl Counter {
    fn start(place: &Place) -> Result<Self> {
        let output = File::create(&place.output)?;
        // In a session of its own: nothing of it is outside. A plain Debian's Python: one that a version manager put on
        // PATH brings wrapper processes with it.
        let mut python = Command::new("setsid");
        python.args(["/usr/bin/python3", "-c", PROGRAM]);
        python.stdin(Stdio::null()).stderr(output.try_clone()?).stdout(output);
        let child = python.spawn().context("cannot start setsid (of util-linux) with /usr/bin/python3")?;
        Ok(Self { pid: i32::try_from(child.id())? })
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        reaper::kill_trees([self.pid]);
    }
}

fn title(text: &str) {
    if std::io::stdout().is_terminal() {
        println!("\n\x1b[1m{text}\x1b[0m");
    } else {
        println!("\n{text}");
    }
}

fn engine_command(args: &[&str]) -> Command {
    println!("    $ criu-ebpf {}", args.join(" "));
    let mut command = Command::new(engine());
    command.args(args);
    command
}

fn timed(mut command: Command) -> Result<Duration> {
    let start = Instant::now();
    let status = command.status().with_context(|| format!("cannot run {}", engine().display()))?;
    let took = start.elapsed();
    ensure!(status.success(), "criu-ebpf failed: {status}");
    Ok(took)
}

/// What the program has printed, whole lines only: it may be in the middle of one.
fn lines(output: &Path) -> Vec<String> {
    let text = fs::read_to_string(output).unwrap_or_default();
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(str::to_owned).collect()
}

/// Shows what the program prints as it comes, until there are so many lines.
fn show_until(output: &Path, shown: &mut usize, count: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while *shown < count {
        for line in &lines(output)[*shown..] {
            println!("    {line}");
            *shown += 1;
        }
        ensure!(Instant::now() < deadline, "waited ten seconds for the program to print line {count}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn ensure_unbroken(lines: &[String]) -> Result<()> {
    for (expected, line) in (1..).zip(lines) {
        let counted: u64 = line.rsplit(' ').next().and_then(|n| n.parse().ok()).context("no number in its output")?;
        ensure!(counted == expected, "counted {counted} where {expected} was due");
    }
    Ok(())
}

/// How many files of what size, in words.
fn size_of_dir(dir: &str) -> Result<String> {
    let mut bytes = 0;
    let mut files = 0;
    for entry in fs::read_dir(dir)? {
        bytes += entry?.metadata()?.len();
        files += 1;
    }
    Ok(format!("{files} files, {:.1} MiB", bytes as f64 / f64::from(1 << 20)))
}
