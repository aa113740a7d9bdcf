//! userfaultfd(2): its features, and write protection that the kernel resolves by itself (WP_ASYNC), which tracks
//! written pages.

use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::{Answer, ensure};
use crate::kernel::anonymous::Pages;
use crate::kernel::error::During;
use crate::kernel::pagemap::{PAGEMAP_SCAN, PageKind, Region, ScanArg};
use crate::kernel::survey::PAGE;
pub use crate::kernel::uffd::Features;
use crate::kernel::uffd::{Registered, WriteWatch, agree, open};
use crate::kernel::{SysError, SysResult};

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
    let watch = WriteWatch::new(open()?)?;
    let pages = Pages::new(3)?;
    if let Registered::No(errno) = watch.register(pages.start, pages.start + pages.len) {
        return Err(SysError::new("ioctl(UFFDIO_REGISTER)", "three pages", errno).into());
    }
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
