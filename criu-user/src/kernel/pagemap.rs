//! Which pages of an area hold something, and which were written: the PAGEMAP_SCAN ioctl of `/proc/PID/pagemap`
//! (Linux 6.7).
//!
//! # References
//! Documentation/admin-guide/mm/pagemap.rst, include/uapi/linux/fs.h.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::error::During;
use super::{SysError, SysResult};

bitflags::bitflags! {
    /// Categories of pages, `PAGE_IS_*`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PageKind: u64 {
        /// In an area that is registered with a userfaultfd in the mode WP_ASYNC.
        const WP_ALLOWED = 1;
        /// Written since it was armed, or not armed at all.
        const WRITTEN = 1 << 1;
        /// Belongs to a file.
        const FILE = 1 << 2;
        /// In memory.
        const PRESENT = 1 << 3;
        /// Swapped out.
        const SWAPPED = 1 << 4;
        /// The zero page.
        const PFN_ZERO = 1 << 5;
        /// Part of a huge page.
        const HUGE = 1 << 6;
        /// Written, by the soft-dirty bit.
        const SOFT_DIRTY = 1 << 7;
        /// A guard region (Linux 6.15).
        const GUARD = 1 << 8;
    }
}

/// A run of pages of one kind.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Their kind, `PageKind` bits.
    pub categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
pub(super) struct ScanArg {
    pub size: u64,
    pub flags: u64,
    pub start: u64,
    pub end: u64,
    pub walk_end: u64,
    pub vec: u64,
    pub vec_len: u64,
    pub max_pages: u64,
    pub category_inverted: u64,
    pub category_mask: u64,
    pub category_anyof_mask: u64,
    pub return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
pub(super) const PAGEMAP_SCAN: u64 = (3 << 30) | ((size_of::<ScanArg>() as u64) << 16) | ((b'f' as u64) << 8) | 16;
/// Regions asked for in one call; more of them and `walk_end` is stale (a bug of the kernel), so that the vector's last
/// region tells where to go on.
const VECTOR: usize = 2048;

/// `PM_SCAN_WP_MATCHING`: what is reported is write-protected in the same step, and areas where that cannot be are passed
/// over.
const WP_MATCHING: u64 = 1;
/// Behind the last address of a process (x86-64 with four levels of page tables; the walk ends with the last area).
pub const ADDRESSES_END: u64 = 0x7fff_ffff_f000;

/// What to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Query {
    /// Of these kinds all must hold (after `inverted`).
    pub all: PageKind,
    /// Of these at least one.
    pub any: PageKind,
    /// Kinds whose meaning is turned round.
    pub inverted: PageKind,
    /// Kinds that are reported back.
    pub report: PageKind,
}

/// How page tables are walked over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Nothing is changed.
    Look,
    /// Nothing is changed, and one page is enough.
    First,
    /// What is found is write-protected in the same step.
    Arm,
}

/// The page map of one process.
#[derive(Debug)]
pub struct PageMap {
    file: File,
    pid: Pid,
    vector: Vec<Region>,
    /// Kinds that this kernel knows.
    known: PageKind,
}

impl PageMap {
    /// Opens `/proc/PID/pagemap`.
    pub fn open(pid: Pid) -> SysResult<Self> {
        let path = format!("/proc/{pid}/pagemap");
        Ok(Self {
            file: File::open(&path).during("open", &path)?,
            pid,
            vector: vec![Region::default(); VECTOR],
            known: PageKind::all(),
        })
    }

    /// The runs of pages between `start` and `end` that match, ascending, appended to `found`.
    pub fn scan(&mut self, start: u64, end: u64, query: Query, found: &mut Vec<Region>) -> SysResult<()> {
        self.walk((start, end), query, How::Look, found)
    }

    /// The same; what is found in areas that are registered with a userfaultfd in the mode WP_ASYNC is armed in the step that
    /// finds it.
    pub fn scan_and_arm(&mut self, start: u64, end: u64, query: Query, found: &mut Vec<Region>) -> SysResult<()> {
        let tracked = Query { all: query.all | PageKind::WP_ALLOWED, ..query };
        // The kernel passes these areas over as a whole.
        let others = Query { inverted: query.inverted | PageKind::WP_ALLOWED, ..tracked };
        let before = found.len();
        self.walk((start, end), tracked, How::Arm, found)?;
        let between = found.len();
        self.walk((start, end), others, How::Look, found)?;
        if before < between && between < found.len() {
            found[before..].sort_unstable_by_key(|region| region.start);
        }
        Ok(())
    }

    /// The pages that were written since they were armed last, in all areas that are registered with a userfaultfd in
    /// the mode WP_ASYNC. Each is armed again in the step that finds it, while the process runs: a write is either seen
    /// by this call or by the next.
    pub fn fetch_written(&mut self, found: &mut Vec<Region>) -> SysResult<()> {
        // Without asking for pages that are there, all that are not would count as written too, and the kernel would fill
        // page tables with marks for them: gigabytes of tables for a large area that is hardly used.
        const WRITTEN: Query = Query {
            all: PageKind::WRITTEN,
            any: PageKind::PRESENT.union(PageKind::SWAPPED),
            inverted: PageKind::empty(),
            report: PageKind::WRITTEN,
        };
        self.walk((0, ADDRESSES_END), WRITTEN, How::Arm, found)
    }

    /// Whether there are pages in areas that are registered with a userfaultfd in the mode WP_ASYNC.
    pub fn is_watched(&mut self) -> SysResult<bool> {
        const WATCHED: Query = Query {
            all: PageKind::WP_ALLOWED,
            any: PageKind::PRESENT.union(PageKind::SWAPPED),
            inverted: PageKind::empty(),
            report: PageKind::WP_ALLOWED,
        };
        let mut found = Vec::new();
        self.walk((0, ADDRESSES_END), WATCHED, How::First, &mut found)?;
        Ok(!found.is_empty())
    }

    fn walk(&mut self, (start, end): (u64, u64), query: Query, how: How, found: &mut Vec<Region>) -> SysResult<()> {
        let mut at = start;
        while at < end {
            let any = query.any & self.known;
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: if how == How::Arm { WP_MATCHING } else { 0 },
                start: at,
                end,
                vec: self.vector.as_mut_ptr() as u64,
                vec_len: VECTOR as u64,
                max_pages: u64::from(how == How::First),
                category_inverted: query.inverted.bits(),
                category_mask: query.all.bits(),
                category_anyof_mask: any.bits(),
                return_mask: (query.report & self.known).bits(),
                ..ScanArg::default()
            };
            // SAFETY: `arg` and the vector live for the call; the vector holds `vec_len` regions.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
            if Errno::result(n) == Err(Errno::EINVAL) && self.known.contains(PageKind::GUARD) {
                // Before Linux 6.15 there is no such kind.
                self.known.remove(PageKind::GUARD);
                continue;
            }
            let n = Errno::result(n)
                .map_err(|e| SysError::new("ioctl PAGEMAP_SCAN", format!("pid {}, {at:#x}-{end:#x}", self.pid), e))?
                as usize;
            found.extend_from_slice(&self.vector[..n]);
            if n < VECTOR {
                return Ok(());
            }
            at = self.vector[n - 1].end;
        }
        Ok(())
    }
}
