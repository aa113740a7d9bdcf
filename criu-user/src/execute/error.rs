//! What can go wrong while a plan is carried out.

use crate::agent::AgentError;
use crate::kernel::SysError;
use crate::object::ObjectError;
use crate::observer::Objection;

/// Why a plan could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// A call of the engine failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The crew failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// An object failed.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// Somebody does not let it go on.
    #[error(transparent)]
    Objection(#[from] Objection),
    /// A file could not be opened.
    #[error("{what}: {source}")]
    Open {
        /// The file.
        what: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The engine could not do its part.
    #[error("{what}: {source}")]
    Deed {
        /// Its part.
        what: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Connections stay held.
    #[error(
        "{source}; the connections of the tree are still held: restore again, or give them up with `criu-ebpf gate clear {gate}`"
    )]
    Locked {
        /// The gate.
        gate: String,
        /// Why the restore failed.
        source: Box<ExecuteError>,
    },
    /// A task's call failed.
    #[error("tid {tid}: {call} = {result} while restoring: {why}")]
    Call {
        /// The task.
        tid: i32,
        /// The call with its arguments.
        call: String,
        /// What it gave.
        result: String,
        /// Why it was made.
        why: String,
    },
    /// The pid is taken.
    #[error("pid {pid} is in use by {comm}; end that process, or restore in a pid namespace of its own")]
    PidTaken {
        /// The pid.
        pid: i32,
        /// Who has it.
        comm: String,
    },
    /// The pid is still taken.
    #[error("pid {pid} is in use by {comm}, which has ended, but its parent {parent} has not taken note of it yet")]
    PidOfZombie {
        /// The pid.
        pid: i32,
        /// Who should wait(2) for it.
        parent: i32,
        /// Who had it.
        comm: String,
    },
    /// No hole in the address space.
    #[error("no {needed} bytes of address space are free in all processes of the dump")]
    NoHole {
        /// Bytes needed.
        needed: u64,
    },
    /// This kernel's vDSO is another.
    #[error("the vDSO of pid {pid} differs from this kernel's ({what}); restore on the kernel of the dump")]
    OtherVdso {
        /// The process.
        pid: i32,
        /// How.
        what: String,
    },
}
