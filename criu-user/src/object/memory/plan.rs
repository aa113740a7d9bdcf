//! Planning an address space: areas are mapped, filled, protected, in this order.

use std::ops::Range;
use std::rc::Rc;

use crate::call;
use crate::image::proto::{MmEntry, VmaEntry};
use crate::image::{FoundRun, PageMap, PageRange, PageStore, VmaStatus};
use crate::kernel::survey::PAGE;
use crate::plan::{Call, KernelArea, Stage, TaskRef, Why};

use super::super::file::Planner;
use super::super::{ObjectError, shmem, sysv};
use super::inherit::{self, Inherited};
use super::{fill, vdso};

/// MADV_GUARD_INSTALL of Linux 6.13.
const MADV_GUARD_INSTALL: i32 = 102;

/// An address space as its images tell it. A process can have tens of thousands of areas: nothing is copied.
#[derive(Debug)]
pub struct Space {
    mm: Rc<MmEntry>,
    /// Which of the image's areas, ascending, and which of `runs` are its pages.
    areas: Vec<(usize, Range<usize>)>,
    runs: Vec<FoundRun>,
    /// Where the pages are.
    pub pages: PageMap,
}

impl Space {
    /// Reads and checks it.
    pub fn read(cx: &Planner<'_>, pid: i32, mm: &Rc<MmEntry>) -> Result<Self, ObjectError> {
        check_areas(mm.vmas.iter().filter(|vma| !is_guard(vma)))?;
        let pages = PageStore::open(cx.dir)?.process(pid as u32)?;
        let stray = |run: &FoundRun| {
            ObjectError::contradiction(format!("page {:#x} of pid {pid} belongs to no area", run.range.start()))
        };
        let found = pages.found()?;
        let mut runs = Vec::with_capacity(found.len());
        let mut rest = found.into_iter();
        let mut run = rest.next();
        let mut areas = Vec::with_capacity(mm.vmas.len());
        for (n, vma) in mm.vmas.iter().enumerate().filter(|(_, vma)| !is_guard(vma)) {
            let first = runs.len();
            while let Some(now) = run.filter(|run| run.range.start() < vma.end) {
                if now.range.start() < vma.start {
                    return Err(stray(&now));
                }
                let (inside, behind) = split(now, vma.end);
                runs.push(inside);
                run = behind.or_else(|| rest.next());
            }
            areas.push((n, first..runs.len()));
        }
        match run {
            None => Ok(Self { mm: mm.clone(), areas, runs, pages }),
            Some(run) => Err(stray(&run)),
        }
    }

    /// Its areas, ascending, each with the pages that it holds.
    pub fn areas(&self) -> impl Iterator<Item = (&VmaEntry, &[FoundRun])> {
        self.areas.iter().map(|(n, runs)| (&self.mm.vmas[*n], &self.runs[runs.clone()]))
    }

    /// Pages that must not be touched.
    pub fn guards(&self) -> impl Iterator<Item = &VmaEntry> {
        self.mm.vmas.iter().filter(|vma| is_guard(vma))
    }
}

fn is_guard(vma: &VmaEntry) -> bool {
    vma.status & VmaStatus::GUARD.bits() != 0
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

fn check_areas<'v>(vmas: impl Iterator<Item = &'v VmaEntry>) -> Result<(), ObjectError> {
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
pub fn plan(cx: &mut Planner<'_>, task: TaskRef, mm: &Rc<MmEntry>) -> Result<(), ObjectError> {
    let pid = cx.plan.task(task).pid.as_raw();
    let space = Space::read(cx, pid, mm)?;
    let inherited = inherit::of(cx, task, &space)?;
    let mut work = Work::default();
    for (vma, runs) in space.areas() {
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
    cx.plan.extend(task, Stage::Memory, work.advice);
    let fresh: Vec<_> = work.anonymous.iter().filter(|area| area.is_plain()).map(|a| (a.start, a.end)).collect();
    fill::plan(cx, task, &space.pages, &work.fills, &fresh)?;
    cx.plan.extend(task, Stage::Protect, work.protects);
    for guard in space.guards() {
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
    /// Advice for it, a bit each.
    madv: u64,
    what: &'static str,
}

impl Anonymous {
    /// Whether pages can be put there one by one. A stack has its own lower end; what is to have huge pages gets them
    /// when it is written to.
    fn is_plain(&self) -> bool {
        !is_stack(self) && self.madv & 1 << libc::MADV_HUGEPAGE == 0 && self.flags & libc::MAP_HUGETLB as u32 == 0
    }
}

impl Work {
    /// Neighbours that are mapped alike are one mapping to the kernel: one call makes them.
    fn anonymous(&mut self, area: Anonymous) {
        match self.anonymous.last_mut() {
            Some(last)
                if last.end == area.start
                    && (last.prot, last.flags, last.madv) == (area.prot, area.flags, area.madv)
                    && !is_stack(last) =>
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
    let madv = vma.madv.unwrap_or(0);
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
        let what = if flags & libc::MAP_HUGETLB as u32 != 0 { HUGE } else { describe(status) };
        work.anonymous(Anonymous { start: vma.start, end: vma.end, prot, flags, madv, what });
    }
    for advice in bits(madv) {
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

/// What an area of huge pages is; where it cannot be made, there mostly are not enough.
const HUGE: &str = "memory of huge pages (vm.nr_hugepages says how many there are)";

/// The numbers of the bits that are set. Most areas have none, and there can be many areas.
fn bits(word: u64) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(word), |left| Some(left & left.wrapping_sub(1)))
        .take_while(|left| *left != 0)
        .map(u64::trailing_zeros)
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
