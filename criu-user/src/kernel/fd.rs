//! What can be asked of a descriptor that we hold.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::errno::Errno;

use super::error::During;
use super::{SysError, SysResult};

fn fcntl(fd: BorrowedFd<'_>, command: i32, arg: u64, call: &'static str) -> SysResult<i32> {
    // SAFETY: the commands below take numbers, or a pointer to a live local of the right type.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), command, arg) })
        .map_err(|e| SysError::new(call, format!("fd {}", fd.as_raw_fd()), e))
}

/// Who gets signals for a descriptor: F_GETOWN_EX and F_GETSIG of fcntl(2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// F_OWNER_TID (0), F_OWNER_PID (1), F_OWNER_PGRP (2).
    pub kind: i32,
    /// The thread, process or group; 0 for none.
    pub id: i32,
    /// The signal; 0 for SIGIO.
    pub signal: i32,
    /// Real and effective uid that F_SETOWN recorded: F_GETOWNER_UIDS.
    pub uids: [u32; 2],
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_GETOWNER_UIDS: i32 = 17;

/// Who gets signals for `fd`.
pub fn owner(fd: impl AsFd) -> SysResult<Owner> {
    let fd = fd.as_fd();
    let mut pair = [0i32; 2];
    fcntl(fd, F_GETOWN_EX, pair.as_mut_ptr() as u64, "fcntl(F_GETOWN_EX)")?;
    let mut owner = Owner { kind: pair[0], id: pair[1], ..Owner::default() };
    owner.signal = fcntl(fd, F_GETSIG, 0, "fcntl(F_GETSIG)")?;
    if owner.id != 0 {
        // Only there with CONFIG_CHECKPOINT_RESTORE.
        let _ = fcntl(fd, F_GETOWNER_UIDS, owner.uids.as_mut_ptr() as u64, "fcntl(F_GETOWNER_UIDS)");
    }
    Ok(owner)
}

/// Sets who gets signals for `fd`, and on whose behalf: the kernel records the uids of the caller (fs/fcntl.c,
/// `f_modown`) and later checks with them whether the signal may be sent.
pub fn set_owner(fd: impl AsFd, owner: &Owner) -> SysResult<()> {
    let fd = fd.as_fd();
    let pair = [owner.kind, owner.id];
    let set = || fcntl(fd, F_SETOWN_EX, pair.as_ptr() as u64, "fcntl(F_SETOWN_EX)").map(drop);
    let own = [nix::unistd::getuid().as_raw(), nix::unistd::geteuid().as_raw()];
    if owner.id == 0 || owner.uids == own {
        set()?;
    } else {
        // Credentials belong to threads: one that ends takes the borrowed ones with it.
        let outcome = std::thread::scope(|scope| {
            let borrowed =
                scope.spawn(|| super::sys::set_thread_uids(owner.uids[0], owner.uids[1]).and_then(|()| set()));
            borrowed.join()
        });
        outcome.unwrap_or_else(|_| Err(SysError::new("fcntl(F_SETOWN_EX)", fd.as_raw_fd(), Errno::ECANCELED)))?;
    }
    fcntl(fd, F_SETSIG, owner.signal as u64, "fcntl(F_SETSIG)")?;
    Ok(())
}

/// Opens the file behind a descriptor once more, whatever became of its name: a description of its own.
pub fn reopen(fd: impl AsFd, flags: i32) -> SysResult<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
    open(path.as_str(), flags, nix::sys::stat::Mode::empty()).map_err(|e| SysError::new("open", path, e))
}

/// Makes the table of descriptors large enough for this number, while only one thread uses it: once several do, the
/// kernel lets it grow after a grace period of RCU only (`expand_fdtable` of fs/file.c), which is milliseconds.
/// Where the number is beyond the limit, whoever needs it is told.
pub fn make_room(number: i32) {
    if let Ok(any) = any() {
        let _ = duplicate_above(&any, number);
    }
}

/// Takes all numbers below this one that are free, so that new descriptors are at or above it; give them back with
/// [`close_all`].
pub fn take_below(number: i32) -> SysResult<Vec<OwnedFd>> {
    let mut taken = vec![any()?];
    while let Some(last) = taken.last().filter(|last| last.as_raw_fd() < number) {
        taken.push(duplicate_above(last, 0)?);
    }
    Ok(taken)
}

/// A descriptor of nothing in particular.
fn any() -> SysResult<OwnedFd> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map(|(end, _)| end).during("pipe2", "the engine")
}

/// A duplicate of a descriptor that whoever started us has left open under this number.
pub fn inherited(number: i32) -> SysResult<OwnedFd> {
    // SAFETY: fcntl takes numbers only, and says so if there is no such descriptor.
    let new = Errno::result(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })
        .map_err(|e| SysError::new("fcntl(F_DUPFD_CLOEXEC)", format!("fd {number}"), e))?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// What poll(2) says of a descriptor just now, among `events`, and of hang-ups and errors.
pub fn poll_now(fd: impl AsFd, events: nix::poll::PollFlags) -> SysResult<nix::poll::PollFlags> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    poll(&mut fds, PollTimeout::ZERO).map_err(|e| SysError::new("poll", fd.as_fd().as_raw_fd(), e))?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// Seals of a memory file: F_GET_SEALS of fcntl(2). Other files have none, and the call fails.
pub fn seals(fd: impl AsFd) -> SysResult<u32> {
    fcntl(fd.as_fd(), libc::F_GET_SEALS, 0, "fcntl(F_GET_SEALS)").map(|s| s as u32)
}

/// Adds seals: F_ADD_SEALS.
pub fn add_seals(fd: impl AsFd, seals: u32) -> SysResult<()> {
    fcntl(fd.as_fd(), libc::F_ADD_SEALS, seals.into(), "fcntl(F_ADD_SEALS)").map(drop)
}

/// Status flags: F_GETFL.
pub fn flags(fd: impl AsFd) -> SysResult<i32> {
    fcntl(fd.as_fd(), libc::F_GETFL, 0, "fcntl(F_GETFL)")
}

/// Sets the status flags that can be set: F_SETFL.
pub fn set_flags(fd: impl AsFd, flags: i32) -> SysResult<()> {
    fcntl(fd.as_fd(), libc::F_SETFL, flags as u64, "fcntl(F_SETFL)").map(drop)
}

/// Sets the status flags of a description that was just made without any: mostly there is nothing to do.
pub fn set_flags_of_new(fd: impl AsFd, flags: i32) -> SysResult<()> {
    /// What F_SETFL changes: SETFL_MASK of fs/fcntl.c.
    const CHANGEABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;
    if flags & CHANGEABLE == 0 { Ok(()) } else { set_flags(fd, flags) }
}

/// A duplicate with a number of at least `lowest`, closed on exec: F_DUPFD_CLOEXEC.
pub fn duplicate_above(fd: impl AsFd, lowest: i32) -> SysResult<OwnedFd> {
    let new = fcntl(fd.as_fd(), libc::F_DUPFD_CLOEXEC, lowest as u64, "fcntl(F_DUPFD_CLOEXEC)")?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Closes descriptors, neighbours at once: close_range(2).
pub fn close_all(files: Vec<OwnedFd>) {
    let mut numbers: Vec<u32> = files.into_iter().map(|file| file.into_raw_fd() as u32).collect();
    numbers.sort_unstable();
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        // SAFETY: all of these were ours and are nobody's any more. What close(2) would say no longer matters.
        unsafe { libc::close_range(run[0], run[run.len() - 1], 0) };
    }
}

/// Makes the number of `old` stand for the description of `new`: dup3(2).
pub fn replace(old: &OwnedFd, new: impl AsFd) -> SysResult<()> {
    let new = new.as_fd();
    // SAFETY: both are open; `old` goes on to own its number.
    Errno::result(unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) })
        .map(drop)
        .map_err(|e| SysError::new("dup3", format!("{}, {}", new.as_raw_fd(), old.as_raw_fd()), e))
}

/// Capacity of a pipe in bytes: F_GETPIPE_SZ.
pub fn pipe_size(fd: impl AsFd) -> SysResult<i32> {
    fcntl(fd.as_fd(), libc::F_GETPIPE_SZ, 0, "fcntl(F_GETPIPE_SZ)")
}

/// Sets the capacity of a pipe: F_SETPIPE_SZ.
pub fn set_pipe_size(fd: impl AsFd, size: i32) -> SysResult<()> {
    fcntl(fd.as_fd(), libc::F_SETPIPE_SZ, size as u64, "fcntl(F_SETPIPE_SZ)").map(drop)
}

/// Moves the position.
pub fn seek(fd: impl AsFd, position: u64) -> SysResult<()> {
    nix::unistd::lseek(fd.as_fd(), position as i64, nix::unistd::Whence::SeekSet)
        .map(drop)
        .map_err(|e| SysError::new("lseek", format!("fd {}, {position}", fd.as_fd().as_raw_fd()), e))
}

/// Puts /dev/null in the place of standard input, output and error. dup2(2).
pub fn close_standard() -> SysResult<()> {
    let null = File::options().read(true).write(true).open("/dev/null").during("open", "/dev/null")?;
    let done = nix::unistd::dup2_stdin(&null).and_then(|()| nix::unistd::dup2_stdout(&null));
    done.and_then(|()| nix::unistd::dup2_stderr(&null)).during("dup2", "/dev/null")
}

/// Writes all of `bytes` at `offset`.
pub fn write_all_at(fd: impl AsFd, bytes: &[u8], offset: u64) -> SysResult<()> {
    let mut done = 0;
    while done < bytes.len() {
        match nix::sys::uio::pwrite(fd.as_fd(), &bytes[done..], (offset as usize + done) as i64) {
            Ok(0) => return Err(SysError::new("pwrite", format!("offset {offset}"), Errno::ENOSPC)),
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(SysError::new("pwrite", format!("{} bytes at {offset}", bytes.len()), e)),
        }
    }
    Ok(())
}

/// The next stretch of data in a file from `at` on, below `size`: SEEK_DATA and SEEK_HOLE of lseek(2).
pub fn next_data(file: impl AsFd, at: u64, size: u64) -> SysResult<Option<(u64, u64)>> {
    use nix::unistd::{Whence, lseek};
    let fd = file.as_fd();
    let failed = |e| SysError::new("lseek", format!("fd {}, {at}", fd.as_raw_fd()), e);
    if at >= size {
        return Ok(None);
    }
    let start = match lseek(fd, at as i64, Whence::SeekData) {
        Ok(start) => start,
        // No data up to the end.
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let end = lseek(fd, start, Whence::SeekHole).map_err(failed)?;
    Ok(Some((start as u64, end as u64)))
}

/// Copies `len` bytes between files within the kernel: sendfile(2) with positions of our own. Short files end in zeros
/// within their last page, so that less than a page may be missing at the end.
pub fn copy(from: impl AsFd, from_at: u64, to: impl AsFd, to_at: u64, len: u64) -> SysResult<()> {
    use nix::unistd::{Whence, lseek};
    let (from, to) = (from.as_fd(), to.as_fd());
    let failed =
        |call, e| SysError::new(call, format!("{len} bytes, fd {} to {}", from.as_raw_fd(), to.as_raw_fd()), e);
    lseek(to, to_at as i64, Whence::SeekSet).map_err(|e| failed("lseek", e))?;
    let mut position = from_at as i64;
    let end = (from_at + len) as i64;
    while position < end {
        // SAFETY: the position is a live local; both descriptors are borrowed.
        let n =
            unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), &raw mut position, (end - position) as usize) };
        match Errno::result(n) {
            Ok(0) if end - position < super::survey::PAGE as i64 => {
                let zeros = vec![0; (end - position) as usize];
                return write_all_at(to, &zeros, to_at + (position as u64 - from_at));
            }
            Ok(0) => return Err(failed("sendfile", Errno::ENODATA)),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(failed("sendfile", e)),
        }
    }
    Ok(())
}

/// The name of a socket's protocol in the kernel (`TCP`, `UNIX-STREAM`, `PACKET`, …), by the socket's link in /proc/PID/fd:
/// the extended attribute `system.sockprotoname`, without taking hold of the socket. getxattr(2).
pub fn protocol_of(path: &str) -> SysResult<String> {
    let failed = |e| SysError::new("getxattr", path, e);
    let name = std::ffi::CString::new(path).map_err(|_| failed(Errno::EINVAL))?;
    let mut value = [0u8; 64];
    // SAFETY: both names end with a zero, and the kernel writes no more than the length says.
    let len = Errno::result(unsafe {
        libc::getxattr(name.as_ptr(), c"system.sockprotoname".as_ptr(), value.as_mut_ptr().cast(), value.len())
    })
    .map_err(failed)?;
    let text = value[..len as usize].split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_these_are_closed() {
        let null = || File::open("/dev/null").expect("/dev/null");
        let base = 700;
        let at = |n: i32| duplicate_above(null(), base + n).expect("a duplicate");
        let (all, kept): (Vec<_>, Vec<_>) = (0..20).map(at).partition(|fd| fd.as_raw_fd() % 5 != 0);
        let numbers: Vec<i32> = all.iter().map(AsRawFd::as_raw_fd).collect();
        close_all(all);
        let is_open = |number: i32| std::path::Path::new(&format!("/proc/self/fd/{number}")).exists();
        assert!(numbers.iter().all(|&number| !is_open(number)));
        assert!(kept.iter().all(|fd| is_open(fd.as_raw_fd())));
    }
}
