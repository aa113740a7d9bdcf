//! What can go wrong between the command line and the engine.

use std::io;
use std::path::PathBuf;

use crate::dump::DumpError;
use crate::image::ImageError;
use crate::kernel::SysError;
use crate::kernel::gate::GateError;
use crate::metrics::textfile::TextfileError;
use crate::object::ObjectError;
use crate::predump::PreDumpError;
use crate::restore::RestoreError;
use crate::rounds::RoundsError;
use crate::track::TrackError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// A dump failed.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// A restore failed.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A pre-dump failed.
    #[error(transparent)]
    PreDump(#[from] PreDumpError),
    /// Rounds of pre-dumps did not bring what was wanted.
    #[error(transparent)]
    Rounds(#[from] RoundsError),
    /// No directory.
    #[error("the directory {path} cannot be made: {source}", path = path.display())]
    WorkDirMake {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Tracking failed.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// There are no images.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An object cannot be looked at.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The gates cannot be seen to.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// There is no file of metrics.
    #[error(transparent)]
    Textfile(#[from] TextfileError),
    /// No such gate.
    #[error("there is no gate {name}; `criu-ebpf gate list` shows which there are")]
    UnknownGate {
        /// What was asked for.
        name: String,
    },
    /// No log.
    #[error("the log {path} cannot be written: {source}; see that its directory (--work-dir, else --images-dir) exists and is yours", path = path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nowhere to put what is not an image.
    #[error("the work directory {path} is no directory; make it, or name another with --work-dir", path = path.display())]
    WorkDir {
        /// The directory.
        path: PathBuf,
    },
    /// No such script.
    #[error("the action script {path} cannot be run: {what}", path = path.display())]
    Script {
        /// The script.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The pid file would be overwritten.
    #[error("the pid file {path} exists already; remove it, or name another with --pidfile", path = path.display())]
    PidFileExists {
        /// The file.
        path: PathBuf,
    },
    /// The descriptor to report to is none.
    #[error("--status-fd {fd}: {source}")]
    StatusFd {
        /// Its number.
        fd: i32,
        /// Why.
        source: SysError,
    },
    /// The program that was to attend to the tree cannot.
    #[error("the tree runs as pid {pid}, but {command:?} cannot be executed: {source}")]
    Exec {
        /// The root of the tree.
        pid: i32,
        /// The program.
        command: std::ffi::OsString,
        /// Why.
        source: io::Error,
    },
    /// Completions or manual pages could not be written.
    #[error("{path} cannot be written: {source}", path = path.display())]
    Documents {
        /// Where to.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something cannot be said as JSON.
    #[error("JSON: {0}")]
    Json(#[from] serde_json::Error),
}
