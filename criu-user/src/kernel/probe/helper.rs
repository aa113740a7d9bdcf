//! A process to try things on: it does nothing, and is gone when its owner is.

use std::fs::File;
use std::io::{Read, Write};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use crate::kernel::error::During;
use crate::kernel::ptrace::{self, Stop};
use crate::kernel::{SysError, SysResult};

/// A copy of this process that sleeps. Dropping it kills and reaps it.
#[derive(Debug)]
pub(in crate::kernel) struct Helper {
    pid: Pid,
}

impl Helper {
    /// Starts one, which first does `prepare`.
    pub(in crate::kernel) fn start(prepare: impl FnOnce() -> Result<(), Errno>) -> SysResult<Self> {
        let (from, to) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).during("pipe2", "a helper")?;
        // SAFETY: the engine has one thread, so the child is a whole copy; it leaves by _exit or is killed.
        match unsafe { fork() }.during("fork", "a helper")? {
            ForkResult::Child => {
                drop(from);
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                let errno = prepare().err().map_or(0, |errno| errno as i32);
                let _ = File::from(to).write_all(&errno.to_le_bytes());
                loop {
                    nix::unistd::pause();
                }
            }
            ForkResult::Parent { child } => {
                drop(to);
                let helper = Self { pid: child };
                let mut errno = [0; 4];
                File::from(from).read_exact(&mut errno).during("read", "a helper")?;
                match i32::from_le_bytes(errno) {
                    0 => Ok(helper),
                    errno => Err(SysError::new("preparation", "a helper", Errno::from_raw(errno))),
                }
            }
        }
    }

    pub(in crate::kernel) fn pid(&self) -> Pid {
        self.pid
    }

    /// Starts one and stops it by ptrace, with these options. It stays a tracee until it is dropped.
    pub(in crate::kernel) fn traced(options: i32, prepare: impl FnOnce() -> Result<(), Errno>) -> SysResult<Self> {
        let helper = Self::start(prepare)?;
        ptrace::seize(helper.pid, options)?;
        ptrace::interrupt(helper.pid)?;
        loop {
            match ptrace::wait(helper.pid)? {
                Stop::Interrupt => return Ok(helper),
                Stop::Exited => return Err(SysError::new("ptrace", "a helper", Errno::ESRCH)),
                _ => ptrace::cont(helper.pid, 0)?,
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        while let Ok(status) = waitpid(self.pid, Some(WaitPidFlag::__WALL)) {
            if matches!(status, nix::sys::wait::WaitStatus::Exited(..) | nix::sys::wait::WaitStatus::Signaled(..)) {
                break;
            }
        }
    }
}
