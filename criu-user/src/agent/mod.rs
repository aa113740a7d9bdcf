//! The agent: a loop of system calls that runs inside another process.
//!
//! What a process must do to itself is always a system call, so nothing but calls is ever sent there: arrays of
//! `{nr, args, flags, ret}` in memory shared with the engine. The same loop serves a dump, where it is a guest that has
//! to lead home by itself ([`Guest`]), and a restore, where it is all that a process consists of at first ([`Crew`]).

pub mod alone;
pub mod batch;
mod beside;
pub mod code;
pub mod copy;
pub mod crew;
pub mod guest;
pub mod slack;

pub use batch::{Arg, Batch, CallId, Outcome, Room};
pub use beside::Beside;
pub use copy::{Aside, Copied};
pub use crew::{Crew, Member};
pub use guest::Guest;

use crate::kernel::SysError;

/// What can go wrong while calls are made inside another process.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A call of our own failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// There is no room for the code.
    #[error("pid {pid}: no mapping has {needed} spare bytes of executable memory to run the agent in")]
    NoSlack {
        /// The process.
        pid: i32,
        /// Bytes that the code needs.
        needed: usize,
    },
    /// The target could not give the agent what it needs.
    #[error(
        "pid {pid}: the target cannot open three more descriptors and map {area} bytes ({}); raise its RLIMIT_NOFILE \
         or RLIMIT_AS",
        errno.desc()
    )]
    NoRoom {
        /// The process.
        pid: i32,
        /// Size of the shared area.
        area: usize,
        /// Why.
        errno: nix::errno::Errno,
    },
    /// The process could not be copied.
    #[error("pid {pid}: no copy of the process can be made ({})", errno.desc())]
    NoCopy {
        /// The process.
        pid: i32,
        /// Why.
        errno: nix::errno::Errno,
    },
    /// The process ended while the agent was in it.
    #[error("pid {pid} ended while the engine worked in it")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// The thread did something that it cannot do by itself.
    #[error("tid {tid}: unexpected stop {stop} while the agent ran")]
    Strayed {
        /// The thread.
        tid: i32,
        /// What it reported.
        stop: String,
    },
    /// The batch is larger than the shared area.
    #[error("a batch of {needed} bytes does not fit into an area of {room}")]
    TooLarge {
        /// Bytes it needs.
        needed: usize,
        /// Bytes there are.
        room: usize,
    },
}
