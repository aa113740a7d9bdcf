//! Planning an address space: areas are mapped, filled, protected, in this order.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::call;
use crate::image::proto::{MmEntry, VmaEntry};
use crate::image::{FoundRun, PageMap, PageRange, PageStore, VmaStatus};
use crate::kernel::SysError;
use crate::kernel::survey::PAGE;
use crate::plan::{Assist, Call, FileRef, KernelArea, Opened, Opener, Stage, TaskRef, Why};

use super::super::file::Planner;
use super::super::{ObjectError, shmem, sysv};
use super::dump::{CALL_BYTES, IOVECS};
use super::inherit::{self, Inherited};
use super::vdso;

/// MADV_GUARD_INSTALL of Linux 6.13.
const MADV_GUARD_INSTALL: i32 = 102;

/// An address space as its images tell it.
#[derive(Debug)]
pub struct Space {
    /// Its areas, ascending, each with the pages that it holds.
    pub areas: Vec<(VmaEntry, Vec<FoundRun>)>,
    /// Pages that must not be touched.
    pub guards: Vec<VmaEntry>,
    /// Where the pages are.
    pub pages: PageMap,
}

impl Space {
    /// Reads and checks it.
    pub fn read(cx: &Planner<'_>, pid: i32, mm: &MmEntry) -> Result<Self, ObjectError> {
        let (guards, areas): (Vec<_>, Vec<_>) =
            mm.vmas.iter().cloned().partition(|vma| vma.status & VmaStatus::GUARD.bits() != 0);
        check_areas(&areas)?;
        let pages = PageStore::open(cx.dir)?.process(pid as u32)?;
        let stray = |run: FoundRun| {
            ObjectError::contradiction(format!("page {:#x} of pid {pid} belongs to no area", run.range.start()))
        };
        let mut rest = pages.found()?.into_iter();
        let mut run = rest.next();
        let mut with_pages = Vec::with_capacity(areas.len());
        for vma in areas {
            let mut mine = Vec::new();
            while let Some(now) = run.filter(|run| run.range.start() < vma.end) {
                if now.range.start() < vma.start {
                    return Err(stray(now));
                }
                let (first, second) = split(now, vma.end);
                mine.push(first);
                run = second.or_else(|| rest.next());
            }
            with_pages.push((vma, mine));
        }
        match run {
            None => Ok(Self { areas: with_pages, guards, pages }),
            Some(run) => Err(stray(run)),
        }
    }
}

/// Neighbouring areas may have one run of pages.
pub(super) fn split(run: FoundRun, at: u64) -> (FoundRun, Option<FoundRun>) {
    let (start, end) = (run.range.start(), run.range.end());
    match (PageRange::new(start, at), PageRange::new(at, end)) {
        (Some(first), Some(second)) if at < end => (
            FoundRun { range: first, ..run },
            Some(FoundRun { range: second, offset: run.offset + (at - start), ..run }),
        ),
        _ => (run, None),
    }
}

fn check_areas(vmas: &[VmaEntry]) -> Result<(), ObjectError> {
    /// End of the addresses of a program: TASK_SIZE_MAX of arch/x86/include/asm/page_64_types.h.
    const END: u64 = (1 << 47) - PAGE;
    let mut last = 0;
    for vma in vmas {
        let vsyscall = vma.status & VmaStatus::VSYSCALL.bits() != 0;
        let aligned = vma.start.is_multiple_of(PAGE) && vma.end.is_multiple_of(PAGE) && vma.pgoff.is_multiple_of(PAGE);
        if !aligned || vma.start < last || vma.end <= vma.start || (vma.end > END && !vsyscall) {
            return Err(ObjectError::contradiction(format!("an area {:#x}-{:#x}", vma.start, vma.end)));
        }
        last = vma.end;
    }
    Ok(())
}

/// Plans the address space of a process.
pub fn plan(cx: &mut Planner<'_>, task: TaskRef, mm: &MmEntry) -> Result<(), ObjectError> {
    let pid = cx.plan.task(task).pid.as_raw();
    let space = Space::read(cx, pid, mm)?;
    let inherited = inherit::of(cx, task, &space)?;
    let mut work = Work::default();
    for (vma, runs) in &space.areas {
        vdso::check(cx, pid, vma, runs, &space.pages)?;
        cx.plan.used.push((vma.start, vma.end));
        if let Some(name) = kernel_name(vma) {
            let area = KernelArea { name: name.to_owned(), start: vma.start, len: vma.end - vma.start };
            cx.plan.task(task).kernel_areas.push(area);
        } else if vma.status & VmaStatus::VSYSCALL.bits() == 0 {
            match inherited.get(&vma.start) {
                Some(kept) => plan_kept(cx, task, vma, kept, &mut work),
                None => plan_area(cx, task, vma, runs, &mut work)?,
            }
        }
    }
    for area in &work.anonymous {
        let (start, len) = (area.start, area.end - area.start);
        let why = Why::Range(area.what, area.start, area.end);
        let map = call!(SYS_mmap(start, len, area.prot, area.flags, -1i64, 0u64), why).giving(start);
        cx.plan.push(task, Stage::Memory, map);
    }
    for advice in work.advice {
        cx.plan.push(task, Stage::Memory, advice);
    }
    fill(cx, task, &space, &work.fills)?;
    for protect in work.protects {
        cx.plan.push(task, Stage::Protect, protect);
    }
    for guard in &space.guards {
        let why = Why::Range("guarded pages", guard.start, guard.end);
        let len = guard.end - guard.start;
        cx.plan.push(task, Stage::Protect, call!(SYS_madvise(guard.start, len, MADV_GUARD_INSTALL), why));
    }
    cx.shelf.get::<inherit::Spaces>().0.insert(pid, space);
    Ok(())
}

/// What is done once all areas are there: pages lie in the image one after the other, whatever areas they belong to, and
/// so few calls fill all of them.
#[derive(Default)]
struct Work {
    anonymous: Vec<Anonymous>,
    advice: Vec<Call>,
    fills: Vec<FoundRun>,
    protects: Vec<Call>,
}

/// Anonymous memory to be mapped.
#[derive(Clone, Copy)]
struct Anonymous {
    start: u64,
    end: u64,
    prot: u32,
    flags: u32,
    what: &'static str,
}

impl Work {
    /// Neighbours that are mapped alike are one mapping to the kernel: one call makes them.
    fn anonymous(&mut self, area: Anonymous) {
        match self.anonymous.last_mut() {
            Some(last)
                if last.end == area.start && (last.prot, last.flags) == (area.prot, area.flags) && !is_stack(last) =>
            {
                last.end = area.end;
            }
            _ => self.anonymous.push(area),
        }
    }
}

/// A stack has its own lower end.
fn is_stack(area: &Anonymous) -> bool {
    area.flags & libc::MAP_GROWSDOWN as u32 != 0
}

/// The name of an area that is moved and not made.
fn kernel_name(vma: &VmaEntry) -> Option<&'static str> {
    if vma.status & VmaStatus::VDSO.bits() != 0 {
        Some("[vdso]")
    } else if vma.status & VmaStatus::VVAR.bits() != 0 {
        Some("[vvar]")
    } else {
        None
    }
}

/// The pages files that a process reads from: one for each dump of the chain.
#[derive(Default)]
struct PageFiles(Vec<Option<FileRef>>);

impl PageFiles {
    fn get(&mut self, cx: &mut Planner<'_>, pages: &PageMap, dump: usize) -> Result<FileRef, ObjectError> {
        if self.0.len() <= dump {
            self.0.resize(dump + 1, None);
        }
        if let Some(known) = self.0[dump] {
            return Ok(known);
        }
        let (file, path) =
            pages.pages(dump).ok_or_else(|| ObjectError::contradiction(format!("no dump {dump} in the chain")))?;
        let file = file.try_clone().map_err(|e| SysError::io("dup", path.display(), &e))?;
        let opened = cx.plan.open(OpenImage { file, path: path.to_owned() });
        self.0[dump] = Some(opened);
        Ok(opened)
    }
}

/// An image file that tasks read from.
#[derive(Debug)]
pub struct OpenImage {
    /// It is open already: images are validated before anything happens.
    pub file: File,
    /// For messages.
    pub path: PathBuf,
}

impl Opener for OpenImage {
    fn describe(&self) -> String {
        format!("image {}", self.path.display())
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.file.try_clone()?.into())
    }
}

fn plan_area(
    cx: &mut Planner<'_>,
    task: TaskRef,
    vma: &VmaEntry,
    runs: &[FoundRun],
    work: &mut Work,
) -> Result<(), ObjectError> {
    let len = vma.end - vma.start;
    let prot = if runs.is_empty() { vma.prot } else { vma.prot | libc::PROT_WRITE as u32 };
    let mut flags = (vma.flags & !(libc::MAP_LOCKED as u32)) | libc::MAP_FIXED_NOREPLACE as u32;
    let status = VmaStatus::from_bits_truncate(vma.status);
    let why = Why::Range(describe(status), vma.start, vma.end);
    if status.contains(VmaStatus::SYSVIPC) {
        sysv::plan_attach(cx, task, vma, why)?;
    } else if status.intersects(VmaStatus::FILE_PRIVATE | VmaStatus::FILE_SHARED | VmaStatus::ANON_SHARED) {
        let file = if status.contains(VmaStatus::ANON_SHARED) {
            flags &= !(libc::MAP_ANONYMOUS as u32);
            shmem::plan_object(cx, vma.shmid)?
        } else {
            cx.mapped_ref(vma.shmid as u32, vma.fdflags)?
        };
        let map = call!(SYS_mmap(vma.start, len, prot, flags, file, vma.pgoff), why).giving(vma.start);
        cx.plan.push(task, Stage::Memory, map);
    } else {
        work.anonymous(Anonymous { start: vma.start, end: vma.end, prot, flags, what: describe(status) });
    }
    let madv = vma.madv.unwrap_or(0);
    for advice in (0..64).filter(|n| madv & 1 << n != 0) {
        let why = format!("advice {advice} for {:#x}", vma.start);
        work.advice.push(call!(SYS_madvise(vma.start, len, advice), why));
    }
    work.fills.extend_from_slice(runs);
    if prot != vma.prot {
        let why = Why::At("protection of", vma.start);
        work.protects.push(call!(SYS_mprotect(vma.start, len, vma.prot), why));
    }
    plan_lock(cx, task, vma);
    Ok(())
}

/// A lock is not inherited, and what it brings in is not to count for the parent.
fn plan_lock(cx: &mut Planner<'_>, task: TaskRef, vma: &VmaEntry) {
    if vma.flags & libc::MAP_LOCKED as u32 != 0 {
        let why = Why::At("lock", vma.start);
        let how = if vma.lock_on_fault() { libc::MLOCK_ONFAULT } else { 0 };
        cx.plan.push(task, Stage::Process, call!(SYS_mlock2(vma.start, vma.end - vma.start, how), why));
    }
}

/// An area that the task was born with: only what differs is written.
fn plan_kept(cx: &mut Planner<'_>, task: TaskRef, vma: &VmaEntry, kept: &Inherited, work: &mut Work) {
    cx.plan.task(task).keep.push((vma.start, vma.end));
    for &(start, end) in &kept.dropped {
        let why = format!("pages from {start:#x} on that only the parent has");
        cx.plan.push(task, Stage::Memory, call!(SYS_madvise(start, end - start, libc::MADV_DONTNEED), why));
    }
    let len = vma.end - vma.start;
    if !kept.different.is_empty() && vma.prot & libc::PROT_WRITE as u32 == 0 {
        let prot = vma.prot | libc::PROT_WRITE as u32;
        let why = format!("{:#x} is to be written to", vma.start);
        cx.plan.push(task, Stage::Memory, call!(SYS_mprotect(vma.start, len, prot), why));
        let why = Why::At("protection of", vma.start);
        work.protects.push(call!(SYS_mprotect(vma.start, len, vma.prot), why));
    }
    work.fills.extend_from_slice(&kept.different);
    plan_lock(cx, task, vma);
}

fn describe(status: VmaStatus) -> &'static str {
    let kinds = [
        (VmaStatus::HEAP, "heap"),
        (VmaStatus::STACK, "stack"),
        (VmaStatus::FILE_PRIVATE, "private file"),
        (VmaStatus::FILE_SHARED, "shared file"),
        (VmaStatus::ANON_SHARED, "shared memory"),
        (VmaStatus::SYSVIPC, "System V segment"),
    ];
    kinds.iter().find(|(bit, _)| status.contains(*bit)).map_or("anonymous memory", |(_, name)| name)
}

/// Fills pages: one call for many runs that follow each other in the image.
fn fill(cx: &mut Planner<'_>, task: TaskRef, space: &Space, runs: &[FoundRun]) -> Result<(), ObjectError> {
    let total: u64 = runs.iter().map(|run| run.range.bytes()).sum();
    // Of the first large process, the engine fills a half: it has nothing else to do meanwhile.
    let mut own = if total >= WORTH_ASSISTING && cx.plan.assists.is_empty() { total / 2 } else { total };
    let mut files = PageFiles::default();
    for group in runs.chunk_by(|a, b| a.dump == b.dump && a.offset + a.range.bytes() == b.offset) {
        let file = files.get(cx, &space.pages, group[0].dump)?;
        let (mine, engines) = pieces(group, &mut own);
        fill_group(cx, task, &mine, file);
        if !engines.is_empty() {
            cx.plan.assists.push(Assist { task, file, pieces: engines });
        }
    }
    Ok(())
}

/// Bytes of a process from which on the engine helps.
const WORTH_ASSISTING: u64 = 4 << 20;
/// Bytes of one piece; small enough that a half can be cut off about anywhere.
const PIECE: u64 = 64 << 20;

/// Address, length, offset in the file.
type Piece = (u64, u64, u64);

/// Cuts runs into pieces that a call can move: those for the task, until it has had its share, and the engine's.
fn pieces(runs: &[FoundRun], own: &mut u64) -> (Vec<Piece>, Vec<Piece>) {
    let (mut mine, mut engines) = (Vec::new(), Vec::new());
    for run in runs {
        let mut done = 0;
        while done < run.range.bytes() {
            let len = (run.range.bytes() - done).min(PIECE);
            let piece = (run.range.start() + done, len, run.offset + done);
            if *own > 0 {
                mine.push(piece);
                *own = own.saturating_sub(len);
            } else {
                engines.push(piece);
            }
            done += len;
        }
    }
    (mine, engines)
}

fn fill_group(cx: &mut Planner<'_>, task: TaskRef, pieces: &[Piece], file: FileRef) {
    let mut rest = pieces;
    while let Some(&(address, _, offset)) = rest.first() {
        let mut bytes = 0;
        let n = rest
            .iter()
            .take(IOVECS)
            .take_while(|(_, len, _)| {
                bytes += len;
                bytes <= CALL_BYTES
            })
            .count()
            .max(1);
        let total: u64 = rest[..n].iter().map(|(_, len, _)| len).sum();
        let iov: Vec<u8> = rest[..n].iter().flat_map(|(at, len, _)| [*at, *len]).flat_map(u64::to_le_bytes).collect();
        let why = format!("{} pages from {address:#x} on", total / PAGE);
        cx.plan.push(task, Stage::Fill, call!(SYS_preadv(file, iov, n, offset, 0u64), why).giving(total));
        rest = &rest[n..];
    }
}
