//! Open files, and what fdinfo tells of them.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

use super::{Answer, ensure};
use crate::kernel::error::During;
use crate::kernel::events;
use crate::kernel::proc::KeyValues;

/// What fdinfo says of a descriptor of ours.
fn told(fd: impl AsFd, key: &str) -> Result<bool, super::Absent> {
    Ok(KeyValues::fdinfo(Pid::this(), fd.as_fd().as_raw_fd())?.get(key).is_some())
}

/// fdinfo tells the mount of a file.
pub fn mount_id() -> Answer {
    let file = memfd_create(c"criu-ebpf-check", MFdFlags::MFD_CLOEXEC).during("memfd_create", "a new file")?;
    ensure(told(&file, "mnt_id")?, "fdinfo has no mnt_id")?;
    Ok(String::new())
}

/// fdinfo tells the locks on a file.
pub fn locks() -> Answer {
    let file = memfd_create(c"criu-ebpf-check", MFdFlags::MFD_CLOEXEC).during("memfd_create", "a new file")?;
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }).during("flock", "a new file")?;
    ensure(told(&file, "lock")?, "fdinfo does not show the lock on a file")?;
    Ok(String::new())
}

/// TFD_IOC_SET_TICKS: how often a timerfd has fired.
pub fn timer_ticks() -> Answer {
    /// `_IOW('T', 0, __u64)`.
    const SET_TICKS: u64 = 0x4008_5400;
    let timer = events::timerfd(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC as u32 | libc::TFD_NONBLOCK as u32)?;
    let ticks = 3u64;
    // SAFETY: the number lives for the call.
    Errno::result(unsafe { libc::ioctl(timer.as_raw_fd(), SET_TICKS as _, &raw const ticks) })
        .during("ioctl(TFD_IOC_SET_TICKS)", "a timerfd")?;
    let mut read = [0; 8];
    nix::unistd::read(&timer, &mut read).during("read", "a timerfd")?;
    ensure(u64::from_ne_bytes(read) == ticks, "a timerfd has fired another number of times than was set")?;
    Ok(String::new())
}

/// openat2(2).
pub fn openat2_resolves() -> Answer {
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(AT_FDCWD, "/", how).during("openat2", "/")?;
    Ok(String::new())
}

/// What is found out is kept in /run for the next time.
pub fn kept() -> Answer {
    use crate::kernel::kept::{DIR, name, read, write};
    let name = name("try", []).ok_or_else(|| super::Absent::because("the kernel does not tell its boot id"))?;
    write(&name, "x").during("write", DIR)?;
    let read = read(&name);
    let path = format!("{DIR}/{name}");
    std::fs::remove_file(&path).during("unlink", &path)?;
    ensure(read.as_deref() == Some("x"), "what is written there does not come back")?;
    Ok(DIR.to_owned())
}
