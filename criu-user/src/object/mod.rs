//! One file per kind of kernel object. What is read of it at dump and what rebuilds it at restore stand together.
//!
//! Kinds that sit behind descriptors are entered in [`KINDS`]; the others belong to tasks and are called by the
//! pipelines one after the other.

pub mod apart;
pub mod cgroup;
pub mod clocks;
pub mod creds;
pub mod epoll;
pub mod eventfd;
pub mod facts;
pub mod fifo;
pub mod file;
pub mod fresh;
pub mod fs;
pub mod ghost;
pub mod hugetlb;
pub mod inet;
pub mod inet_ahead;
pub mod inotify;
pub mod locks;
pub mod memfd;
pub mod memory;
pub mod multicast;
pub mod netlink;
pub mod outside;
pub mod packet;
pub mod pipe;
pub mod raw;
pub mod regfile;
pub mod registers;
pub mod seccomp;
pub mod seen;
pub mod shmem;
pub mod signalfd;
pub mod signals;
pub mod sockopt;
pub mod sysv;
pub mod task;
pub mod tcp;
pub mod timerfd;
pub mod timers;
pub mod tree;
pub mod tty;
pub mod udp;
pub mod unix;
pub mod unsupported;
pub mod waits;

use crate::agent::AgentError;
use crate::image::{ImageError, room};
use crate::kernel::SysError;

/// The kinds of open file description. The first whose `is` holds takes a description.
pub const KINDS: &[&dyn file::FileKind] = &[
    // Pipes come before files with a path: some have one.
    &pipe::Pipe,
    &fifo::Fifo,
    &memfd::Memfd,
    // Files with a path.
    &regfile::RegFile,
    // Anonymous inodes.
    &eventfd::EventFd,
    &epoll::Epoll,
    &signalfd::SignalFd,
    &timerfd::TimerFd,
    &inotify::Inotify,
    // Sockets.
    &unix::Unix,
    &inet::Inet,
    &netlink::Netlink,
    &packet::Packet,
    // Terminals.
    &tty::Tty,
];

/// Why an object could not be read or planned.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A call inside the target failed.
    #[error("pid {pid}: {call} inside the process while reading {what}: {}", errno.desc())]
    Inside {
        /// The process.
        pid: i32,
        /// The call.
        call: &'static str,
        /// What was to be read.
        what: &'static str,
        /// Why it failed.
        errno: nix::errno::Errno,
    },
    /// A process could not write its memory.
    #[error("the memory of pid {pid} cannot be written to {}: {}{}", file.display(), errno.desc(), room(*errno))]
    Memory {
        /// The process.
        pid: i32,
        /// Where to.
        file: std::path::PathBuf,
        /// Why it failed.
        errno: nix::errno::Errno,
    },
    /// The copy that was to write the memory of a process is no more.
    #[error(
        "the copy of pid {pid} that wrote its memory has ended early: it was killed, or memory ran out; the program itself runs on. Dump it again, or without --live"
    )]
    CopyGone {
        /// The process.
        pid: i32,
    },
    /// The agent failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// An image could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Connections cannot be held.
    #[error(transparent)]
    Lock(#[from] tcp::lock::LockError),
    /// A connection could not be read.
    #[error("pid {pid}, fd {fd}: the TCP connection {ends} cannot be read: {why}")]
    Connection {
        /// The process.
        pid: i32,
        /// Its descriptor.
        fd: i32,
        /// Its ends.
        ends: tcp::Ends,
        /// Why.
        why: String,
    },
    /// Clients that nobody has accepted could not be read.
    #[error(
        "pid {pid}, fd {fd}: the TCP clients that wait to be accepted cannot be read: {why}; --skip-in-flight drops them"
    )]
    Clients {
        /// The process with the listening socket.
        pid: i32,
        /// Its descriptor.
        fd: i32,
        /// Why.
        why: String,
    },
    /// What was asked before the freeze is otherwise in it.
    #[error(
        "pid {pid}, fd {fd}: what the socket told before the freeze is wrong: it told {kept}, and tells {read}; \
         this is an error of criu-ebpf, please report it; --survey proc asks in the freeze only"
    )]
    Stale {
        /// The process.
        pid: i32,
        /// Its descriptor.
        fd: i32,
        /// What was told.
        kept: String,
        /// What is told in the freeze.
        read: String,
    },
    /// The gate could not be made permanent.
    #[error("the tree runs on, because its connections cannot be held behind it: {why}")]
    Unpinned {
        /// Why.
        why: String,
    },
    /// Images that do not fit together.
    #[error("the images contradict each other: {what}")]
    Contradiction {
        /// How.
        what: String,
    },
    /// What the dump holds is not supported by this restore.
    #[error("cannot restore {what}: {advice}")]
    Unsupported {
        /// The object.
        what: String,
        /// What to do.
        advice: &'static str,
    },
}

impl ObjectError {
    /// Images that do not fit together.
    pub fn contradiction(what: impl Into<String>) -> Self {
        Self::Contradiction { what: what.into() }
    }

    /// An entry of files.img without the part that its type announces.
    pub fn empty(entry: &crate::image::proto::FileEntry) -> Self {
        Self::contradiction(format!("file {} of type {} is empty", entry.id, entry.r#type().as_str_name()))
    }
}

/// Something that cannot be dumped: what, where, and what the user can do.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Refusal {
    /// The process.
    pub pid: i32,
    /// Its descriptor, where it is one.
    pub fd: Option<i32>,
    /// The object.
    pub what: String,
    /// What can be done.
    pub advice: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {}", self.pid)?;
        if let Some(fd) = self.fd {
            write!(f, ", fd {fd}")?;
        }
        write!(f, ": {}; {}", self.what, self.advice)
    }
}
