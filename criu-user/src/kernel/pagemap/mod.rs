//! Which pages of an area hold something, and which were written: the PAGEMAP_SCAN ioctl of `/proc/PID/pagemap`
//! (Linux 6.7), or what can be read from that file.
//!
//! # References
//! Documentation/admin-guide/mm/pagemap.rst, Documentation/admin-guide/mm/soft-dirty.rst, include/uapi/linux/fs.h.

mod entries;

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::unistd::Pid;

use self::entries::Entries;
use super::anonymous::Pages;
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

impl Query {
    /// Whether pages of this kind are looked for.
    fn wants(&self, kind: PageKind) -> bool {
        let kind = kind ^ self.inverted;
        kind.contains(self.all) && (self.any.is_empty() || kind.intersects(self.any))
    }

    /// The same question where writes are told by soft-dirty bits, which no page is without; `None` if nothing can be found.
    fn of_soft_dirty(self) -> Option<Self> {
        let tracked = PageKind::WP_ALLOWED;
        if self.all.contains(tracked) && self.inverted.contains(tracked) {
            return None;
        }
        let put = |kinds: PageKind| match kinds.contains(PageKind::WRITTEN) {
            true => (kinds - PageKind::WRITTEN - tracked) | PageKind::SOFT_DIRTY,
            false => kinds - tracked,
        };
        Some(Self { all: put(self.all), any: put(self.any), inverted: put(self.inverted), report: put(self.report) })
    }
}

/// By what the kernel tells which pages were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Marks {
    /// The write protection of a userfaultfd in the mode WP_ASYNC, for each page of areas that are registered with one.
    #[default]
    Userfaultfd,
    /// Soft-dirty bits, which each page of a process has, and which are cleared for all of them at once. Whoever clears them
    /// takes them from everybody else.
    SoftDirty,
}

/// Whether this kernel keeps soft-dirty bits: a page that was just made has its own.
pub fn keeps_soft_dirty() -> SysResult<bool> {
    let page = Pages::new(1)?;
    page.touch(0);
    let mut found = Vec::new();
    let (bit, none) = (PageKind::SOFT_DIRTY, PageKind::empty());
    let query = Query { all: bit, any: none, inverted: none, report: bit };
    PageMap::open(Pid::this())?.scan(page.start, page.start + page.len, query, &mut found)?;
    Ok(!found.is_empty())
}

/// Whether this kernel has PAGEMAP_SCAN.
pub fn has_scan() -> SysResult<bool> {
    let page = Pages::new(1)?;
    let mut map = PageMap::open(Pid::this())?;
    map.scan(page.start, page.start + page.len, WRITTEN, &mut Vec::new())?;
    Ok(map.has_scan())
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

/// Pages that were written. Without asking for pages that are there, all that are not would count as written too, and the
/// kernel would fill page tables with marks for them: gigabytes of tables for a large area that is hardly used.
const WRITTEN: Query = Query {
    all: PageKind::WRITTEN,
    any: PageKind::PRESENT.union(PageKind::SWAPPED),
    inverted: PageKind::empty(),
    report: PageKind::WRITTEN,
};

/// The page map of one process.
#[derive(Debug)]
pub struct PageMap {
    file: File,
    pid: Pid,
    vector: Vec<Region>,
    /// Kinds that this kernel knows.
    known: PageKind,
    marks: Marks,
    /// What does the work where the kernel has no PAGEMAP_SCAN.
    entries: Option<Entries>,
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
            marks: Marks::Userfaultfd,
            entries: None,
        })
    }

    /// With these marks for pages that were written: to be tracked (`PageKind::WP_ALLOWED`) and to be written are asked and
    /// told of in the same way.
    #[must_use]
    pub fn with_marks(self, marks: Marks) -> Self {
        Self { marks, ..self }
    }

    /// Whether the kernel has not refused PAGEMAP_SCAN so far.
    pub fn has_scan(&self) -> bool {
        self.entries.is_none()
    }

    /// The runs of pages between `start` and `end` that match, ascending, appended to `found`.
    pub fn scan(&mut self, start: u64, end: u64, query: Query, found: &mut Vec<Region>) -> SysResult<()> {
        self.walk((start, end), query, How::Look, found)
    }

    /// The same; what is found in areas that are registered with a userfaultfd in the mode WP_ASYNC is armed in the step that
    /// finds it. Soft-dirty bits are left for [`clear`](Self::clear).
    pub fn scan_and_arm(&mut self, start: u64, end: u64, query: Query, found: &mut Vec<Region>) -> SysResult<()> {
        if self.marks == Marks::SoftDirty {
            return self.scan(start, end, query, found);
        }
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
    /// by this call or by the next. With soft-dirty bits the process must stand still.
    pub fn fetch_written(&mut self, found: &mut Vec<Region>) -> SysResult<()> {
        self.walk((0, ADDRESSES_END), WRITTEN, How::Arm, found)?;
        self.clear()
    }

    /// The same, without arming anything.
    pub fn find_written(&mut self, found: &mut Vec<Region>) -> SysResult<()> {
        self.walk((0, ADDRESSES_END), WRITTEN, How::Look, found)
    }

    /// Arms all pages of a process that stands still, where its writes are told by soft-dirty bits.
    pub fn clear(&self) -> SysResult<()> {
        /// Of Documentation/admin-guide/mm/soft-dirty.rst.
        const SOFT_DIRTY: &str = "4";
        if self.marks == Marks::Userfaultfd {
            return Ok(());
        }
        let path = format!("/proc/{}/clear_refs", self.pid);
        std::fs::write(&path, SOFT_DIRTY).during("write", &path)
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

    fn walk(&mut self, range: (u64, u64), query: Query, how: How, found: &mut Vec<Region>) -> SysResult<()> {
        if self.marks == Marks::Userfaultfd {
            return self.walk_as_asked(range, query, how, found);
        }
        let Some(asked) = query.of_soft_dirty() else { return Ok(()) };
        let how = if how == How::Arm { How::Look } else { how };
        let before = found.len();
        self.walk_as_asked(range, asked, how, found)?;
        let tracked = query.report & PageKind::WP_ALLOWED;
        for region in &mut found[before..] {
            let mut kind = PageKind::from_bits_retain(region.categories) | tracked;
            kind.set(PageKind::WRITTEN, kind.contains(PageKind::SOFT_DIRTY));
            region.categories = (kind - PageKind::SOFT_DIRTY).bits();
        }
        Ok(())
    }

    fn walk_as_asked(&mut self, range: (u64, u64), query: Query, how: How, found: &mut Vec<Region>) -> SysResult<()> {
        if self.entries.is_none() {
            match self.scan_with_ioctl(range, query, how, found) {
                // fs/ioctl.c, vfs_ioctl(): the file takes none.
                Err(err) if err.errno == Errno::ENOTTY => self.entries = Some(Entries::new(self.pid)),
                done => return done,
            }
        }
        match &mut self.entries {
            Some(entries) => entries.walk(&self.file, range, query, how == How::First, found),
            None => Ok(()),
        }
    }

    fn scan_with_ioctl(
        &mut self,
        (start, end): (u64, u64),
        query: Query,
        how: How,
        found: &mut Vec<Region>,
    ) -> SysResult<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::survey::PAGE;

    const NONE: PageKind = PageKind::empty();
    const THERE: PageKind = PageKind::PRESENT.union(PageKind::SWAPPED);
    const OWN: PageKind = PageKind::FILE.union(PageKind::PFN_ZERO);

    /// What is found by the ioctl, and by reading entries.
    fn both(start: u64, end: u64, query: Query) -> [Vec<Region>; 2] {
        let mut map = PageMap::open(Pid::this()).expect("the page map");
        let mut scanned = Vec::new();
        map.scan(start, end, query, &mut scanned).expect("a scan");
        assert!(map.entries.is_none(), "this kernel has no PAGEMAP_SCAN");
        map.entries = Some(Entries::new(Pid::this()));
        let mut read = Vec::new();
        map.scan(start, end, query, &mut read).expect("entries");
        [scanned, read]
    }

    fn pages(query: Query, pages: &Pages) -> u64 {
        let [scanned, read] = both(pages.start, pages.start + pages.len, query);
        assert_eq!(scanned, read, "{query:?}");
        read.iter().map(|region| (region.end - region.start) / PAGE).sum()
    }

    #[test]
    fn entries_tell_what_the_ioctl_tells() {
        let queries = [
            Query { all: NONE, any: THERE, inverted: NONE, report: THERE | PageKind::FILE },
            Query { all: OWN, any: THERE, inverted: OWN, report: NONE },
            Query { all: PageKind::PFN_ZERO, any: THERE, inverted: PageKind::PFN_ZERO, report: THERE },
            Query { all: PageKind::PFN_ZERO, any: NONE, inverted: NONE, report: PageKind::PFN_ZERO },
        ];
        let small = Pages::new(1000).expect("memory");
        small.advise(libc::MADV_NOHUGEPAGE).expect("advice");
        (0..1000).step_by(3).for_each(|page| small.touch(page));
        assert!((1..1000).step_by(7).all(|page| small.look(page) <= 1));
        let huge = Pages::new(2048).expect("memory");
        huge.advise(libc::MADV_HUGEPAGE).expect("advice");
        huge.look(1000);
        let zeros = pages(queries[3], &huge);
        assert!(zeros == 1 || zeros == 512, "{zeros} pages of zeros");
        huge.touch(2047 - 512);
        for query in queries {
            assert!(pages(query, &small) > 50, "{query:?}");
            pages(query, &huge);
        }
        // Of a file, there for sure while it runs.
        let code = both as *const () as u64 & !(PAGE - 1);
        let [scanned, read] = both(code, code + PAGE, queries[0]);
        assert_eq!((scanned.len(), &scanned), (1, &read));
    }

    /// All of memory is read by its areas; they cannot be compared page by page while other tests run.
    #[test]
    fn all_areas_are_found() {
        let query = Query { all: NONE, any: THERE, inverted: NONE, report: NONE };
        let written = Pages::new(3).expect("memory");
        written.touch(1);
        let at = written.start + PAGE;
        for found in both(0, ADDRESSES_END, query) {
            assert!(found.iter().any(|region| (region.start..region.end).contains(&at)));
        }
    }

    #[test]
    fn without_registering_every_page_is_tracked_by_its_bit() {
        let tracked = PageKind::WP_ALLOWED;
        let untracked = Query { all: tracked, any: THERE, inverted: tracked, report: NONE };
        assert_eq!(untracked.of_soft_dirty(), None);
        let asked =
            Query { all: NONE, any: THERE, inverted: NONE, report: tracked | PageKind::WRITTEN }.of_soft_dirty();
        assert_eq!(asked.map(|query| query.report), Some(PageKind::SOFT_DIRTY));
        assert_eq!(WRITTEN.of_soft_dirty().map(|query| query.all), Some(PageKind::SOFT_DIRTY));
    }
}
