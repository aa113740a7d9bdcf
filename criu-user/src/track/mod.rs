//! Tracking: what a tree of processes does before it is dumped. docs/tracking.md tells how it works and what it costs.
//!
//! A *session* ([`session`]) is one process that watches one tree. It knows which pages of it were written since the last
//! image ([`memory`], [`tree`]), hears from eBPF programs what happens meanwhile ([`witness`]), and tells whoever asks at its control socket ([`wire`], [`client`]).

pub mod client;
mod copying;
pub mod export;
mod install;
mod measures;
pub mod memory;
pub mod method;
pub mod predict;
mod recorder;
pub mod refusals;
pub mod report;
pub mod session;
mod told;
pub mod tree;
pub mod wire;
pub mod witness;

use crate::agent::AgentError;
use crate::freeze::FreezeError;
use crate::kernel::SysError;
use crate::metrics::address::Address;
use crate::metrics::textfile::TextfileError;
use std::path::PathBuf;

/// Why tracking failed. The tree goes on as if nothing had happened.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// No such process.
    #[error("there is no process {pid} to track; see that the number is right and that it has not ended")]
    NoProcess {
        /// What was asked for.
        pid: i32,
    },
    /// A process could not be stopped for a moment.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// The agent could not be brought in.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The control socket cannot be made or reached.
    #[error("the control socket {path}: {source}", path = path.display())]
    Socket {
        /// Where it is.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// There is a session already.
    #[error("process {pid} is tracked already: somebody else's session has just begun; try again to join it")]
    Tracked {
        /// The root of the tree.
        pid: i32,
    },
    /// The kernel does not do what was asked for.
    #[error(
        "this kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY); track memory with --track-mem=uffd, or leave the choice to --track-mem=auto"
    )]
    NoSoftDirty,
    /// A session tracks in another way than is wanted.
    #[error(
        "process {pid} is tracked already, but not by what --track-mem says; end that with `criu-ebpf track --stop {pid}` first"
    )]
    OtherMethod {
        /// The root of the tree.
        pid: i32,
    },
    /// Nobody tracks this tree.
    #[error("process {pid} is not tracked; `criu-ebpf track {pid} -d` starts that, and `track --list` shows who is")]
    NoSession {
        /// The root of the tree.
        pid: i32,
    },
    /// The other side does not keep to the protocol: another version, mostly.
    #[error(
        "the session of process {pid} does not answer as expected ({what}); end it with `criu-ebpf track --stop {pid}` and start it again"
    )]
    Protocol {
        /// The root of the tree.
        pid: i32,
        /// What is wrong.
        what: String,
    },
    /// Nothing to track in a control group.
    #[error("there is no process in the control group {path}; give its directory below /sys/fs/cgroup", path = path.display())]
    EmptyGroup {
        /// Its directory.
        path: PathBuf,
    },
    /// More than one tree, where there can be one.
    #[error(
        "metrics are of one tree, and there are several in the control group {path}, with the roots {roots:?}; track each by its pid, with metrics at a place of its own",
        path = path.display()
    )]
    SeveralTrees {
        /// The group's directory.
        path: PathBuf,
        /// The roots.
        roots: Vec<i32>,
    },
    /// A control group cannot be followed.
    #[error("the control group {path} cannot be followed: {source}", path = path.display())]
    Group {
        /// Its directory.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The session was started and ended at once.
    #[error("the session of process {pid} did not start: {what}")]
    NotStarted {
        /// The root of the tree.
        pid: i32,
        /// What it said.
        what: String,
    },
    /// Metrics cannot be served.
    #[error("metrics cannot be served at {address}: {source}; name another address with --metrics")]
    Metrics {
        /// Where.
        address: Address,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// There is no file of metrics.
    #[error(transparent)]
    Textfile(#[from] TextfileError),
    /// A session that runs has the options that it was started with.
    #[error(
        "process {pid} is tracked already, by a session that {option} cannot be said to any more; end it with `criu-ebpf track --stop {pid}` first"
    )]
    AlreadyTracked {
        /// The root of the tree.
        pid: i32,
        /// What was asked for.
        option: &'static str,
    },
}

impl TrackError {
    /// Whether nobody answered in time.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Socket { source, .. }
            if matches!(source.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
    }
}
