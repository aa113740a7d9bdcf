//! Filling and protecting an address space of thousands of areas, at the same time.
//!
//! Both are work of the kernel's, and of much the same size: the engine places the pages, and the task protects its areas.
//! What takes the least time:
//!
//! * Pages are placed before their areas are cut out of a larger one: a call that places a single page takes twice as long
//!   as one page of many. (To protect an area that has a page takes only a fifth longer.)
//! * The kernel locks area by area, and an area stays locked while pages are placed into it. So the memory is first cut
//!   into blocks, by protecting one area here and there. While a block is filled, the task protects what is in the one
//!   before.
//! * It is the engine's first thread that fills. Had it nothing to do but wait, the kernel would often have the task and a
//!   thread that fills on the same processor.
//! * A block is taken from the userfaultfd while it still is one area.

use super::{ExecuteError, Run};
use crate::kernel::SysError;
use crate::kernel::fill::{self, Ground, Job, Piece};
use crate::plan::{Arg, Call, Stage};

/// A part of the memory, and the calls that protect areas in it.
#[derive(Debug)]
struct Block<'a> {
    start: u64,
    end: u64,
    calls: &'a [Call],
    /// For each job, the pages that lie in the block.
    pieces: Vec<Vec<Piece>>,
}

/// Calls of a block.
const BLOCK: usize = 500;

/// Whether there are so many areas to protect that it is worth the trouble.
pub(super) fn is_worth_it(calls: &[Call]) -> bool {
    calls.len() > 2 * BLOCK
}

/// Bytes of a block from which on it is worth starting threads to fill it.
const LARGE: u64 = 16 << 20;

impl Run<'_> {
    /// Places the pages of these jobs, all in new areas of a task, and has it make the calls that protect its areas.
    pub(super) fn fill_apart(&self, task: usize, ground: &Ground, jobs: &[Job<'_>]) -> Result<(), ExecuteError> {
        let planned = &self.plan.tasks[task];
        let protect = |calls: &[Call]| self.run_calls(Stage::Protect, &[(task, calls)]);
        let calls = planned.stage(Stage::Protect);
        let (areas, others) = calls.split_at(calls.iter().take_while(|call| area(call).is_some()).count());
        let borders: Vec<Call> = borders(areas).cloned().collect();
        protect(&borders)?;
        let mut rest: &[Call] = &[];
        for block in blocks(areas, jobs.iter().map(|job| job.pieces)) {
            let started = self.start(task, rest)?;
            block.fill(ground, &planned.fresh, jobs, |bytes| self.observer.moved(bytes))?;
            self.finish(Stage::Protect, &started)?;
            protect(&rest[started.calls.len()..])?;
            rest = block.calls;
        }
        protect(rest)?;
        protect(others)
    }
}

impl Block<'_> {
    /// Places its pages, in fresh ranges all of them.
    fn fill(
        &self,
        ground: &Ground,
        fresh: &[(u64, u64)],
        jobs: &[Job<'_>],
        moved: impl Fn(u64) + Sync,
    ) -> Result<(), SysError> {
        let jobs: Vec<Job<'_>> = jobs.iter().zip(&self.pieces).map(|(&job, pieces)| Job { pieces, ..job }).collect();
        let bytes: u64 = self.pieces.iter().flatten().map(|piece| piece.1).sum();
        if bytes < LARGE {
            fill::fill_alone(&jobs, moved)?
        } else {
            fill::fill(&jobs, moved)?
        }
        let first = fresh.partition_point(|range| range.1 <= self.start);
        for &(start, end) in fresh[first..].iter().take_while(|range| range.0 < self.end) {
            ground.leave(start.max(self.start), end.min(self.end))?;
        }
        Ok(())
    }
}

/// The calls that cut the memory into blocks. All ascend.
fn borders(areas: &[Call]) -> impl Iterator<Item = &Call> {
    areas.iter().step_by(BLOCK).skip(1)
}

/// Cuts memory at the borders, in which these pages are to be placed; pieces ascend. A border begins its block.
fn blocks<'a, 'p>(areas: &'a [Call], jobs: impl Iterator<Item = &'p [Piece]>) -> Vec<Block<'a>> {
    let borders: Vec<(u64, u64)> = borders(areas).filter_map(area).collect();
    let mut jobs: Vec<_> = jobs.map(|pieces| cut(pieces, &borders).into_iter().peekable()).collect();
    let starts = std::iter::once(0).chain(borders.iter().map(|border| border.0));
    let ends = borders.iter().map(|border| border.0).chain([u64::MAX]);
    let block = |(n, (start, end)): (usize, (u64, u64))| {
        let calls = areas.chunks(BLOCK).nth(n).unwrap_or_default();
        let mut within = |pieces: &mut std::iter::Peekable<std::vec::IntoIter<Piece>>| {
            std::iter::from_fn(|| pieces.next_if(|piece| piece.0 < end)).collect()
        };
        Block { start, end, calls: &calls[usize::from(n > 0)..], pieces: jobs.iter_mut().map(&mut within).collect() }
    };
    starts.zip(ends).enumerate().map(block).collect()
}

/// The area that a call protects.
fn area(call: &Call) -> Option<(u64, u64)> {
    match call.args[..] {
        [Arg::Value(start), Arg::Value(len), ..] if call.nr == libc::SYS_mprotect => Some((start, start + len)),
        _ => None,
    }
}

/// The same pieces, cut at the borders of areas. Both ascend.
fn cut(pieces: &[Piece], areas: &[(u64, u64)]) -> Vec<Piece> {
    let mut out = Vec::with_capacity(pieces.len() + 2 * areas.len());
    let mut areas = areas.iter().copied().peekable();
    for &(mut at, mut len, mut offset) in pieces {
        while len > 0 {
            while areas.next_if(|area| area.1 <= at).is_some() {}
            let (start, end) = areas.peek().copied().unwrap_or((u64::MAX, u64::MAX));
            let part = len.min(if start <= at { end } else { start } - at);
            out.push((at, part, offset));
            (at, len, offset) = (at + part, len - part, offset + part);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call;

    #[test]
    fn blocks_are_all_calls_and_all_pages_once_and_in_order() {
        let jobs = [vec![(0x1000, 3000 * 0x2000, 0)], vec![(0x7000_0000, 0x3000, 0x5000)], vec![]];
        for (areas, expected) in [(0, 1), (1, 1), (499, 1), (500, 1), (501, 2), (1000, 2), (1001, 3)] {
            let protect = |n: u64| call!(SYS_mprotect(n * 0x2000, 0x1000u64, 1u64), "test");
            let areas: Vec<Call> = (0..areas).map(protect).collect();
            let blocks = blocks(&areas, jobs.iter().map(Vec::as_slice));
            assert_eq!(blocks.len(), expected, "{} areas", areas.len());
            let mut calls: Vec<&Call> = borders(&areas).chain(blocks.iter().flat_map(|block| block.calls)).collect();
            calls.sort_by_key(|call| area(call));
            assert!(calls.into_iter().eq(&areas));
            assert!(blocks.is_sorted_by(|one, next| one.end == next.start));
            for (n, job) in jobs.iter().enumerate() {
                let mut joined: Vec<Piece> = Vec::new();
                for block in &blocks {
                    for &(at, len, offset) in &block.pieces[n] {
                        assert!(block.start <= at && at + len <= block.end);
                        match joined.last_mut() {
                            Some(last) if last.0 + last.1 == at && last.2 + last.1 == offset => last.1 += len,
                            _ => joined.push((at, len, offset)),
                        }
                    }
                }
                assert_eq!(joined, *job);
            }
        }
    }

    #[test]
    fn pieces_are_cut_at_borders() {
        let pieces = [(0x1000, 0x3000, 0), (0x8000, 0x1000, 0x3000)];
        assert_eq!(
            cut(&pieces, &[(0x500, 0x2000), (0x3000, 0x4000), (0x8000, 0x9000)]),
            [(0x1000, 0x1000, 0), (0x2000, 0x1000, 0x1000), (0x3000, 0x1000, 0x2000), (0x8000, 0x1000, 0x3000)]
        );
    }
}
