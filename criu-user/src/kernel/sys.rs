//! System calls that have no safe wrapper in `nix`.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::{SysError, SysResult};

/// Runs a raw system call.
///
/// # Safety
/// As the call itself: pointers among `args` must be valid for what the kernel does with them.
pub(crate) unsafe fn raw(nr: i64, args: [u64; 6]) -> Result<u64, Errno> {
    // SAFETY: the caller vouches for the arguments.
    let ret = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) };
    Errno::result(ret).map(|r| r as u64)
}

/// What kcmp(2) compares; `KCMP_*` of include/uapi/linux/kcmp.h.
#[derive(Debug, Clone, Copy)]
pub enum Compare {
    /// Two open file descriptions.
    File(u64, u64),
    /// Address spaces.
    Vm,
    /// Descriptor tables.
    Files,
    /// Working directory, root and umask.
    Fs,
    /// Tables of signal actions.
    Sighand,
}

/// Orders two kernel objects of two processes: `Equal` means that they are one. kcmp(2).
pub fn kcmp(a: Pid, b: Pid, what: Compare) -> SysResult<std::cmp::Ordering> {
    let (kind, x, y) = match what {
        Compare::File(x, y) => (0, x, y),
        Compare::Vm => (1, 0, 0),
        Compare::Files => (2, 0, 0),
        Compare::Fs => (3, 0, 0),
        Compare::Sighand => (4, 0, 0),
    };
    // SAFETY: kcmp takes numbers only.
    let ret = unsafe { raw(libc::SYS_kcmp, [a.as_raw() as u64, b.as_raw() as u64, kind, x, y, 0]) };
    match ret {
        Ok(0) => Ok(std::cmp::Ordering::Equal),
        Ok(1) => Ok(std::cmp::Ordering::Less),
        Ok(_) => Ok(std::cmp::Ordering::Greater),
        Err(e) => Err(SysError::new("kcmp", format!("{a}, {b}, {what:?}"), e)),
    }
}

/// An ioctl whose third argument is a value that the kernel fills or reads.
///
/// Only used with request numbers whose argument is `T`: the callers are the typed functions of `kernel/` and `object/`.
pub(super) fn ioctl_with<T>(fd: BorrowedFd<'_>, request: u64, value: &mut T) -> Result<i32, Errno> {
    // SAFETY: `value` lives for the call and is as large as the request says, which the typed callers see to.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, value as *mut T) })
}

macro_rules! ioctls_reading {
    ($($(#[$doc:meta])* $name:ident($request:expr) -> $t:ty;)*) => { $(
        $(#[$doc])*
        pub fn $name(fd: BorrowedFd<'_>) -> SysResult<$t> {
            // SAFETY: all-zero is a valid value of these plain C types.
            let mut value: $t = unsafe { std::mem::zeroed() };
            ioctl_with(fd, $request as u64, &mut value)
                .map_err(|e| SysError::new(concat!("ioctl ", stringify!($name)), fd.as_raw_fd(), e))?;
            Ok(value)
        }
    )* };
}

macro_rules! ioctls_writing {
    ($($(#[$doc:meta])* $name:ident($request:expr) <- $t:ty;)*) => { $(
        $(#[$doc])*
        pub fn $name(fd: BorrowedFd<'_>, mut value: $t) -> SysResult<()> {
            ioctl_with(fd, $request as u64, &mut value)
                .map_err(|e| SysError::new(concat!("ioctl ", stringify!($name)), fd.as_raw_fd(), e))?;
            Ok(())
        }
    )* };
}

ioctls_reading! {
    /// Bytes that can be read now: FIONREAD, ioctl_tty(2), pipe(7), unix(7).
    readable_bytes(libc::FIONREAD) -> i32;
    /// Bytes that a TCP peer has not acknowledged: SIOCOUTQ, tcp(7).
    tcp_unacknowledged(libc::TIOCOUTQ) -> i32;
    /// Bytes that were never sent to a TCP peer: SIOCOUTQNSD of include/uapi/linux/sockios.h.
    tcp_unsent(0x894bu64) -> i32;
    /// Window size of a terminal: TIOCGWINSZ.
    window_size(libc::TIOCGWINSZ) -> libc::winsize;
    /// Foreground process group of a terminal: TIOCGPGRP.
    tty_pgrp(libc::TIOCGPGRP) -> i32;
    /// Session of a terminal: TIOCGSID.
    tty_session(libc::TIOCGSID) -> i32;
    /// Index of a pseudo terminal, asked at its master: TIOCGPTN.
    pty_index(libc::TIOCGPTN) -> u32;
    /// Whether a pseudo terminal's slave is locked: TIOCGPTLCK.
    pty_locked(0x8004_5439u64) -> i32;
    /// Whether a pseudo terminal is in packet mode: TIOCGPKT.
    pty_packet_mode(0x8004_5438u64) -> i32;
    /// Whether a terminal is in exclusive mode: TIOCGEXCL.
    tty_exclusive(0x8004_5440u64) -> i32;
}

ioctls_writing! {
    /// TIOCSWINSZ.
    set_window_size(libc::TIOCSWINSZ) <- libc::winsize;
    /// TIOCSPTLCK: lock (1) or unlock (0) the slave of a pseudo terminal.
    set_pty_lock(libc::TIOCSPTLCK) <- i32;
    /// TIOCPKT.
    set_pty_packet_mode(libc::TIOCPKT) <- i32;
}

/// The robust futex list of a thread: head address and length. get_robust_list(2).
pub fn robust_list(tid: Pid) -> SysResult<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both out-pointers are to live locals of the size that the kernel writes (pointer and size_t).
    unsafe {
        raw(libc::SYS_get_robust_list, [tid.as_raw() as u64, &raw mut head as u64, &raw mut len as u64, 0, 0, 0])
    }
    .map_err(|e| SysError::new("get_robust_list", tid, e))?;
    Ok((head, len))
}

/// The securebits of the calling thread, or -1. prctl(2).
pub fn securebits() -> i32 {
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_GET_SECUREBITS) }
}

/// CAP_SYS_RESOURCE of capabilities(7).
pub const CAP_SYS_RESOURCE: u32 = 24;

/// Whether a capability is effective in this process: its bit in /proc/self/status.
pub fn has_capability(capability: u32) -> bool {
    super::proc::KeyValues::status(Pid::this(), Pid::this())
        .and_then(|status| status.number("CapEff", 16))
        .is_ok_and(|effective| effective >> capability & 1 != 0)
}

/// Soft and hard limit of this process for a resource, by its number. prlimit(2).
pub fn limit(resource: u64) -> SysResult<[u64; 2]> {
    let mut limit = [0u64; 2];
    // SAFETY: the last argument points to a live local of the size of struct rlimit64.
    unsafe { raw(libc::SYS_prlimit64, [0, resource, 0, limit.as_mut_ptr() as u64, 0, 0]) }
        .map_err(|e| SysError::new("prlimit", format!("resource {resource}"), e))?;
    Ok(limit)
}

/// Sets the real and effective uid of the calling thread alone, and keeps the saved one: setresuid(2) without the C
/// library, which would change all threads.
pub fn set_thread_uids(real: u32, effective: u32) -> SysResult<()> {
    // SAFETY: numbers only.
    unsafe { raw(libc::SYS_setresuid, [real.into(), effective.into(), u64::MAX, 0, 0, 0]) }
        .map_err(|e| SysError::new("setresuid", format!("{real}, {effective}"), e))?;
    // A change of uids makes the process undumpable (kernel/cred.c, `commit_creds`), and /proc/self root's alone.
    // SAFETY: numbers only.
    unsafe { raw(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0]) }
        .map_err(|e| SysError::new("prctl(PR_SET_DUMPABLE)", "self", e))?;
    Ok(())
}

/// A new inotify descriptor that does not block: inotify_init1(2).
pub fn inotify() -> SysResult<OwnedFd> {
    // SAFETY: numbers only; the result is a new descriptor that nobody else owns.
    let fd = Errno::result(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })
        .map_err(|e| SysError::new("inotify_init1", "a new descriptor", e))?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Watches the file behind `target`, and gives the watch's number: inotify_add_watch(2).
pub fn add_watch(inotify: BorrowedFd<'_>, target: BorrowedFd<'_>, mask: u32) -> SysResult<i32> {
    let path = format!("/proc/self/fd/{}\0", target.as_raw_fd());
    // SAFETY: the path lives for the call and ends in a zero.
    Errno::result(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr().cast(), mask) })
        .map_err(|e| SysError::new("inotify_add_watch", path.trim_end_matches('\0'), e))
}

/// Takes a watch back: inotify_rm_watch(2).
pub fn remove_watch(inotify: BorrowedFd<'_>, watch: i32) -> SysResult<()> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), watch) })
        .map(drop)
        .map_err(|e| SysError::new("inotify_rm_watch", watch, e))
}

/// Which number the next watch of an inotify descriptor gets: INOTIFY_IOC_SETNEXTWD, made for restores.
pub fn set_next_watch(fd: BorrowedFd<'_>, watch: i32) -> SysResult<()> {
    const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
    // SAFETY: numbers only: this request takes its argument by value (fs/notify/inotify/inotify_user.c).
    unsafe { raw(libc::SYS_ioctl, [fd.as_raw_fd() as u64, INOTIFY_IOC_SETNEXTWD, watch as u64, 0, 0, 0]) }
        .map_err(|e| SysError::new("ioctl(INOTIFY_IOC_SETNEXTWD)", format!("watch {watch}"), e))?;
    Ok(())
}

/// Opens a file by its handle, on the file system that `mount` is on. open_by_handle_at(2).
pub fn open_by_handle(mount: BorrowedFd<'_>, kind: i32, handle: &[u8], flags: i32) -> SysResult<OwnedFd> {
    // struct file_handle: length, type, bytes.
    let mut packed = Vec::with_capacity(8 + handle.len());
    packed.extend_from_slice(&(handle.len() as u32).to_ne_bytes());
    packed.extend_from_slice(&kind.to_ne_bytes());
    packed.extend_from_slice(handle);
    let args = [mount.as_raw_fd() as u64, packed.as_ptr() as u64, (flags | libc::O_CLOEXEC) as u64, 0, 0, 0];
    // SAFETY: the handle lives for the call and tells its own length.
    let fd = unsafe { raw(libc::SYS_open_by_handle_at, args) }
        .map_err(|e| SysError::new("open_by_handle_at", format!("a handle of type {kind}"), e))?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
/// PR_TIMER_CREATE_RESTORE_IDS of prctl(2), Linux 6.15: timer_create(2) takes the id that it finds in its result.
pub const RESTORE_IDS: u32 = 77;

/// Whether timers can be made with ids of one's choice.
pub fn takes_timer_ids() -> bool {
    /// PR_TIMER_CREATE_RESTORE_IDS_GET
    const GET: u64 = 2;
    // SAFETY: numbers only.
    unsafe { raw(libc::SYS_prctl, [RESTORE_IDS.into(), GET, 0, 0, 0, 0]) }.is_ok()
}
