//! userfaultfd(2): its features, and write protection that the kernel resolves by itself (WP_ASYNC), which tracks
//! written pages.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::memory::Pages;
use super::{Answer, ensure};
use crate::kernel::error::During;
use crate::kernel::pagemap::{PAGEMAP_SCAN, PageKind, Region, ScanArg};
use crate::kernel::survey::PAGE;
use crate::kernel::{SysError, SysResult, sys};

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

const API: u64 = 0xaa;
/// `UFFDIO_API`, `UFFDIO_REGISTER`: `_IOWR(0xaa, …)` with 24 and 32 bytes.
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const MODE_WP: u64 = 1 << 1;

/// A new userfaultfd: by the system call, or by its device, which may be open to more users.
fn open() -> SysResult<OwnedFd> {
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
fn agree(fd: &OwnedFd, wanted: Features) -> SysResult<Features> {
    let mut api = [API, wanted.bits(), 0];
    // SAFETY: the words live for the call and are as many as the request says.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, api.as_mut_ptr()) })
        .during("ioctl(UFFDIO_API)", format!("{wanted:?}"))?;
    Ok(Features::from_bits_retain(api[1]))
}

/// userfaultfd(2) at all.
pub fn userfaultfd() -> Answer {
    let features = agree(&open()?, Features::empty())?;
    Ok(format!("features {:#x}", features.bits()))
}

/// The kernel has and grants these features.
pub fn grants<const FEATURES: u64>() -> Answer {
    let wanted = Features::from_bits_retain(FEATURES);
    ensure(agree(&open()?, Features::empty())?.contains(wanted), &format!("the kernel lacks {wanted:?}"))?;
    agree(&open()?, wanted)?;
    Ok(String::new())
}

/// Tracks the writes to an area: of three pages, the one that was written since the last look is found.
pub fn tracks_writes() -> Answer {
    let fd = open()?;
    agree(&fd, Features::WP_ASYNC | Features::WP_UNPOPULATED)?;
    let pages = Pages::new(3)?;
    let mut register = [pages.start, pages.len, MODE_WP, 0];
    // SAFETY: the words live for the call and are as many as the request says.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER as _, register.as_mut_ptr()) })
        .during("ioctl(UFFDIO_REGISTER)", "three pages")?;
    fetch_written(&pages)?;
    pages.touch(1);
    ensure(fetch_written(&pages)? == [1], "the kernel does not tell the page that was written from the others")?;
    ensure(fetch_written(&pages)?.is_empty(), "the kernel does not arm again what it tells of")?;
    Ok(String::new())
}

/// The pages written since the last call, armed again in the same step.
fn fetch_written(pages: &Pages) -> SysResult<Vec<u64>> {
    /// PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC.
    const FETCH: u64 = 3;
    let map = std::fs::File::open("/proc/self/pagemap").during("open", "/proc/self/pagemap")?;
    let mut found = [Region::default(); 4];
    let written = PageKind::WRITTEN.bits();
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: FETCH,
        start: pages.start,
        end: pages.start + pages.len,
        vec: found.as_mut_ptr().expose_provenance() as u64,
        vec_len: found.len() as u64,
        category_mask: written,
        return_mask: written,
        ..ScanArg::default()
    };
    // SAFETY: `arg` and the vector live for the call; the vector holds `vec_len` regions.
    let count = Errno::result(unsafe { libc::ioctl(map.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) })
        .map_err(|errno| SysError::new("ioctl(PAGEMAP_SCAN)", "write-protecting three pages", errno))?;
    let regions = &found[..count as usize];
    Ok(regions.iter().flat_map(|r| (r.start - pages.start) / PAGE..(r.end - pages.start) / PAGE).collect())
}
