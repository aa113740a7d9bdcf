//! What a process has from the one that forks it: areas that both have need not be made again, and pages that are equal
//! in both are left alone, so that parent and child share them as they did.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::image::proto::VmaEntry;
use crate::image::{FoundRun, PageMap, PageRange, VmaStatus};
use crate::kernel::SysError;
use crate::kernel::survey::PAGE;
use crate::plan::{Stage, TaskRef};

use super::super::ObjectError;
use super::super::file::Planner;
use super::plan::{Space, split};

/// Address spaces that have been planned, by pid.
#[derive(Debug, Default)]
pub struct Spaces(pub HashMap<i32, Space>);

/// What becomes of an area that a task was born with.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Pages that the parent does not have, or has with other content.
    pub different: Vec<FoundRun>,
    /// Ranges of pages that only the parent has.
    pub dropped: Vec<(u64, u64)>,
}

/// Advice under which an area does not survive a fork as it is.
const NOT_INHERITED: u64 = 1 << libc::MADV_DONTFORK | 1 << libc::MADV_WIPEONFORK;

/// The areas of a task that it is born with, by their start.
pub fn of(cx: &mut Planner<'_>, task: TaskRef, space: &Space) -> Result<BTreeMap<u64, Inherited>, ObjectError> {
    let mut kept = BTreeMap::new();
    let creator = cx.plan.tasks.iter().find(|t| t.stage(Stage::Tree).iter().any(|c| c.creates == Some(task)));
    let Some(parent) = creator.map(|t| t.pid.as_raw()) else { return Ok(kept) };
    let (spaces, mut windows) = (cx.shelf.take::<Spaces>(), cx.shelf.take::<Windows>());
    if let Some(theirs) = spaces.0.get(&parent) {
        let by_start: HashMap<u64, _> = theirs.areas().map(|area| (area.0.start, area)).collect();
        for (vma, runs) in space.areas() {
            if let Some((other, other_runs)) = by_start.get(&vma.start)
                && is_same(vma, other)
                && !touches(theirs.guards(), vma)
            {
                let found = compare((runs, &space.pages), (other_runs, &theirs.pages), &mut windows)?;
                kept.insert(vma.start, found);
            }
        }
    }
    *cx.shelf.get::<Spaces>() = spaces;
    *cx.shelf.get::<Windows>() = windows;
    Ok(kept)
}

/// Whether a fork gives the child this very area.
fn is_same(vma: &VmaEntry, other: &VmaEntry) -> bool {
    let kernels = (VmaStatus::VDSO | VmaStatus::VVAR | VmaStatus::VSYSCALL).bits();
    let identity = |v: &VmaEntry| (v.end, v.pgoff, v.shmid, v.prot, v.flags & !(libc::MAP_LOCKED as u32), v.status);
    identity(vma) == identity(other)
        && vma.madv.unwrap_or(0) == other.madv.unwrap_or(0)
        && vma.madv.unwrap_or(0) & NOT_INHERITED == 0
        && vma.status & kernels == 0
}

fn touches<'v>(mut guards: impl Iterator<Item = &'v VmaEntry>, vma: &VmaEntry) -> bool {
    guards.any(|guard| guard.start < vma.end && vma.start < guard.end)
}

/// Compares the pages of an area in two images, run by run; both lists are ascending.
fn compare(
    mine: (&[FoundRun], &PageMap),
    theirs: (&[FoundRun], &PageMap),
    windows: &mut Windows,
) -> Result<Inherited, ObjectError> {
    let mut out = Inherited::default();
    let mut others = theirs.0.iter().copied();
    let mut other = others.next();
    for &run in mine.0 {
        let mut rest = Some(run);
        while let Some(now) = rest {
            // Theirs that end before mine begins.
            while let Some(o) = other.filter(|o| o.range.start() < now.range.start()) {
                let (before, after) = split(o, now.range.start());
                out.dropped.push((before.range.start(), before.range.end()));
                other = after.or_else(|| others.next());
            }
            let Some(o) = other.filter(|o| o.range.start() < now.range.end()) else {
                out.different.push(now);
                break;
            };
            // Mine that begins before theirs.
            if o.range.start() > now.range.start() {
                let (before, after) = split(now, o.range.start());
                out.different.push(before);
                rest = after;
                continue;
            }
            let end = now.range.end().min(o.range.end());
            let (both, after) = split(now, end);
            let (both_theirs, after_theirs) = split(o, end);
            compare_content((both, mine.1), (both_theirs, theirs.1), windows, &mut out.different)?;
            rest = after;
            other = after_theirs.or_else(|| others.next());
        }
    }
    while let Some(o) = other {
        out.dropped.push((o.range.start(), o.range.end()));
        other = others.next();
    }
    Ok(out)
}

/// Adds the pages of the same addresses whose content differs.
fn compare_content(
    mine: (FoundRun, &PageMap),
    theirs: (FoundRun, &PageMap),
    windows: &mut Windows,
    different: &mut Vec<FoundRun>,
) -> Result<(), ObjectError> {
    let (start, end) = (mine.0.range.start(), mine.0.range.end());
    let mut at = start;
    while at < end {
        let len = (end - at).min(WINDOW);
        let a = windows.mine.read(mine, at - start, len)?;
        let b = windows.theirs.read(theirs, at - start, len)?;
        if a != b {
            for (n, (x, y)) in a.chunks(PAGE as usize).zip(b.chunks(PAGE as usize)).enumerate() {
                let page = at + n as u64 * PAGE;
                if x != y
                    && let Some(range) = PageRange::new(page, page + PAGE)
                {
                    different.push(FoundRun { range, dump: mine.0.dump, offset: mine.0.offset + (page - start) });
                }
            }
        }
        at += len;
    }
    Ok(())
}

/// Bytes that are read and compared at once.
const WINDOW: u64 = 256 << 10;

/// What was read last of a process and of the one that forks it, which has many children: most pages of a small process
/// are in one window.
#[derive(Debug, Default)]
struct Windows {
    mine: Window,
    theirs: Window,
}

/// A piece of a pages file.
#[derive(Debug, Default)]
struct Window {
    path: PathBuf,
    offset: u64,
    len: usize,
    bytes: Vec<u8>,
}

impl Window {
    /// Bytes of a run, at most [`WINDOW`] of them.
    fn read(&mut self, (run, pages): (FoundRun, &PageMap), skip: u64, len: u64) -> Result<&[u8], ObjectError> {
        let (file, path) = pages
            .pages(run.dump)
            .ok_or_else(|| ObjectError::contradiction(format!("no dump {} in the chain", run.dump)))?;
        let (at, len) = (run.offset + skip, len as usize);
        let behind = |window: &Self| at.checked_sub(window.offset).filter(|n| n + len as u64 <= window.len as u64);
        if self.path.as_os_str() != path.as_os_str() || behind(self).is_none() {
            self.fill(file, at, len).map_err(|err| SysError::io("pread", path.display(), &err))?;
            self.path = path.to_owned();
        }
        let from = (at - self.offset) as usize;
        Ok(&self.bytes[from..from + len])
    }

    /// Reads what is there from `offset` on; at least `needed` bytes.
    fn fill(&mut self, file: &File, offset: u64, needed: usize) -> std::io::Result<()> {
        self.bytes.resize(WINDOW as usize, 0);
        (self.path, self.offset, self.len) = (PathBuf::new(), offset, 0);
        while self.len < needed {
            match file.read_at(&mut self.bytes[self.len..], offset + self.len as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.len += n,
                Err(err) if err.kind() == ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}
