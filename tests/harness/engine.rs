//! Calling an engine: ours or CRIU, by the command line that both have.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    Program, proc,
    reaper::{self, POLL},
    workload::workspace,
};

/// How long one call of an engine may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How much of an engine's log is shown when it fails.
const LOG_LINES: usize = 40;

/// What our engine uses to look a tree over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Survey {
    /// eBPF iterators.
    Ebpf,
    /// `/proc`.
    Proc,
}

/// Which engine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Engine {
    /// The one under test.
    Ours(Survey),
    /// CRIU.
    Peer,
}

/// What a test wants beyond the usual command line.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Further words for `dump`.
    pub dump: Vec<OsString>,
    /// Further words for `restore`.
    pub restore: Vec<OsString>,
    /// What `restore` gets as standard input, and can pass on with `--inherit-fd fd[0]:…`.
    pub input: Option<Arc<OwnedFd>>,
}

impl Options {
    /// The same further words for both.
    pub fn both(words: &[&str]) -> Self {
        Self { restore: words.iter().map(OsString::from).collect(), ..Self::dump(words) }
    }

    /// A descriptor that stands for something outside of the tree at the restore.
    pub fn given(name: &str, fd: impl Into<OwnedFd>) -> Self {
        Self {
            restore: vec!["--inherit-fd".into(), format!("fd[0]:{name}").into()],
            input: Some(Arc::new(fd.into())),
            ..Self::default()
        }
    }

    /// Further words for `dump` only.
    pub fn dump(words: &[&str]) -> Self {
        Self { dump: words.iter().map(OsString::from).collect(), ..Self::default() }
    }
}

/// How a call of an engine ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status.
    pub status: ExitStatus,
    /// How long it took.
    pub took: Duration,
    /// Its log file.
    pub log: String,
    /// What it printed on both streams.
    pub printed: String,
    /// The call itself, for reports.
    pub call: String,
}

impl Outcome {
    /// Fails the test unless the engine was successful.
    pub fn expect_success(self) -> Self {
        assert!(self.status.success(), "{}\n{}", self.call, self.report());
        self
    }

    /// Fails the test unless the engine refused, and said `reason` (in any case of letters).
    pub fn expect_refusal(self, reason: &str) -> Self {
        assert!(!self.status.success(), "{} went through but was to be refused ({reason})", self.call);
        let said = format!("{}\n{}", self.log, self.printed).to_lowercase();
        assert!(said.contains(&reason.to_lowercase()), "{} says nothing of {reason:?}\n{}", self.call, self.report());
        self
    }

    /// The end of its log and what it printed.
    pub fn report(&self) -> String {
        let lines: Vec<&str> = self.log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        format!("{}\n--- log ---\n{tail}\n--- printed ---\n{}", self.status, self.printed.trim())
    }
}

/// A tree that was brought back.
#[derive(Debug)]
pub struct Restored {
    /// What was said and how long it took.
    pub outcome: Outcome,
    /// The pid in its pid file.
    pub pid: i32,
}

impl Engine {
    /// The binary. With `E2E_ENGINE=peer` it is CRIU's for every engine.
    pub fn binary(self) -> PathBuf {
        let (variable, default) = if self.is_peer() {
            ("CRIU_PEER_BIN", "target/peer/criu")
        } else {
            ("CRIU_EBPF_BIN", "target/release/criu-ebpf")
        };
        env::var_os(variable).map_or_else(|| workspace().join(default), PathBuf::from)
    }

    /// Whether calls go to CRIU.
    pub fn is_peer(self) -> bool {
        self == Self::Peer || env::var_os("E2E_ENGINE").is_some_and(|value| value == "peer")
    }

    /// Dumps a program into `images` (made here) and leaves judging the outcome to the caller.
    pub fn dump(self, program: &Program, images: &Path, options: &Options) -> Outcome {
        fs::create_dir_all(images).unwrap_or_else(|error| panic!("creating {}: {error}", images.display()));
        self.call(&self.dump_words(program, images, options), images, "dump")
    }

    /// Writes the memory of a program that runs on, building on `parent` if there is one.
    pub fn pre_dump(self, program: &Program, images: &Path, parent: Option<&Path>) -> Outcome {
        fs::create_dir_all(images).unwrap_or_else(|error| panic!("creating {}: {error}", images.display()));
        let mut words: Vec<OsString> = vec!["pre-dump".into(), "-t".into(), program.pid().to_string().into()];
        words.extend(Self::common_words(images, "pre-dump.log"));
        if let Some(parent) = parent {
            words.extend(["--prev-images-dir".into(), parent.into()]);
        }
        self.call(&words, images, "pre-dump")
    }

    /// The words after the binary's name for a dump.
    pub fn dump_words(self, program: &Program, images: &Path, options: &Options) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["dump".into(), "-t".into(), program.pid().to_string().into()];
        words.extend(Self::common_words(images, "dump.log"));
        // Only a dump looks a tree over.
        if let Self::Ours(survey) = self
            && !self.is_peer()
        {
            words.extend(["--survey".into(), if survey == Survey::Ebpf { "ebpf" } else { "proc" }.into()]);
        }
        words.extend(options.dump.iter().cloned());
        words
    }

    /// Restores what is in `images`, detached.
    pub fn restore(self, images: &Path, options: &Options) -> Outcome {
        let input = options.input.as_ref().map(|fd| fd.try_clone().expect("duplicating a descriptor"));
        self.call_with(&self.restore_words(images, options), images, "restore", input)
    }

    /// The words after the binary's name for a detached restore.
    pub fn restore_words(self, images: &Path, options: &Options) -> Vec<OsString> {
        let pid_file = images.join("pid");
        // Engines refuse to overwrite a pid file; one of an earlier restore from the same images is no use to anyone.
        let _: std::io::Result<()> = fs::remove_file(&pid_file);
        let mut words: Vec<OsString> = vec!["restore".into(), "-d".into(), "--pidfile".into(), pid_file.into()];
        words.extend(Self::common_words(images, "restore.log"));
        words.extend(options.restore.iter().cloned());
        words
    }

    fn common_words(images: &Path, log: &str) -> Vec<OsString> {
        let mut words: Vec<OsString> = ["-v4", "-D"].iter().map(OsString::from).collect();
        words.extend([images.into(), "-o".into(), log.into()]);
        words
    }

    /// Starts the engine and kills it after `life` unless it has ended by then. Says whether it was killed. What the engine
    /// had begun that goes on without it (the last steps of a dump, a session) has ended as well then.
    pub fn killed_after(self, words: &[OsString], life: Duration) -> bool {
        static CALLS: AtomicU32 = AtomicU32::new(0);
        let mark = CALLS.fetch_add(1, Ordering::Relaxed).to_string();
        let mut command = Command::new(self.binary());
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).env("E2E_CALL", &mark);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
        sleep(life);
        let ended = child.try_wait().expect("waiting for the engine").is_some();
        if !ended {
            child.kill().expect("killing the engine");
            child.wait().expect("waiting for the killed engine");
            wait_for_helpers(&mark);
        }
        !ended
    }

    /// Runs the engine to its end. It is killed, and the test fails, if it takes too long.
    pub fn call(self, words: &[OsString], images: &Path, verb: &str) -> Outcome {
        self.call_with(words, images, verb, None)
    }

    /// The same with a standard input.
    pub fn call_with(self, words: &[OsString], images: &Path, verb: &str, input: Option<OwnedFd>) -> Outcome {
        let mut command = Command::new(self.binary());
        command.args(words).stdin(input.map_or_else(Stdio::null, Stdio::from));
        Self::run(command, images, verb)
    }

    /// Runs the engine by way of a shell script, to which it is `"$@"` and the image directory `$0`.
    pub fn call_by(self, script: &str, words: &[OsString], images: &Path, verb: &str) -> Outcome {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(images).arg(self.binary()).args(words).stdin(Stdio::null());
        Self::run(command, images, verb)
    }

    fn run(mut command: Command, images: &Path, verb: &str) -> Outcome {
        let printed = images.join(format!("{verb}.printed"));
        let out = File::create(&printed).unwrap_or_else(|error| panic!("creating {}: {error}", printed.display()));
        let err = out.try_clone().expect("duplicating a descriptor");
        command.stdout(out).stderr(err);
        let call = format!("{command:?}");
        let start = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("starting {call}: {error}"));
        let status = loop {
            if let Some(status) = child.try_wait().expect("waiting for the engine") {
                break Some(status);
            }
            if start.elapsed() > PATIENCE {
                let _: std::io::Result<()> = child.kill();
                break None;
            }
            sleep(POLL);
        };
        let took = start.elapsed();
        let log = fs::read(images.join(format!("{verb}.log"))).unwrap_or_default();
        let printed = fs::read(&printed).unwrap_or_default();
        let (log, printed) =
            (String::from_utf8_lossy(&log).into_owned(), String::from_utf8_lossy(&printed).into_owned());
        let Some(status) = status else {
            let status = child.wait().expect("waiting for the killed engine");
            let outcome = Outcome { status, took, log, printed, call };
            panic!("{} did not end in {PATIENCE:?}\n{}", outcome.call, outcome.report());
        };
        Outcome { status, took, log, printed, call }
    }
}

/// Waits for the end of what a call of the engine, which was killed, has left to go on without it. Those are ours now.
fn wait_for_helpers(mark: &str) {
    // A session that was started for good is no helper.
    let is_session = |pid: i32| {
        let line = proc::cmdline(pid);
        line.contains(" --serve") && !line.contains(" --with ")
    };
    let helpers = proc::children(std::process::id() as i32)
        .into_iter()
        .filter(|&pid| proc::has_environment(pid, "E2E_CALL", mark) && !is_session(pid))
        .collect();
    let left = reaper::wait_gone(&helpers, Duration::from_secs(10));
    assert!(left.is_empty(), "what a killed engine has left does not end: {left:?}");
}

/// Checks what a restore has to have done: the same pid again, below us.
pub fn adopt(program: &Program, images: &Path, outcome: Outcome) -> Restored {
    let outcome = outcome.expect_success();
    let text = fs::read_to_string(images.join("pid")).unwrap_or_else(|error| panic!("the pid file: {error}"));
    let pid: i32 = text.trim().parse().unwrap_or_else(|error| panic!("the pid file says {text:?}: {error}"));
    assert_eq!(pid, program.pid(), "restored under another pid\n{}", outcome.report());
    assert!(proc::exists(pid), "restored, but pid {pid} is not there\n{}", outcome.report());
    let me = std::process::id().to_string();
    assert_eq!(proc::status(pid).get("PPid"), Some(&me), "detached, but not below the next subreaper");
    Restored { outcome, pid }
}
