//! Dumps and pre-dumps that are asked for on the screen: the commands that the user would type elsewhere.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;

use nix::unistd::Pid;
use tokio::process::{Child, Command};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The tree runs on.
    PreDump,
    /// The tree is killed.
    Dump,
}

/// Runs one of them at a time, each building on the one before.
pub(super) struct Dumper {
    root: Pid,
    dir: Option<PathBuf>,
    options: Vec<OsString>,
    /// Images of the last one that went well.
    parent: Option<PathBuf>,
    running: Option<(Child, Wanted, PathBuf)>,
}

impl Dumper {
    pub(super) fn new(root: Pid, dir: Option<PathBuf>, options: Vec<OsString>) -> Self {
        Self { root, dir, options, parent: None, running: None }
    }

    /// Where the next images go: a directory that is not there yet.
    fn next_dir(&self) -> std::io::Result<PathBuf> {
        let base = match &self.dir {
            Some(dir) => dir.clone(),
            None => std::env::current_dir()?,
        };
        let name = |n| base.join(format!("track-{}-{n}", self.root));
        std::fs::create_dir_all(&base)?;
        let free = (1u32..).map(name).find(|dir| !dir.exists());
        free.ok_or_else(|| std::io::ErrorKind::AlreadyExists.into())
    }

    /// Starts one. Gives what is to be shown.
    pub(super) fn start(&mut self, wanted: Wanted) -> String {
        if self.running.is_some() {
            return "one is being made; wait for its end".to_owned();
        }
        match self.spawn(wanted) {
            Ok(dir) => format!("writing {} …", dir.display()),
            Err(err) => format!("cannot be started: {err}"),
        }
    }

    fn spawn(&mut self, wanted: Wanted) -> std::io::Result<PathBuf> {
        let dir = std::path::absolute(self.next_dir()?)?;
        let mut command = Command::new("/proc/self/exe");
        let verb = if wanted == Wanted::Dump { "dump" } else { "pre-dump" };
        command.arg(verb).arg("-t").arg(self.root.to_string()).arg("-D").arg(&dir).args(["-o", "dump.log"]);
        command.arg("--track-mem");
        if let Some(parent) = &self.parent {
            command.arg("--prev-images-dir").arg(parent);
        }
        command.args(&self.options).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.running = Some((command.spawn()?, wanted, dir.clone()));
        Ok(dir)
    }

    /// Waits for the end of the one that runs, for ever if none does. Gives what is to be shown. Nothing is lost if the
    /// caller stops waiting.
    pub(super) async fn finished(&mut self) -> String {
        let Some((child, ..)) = &mut self.running else { return std::future::pending().await };
        let status = child.wait().await;
        let Some((child, _, dir)) = self.running.take() else { return String::new() };
        let said = child.wait_with_output().await.map(|output| {
            let text = if output.stderr.is_empty() { output.stdout } else { output.stderr };
            String::from_utf8_lossy(&text).trim().replace('\n', "; ")
        });
        let said = said.unwrap_or_else(|err| err.to_string());
        if status.is_ok_and(|status| status.success()) {
            let text = format!("{}: {said}", dir.display());
            self.parent = Some(dir);
            text
        } else {
            said
        }
    }
}
