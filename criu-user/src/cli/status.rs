//! What other programs are told of how a command went: `--status-fd` and `--pidfile`.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::unistd::{Pid, close};

use super::error::CliError;
use crate::kernel;

/// A descriptor of the caller's to which a zero byte goes at success.
#[derive(Debug)]
pub(super) struct StatusFd(OwnedFd);

impl StatusFd {
    /// Takes it over: nobody that we start shall hold it open.
    pub fn take(number: Option<i32>) -> Result<Option<Self>, CliError> {
        let Some(fd) = number else { return Ok(None) };
        let taken = kernel::fd::inherited(fd).map_err(|source| CliError::StatusFd { fd, source })?;
        // Standard streams are still needed, and closed with us.
        if fd > 2 {
            let _ = close(fd);
        }
        Ok(Some(Self(taken)))
    }

    /// Says that all went well. Whoever asked may have gone meanwhile.
    pub fn report(self) {
        if let Err(err) = nix::unistd::write(&self.0, &[0]) {
            tracing::warn!(%err, "nobody reads from --status-fd");
        }
    }
}

/// A file that will hold the pid of the tree's root. An earlier one is somebody else's and is not written over.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
}

impl PidFile {
    /// Sees that it is not there yet.
    pub fn new(path: PathBuf) -> Result<Self, CliError> {
        if path.symlink_metadata().is_ok() {
            return Err(CliError::PidFileExists { path });
        }
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes it.
    pub fn write(&self, pid: Pid) -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&self.path)?;
        file.write_all(pid.to_string().as_bytes())
    }

    /// Takes it back: the tree does not come to be.
    pub fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
