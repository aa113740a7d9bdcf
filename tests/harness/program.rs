//! A running program under test: its processes, its directory, and what it says.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::sys::wait::WaitStatus;
use tempfile::TempDir;

use crate::{
    Workload,
    claim::Claimed,
    proc,
    reaper::{self, POLL},
};

/// How long a program may take to get ready, to check itself, or to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The variable that tells a program its directory, and by which its stray processes are found again.
const DIR_VARIABLE: &str = "E2E_DIR";

/// A program under test. It is killed, with everything below it, when this is dropped.
#[derive(Debug)]
pub struct Program {
    name: String,
    pid: i32,
    /// How often it was told to go on.
    steps: u32,
    dir: PathBuf,
    /// The same directory, where it goes with this program.
    owned_dir: Option<TempDir>,
    /// What it has that there is one of for all.
    _claims: Vec<Claimed>,
}

impl Program {
    /// Starts a workload as the leader of a new session, in a directory of its own, with its output in a file there.
    pub fn start(workload: &Workload) -> Self {
        Self::start_with(workload, "setsid", |command, dir| {
            let out = File::create(dir.join("out")).expect("creating the output file");
            let err = out.try_clone().expect("duplicating a descriptor");
            command.stdin(Stdio::null()).stdout(out).stderr(err);
        })
    }

    /// The same with standard streams of the caller's choice. `setsid` is the command that makes the session: `setsid
    /// -c` also makes the terminal at its standard input the controlling one.
    #[expect(clippy::zombie_processes, reason = "reaped by its pid, as what a restore makes of it is")]
    pub fn start_with(workload: &Workload, setsid: &str, streams: impl FnOnce(&mut Command, &Path)) -> Self {
        reaper::become_subreaper();
        // What the test runner was started with is none of the program's: somebody outside holds the other end.
        close_fds::set_fds_cloexec(3, &[]);
        let claims = workload.claims.iter().map(|claim| claim.take()).collect();
        let dir = TempDir::with_prefix("e2e-").expect("creating a directory");
        let mut words = setsid.split_whitespace();
        let mut command = Command::new(words.next().expect("a command"));
        // A test runner in the background of a shell without job control ignores these, and whoever it starts would as well.
        command.args(words).args(["env", "--default-signal=INT,QUIT"]);
        command.args(&workload.command).current_dir(dir.path());
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env(DIR_VARIABLE, dir.path()).env("PYTHONDONTWRITEBYTECODE", "1");
        command.envs(workload.environment.iter().map(|(name, value)| (name, value)));
        streams(&mut command, dir.path());
        let child = command.spawn().unwrap_or_else(|error| panic!("starting {}: {error}", workload.name));
        let pid = i32::try_from(child.id()).expect("a pid");
        let program = Self {
            name: workload.name.clone(),
            pid,
            steps: 0,
            dir: dir.path().to_owned(),
            owned_dir: Some(dir),
            _claims: claims,
        };
        if workload.speaks {
            program.wait_for_word("ready 1");
        }
        program
    }

    /// A process below this one as a program of its own, in the same directory: the job of a shell.
    pub fn part(&self, pid: i32) -> Self {
        let name = format!("{} (part {pid})", self.name);
        Self { name, pid, steps: 0, dir: self.dir.clone(), owned_dir: None, _claims: Vec::new() }
    }

    /// The pid of its first process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its directory: its working directory, its output and log, and the images.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file in its directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// All its processes.
    pub fn tree(&self) -> BTreeSet<i32> {
        proc::tree(self.pid)
    }

    /// Lets it go on to its next step: the rest of its checks, or the next state to dump.
    pub fn go(&mut self) {
        self.steps += 1;
        let name = self.file(&format!("go.{}", self.steps));
        File::create(&name).unwrap_or_else(|error| panic!("creating {}: {error}", name.display()));
    }

    /// Lets it go on, and waits until it is ready for the next dump.
    pub fn next(&mut self) {
        self.go();
        self.wait_for_word(&format!("ready {}", self.steps + 1));
    }

    /// Lets it check itself and end; fails unless it finds everything in order and exits with 0.
    pub fn finish(&mut self) {
        self.go();
        self.wait_for_word("ok");
        let status = self.wait_exit();
        assert!(matches!(status, WaitStatus::Exited(_, 0)), "{}: {status:?} instead of an exit with 0", self.name);
    }

    /// Waits until its first process ends, and reaps it.
    pub fn wait_exit(&self) -> WaitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = reaper::try_reap(self.pid) {
                return status;
            }
            assert!(Instant::now() < end, "{} (pid {}) does not end\n{}", self.name, self.pid, self.story());
            sleep(POLL);
        }
    }

    /// Waits until a line of its log is `word`; a line that says FAIL, or its death, fails the test.
    pub fn wait_for_word(&self, word: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            let dead = self.is_dead();
            let log = self.log();
            if log.lines().any(|line| line == word) && !self.has_log_open() {
                return;
            }
            if let Some(line) = log.lines().find(|line| line.starts_with("FAIL")) {
                panic!("{}: {line}\n{}", self.name, self.story());
            }
            assert!(!dead, "{} died before it said {word:?}\n{}", self.name, self.story());
            assert!(Instant::now() < end, "{} does not say {word:?}\n{}", self.name, self.story());
            sleep(POLL);
        }
    }

    /// Waits for a line of its log, where somebody else sees to its end.
    pub fn wait_for_log_line(&self, word: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.log().lines().any(|line| line == word) {
            assert!(Instant::now() < end, "{} does not say {word:?}\n{}", self.name, self.story());
            sleep(POLL);
        }
    }

    /// Whether its first process has ended, with all its threads (the first thread alone may have).
    fn is_dead(&self) -> bool {
        proc::stat(self.pid).is_none_or(|(state, _)| state == 'Z') && proc::threads(self.pid).len() <= 1
    }

    /// Whether it is still in the middle of writing to its log: that descriptor is none of what a test looks at.
    fn has_log_open(&self) -> bool {
        let log = self.file("log");
        self.tree().iter().any(|&pid| proc::descriptors(pid).values().any(|path| *path == log))
    }

    /// What it wrote into its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    /// All that it wrote, for the report of a failure.
    fn story(&self) -> String {
        let out = fs::read(self.file("out")).unwrap_or_default();
        format!("log: {}\noutput: {}", self.log().trim(), String::from_utf8_lossy(&out).trim())
    }

    /// Waits until every one of `tree` is gone, as after a dump that kills.
    ///
    /// What was started and killed between the look at the tree and its freeze is reaped as well: even a zombie keeps
    /// the number of its group and session taken.
    pub fn expect_gone(&self, tree: &BTreeSet<i32>) {
        let mut left = reaper::wait_gone(tree, Duration::from_secs(10));
        let me = i32::try_from(std::process::id()).expect("a pid");
        let of_tree = |&pid: &i32| {
            proc::stat(pid).is_some_and(|(state, numbers)| {
                let number = |index: usize| numbers.get(index).and_then(|&number| i32::try_from(number).ok());
                state == 'Z' && [1, 2].iter().any(|&index| number(index).is_some_and(|pid| tree.contains(&pid)))
            })
        };
        let strays = proc::children(me).into_iter().filter(of_tree).collect();
        left.extend(reaper::wait_gone(&strays, Duration::from_secs(10)));
        assert!(left.is_empty(), "{}: still there after the dump: {left:?}", self.name);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        reaper::kill_trees([self.pid]);
        let Some(dir) = self.owned_dir.take() else { return };
        // What lost its parents on the way is now a child of ours, known by the directory in its environment.
        let marker = dir.path().to_string_lossy().into_owned();
        let me = i32::try_from(std::process::id()).expect("a pid");
        let strays = proc::children(me).into_iter().filter(|&pid| proc::has_environment(pid, DIR_VARIABLE, &marker));
        reaper::kill_trees(strays);
        if std::thread::panicking() && std::env::var_os("E2E_KEEP").is_some() {
            eprintln!("{}: kept {}", self.name, dir.keep().display());
        }
    }
}
