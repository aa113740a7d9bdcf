//! Writing the private memory of a process from a copy of it, while the program runs on.
//!
//! The freeze has only the making of the copy: which pages hold something is seen in the copy as well, whose page tables are
//! those of that instant. The copy writes its pages itself and drops what it has written, so that the program no longer has
//! to make a page its own before it writes to it. What a copy does not get (MADV_DONTFORK, MADV_WIPEONFORK) is read in
//! the freeze, and put in its place later: pages have to be in the order of their addresses.

use std::fs::File;
use std::os::fd::BorrowedFd;

use nix::unistd::Pid;

use crate::agent::copy::Orphans;
use crate::agent::{AgentError, Batch, Copied, Guest};
use crate::freeze::FrozenProcess;
use crate::image::proto::VmaEntry;
use crate::image::{ImageDir, ImageKind, PageCounts, PagesWriter};
use crate::kernel::mem::ProcessMemory;
use crate::kernel::pagemap::{PageKind, PageMap, Query, Region};
use crate::kernel::survey::{PAGE, VmFlags, Vma};
use crate::observer::Observer;

use super::super::ObjectError;
use super::super::file::Capture;
use super::dump::{
    CALL_BYTES, IOVECS, Pages, add_write, can_write_itself, check_written, guard, has_own_pages, own_pages, range,
};
use super::history::{CleanNow, Place};

/// Bytes that are read from outside at once.
const PIECE: u64 = 4 << 20;
/// Mappings that a copy gives up in one batch.
const UNMAPPED_AT_ONCE: usize = 1024;

/// What to look for: who wrote it is nobody's question here.
fn unasked(vma: &Vma) -> Query {
    Query { report: PageKind::GUARD, ..own_pages(vma) }
}

/// The memory of a process as it was at one instant.
#[derive(Debug)]
pub struct Snapshot {
    copy: Copied,
    vmas: Vec<Vma>,
    kept: Kept,
    /// What the parent image has.
    clean: CleanNow,
    by_itself: bool,
}

impl Snapshot {
    /// Takes it, of a process that stands still. [`AgentError::NoCopy`] where the process cannot be copied: it can still be
    /// written as it stands there.
    pub fn take(
        cx: &Capture<'_>,
        guest: &mut Guest<'_>,
        process: &FrozenProcess,
        vmas: &[Vma],
        orphans: Orphans,
        busy: BorrowedFd<'_>,
    ) -> Result<Self, ObjectError> {
        let kept = Kept::read(cx.dir, process, vmas)?;
        let by_itself = can_write_itself(cx, process.pid);
        let mut copy = guest.copy(orphans, busy)?;
        give_up_shared(&mut copy, vmas)?;
        // A copy has no marks of what was written.
        let mut map = PageMap::open(process.shown.by)?.with_marks(cx.past.history.marks_of(process.pid));
        let clean = cx.past.arm(process.pid, &mut map, vmas)?;
        Ok(Self { copy, vmas: vmas.to_vec(), kept, clean, by_itself })
    }

    /// The pid of the copy.
    pub fn pid(&self) -> Pid {
        self.copy.pid()
    }

    /// The process that it is of.
    pub fn of(&self) -> Pid {
        self.copy.of()
    }

    /// Writes it. Guarded pages are no content: they are entered in `guards`, in the way of the format.
    pub fn write(
        self,
        dir: &ImageDir,
        observer: &dyn Observer,
        pages_id: u32,
        guards: &mut Vec<VmaEntry>,
    ) -> Result<Pages, ObjectError> {
        let Self { mut copy, vmas, kept, clean, by_itself } = self;
        let mut clean = clean.walk();
        let mut map = PageMap::open(copy.pid())?;
        let image = PagesWriter::create(dir, ImageKind::Pagemap.id(copy.of().as_raw() as u64), pages_id)?;
        let mut scanned = 0;
        let mut writer = Writer { image, copy: &mut copy, observer, waiting: Vec::new(), bytes: 0 };
        for vma in &vmas {
            if vma.special() == Some("[vdso]") {
                writer.write_from_outside(Region { start: vma.start, end: vma.end, categories: 0 })?;
                continue;
            }
            if !has_own_pages(vma) {
                continue;
            }
            scanned += vma.len() / PAGE;
            if is_not_copied(vma) {
                guards.extend(kept.guards(vma).map(guard));
                writer.put(&kept, vma)?;
                continue;
            }
            let mut regions = Vec::new();
            map.scan(vma.start, vma.end, unasked(vma), &mut regions)?;
            let from_inside =
                by_itself && vma.flags.contains(VmFlags::READ) && !writer.copy.stands_in(vma.start, vma.end);
            for region in regions {
                if is_guard(&region) {
                    guards.push(guard(&region));
                    continue;
                }
                let mut parts = Vec::new();
                clean.divide(region, |part, place| parts.push((part, place)));
                for (part, place) in parts {
                    match (place, from_inside) {
                        (Place::Parent, _) => writer.leave_to_parent(part, vma)?,
                        (Place::Here, true) => writer.write_from_inside(part, vma)?,
                        (Place::Here, false) => writer.write_from_outside(part)?,
                    }
                }
            }
        }
        writer.flush()?;
        let PageCounts { present: written, in_parent } = writer.image.finish()?;
        Ok(Pages { scanned, written, in_parent })
    }
}

fn is_guard(region: &Region) -> bool {
    region.categories & PageKind::GUARD.bits() != 0
}

/// Whether a new process does not get the content of an area: madvise(2).
fn is_not_copied(vma: &Vma) -> bool {
    vma.flags.intersects(VmFlags::DONTCOPY | VmFlags::WIPEONFORK)
}

/// Has the copy unmap what it shares with the program: that counts who maps it (attached segments, seals of memory files),
/// and the copy is nobody.
fn give_up_shared(copy: &mut Copied, vmas: &[Vma]) -> Result<(), ObjectError> {
    let shared: Vec<&Vma> = vmas
        .iter()
        .filter(|vma| vma.flags.contains(VmFlags::SHARED) && !vma.flags.contains(VmFlags::DONTCOPY))
        .collect();
    for part in shared.chunks(UNMAPPED_AT_ONCE) {
        let mut batch = Batch::new();
        for vma in part {
            batch.try_call(libc::SYS_munmap, &[vma.start.into(), vma.len().into()]);
        }
        copy.run(&batch)?;
    }
    Ok(())
}

/// What is read in the freeze, because no copy gets it.
#[derive(Debug, Default)]
struct Kept {
    /// Where it is kept.
    file: Option<File>,
    /// Regions and where they stand in the file.
    regions: Vec<(Region, u64)>,
}

impl Kept {
    fn read(dir: &ImageDir, process: &FrozenProcess, vmas: &[Vma]) -> Result<Self, ObjectError> {
        let mut kept = Self::default();
        let Some(memory) = &process.memory else { return Ok(kept) };
        let mut wanted = vmas.iter().filter(|vma| has_own_pages(vma) && is_not_copied(vma)).peekable();
        if wanted.peek().is_none() {
            return Ok(kept);
        }
        let file = dir.scratch()?;
        let mut map = PageMap::open(process.shown.by)?;
        let mut end = 0;
        for vma in wanted {
            let mut regions = Vec::new();
            map.scan(vma.start, vma.end, unasked(vma), &mut regions)?;
            for region in regions {
                kept.regions.push((region, end));
                if !is_guard(&region) {
                    end = keep(memory, &region, &file, end)?;
                }
            }
        }
        kept.file = Some(file);
        Ok(kept)
    }

    fn of(&self, vma: &Vma) -> impl Iterator<Item = &(Region, u64)> {
        let (start, end) = (vma.start, vma.end);
        self.regions.iter().filter(move |(region, _)| start <= region.start && region.end <= end)
    }

    fn guards(&self, vma: &Vma) -> impl Iterator<Item = &Region> {
        self.of(vma).map(|(region, _)| region).filter(|region| is_guard(region))
    }
}

/// Copies a region to the end of a file; gives back where the end is then.
fn keep(memory: &ProcessMemory, region: &Region, file: &File, mut end: u64) -> Result<u64, ObjectError> {
    let mut start = region.start;
    while start < region.end {
        let len = (region.end - start).min(PIECE);
        crate::kernel::fd::write_all_at(file, &memory.read(start, len as usize)?, end)?;
        start += len;
        end += len;
    }
    Ok(end)
}

/// Pages on their way from the copy into the image.
struct Writer<'c> {
    image: PagesWriter,
    copy: &'c mut Copied,
    observer: &'c dyn Observer,
    /// What the copy is to write next: where, how much, and whether its area goes on from the one before.
    waiting: Vec<Piece>,
    /// How many bytes that is.
    bytes: u64,
}

/// A piece of an area.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: u64,
    len: u64,
    /// Start of its area.
    area: u64,
    place: Place,
}

impl Writer<'_> {
    /// The place for a region in the image.
    fn place(&mut self, start: u64, len: u64) -> Result<u64, ObjectError> {
        Ok(self.image.append(range(start, len)?)?)
    }

    /// What was kept of an area.
    fn put(&mut self, kept: &Kept, vma: &Vma) -> Result<(), ObjectError> {
        self.flush()?;
        let Some(file) = &kept.file else { return Ok(()) };
        for (region, from) in kept.of(vma).filter(|(region, _)| !is_guard(region)) {
            let len = region.end - region.start;
            let offset = self.place(region.start, len)?;
            crate::kernel::fd::copy(file, *from, self.image.pages(), offset, len)?;
            self.observer.moved(len);
        }
        Ok(())
    }

    /// What the copy cannot read itself, or must not show as it is: the agent stands in it.
    fn write_from_outside(&mut self, region: Region) -> Result<(), ObjectError> {
        self.flush()?;
        let mut start = region.start;
        while start < region.end {
            let len = (region.end - start).min(PIECE);
            let mut bytes = self.copy.memory().read(start, len as usize)?;
            self.copy.hide(start, &mut bytes);
            let offset = self.place(start, len)?;
            crate::kernel::fd::write_all_at(self.image.pages(), &bytes, offset)?;
            self.observer.moved(len);
            start += len;
        }
        Ok(())
    }

    /// What the copy writes itself, many regions in one call.
    fn write_from_inside(&mut self, region: Region, vma: &Vma) -> Result<(), ObjectError> {
        let mut start = region.start;
        while start < region.end {
            let len = (region.end - start).min(CALL_BYTES - self.bytes);
            self.waiting.push(Piece { start, len, area: vma.start, place: Place::Here });
            self.bytes += len;
            start += len;
            if self.waiting.len() == IOVECS || self.bytes == CALL_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// What the parent has. It is dropped with what is written before and after it.
    fn leave_to_parent(&mut self, region: Region, vma: &Vma) -> Result<(), ObjectError> {
        let (start, len) = (region.start, region.end - region.start);
        self.waiting.push(Piece { start, len, area: vma.start, place: Place::Parent });
        if self.waiting.len() == IOVECS { self.flush() } else { Ok(()) }
    }

    /// Has the copy write what waits, and drop it.
    fn flush(&mut self) -> Result<(), ObjectError> {
        let pieces = std::mem::take(&mut self.waiting);
        let bytes = std::mem::take(&mut self.bytes);
        if pieces.is_empty() {
            return Ok(());
        }
        let offset = self.image.end();
        let mut vector: Vec<(u64, u64)> = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            if piece.place == Place::Here {
                self.place(piece.start, piece.len)?;
                vector.push((piece.start, piece.len));
            } else {
                self.image.in_parent(range(piece.start, piece.len)?)?;
            }
        }
        let mut batch = Batch::new();
        let write = match vector.is_empty() {
            true => None,
            false => Some(add_write(&mut batch, self.copy.lend(self.image.pages())?, &vector, offset)),
        };
        // Between the pieces of one area is nothing that is still to be written.
        for pieces in pieces.chunk_by(|a, b| a.area == b.area) {
            let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { continue };
            let len = last.start + last.len - first.start;
            batch.try_call(libc::SYS_madvise, &[first.start.into(), len.into(), libc::MADV_DONTNEED.into()]);
        }
        let of = self.copy.of();
        let outcome = self.copy.run(&batch).map_err(|err| match err {
            AgentError::Gone { .. } => ObjectError::CopyGone { pid: of.as_raw() },
            other => other.into(),
        })?;
        if let Some(write) = write {
            check_written(outcome.ret(write), bytes, of, self.image.pages_path())?;
        }
        self.observer.moved(bytes);
        Ok(())
    }
}
