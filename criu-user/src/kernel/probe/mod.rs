//! Questions to the running kernel. Each is answered by doing the thing in question, never by the kernel's version, and
//! leaves nothing behind: what would change this process, or could go wrong, happens in a child that ends with it.
//!
//! What the answers mean for a dump is `check`'s to say.

pub mod cgroup;
pub mod ebpf;
pub mod files;
pub(super) mod helper;
pub mod memory;
pub mod mount;
mod netlink;
pub mod network;
pub mod privilege;
pub mod process;
pub mod socket;
pub mod trace;
pub mod uffd;

use std::fs::File;
use std::io::{Read, Write};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe2};

use super::SysError;
use super::ebpf::EbpfError;
use super::error::During;

/// What a probe finds: something worth telling about what is there, or why it is not.
pub type Answer = Result<String, Absent>;

/// Something is not to be had here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Absent {
    /// The reason, for a reader: mostly what the kernel said.
    pub why: String,
}

impl Absent {
    /// Absent for this reason.
    pub fn because(why: impl Into<String>) -> Self {
        Self { why: why.into() }
    }
}

impl From<SysError> for Absent {
    fn from(error: SysError) -> Self {
        Self::because(error.to_string())
    }
}

impl From<EbpfError> for Absent {
    fn from(error: EbpfError) -> Self {
        // What the verifier says further on fills screens.
        Self::because(error.to_string().lines().next().unwrap_or_default())
    }
}

/// Present, if the kernel has done more than to take the call.
fn ensure(works: bool, otherwise: &str) -> Result<(), Absent> {
    if works { Ok(()) } else { Err(Absent::because(otherwise)) }
}

/// Seconds after which a child that hangs is ended.
const LIMIT: u32 = 5;

/// Asks in a child, which is gone afterwards with all that it had.
fn apart(question: impl FnOnce() -> Answer) -> Answer {
    let (from, to) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).during("pipe2", "a probe")?;
    // SAFETY: the engine has one thread, so the child is a whole copy; it leaves by _exit.
    match unsafe { fork() }.during("fork", "a probe")? {
        ForkResult::Child => {
            drop(from);
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            nix::unistd::alarm::set(LIMIT);
            let (mark, text) = match question() {
                Ok(text) => (1, text),
                Err(absent) => (0, absent.why),
            };
            let _ = File::from(to).write_all(&[&[mark], text.as_bytes()].concat());
            // SAFETY: ends this process alone, without running what the parent would run at its end.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(to);
            let mut message = Vec::new();
            let read = File::from(from).read_to_end(&mut message).during("read", "a probe");
            let status = waitpid(child, None).during("waitpid", child)?;
            read?;
            match message.split_first() {
                Some((1, text)) => Ok(String::from_utf8_lossy(text).into_owned()),
                Some((_, text)) => Err(Absent::because(String::from_utf8_lossy(text))),
                None => Err(Absent::because(format!("the attempt ended its process: {status:?}"))),
            }
        }
    }
}

/// Asks in a child that has further namespaces of its own.
fn apart_in(namespaces: CloneFlags, question: impl FnOnce() -> Answer) -> Answer {
    apart(|| {
        // nix knows no name for the youngest of them.
        let time = namespaces.bits() == libc::CLONE_NEWTIME;
        let name = if time { "CLONE_NEWTIME".to_owned() } else { format!("{namespaces:?}") };
        unshare(namespaces).during("unshare", name)?;
        question()
    })
}
