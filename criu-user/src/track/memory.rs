//! The memory of one process: which pages were written since the last image.
//!
//! A *look* finds the pages written since the look before, and protects them again in the same step, while the process
//! runs. What looks have found is kept in a set until an image takes it. Pages of areas that are not registered yet (new
//! ones, ones that were moved, all after execve(2)) are in no look, and whoever reads the page map at the end sees that
//! they cannot be trusted; the next look registers them, and counts all that is in them as written.
//!
//! Soft-dirty bits need no registering, but cannot be read and cleared in one step: they are cleared for an image only, while
//! the process stands still.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::TrackError;
use super::install::install;
use super::report::RECENT;
use crate::freeze::{self, Frozen, Release};
use crate::kernel::page_set::PageSet;
use crate::kernel::pagemap::{Marks, PageKind, PageMap, Query, Region};
use crate::kernel::proc::{KeyValues, Shown};
use crate::kernel::survey::{self, VmFlags, Vma};
use crate::kernel::uffd::{Registered, WriteWatch};

/// Pages that are there and whose writes nobody tracks. Areas that are tracked are passed over as a whole; and whether a
/// page is a file's is not asked, for the kernel would look at every `struct page`.
const UNTRACKED: Query = Query {
    all: PageKind::PFN_ZERO.union(PageKind::WP_ALLOWED),
    any: PageKind::PRESENT.union(PageKind::SWAPPED),
    inverted: PageKind::PFN_ZERO.union(PageKind::WP_ALLOWED),
    report: PageKind::empty(),
};

/// What a look is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To tell what is written.
    Report,
    /// An image, whose successor is to find what is written from here on. With soft-dirty bits, the tree stands still.
    Image,
}

/// What one look found.
#[derive(Debug, Default, Clone, Copy)]
pub struct Look {
    /// Pages written since the look before. In the first look nothing is known of when they were written: none.
    pub written: u64,
    /// Of these, pages that were also written before the look before: the working set shows in them.
    pub again: u64,
    /// For how long the process had to be stopped, if it had.
    pub stopped: Duration,
    /// How much of the look went into bringing the means of tracking in, which is done once.
    pub installing: Duration,
}

impl Look {
    /// Lets a process go on that stood still for the look.
    fn let_go(&mut self, still: Option<Frozen>) {
        self.stopped += still.map_or(Duration::ZERO, |frozen| frozen.release(Release::Resume));
    }
}

/// The tracked memory of a process.
#[derive(Debug)]
pub struct Memory {
    /// The process.
    pub pid: Pid,
    /// When it began, in clock ticks since boot.
    pub start_time: u64,
    /// Why its memory is not tracked.
    pub untracked: Option<String>,
    /// How many areas it had in the last look.
    pub areas: u64,
    /// What tells which pages were written.
    pub marks: Marks,
    /// The root of another tracked tree that it belongs to, where two would take the marks from each other unseen.
    rival: Option<Pid>,
    watch: Option<WriteWatch>,
    /// Pages whose soft-dirty bits the last look has found; `None` before the first.
    seen: Option<PageSet>,
    /// Written since the last image.
    written: PageSet,
    /// Handed over for an image that is not complete yet.
    pending: Option<PageSet>,
    /// Written in each of the last looks, the latest last.
    recent: VecDeque<PageSet>,
    /// How many regions the last page map walk gave; room for the next.
    regions: Vec<Region>,
}

impl Memory {
    /// Begins with a process of which nothing is known yet.
    pub fn new(pid: Pid, start_time: u64, marks: Marks, rival: Option<Pid>) -> Self {
        Self {
            pid,
            start_time,
            untracked: None,
            areas: 0,
            marks,
            rival,
            watch: None,
            seen: None,
            written: PageSet::default(),
            pending: None,
            recent: VecDeque::new(),
            regions: Vec::new(),
        }
    }

    /// Looks once. Nothing is found in a process that has ended.
    pub fn look(&mut self, purpose: Purpose) -> Result<Look, TrackError> {
        let Some(shown) = Shown::find(self.pid) else { return Ok(Look::default()) };
        match self.marks {
            Marks::Userfaultfd => self.look_with_watch(shown),
            Marks::SoftDirty => self.look_at_bits(shown, purpose),
        }
    }

    fn look_with_watch(&mut self, shown: Shown) -> Result<Look, TrackError> {
        let mut look = Look::default();
        let mut latest = PageSet::default();
        let mut is_first = false;
        let mut map = PageMap::open(shown.by)?;
        // A process that has called execve(2) since has a memory that the watch knows nothing of.
        for _ in 0..2 {
            let mut still = None;
            if self.watch.is_none() {
                if let Some(why) = own_userfaultfd(shown.by).or_else(|| self.watched_by_others(&mut map)) {
                    self.untracked = Some(why);
                    return Ok(look);
                }
                // A walk over many pages is not what it stands still for.
                self.find_untracked(shown.by, &mut map)?;
                let begin = Instant::now();
                match install(self.pid) {
                    Ok(Some((watch, frozen))) => {
                        look.installing += begin.elapsed();
                        tracing::debug!(pid = self.pid.as_raw(), took = ?begin.elapsed(), "its writes are watched");
                        still = Some(frozen);
                        self.watch = Some(watch);
                        is_first = true;
                        self.untracked = None;
                    }
                    Ok(None) => return Ok(look),
                    Err(err) => {
                        self.untracked = Some(err.to_string());
                        return Err(err);
                    }
                }
                map = PageMap::open(shown.by)?;
            } else {
                self.find_untracked(shown.by, &mut map)?;
            }
            if self.regions.is_empty() {
                look.let_go(still);
                break;
            }
            // The kernel splits an area of which a part is registered, and a program may take it for one (mremap(2) over
            // both parts fails): what is registered must be whole areas, and these must not change meanwhile.
            if still.is_none() {
                match freeze::freeze_alone(self.pid, STILL) {
                    Ok(frozen) => still = Some(frozen),
                    // Its new pages go on to count as written.
                    Err(err) => {
                        tracing::debug!(pid = self.pid.as_raw(), %err, "its new areas are not registered yet");
                        break;
                    }
                }
            }
            let is_there = self.register_new(shown.by, &mut latest);
            look.let_go(still);
            if is_there? {
                break;
            }
            self.watch = None;
        }
        self.regions.clear();
        // A device that writes into a page does not care for its protection: none must be at it when that is put up.
        if reads_directly(shown.by) {
            let still = freeze::freeze_alone(self.pid, STILL)?;
            map.fetch_written(&mut self.regions)?;
            look.let_go(Some(still));
        } else {
            map.fetch_written(&mut self.regions)?;
        }
        latest.add_regions(&self.regions);
        self.written.unite(&latest);
        if is_first {
            self.recent.clear();
        } else {
            self.remember(latest, &mut look);
        }
        Ok(look)
    }

    fn look_at_bits(&mut self, shown: Shown, purpose: Purpose) -> Result<Look, TrackError> {
        let mut look = Look::default();
        let mut map = PageMap::open(shown.by)?.with_marks(Marks::SoftDirty);
        let rival = |root| format!("the session of process {root}, to whose tree it belongs, uses its soft-dirty bits");
        self.untracked = self.rival.map(rival).or_else(|| own_userfaultfd(shown.by));
        if self.untracked.is_some() {
            self.seen = None;
            return Ok(look);
        }
        if self.seen.is_none() {
            // Somebody may have cleared bits before.
            self.find_untracked(shown.by, &mut PageMap::open(shown.by)?)?;
            self.written.add_regions(&self.regions);
        } else {
            self.areas = survey::layout_of(shown.by)?.len() as u64;
        }
        self.regions.clear();
        // After execve(2) all pages are new, and have their bits.
        match purpose {
            Purpose::Report => map.find_written(&mut self.regions)?,
            Purpose::Image => map.fetch_written(&mut self.regions)?,
        }
        let mut latest = PageSet::default();
        latest.add_regions(&self.regions);
        self.written.unite(&latest);
        let now = if purpose == Purpose::Image { PageSet::default() } else { latest.clone() };
        if let Some(seen) = self.seen.replace(now) {
            latest.subtract(&seen);
            self.remember(latest, &mut look);
        }
        Ok(look)
    }

    /// Remembers what was written since the look before.
    fn remember(&mut self, latest: PageSet, look: &mut Look) {
        look.written = latest.len();
        look.again = self.recent.back().map_or(0, |before| latest.common(before));
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(latest);
    }

    /// Two who look at the same pages would take them from each other: what one of them has found written, and armed, the
    /// other never sees. A session that was killed a moment ago may still be on its way out.
    fn watched_by_others(&self, map: &mut PageMap) -> Option<String> {
        const WHY: &str = "somebody else tracks its memory: the session of another tree that it belongs to, or whoever \
                           holds a userfaultfd of it";
        let end = Instant::now() + if self.untracked.is_none() { GOING } else { Duration::ZERO };
        while map.is_watched().unwrap_or(false) {
            if Instant::now() >= end {
                return Some(WHY.to_owned());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    /// Finds pages that are not tracked, into `regions`.
    fn find_untracked(&mut self, by: Pid, map: &mut PageMap) -> Result<(), TrackError> {
        let areas = survey::layout_of(by)?;
        self.areas = areas.len() as u64;
        self.regions.clear();
        for (start, end) in stretches(&areas) {
            map.scan(start, end, UNTRACKED, &mut self.regions)?;
        }
        Ok(())
    }

    /// Registers areas with pages that were found not to be tracked, and counts these as written. Tells whether the watch
    /// still has a memory to watch. The process must stand still.
    ///
    /// It ran when they were found. A page that it has written since is in no set yet, but is not protected either: the walk
    /// that protects it tells of it. An area that has come into being since has to wait for the next look.
    fn register_new(&mut self, by: Pid, latest: &mut PageSet) -> Result<bool, TrackError> {
        let areas = survey::layout_of(by)?;
        let Some(watch) = &self.watch else { return Ok(false) };
        let mut regions = self.regions.iter().peekable();
        for area in areas.iter().filter(|area| is_tracked(area)) {
            let mut has_pages = false;
            while let Some(region) = regions.peek().copied().filter(|region| region.start < area.end) {
                if region.end > area.start {
                    latest.add(region.start.max(area.start), region.end.min(area.end));
                    has_pages = true;
                }
                // A run of pages may go on in the next area.
                if region.end > area.end {
                    break;
                }
                regions.next();
            }
            if !has_pages {
                continue;
            }
            match watch.register(area.start, area.end) {
                Registered::Yes => {}
                Registered::Gone => return Ok(false),
                // Nothing that can be watched: it goes on to count as written.
                Registered::No(errno) => {
                    tracing::debug!(pid = self.pid.as_raw(), start = format_args!("{:#x}", area.start), %errno, "an area is not watched");
                }
            }
        }
        Ok(true)
    }

    /// Whether it is tracked now: by a userfaultfd not if it has called execve(2) since it was looked at.
    pub fn is_watched(&self) -> bool {
        match self.marks {
            Marks::Userfaultfd => self.watch.as_ref().is_some_and(WriteWatch::has_memory),
            Marks::SoftDirty => self.seen.is_some(),
        }
    }

    /// Takes what was written since the last image, for the next one.
    pub fn cut(&mut self) -> PageSet {
        let set = std::mem::take(&mut self.written);
        self.pending = Some(set.clone());
        set
    }

    /// The image for which a cut was taken is complete.
    pub fn commit(&mut self) {
        self.pending = None;
    }

    /// The image for which a cut was taken has failed: it belongs to the next one.
    pub fn give_back(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.written.unite(&pending);
        }
    }

    /// Pages that the next image has to take, by what is known now.
    pub fn written(&self) -> u64 {
        self.written.len()
    }

    /// Pages written in the last ten looks.
    pub fn working_set(&self) -> u64 {
        let mut recent = self.recent.iter();
        let Some(mut all) = recent.next().cloned() else { return 0 };
        recent.for_each(|set| all.unite(set));
        all.len()
    }
}

/// Private memory, but for the kernel's own areas.
fn is_tracked(area: &Vma) -> bool {
    !area.flags.contains(VmFlags::SHARED)
        && !area.special().is_some_and(|name| name == "[vdso]" || name.starts_with("[vvar") || name == "[vsyscall]")
}

/// Stretches of addresses without anything that is not tracked, so that few scans serve many areas.
fn stretches(areas: &[Vma]) -> Vec<(u64, u64)> {
    let mut stretches: Vec<(u64, u64)> = Vec::new();
    let mut broken = true;
    for area in areas {
        match (is_tracked(area), stretches.last_mut()) {
            (false, _) => broken = true,
            (true, Some(last)) if !broken => last.1 = area.end,
            (true, _) => {
                stretches.push((area.start, area.end));
                broken = false;
            }
        }
    }
    stretches
}

/// How long a process may take to stand still: as long as a read from a disk.
pub(super) const STILL: Duration = Duration::from_secs(2);

/// How long a session that was killed may take to be gone: the kernel goes over all the pages that were protected.
const GOING: Duration = Duration::from_millis(500);

/// Whether a process has a file open with O_DIRECT. Its reads are over when it stands still: a thread in the middle of one
/// stops only afterwards.
fn reads_directly(by: Pid) -> bool {
    let entries = std::fs::read_dir(format!("/proc/{by}/fd")).into_iter().flatten().flatten();
    entries
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link.is_absolute()))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|fd| KeyValues::fdinfo(by, fd).ok()?.number("flags", 8).ok())
        .any(|flags| flags & libc::O_DIRECT as u64 != 0)
}

/// A process that uses userfaultfd(2) itself needs its areas for itself.
fn own_userfaultfd(by: Pid) -> Option<String> {
    let entries = std::fs::read_dir(format!("/proc/{by}/fd")).ok()?;
    let own = entries.flatten().find(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
    })?;
    Some(format!("it uses userfaultfd(2) itself (descriptor {})", own.file_name().to_string_lossy()))
}
