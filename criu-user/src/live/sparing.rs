//! Which processes of a live dump need no copy.
//!
//! To make a copy the kernel goes over every page of a process. Where the parent images have nearly all of them, it takes
//! less to write the others in the freeze.

use std::collections::HashSet;

use nix::unistd::Pid;
use tracing::{debug, info};

use super::Manner;
use crate::kernel::SysResult;
use crate::kernel::pagemap::{PageKind, PageMap, Query};
use crate::kernel::proc::Shown;
use crate::kernel::survey::{self, PAGE, VmFlags, Vma};
use crate::object::memory::{Clean, History, Place, has_own_pages, own_pages};
use crate::track::predict::Costs;

/// Pages of a process that runs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Pages {
    /// That a dump would write.
    to_write: u64,
    /// Of usual size.
    small: u64,
    /// That are parts of huge pages.
    huge: u64,
}

/// Microseconds that copying takes, at least: the new process, and all that it gives up.
const COPY: f64 = 500.0;
/// Microseconds for each page, and for each part of a huge one, of which the kernel copies 512 in one.
const COPY_SMALL: f64 = 0.08;
const COPY_HUGE: f64 = 1.0 / 512.0;
/// Microseconds to find a page that has not to be written.
const LOOK_SMALL: f64 = 0.012;

impl Pages {
    /// Whether they are written in less time than a copy takes.
    fn are_few(self, costs: &Costs) -> bool {
        let (small, huge) = (self.small as f64, self.huge as f64);
        let copying = COPY + COPY_SMALL * small + COPY_HUGE * huge;
        costs.of_writing(self.to_write) + LOOK_SMALL * small <= copying
    }

    /// Counts those of a process, of which `clean` are in the parent images.
    fn count(shown: Shown, mut clean: Clean<'_>) -> SysResult<Self> {
        let mut pages = Self::default();
        let mut map = PageMap::open(shown.by)?.with_marks(clean.marks);
        let mut regions = Vec::new();
        // The page map ends before the last one.
        let has_pages = |area: &&Vma| has_own_pages(area) && area.special() != Some("[vsyscall]");
        for area in survey::layout_of(shown.by)?.iter().filter(has_pages) {
            let own = own_pages(area);
            regions.clear();
            map.scan(area.start, area.end, Query { report: own.report | PageKind::HUGE, ..own }, &mut regions)?;
            for &region in &regions {
                let kind = PageKind::from_bits_retain(region.categories);
                let count = (region.end - region.start) / PAGE;
                if kind.contains(PageKind::GUARD) {
                    continue;
                }
                *(if kind.contains(PageKind::HUGE) { &mut pages.huge } else { &mut pages.small }) += count;
                if area.flags.contains(VmFlags::HUGETLB) {
                    pages.to_write += count;
                    continue;
                }
                clean.split(region, |part, place| {
                    pages.to_write += if place == Place::Here { (part.end - part.start) / PAGE } else { 0 };
                });
            }
        }
        Ok(pages)
    }
}

/// Those of the tracked processes that need no copy, by what they have written until now. A copy is made where that is not
/// known.
pub fn spared(manner: Manner, tracked: &[(Pid, u64)], history: &History) -> HashSet<Pid> {
    if manner == Manner::Copies {
        return HashSet::new();
    }
    let costs = Costs::of_this_machine();
    let need_none = tracked.iter().map(|&(pid, _)| pid).filter(|&pid| {
        let Some(shown) = Shown::find(pid).filter(|_| history.has(pid)) else { return false };
        match Pages::count(shown, history.of(pid)) {
            Ok(pages) => {
                let spared = manner == Manner::Rounds || pages.are_few(&costs);
                info!(pid = pid.as_raw(), to_write = pages.to_write, spared, "written since the parent");
                spared
            }
            Err(err) => {
                debug!(pid = pid.as_raw(), %err, "it cannot be told how much of it was written");
                false
            }
        }
    });
    need_none.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_made_where_much_was_written() {
        let costs = Costs::default();
        let two_gigabytes = Pages { to_write: 5_000, small: 1 << 19, huge: 0 };
        assert!(two_gigabytes.are_few(&costs));
        assert!(!Pages { to_write: 100_000, ..two_gigabytes }.are_few(&costs));
        // The same of huge pages is copied in two milliseconds.
        let huge = Pages { to_write: 1_000, small: 0, huge: 1 << 19 };
        assert!(huge.are_few(&costs));
        assert!(!Pages { to_write: 5_000, ..huge }.are_few(&costs));
        // So is a small process.
        assert!(!Pages { to_write: 1_000, small: 1_000, huge: 0 }.are_few(&costs));
    }
}
