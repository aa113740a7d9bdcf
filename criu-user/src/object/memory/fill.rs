//! Planning how pages come into an address space. Few pages are filled by the process itself; many by the engine, whose
//! threads are as many as there are processors, and which can put pages where none are (kernel/fill.rs).

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::call;
use crate::image::{FoundRun, PageMap};
use crate::kernel::SysError;
use crate::kernel::fill::Piece;
use crate::kernel::survey::PAGE;
use crate::plan::{Assist, FileRef, Ground, Opened, Opener, Stage, TaskRef};

use super::super::ObjectError;
use super::super::file::Planner;
use super::dump::{CALL_BYTES, IOVECS};

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
        let opened = cx.plan.open(OpenImage { file: RefCell::new(Some(file)), path: path.to_owned() });
        self.0[dump] = Some(opened);
        Ok(opened)
    }
}

/// An image file that tasks read from.
#[derive(Debug)]
pub struct OpenImage {
    /// It is open already: images are validated before anything happens. Gone when it has been opened for the tree.
    pub file: RefCell<Option<File>>,
    /// For messages.
    pub path: PathBuf,
}

impl Opener for OpenImage {
    fn describe(&self) -> String {
        format!("image {}", self.path.display())
    }

    fn only_fills(&self) -> bool {
        true
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let file = self.file.take().ok_or("it was opened before")?;
        Ok(file.into())
    }
}

/// Bytes of a process from which on the engine fills it.
const WORTH_ASSISTING: u64 = 4 << 20;
/// Bytes in an area from which on pages are placed: it takes a call for the area and one for each piece.
const WORTH_PLACING: u64 = 1 << 20;

/// Plans the filling of these runs. `fresh` are ranges of new anonymous memory, ascending.
pub(super) fn plan(
    cx: &mut Planner<'_>,
    task: TaskRef,
    pages: &PageMap,
    runs: &[FoundRun],
    fresh: &[(u64, u64)],
) -> Result<(), ObjectError> {
    let total: u64 = runs.iter().map(|run| run.range.bytes()).sum();
    let fresh = if total < WORTH_ASSISTING { Vec::new() } else { worth_placing(runs, fresh) };
    let mut files = PageFiles::default();
    for group in runs.chunk_by(|a, b| a.dump == b.dump && a.offset + a.range.bytes() == b.offset) {
        let file = files.get(cx, pages, group[0].dump)?;
        if total < WORTH_ASSISTING {
            fill_group(cx, task, &pieces(group), file);
            continue;
        }
        for alike in group.chunk_by(|a, b| range_of(&fresh, a) == range_of(&fresh, b)) {
            let ground = range_of(&fresh, &alike[0]).map_or(Ground::Any, |_| Ground::Empty);
            cx.plan.assists.push(Assist { task, file, ground, pieces: joined(alike) });
        }
    }
    cx.plan.task(task).fresh = fresh;
    Ok(())
}

/// Those of the ranges that have many pages to fill. Runs and ranges are ascending, and no run leaves its range.
fn worth_placing(runs: &[FoundRun], fresh: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let bytes = |&(start, end): &(u64, u64)| -> u64 {
        let first = runs.partition_point(|run| run.range.start() < start);
        runs[first..].iter().take_while(|run| run.range.start() < end).map(|run| run.range.bytes()).sum()
    };
    fresh.iter().filter(|range| bytes(range) >= WORTH_PLACING).copied().collect()
}

/// In which of the ranges a run is.
fn range_of(fresh: &[(u64, u64)], run: &FoundRun) -> Option<usize> {
    let at = fresh.partition_point(|&(_, end)| end <= run.range.start());
    fresh.get(at).is_some_and(|&(start, _)| start <= run.range.start()).then_some(at)
}

/// Runs as pieces, neighbours joined: until they are protected as they were, their areas are one to the kernel.
fn joined(runs: &[FoundRun]) -> Vec<Piece> {
    let mut out: Vec<Piece> = Vec::new();
    for run in runs {
        match out.last_mut() {
            Some((at, len, _)) if *at + *len == run.range.start() => *len += run.range.bytes(),
            _ => out.push((run.range.start(), run.range.bytes(), run.offset)),
        }
    }
    out
}

/// Cuts runs into pieces that a call can move.
fn pieces(runs: &[FoundRun]) -> Vec<Piece> {
    let cut = |run: &FoundRun| {
        let (start, len, offset) = (run.range.start(), run.range.bytes(), run.offset);
        let step = CALL_BYTES as usize;
        (0..len).step_by(step).map(move |done| (start + done, (len - done).min(CALL_BYTES), offset + done))
    };
    runs.iter().flat_map(cut).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::PageRange;

    fn run(start: u64, pages: u64, offset: u64) -> FoundRun {
        FoundRun { range: PageRange::of_pages(start, pages).expect("a range"), dump: 0, offset }
    }

    #[test]
    fn pages_are_placed_only_where_many_come_into_new_memory() {
        let big = WORTH_PLACING / PAGE;
        let runs = [run(0x1000, 1, 0), run(0x1_0000, 2, 0x1000), run(0x1000_0000, big, 0x3000)];
        let fresh = [(0x1000, 0x2000), (0x1000_0000, 0x2000_0000)];
        let placed = worth_placing(&runs, &fresh);
        assert_eq!(placed, [(0x1000_0000, 0x2000_0000)]);
        assert_eq!(runs.map(|run| range_of(&placed, &run)), [None, None, Some(0)]);
        assert_eq!(range_of(&placed, &run(0x2000_0000, 1, 0)), None, "behind the range");
    }

    #[test]
    fn neighbours_are_joined() {
        let runs = [run(0x1000, 1, 0), run(0x2000, 1, 0x1000), run(0x5000, 1, 0x2000)];
        assert_eq!(joined(&runs), [(0x1000, 0x2000, 0), (0x5000, 0x1000, 0x2000)]);
    }
}
