//! What earlier images hold of a tree's memory and nobody has written since: it need not be read again.
//!
//! Made before the freeze from two things: which pages the parent image tells of, and which pages a tracking session saw
//! written since. In the freeze the page map has the last word: a page that was written after the session's last look, or
//! whose writes nobody tracked, is no longer clean.

use std::collections::{HashMap, HashSet};

use nix::unistd::Pid;

use super::crowded::Crowded;
use super::prepare::Prepared;
use crate::image::{ImageDir, ImageError, PageStore};
use crate::kernel::SysResult;
use crate::kernel::page_set::PageSet;
use crate::kernel::pagemap::{Marks, PageKind, PageMap, Query, Region};
use crate::kernel::survey::{PAGE, VmFlags, Vma};

use super::area::is_private;

/// What is known of the processes of a tree.
#[derive(Debug, Default)]
pub struct History {
    clean: HashMap<i32, Vec<(u64, u64)>>,
    /// What tells whose pages were written.
    marks: HashMap<Pid, Marks>,
}

impl History {
    /// Takes what `parent` has of each process, less what was written since.
    pub fn new(parent: &ImageDir, written: &[(Pid, PageSet)]) -> Result<Self, ImageError> {
        let store = PageStore::open(parent)?;
        let mut clean = HashMap::new();
        for (pid, written) in written {
            let map = match store.process(pid.as_raw() as u32) {
                Ok(map) => map,
                // It is younger than the image.
                Err(ImageError::Missing { .. }) => continue,
                Err(err) => return Err(err),
            };
            let mut pages = PageSet::default();
            map.runs().iter().for_each(|run| pages.add(run.range.start(), run.range.end()));
            pages.subtract(written);
            clean.insert(pid.as_raw(), pages.ranges());
        }
        Ok(Self { clean, ..Self::default() })
    }

    /// Says what tells whose pages were written.
    pub fn go_by(&mut self, marks: HashMap<Pid, Marks>) {
        self.marks = marks;
    }

    /// What tells whose pages were written.
    pub fn marks(&self) -> &HashMap<Pid, Marks> {
        &self.marks
    }

    /// What tells which pages of a process were written.
    pub fn marks_of(&self, pid: Pid) -> Marks {
        self.marks.get(&pid).copied().unwrap_or_default()
    }

    /// Whether there is anything to build on.
    pub fn is_empty(&self) -> bool {
        self.clean.is_empty()
    }

    /// Whether anything is known of a process.
    pub fn has(&self, pid: Pid) -> bool {
        self.clean.contains_key(&pid.as_raw())
    }

    /// How many pages of a process need not be written, as far as is known before it stands still.
    pub fn pages_of(&self, pid: Pid) -> u64 {
        self.clean.get(&pid.as_raw()).map_or(0, |ranges| ranges.iter().map(|(start, end)| (end - start) / PAGE).sum())
    }

    /// Forgets all processes but these.
    pub fn keep(&mut self, mut wanted: impl FnMut(Pid) -> bool) {
        self.clean.retain(|&pid, _| wanted(Pid::from_raw(pid)));
    }

    /// What is known of one process.
    pub fn of(&self, pid: Pid) -> Clean<'_> {
        let ranges = self.clean.get(&pid.as_raw()).map_or(&[][..], Vec::as_slice);
        Clean { ranges, marks: self.marks_of(pid) }
    }
}

/// What a dump knows of the tree's memory when it begins, and what it leaves behind.
#[derive(Debug, Default)]
pub struct Past {
    /// What need not be written.
    pub history: History,
    /// Processes whose pages are armed in the freeze, so that what is written from then on is found by the next image.
    pub arms: HashSet<Pid>,
    /// Files for pages that were made beforehand.
    pub prepared: Prepared,
    /// Who must not write its memory itself.
    pub crowded: Crowded,
}

/// Clean pages of one process, walked through from low addresses to high ones.
#[derive(Debug)]
pub struct Clean<'h> {
    ranges: &'h [(u64, u64)],
    /// What tells which of them were written since.
    pub marks: Marks,
}

/// Where the data of some pages is to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere yet: it has to be written.
    Here,
    /// In the parent image.
    Parent,
}

/// Clean pages of a process at one instant, for whoever comes later.
#[derive(Debug, Default)]
pub struct CleanNow(Vec<(u64, u64)>);

impl CleanNow {
    /// To be walked through.
    pub fn walk(&self) -> Clean<'_> {
        Clean { ranges: &self.0, marks: Marks::default() }
    }
}

impl Past {
    /// What the parent has of a process that stands still, by its page map, and arms its pages.
    pub fn arm(&self, pid: Pid, map: &mut PageMap, vmas: &[Vma]) -> SysResult<CleanNow> {
        /// Pages that are in no registered area. Those that are, are passed over area by area.
        const UNTRACKED: Query = Query {
            all: PageKind::WP_ALLOWED,
            any: PageKind::PRESENT.union(PageKind::SWAPPED),
            inverted: PageKind::WP_ALLOWED,
            report: PageKind::empty(),
        };
        if !self.arms.contains(&pid) {
            return Ok(CleanNow::default());
        }
        let mut not_clean = Vec::new();
        map.fetch_written(&mut not_clean)?;
        let Some(ranges) = self.history.clean.get(&pid.as_raw()) else { return Ok(CleanNow::default()) };
        let is_soft_dirty = self.history.marks_of(pid) == Marks::SoftDirty;
        for vma in vmas.iter().filter(|vma| is_private(vma)) {
            map.scan(vma.start, vma.end, UNTRACKED, &mut not_clean)?;
            // Nobody clears the bits of these pages, and not every kernel shows them (fs/proc/task_mmu.c).
            if is_soft_dirty && vma.flags.contains(VmFlags::HUGETLB) {
                not_clean.push(Region { start: vma.start, end: vma.end, categories: 0 });
            }
        }
        let (mut clean, mut others) = (PageSet::default(), PageSet::default());
        ranges.iter().for_each(|&(start, end)| clean.add(start, end));
        others.add_regions(&not_clean);
        clean.subtract(&others);
        Ok(CleanNow(clean.ranges()))
    }
}

impl Clean<'_> {
    /// Splits a run of pages, as the page map shows it, by where the data of each is. Runs come in the order of their
    /// addresses.
    pub fn split(&mut self, region: Region, mut part: impl FnMut(Region, Place)) {
        let tracked = PageKind::WP_ALLOWED.bits();
        let written = PageKind::WRITTEN.bits();
        if region.categories & tracked == 0 || region.categories & written != 0 {
            return part(region, Place::Here);
        }
        self.divide(region, part);
    }

    /// The same where what the page map has to say of the pages is in what is known already.
    pub fn divide(&mut self, region: Region, mut part: impl FnMut(Region, Place)) {
        let mut at = region.start;
        while at < region.end {
            while self.ranges.first().is_some_and(|range| range.1 <= at) {
                self.ranges = &self.ranges[1..];
            }
            let (start, end) = self.ranges.first().copied().unwrap_or((u64::MAX, u64::MAX));
            let (until, place) = if start <= at { (end, Place::Parent) } else { (start, Place::Here) };
            let until = until.min(region.end);
            part(Region { start: at, end: until, ..region }, place);
            at = until;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(ranges: &[(u64, u64)], regions: &[(u64, u64, PageKind)]) -> Vec<(u64, u64, Place)> {
        let mut clean = Clean { ranges, marks: Marks::default() };
        let mut parts = Vec::new();
        for &(start, end, kind) in regions {
            clean.split(Region { start, end, categories: kind.bits() }, |part, place| {
                parts.push((part.start, part.end, place));
            });
        }
        parts
    }

    #[test]
    fn only_what_is_tracked_unwritten_and_known_is_in_the_parent() {
        let clean = [(0x1000, 0x3000), (0x5000, 0x9000)];
        let tracked = PageKind::WP_ALLOWED;
        let written = PageKind::WP_ALLOWED | PageKind::WRITTEN;
        let (here, parent) = (Place::Here, Place::Parent);
        assert_eq!(
            split(&clean, &[(0, 0x6000, tracked), (0x6000, 0x7000, written), (0x7000, 0xa000, tracked)]),
            [
                (0, 0x1000, here),
                (0x1000, 0x3000, parent),
                (0x3000, 0x5000, here),
                (0x5000, 0x6000, parent),
                (0x6000, 0x7000, here),
                (0x7000, 0x9000, parent),
                (0x9000, 0xa000, here),
            ]
        );
        assert_eq!(split(&clean, &[(0x1000, 0x2000, PageKind::empty())]), [(0x1000, 0x2000, here)]);
        assert_eq!(split(&[], &[(0x1000, 0x2000, tracked)]), [(0x1000, 0x2000, here)]);
    }
}
