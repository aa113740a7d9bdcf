//! Descriptors that report events: making them, and what is asked of them that has no wrapper in `nix`.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::{SysError, SysResult, sys};

/// `EFD_SEMAPHORE` of eventfd(2).
pub const EFD_SEMAPHORE: u32 = 1;
/// `TFD_IOC_SET_TICKS` of include/uapi/linux/timerfd.h: sets the expirations that nobody has read yet.
pub const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

fn new_fd(call: &'static str, result: Result<u64, Errno>) -> SysResult<OwnedFd> {
    let fd = result.map_err(|e| SysError::new(call, "a new descriptor", e))?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A new event counter at 0, closed on exec; `flags` are those of eventfd(2).
pub fn eventfd(flags: u32) -> SysResult<OwnedFd> {
    let flags = u64::from(flags | libc::EFD_CLOEXEC as u32);
    // SAFETY: numbers only.
    new_fd("eventfd2", unsafe { sys::raw(libc::SYS_eventfd2, [0, flags, 0, 0, 0, 0]) })
}

/// A new, empty epoll instance, closed on exec. epoll_create1(2).
pub fn epoll() -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    new_fd("epoll_create1", unsafe { sys::raw(libc::SYS_epoll_create1, [libc::EPOLL_CLOEXEC as u64, 0, 0, 0, 0, 0]) })
}

/// A new signalfd for the signals of `mask` (bit n−1 for signal n), closed on exec; `flags` are those of signalfd(2).
pub fn signalfd(mask: u64, flags: u32) -> SysResult<OwnedFd> {
    let flags = u64::from(flags | libc::SFD_CLOEXEC as u32);
    // SAFETY: the pointer is to a live local of the eight bytes that the third argument announces.
    new_fd("signalfd4", unsafe { sys::raw(libc::SYS_signalfd4, [u64::MAX, &raw const mask as u64, 8, flags, 0, 0]) })
}

/// A new timer on a clock, not armed, closed on exec; `flags` are those of timerfd_create(2).
pub fn timerfd(clock: i32, flags: u32) -> SysResult<OwnedFd> {
    let flags = u64::from(flags | libc::TFD_CLOEXEC as u32);
    // SAFETY: numbers only.
    new_fd("timerfd_create", unsafe { sys::raw(libc::SYS_timerfd_create, [clock as u64, flags, 0, 0, 0, 0]) })
}

/// What remains of a timer, and its interval. timerfd_gettime(2).
///
/// The kernel counts a periodic timer's expirations when it is asked: fdinfo is up to date only afterwards.
pub fn timerfd_remaining(timer: impl AsFd) -> SysResult<(Duration, Duration)> {
    let mut spec = [0u64; 4];
    let fd = timer.as_fd().as_raw_fd();
    // SAFETY: the pointer is to a live local of the size of struct itimerspec.
    unsafe { sys::raw(libc::SYS_timerfd_gettime, [fd as u64, spec.as_mut_ptr() as u64, 0, 0, 0, 0]) }
        .map_err(|e| SysError::new("timerfd_gettime", format!("fd {fd}"), e))?;
    let duration = |seconds: u64, nanoseconds: u64| Duration::new(seconds, nanoseconds as u32);
    Ok((duration(spec[2], spec[3]), duration(spec[0], spec[1])))
}

/// Whether descriptor `fd` of process `pid` is what an epoll instance watches under `number`; several may be registered
/// under one number, `nth` tells them apart in the order of fdinfo. kcmp(2), `KCMP_EPOLL_TFD`.
pub fn epoll_watches(epoll: impl AsFd, number: u32, nth: u32, pid: Pid, fd: i32) -> SysResult<bool> {
    const KCMP_EPOLL_TFD: u64 = 7;
    // struct kcmp_epoll_slot
    let slot = [epoll.as_fd().as_raw_fd() as u32, number, nth];
    let args = [pid.as_raw() as u64, Pid::this().as_raw() as u64, KCMP_EPOLL_TFD, fd as u64, slot.as_ptr() as u64, 0];
    // SAFETY: the pointer is to a live local of the size of struct kcmp_epoll_slot.
    let order = unsafe { sys::raw(libc::SYS_kcmp, args) }
        .map_err(|e| SysError::new("kcmp(EPOLL_TFD)", format!("pid {pid}, fd {fd}, watched as {number}"), e))?;
    Ok(order == 0)
}
