//! The one observer of a command: runs the action scripts, writes the pid file in time, and shows progress.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::unistd::Pid;

use super::progress::Progress;
use super::scripts::Scripts;
use super::status::PidFile;
use crate::observer::{Moment, Observer};

/// Who watches.
#[derive(Debug)]
pub(super) struct Watcher {
    scripts: Scripts,
    progress: Progress,
    pid_file: Option<PidFile>,
    wrote_pid: AtomicBool,
}

/// The pid file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("the pid file {path} cannot be written: {source}")]
struct PidFileError {
    path: String,
    source: std::io::Error,
}

impl Watcher {
    /// One with these duties.
    pub fn new(scripts: Scripts, progress: Progress, pid_file: Option<PidFile>) -> Self {
        Self { scripts, progress, pid_file, wrote_pid: AtomicBool::new(false) }
    }

    /// All went well.
    pub fn finish(&self) {
        self.progress.finish();
    }

    /// Nothing has come of it.
    pub fn give_up(&self) {
        self.progress.give_up();
        if let Some(file) = self.pid_file.as_ref().filter(|_| self.wrote_pid.load(Ordering::Relaxed)) {
            file.remove();
        }
    }

    fn write_pid(&self, root: Pid) -> Result<(), PidFileError> {
        if let Some(file) = &self.pid_file {
            file.write(root).map_err(|source| PidFileError { path: file.path().display().to_string(), source })?;
            self.wrote_pid.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Observer for Watcher {
    fn reached(&self, moment: Moment, root: Option<Pid>) -> Result<(), Box<dyn Error + Send + Sync>> {
        if let (Moment::PostRestore, Some(root)) = (moment, root) {
            self.write_pid(root)?;
        }
        Ok(self.scripts.run(moment, root)?)
    }

    fn acts_after_dump(&self) -> bool {
        !self.scripts.is_empty()
    }

    fn counts_memory(&self) -> bool {
        self.progress.is_shown()
    }

    fn expects(&self, bytes: u64) {
        self.progress.expect(bytes);
    }

    fn moved(&self, bytes: u64) {
        self.progress.advance(bytes);
    }
}
