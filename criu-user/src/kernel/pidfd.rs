//! Pid file descriptors: a process held by a descriptor cannot be mistaken for another that got its number.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

use super::{SysError, SysResult, sys};

/// A process that stays identified for as long as this lives. pidfd_open(2).
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    pid: Pid,
}

impl PidFd {
    /// Opens process `pid` (a thread-group leader).
    pub fn open(pid: Pid) -> SysResult<Self> {
        Self::open_with(pid, 0)
    }

    /// Opens the process of thread `tid`, whose first thread has ended: PIDFD_THREAD, Linux 6.9.
    pub fn open_by_thread(tid: Pid) -> SysResult<Self> {
        Self::open_with(tid, libc::O_EXCL).map_err(|err| match err.errno {
            Errno::EINVAL => {
                SysError::new("pidfd_open", format!("a thread of {tid}, whose first has ended (Linux 6.9)"), err.errno)
            }
            _ => err,
        })
    }

    fn open_with(pid: Pid, flags: i32) -> SysResult<Self> {
        // SAFETY: numbers only; the result is a new descriptor that nobody else owns.
        let fd = unsafe { sys::raw(libc::SYS_pidfd_open, [pid.as_raw() as u64, flags as u64, 0, 0, 0, 0]) }
            .map_err(|e| SysError::new("pidfd_open", pid, e))?;
        // SAFETY: as above.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd as i32) }, pid })
    }

    /// A duplicate of descriptor `fd` of the process: the same open file description. pidfd_getfd(2).
    pub fn get(&self, fd: i32) -> SysResult<OwnedFd> {
        // SAFETY: numbers only; the result is a new descriptor that nobody else owns.
        let got = unsafe { sys::raw(libc::SYS_pidfd_getfd, [self.fd.as_raw_fd() as u64, fd as u64, 0, 0, 0, 0]) }
            .map_err(|e| SysError::new("pidfd_getfd", format!("pid {}, fd {fd}", self.pid), e))?;
        // SAFETY: as above.
        Ok(unsafe { OwnedFd::from_raw_fd(got as i32) })
    }

    /// For waiting in a tokio runtime: it becomes readable when the process has ended.
    pub fn into_async(self) -> std::io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the descriptor is owned by what is returned, and closed with it only.
        unsafe { AsyncFd::register(self.fd) }.map_err(Into::into)
    }

    /// Sends a signal. pidfd_send_signal(2).
    pub fn kill(&self, signal: Signal) -> SysResult<()> {
        // SAFETY: no siginfo is passed.
        unsafe { sys::raw(libc::SYS_pidfd_send_signal, [self.fd.as_raw_fd() as u64, signal as u64, 0, 0, 0, 0]) }
            .map_err(|e| SysError::new("pidfd_send_signal", self.pid, e))?;
        Ok(())
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
