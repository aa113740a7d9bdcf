//! How far a generation can be believed: docs/tracking.md has the reasons.

use criu_common::watch::Kind;

/// What an unchanged generation says of a kind of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// That the state is as it was, but for what is named in docs/tracking.md.
    Whole,
    /// Only which objects there are, not how they are: descriptors without offsets, timers without what is left.
    Existence,
    /// Nothing: others change it, or the kernel does. To be read in every freeze.
    Nothing,
}

/// How far an unchanged generation of a kind can be believed.
pub fn trust(kind: Kind) -> Trust {
    match kind {
        // Of actions, those without SA_RESETHAND; of the memory map, together with its sequence number.
        Kind::Memory | Kind::Actions | Kind::Credentials | Kind::Seccomp | Kind::Namespaces => Trust::Whole,
        Kind::Descriptors | Kind::Timers | Kind::Directories | Kind::Threads | Kind::Children => Trust::Existence,
        Kind::Settings
        | Kind::Masks
        | Kind::Limits
        | Kind::Scheduling
        | Kind::Sessions
        | Kind::Sockets
        | Kind::Files
        | Kind::Locks
        | Kind::Watches
        | Kind::Ipc
        | Kind::Mounts
        | Kind::Asynchronous => Trust::Nothing,
    }
}
