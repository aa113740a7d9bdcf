//! Writing the private memory of a process.

use std::path::Path;

use nix::errno::Errno;
use nix::unistd::Pid;
use tracing::debug;

use crate::agent::{Batch, CallId, Guest};
use crate::freeze::FrozenProcess;
use crate::image::proto::VmaEntry;
use crate::image::{ImageKind, PageCounts, PageRange, PagesWriter, VmaStatus};
use crate::kernel::mem::ProcessMemory;
use crate::kernel::pagemap::{PageKind, PageMap, Query, Region};
use crate::kernel::survey::{PAGE, VmFlags, Vma};
use crate::observer::Observer;

use super::super::ObjectError;
use super::super::file::Capture;
use super::ahead::{How, LookAhead};
use super::area::is_private;
use super::history::{Clean, Place};

/// I/O vectors that one call takes: IOV_MAX.
pub(super) const IOVECS: usize = 1024;
/// Bytes that one call moves: the kernel stops at MAX_RW_COUNT, a page below 2 GiB. These are far fewer: whoever watches
/// wants to see progress.
pub(super) const CALL_BYTES: u64 = 64 << 20;

/// What a dump of memory came to.
#[derive(Debug, Default, Clone, Copy)]
pub struct Pages {
    /// Pages looked at.
    pub scanned: u64,
    /// Pages written.
    pub written: u64,
    /// Pages left in the parent image.
    pub in_parent: u64,
}

impl Pages {
    /// Adds those of another part.
    pub fn add(&mut self, part: Pages) {
        self.scanned += part.scanned;
        self.written += part.written;
        self.in_parent += part.in_parent;
    }
}

/// About how many bytes of private memory a process has: of those in memory, the ones that are no file's.
pub fn estimate(pid: Pid) -> u64 {
    let text = crate::kernel::proc::read_text(&format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: Vec<u64> = text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
    pages.get(1).zip(pages.get(2)).map_or(0, |(resident, shared)| resident.saturating_sub(*shared) * PAGE)
}

/// Pages that hold what nothing else does: in memory or swapped out, not the file's own, not the zero page. Pages that
/// madvise(2) guards come along and are told apart, and so is what was written since it was armed.
const OWN_PAGES: Query = Query {
    all: PageKind::FILE.union(PageKind::PFN_ZERO),
    any: PageKind::PRESENT.union(PageKind::SWAPPED).union(PageKind::GUARD),
    inverted: PageKind::FILE.union(PageKind::PFN_ZERO),
    report: PageKind::GUARD.union(PageKind::WRITTEN).union(PageKind::WP_ALLOWED),
};

/// The same where no page is a file's: to tell that of a page the kernel looks at its `struct page`, which is 30 ms for a
/// gigabyte.
const ANONYMOUS_PAGES: Query =
    Query { all: PageKind::PFN_ZERO, any: OWN_PAGES.any, inverted: PageKind::PFN_ZERO, report: OWN_PAGES.report };

/// The same of huge pages from hugetlbfs, which are never swapped out. What looks so is a page that was protected by
/// userfaultfd(2) and given up since (mm/hugetlb.c, __unmap_hugepage_range).
const HUGE_PAGES: Query = Query { any: PageKind::PRESENT.union(PageKind::GUARD), ..OWN_PAGES };

/// Whether a page of an area counts as unwritten though it was given up (MADV_DONTNEED) and read again, as zeros: the mark of
/// its protection outlives the page (mm/hugetlb.c, hugetlb_no_page). Such an area is written whole.
fn hides_what_was_given_up(vma: &Vma) -> bool {
    vma.flags.contains(VmFlags::HUGETLB)
}

/// What to look for in an area.
pub fn own_pages(vma: &Vma) -> Query {
    match (vma.ino, vma.flags.contains(VmFlags::HUGETLB)) {
        (0, _) => ANONYMOUS_PAGES,
        (_, false) => OWN_PAGES,
        (_, true) => HUGE_PAGES,
    }
}

/// Writes the private memory of a process. Guarded pages are no content: they are entered in `guards`, in the way of
/// the format.
pub fn dump_private(
    cx: &mut Capture<'_>,
    guest: &mut Guest<'_>,
    process: &FrozenProcess,
    vmas: &[Vma],
    pages_id: u32,
    guards: &mut Vec<VmaEntry>,
) -> Result<Pages, ObjectError> {
    let pid = guest.pid();
    let memory =
        process.memory.as_ref().ok_or_else(|| ObjectError::contradiction(format!("pid {pid} has no memory")))?;
    let pages = PageMap::open(process.shown.by)?.with_marks(cx.past.history.marks_of(pid));
    let how = if cx.past.arms.contains(&pid) { How::Arming } else { How::Looking };
    let prepared = cx.past.prepared.take(process.shown.by);
    let image = PagesWriter::create_with(cx.dir, ImageKind::Pagemap.id(pid.as_raw() as u64), pages_id, prepared)?;
    let by_itself = can_write_itself(cx, pid);
    let clean = cx.past.history.of(pid);
    let copy = Copy { image, guest, memory, observer: cx.observer, waiting: Vec::new() };
    let mut work = Work { copy, clean, by_itself, guards };
    let mut ahead = LookAhead::new(pages, vmas, how);
    let scanned = work.write(vmas, &mut ahead)?;
    ahead.finish()?;
    debug!(pid = pid.as_raw(), scanning_us = ahead.took().as_micros() as u64, "its page map is read");
    let PageCounts { present: written, in_parent } = work.copy.finish()?;
    Ok(Pages { scanned, written, in_parent })
}

/// What a dump of memory goes through its areas with.
struct Work<'w, 'g, 'm> {
    copy: Copy<'g, 'm>,
    clean: Clean<'w>,
    by_itself: bool,
    guards: &'w mut Vec<VmaEntry>,
}

impl Work<'_, '_, '_> {
    /// Writes what the areas hold, or has it written, and says how many pages they have.
    fn write(&mut self, vmas: &[Vma], ahead: &mut LookAhead) -> Result<u64, ObjectError> {
        let mut scanned = 0;
        for vma in vmas {
            if vma.special() == Some("[vdso]") {
                // With it a restore can tell whether its kernel's vDSO is the same.
                self.copy.write_from_outside(Region { start: vma.start, end: vma.end, categories: 0 })?;
            }
            if !has_own_pages(vma) {
                continue;
            }
            scanned += vma.len() / PAGE;
            while let Some(regions) = ahead.regions(vma)? {
                regions.into_iter().try_for_each(|region| self.region(vma, region))?;
            }
        }
        Ok(scanned)
    }

    fn region(&mut self, vma: &Vma, region: Region) -> Result<(), ObjectError> {
        if region.categories & PageKind::GUARD.bits() != 0 {
            self.guards.push(guard(&region));
            return Ok(());
        }
        let copy = &mut self.copy;
        let inside = self.by_itself && vma.flags.contains(VmFlags::READ) && !copy.guest.stands_in(vma.start, vma.end);
        let mut outcome = Ok(());
        let mut part = |part: Region, place: Place| {
            if inside || place == Place::Parent {
                copy.waiting.push((part, place));
            } else if outcome.is_ok() {
                outcome = copy.write_from_outside(part);
            }
        };
        match hides_what_was_given_up(vma) {
            true => part(region, Place::Here),
            false => self.clean.split(region, part),
        }
        outcome
    }
}

/// Whether an area has pages that are its own and are to be written.
pub fn has_own_pages(vma: &Vma) -> bool {
    is_private(vma) && !vma.flags.intersects(VmFlags::PFNMAP | VmFlags::IO) && vma.special() != Some("[vdso]")
}

pub(super) fn guard(region: &Region) -> VmaEntry {
    VmaEntry {
        start: region.start,
        end: region.end,
        status: VmaStatus::GUARD.bits(),
        flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
        fd: -1,
        ..VmaEntry::default()
    }
}

/// A process with a limit on file sizes would be killed by SIGXFSZ for our writing, one in a full group for want of memory.
pub(super) fn can_write_itself(cx: &Capture<'_>, pid: Pid) -> bool {
    crate::kernel::proc::read_text(&format!("/proc/{pid}/limits"))
        .is_ok_and(|text| text.lines().any(|line| soft_limit(line, "Max file size") == Some("unlimited")))
        && !cx.past.crowded.has(pid)
}

/// The first of the two columns of `/proc/PID/limits`.
fn soft_limit<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.strip_prefix(name)?.split_ascii_whitespace().next()
}

/// Pages on their way into the image.
struct Copy<'g, 'm> {
    image: PagesWriter,
    guest: &'g mut Guest<'m>,
    memory: &'g ProcessMemory,
    observer: &'g dyn Observer,
    /// What the process is to write itself, collected so that one call serves many regions, and between that what is in
    /// the parent already.
    waiting: Vec<(Region, Place)>,
}

impl Copy<'_, '_> {
    /// The place for a region in the image.
    fn place(&mut self, start: u64, len: u64) -> Result<u64, ObjectError> {
        Ok(self.image.append(range(start, len)?)?)
    }

    /// Writes what the process cannot read, or must not show as it is: the agent stands in it just now.
    fn write_from_outside(&mut self, region: Region) -> Result<(), ObjectError> {
        /// Bytes that are copied at once.
        const PIECE: u64 = 4 << 20;
        self.write_from_inside()?;
        let mut start = region.start;
        while start < region.end {
            let len = (region.end - start).min(PIECE);
            let mut bytes = self.memory.read(start, len as usize)?;
            self.guest.hide(start, &mut bytes);
            let offset = self.place(start, len)?;
            crate::kernel::fd::write_all_at(self.image.pages(), &bytes, offset)?;
            self.observer.moved(len);
            start += len;
        }
        Ok(())
    }

    /// Has the process write all that waits.
    fn write_from_inside(&mut self) -> Result<(), ObjectError> {
        let mut vector: Vec<(u64, u64)> = Vec::new();
        let mut bytes = 0;
        for (region, place) in std::mem::take(&mut self.waiting) {
            if place == Place::Parent {
                self.image.in_parent(range(region.start, region.end - region.start)?)?;
                continue;
            }
            let mut start = region.start;
            while start < region.end {
                let len = (region.end - start).min(CALL_BYTES - bytes);
                self.place(start, len)?;
                vector.push((start, len));
                bytes += len;
                start += len;
                if vector.len() == IOVECS || bytes == CALL_BYTES {
                    self.write_vector(&vector, bytes)?;
                    vector.clear();
                    bytes = 0;
                }
            }
        }
        if vector.is_empty() { Ok(()) } else { self.write_vector(&vector, bytes) }
    }

    /// Has the process write what was given its place last.
    fn write_vector(&mut self, vector: &[(u64, u64)], bytes: u64) -> Result<(), ObjectError> {
        let offset = self.image.end() - bytes;
        let fd = self.guest.lend(self.image.pages())?;
        let mut batch = Batch::new();
        let write = add_write(&mut batch, fd, vector, offset);
        let outcome = self.guest.run(&batch)?;
        check_written(outcome.ret(write), bytes, self.guest.pid(), self.image.pages_path())?;
        self.observer.moved(bytes);
        Ok(())
    }

    fn finish(mut self) -> Result<PageCounts, ObjectError> {
        self.write_from_inside()?;
        Ok(self.image.finish()?)
    }
}

/// Has the process write pieces of its memory (address, length) one behind the other into a file that it was lent.
pub(super) fn add_write(batch: &mut Batch, fd: i32, pieces: &[(u64, u64)], offset: u64) -> CallId {
    let iov: Vec<u8> = pieces.iter().flat_map(|(start, len)| [*start, *len]).flat_map(u64::to_le_bytes).collect();
    let iov = batch.bytes(&iov);
    batch.call(libc::SYS_pwritev, &[fd.into(), iov.into(), pieces.len().into(), offset.into(), 0u64.into()])
}

/// Makes an error of a write that did not write all.
pub(super) fn check_written(result: Result<u64, Errno>, bytes: u64, pid: Pid, file: &Path) -> Result<(), ObjectError> {
    let failed = |errno| Err(ObjectError::Memory { pid: pid.as_raw(), file: file.to_owned(), errno });
    match result {
        Ok(written) if written == bytes => Ok(()),
        // The kernel wrote a part before it met the obstacle: no room, mostly.
        Ok(_) => failed(Errno::ENOSPC),
        Err(errno) => failed(errno),
    }
}

/// The pages from `start` on.
pub(super) fn range(start: u64, len: u64) -> Result<PageRange, ObjectError> {
    PageRange::new(start, start + len)
        .ok_or_else(|| ObjectError::contradiction(format!("pages {start:#x}, {len} bytes")))
}
