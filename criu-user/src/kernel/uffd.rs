//! userfaultfd(2) in the mode that tracks written pages: write protection that the kernel takes away by itself at the
//! first write to a page (`WP_ASYNC`), without telling anybody and without anybody's being there to answer. Who wants to
//! know asks `/proc/PID/pagemap` ([`PageMap::fetch_written`](super::pagemap::PageMap::fetch_written)).
//!
//! A userfaultfd belongs to the memory of the process that made it, for good: it can be used by whoever holds it, and does
//! nothing any more once that memory is gone (execve(2), exit). Closed, it takes its registrations and all protection
//! with it.
//!
//! # References
//! userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::error::During;
use super::pagemap::ADDRESSES_END;
use super::survey::PAGE;
use super::{SysError, SysResult, sys};

bitflags::bitflags! {
    /// `UFFD_FEATURE_*` of include/uapi/linux/userfaultfd.h.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Tells of forks.
        const EVENT_FORK = 1 << 1;
        /// Tells of mremap(2).
        const EVENT_REMAP = 1 << 2;
        /// Tells of MADV_DONTNEED and the like.
        const EVENT_REMOVE = 1 << 3;
        /// Tells of munmap(2).
        const EVENT_UNMAP = 1 << 6;
        /// Write protection of huge pages and of shared memory.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write protection of pages that do not exist yet.
        const WP_UNPOPULATED = 1 << 13;
        /// Write protection that a fault takes away by itself.
        const WP_ASYNC = 1 << 15;
    }
}

/// What tracking needs.
const TRACKING: Features = Features::WP_ASYNC.union(Features::WP_UNPOPULATED);

pub(super) const API: u64 = 0xaa;
/// `UFFDIO_API`, `UFFDIO_REGISTER`: `_IOWR(0xaa, …)` with 24 and 32 bytes.
pub(super) const UFFDIO_API: u64 = 0xc018_aa3f;
pub(super) const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const MODE_WP: u64 = 1 << 1;
/// `_IOWR(0xaa, …)` with 24 bytes.
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;

/// Flags for the system call, where no fault ever asks anybody: `UFFD_USER_MODE_ONLY` will do then, which needs no
/// privilege. Faults of the kernel's own (a read(2) into a buffer) are resolved all the same.
pub const MAKE_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

/// A userfaultfd that tracks writes.
#[derive(Debug)]
pub struct WriteWatch(OwnedFd);

/// What came of registering an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registered {
    /// It is tracked.
    Yes,
    /// It is not there any more, or cannot be tracked.
    No(Errno),
    /// The memory that this watched is gone: the process has ended or called execve(2).
    Gone,
}

impl WriteWatch {
    /// Takes a fresh userfaultfd, of this process or another, into use.
    pub fn new(fd: OwnedFd) -> SysResult<Self> {
        agree(&fd, TRACKING)?;
        Ok(Self(fd))
    }

    /// Whether the memory that this watches is still there: its process has neither ended nor called execve(2).
    pub fn has_memory(&self) -> bool {
        // Asks for writes to the last page there can be to be allowed. Hardly anybody has it; then it counts as written.
        let mut protect = [ADDRESSES_END - PAGE, PAGE, 0];
        // SAFETY: the words live for the call and are as many as the request says.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT as _, protect.as_mut_ptr()) };
        Errno::result(done) != Err(Errno::ESRCH)
    }

    /// Registers the area from `start` to `end`. Pages in it count as written until they are armed.
    pub fn register(&self, start: u64, end: u64) -> Registered {
        let mut register = [start, end - start, MODE_WP, 0];
        // SAFETY: the words live for the call and are as many as the request says.
        match Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER as _, register.as_mut_ptr()) }) {
            Ok(_) => Registered::Yes,
            // mmget_not_zero() in fs/userfaultfd.c says ENOMEM, for a memory that nobody uses any more.
            Err(Errno::ESRCH | Errno::ENOMEM) => Registered::Gone,
            Err(errno) => Registered::No(errno),
        }
    }
}

/// A new userfaultfd of our own: by the system call, or by its device, which may be open to more users.
pub fn open() -> SysResult<OwnedFd> {
    /// `USERFAULTFD_IOC_NEW`: `_IO(0xaa, 0)`.
    const NEW: u64 = 0xaa00;
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    // SAFETY: numbers only.
    let made = unsafe { sys::raw(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]) };
    let made = match (made, OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")) {
        (Err(Errno::EPERM), Ok(device)) => {
            // SAFETY: numbers only.
            unsafe { sys::raw(libc::SYS_ioctl, [device.as_raw_fd() as u64, NEW, flags, 0, 0, 0]) }
        }
        (made, _) => made,
    };
    let fd = made.during("userfaultfd", "a new descriptor")?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Agrees on features with the kernel; gives all that it has.
pub fn agree(fd: &OwnedFd, wanted: Features) -> SysResult<Features> {
    let mut api = [API, wanted.bits(), 0];
    // SAFETY: the words live for the call and are as many as the request says.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) })
        .during("ioctl(UFFDIO_API)", format!("{wanted:?}"))?;
    Ok(Features::from_bits_retain(api[1]))
}

/// Whether this kernel can track writes.
pub fn can_track() -> SysResult<()> {
    let has = agree(&open()?, Features::empty())?;
    if has.contains(TRACKING) {
        return Ok(());
    }
    Err(SysError::new("userfaultfd", format!("{:?}", TRACKING - has), Errno::EOPNOTSUPP))
}
