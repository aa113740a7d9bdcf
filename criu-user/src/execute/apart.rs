//! Protecting and filling an address space of thousands of areas, at the same time.
//!
//! Both are work of the kernel's, and of much the same size: the task protects its areas, and threads of the engine place
//! the pages. What takes the least time:
//!
//! * Areas are protected before they have pages: afterwards it would take longer, for the processor has to forget what it
//!   knows of each page.
//! * The kernel locks area by area. Pages are placed behind the task, where areas do not change any more.
//! * The first page of an area is placed under the lock of the whole address space, unless the area was cut off one that
//!   has had a page. So one page of each new area is placed before all else.

use std::sync::{Mutex, PoisonError, mpsc};

use super::{ExecuteError, Run};
use crate::kernel::SysError;
use crate::kernel::fill::{self, Job, Piece};
use crate::kernel::parallel::processors;
use crate::kernel::survey::PAGE;
use crate::plan::{Arg, Call, Stage};

/// Calls that protect areas one after the other, and the pages that lie behind the areas of the slice before.
struct Slice<'a> {
    calls: &'a [Call],
    /// The areas.
    areas: Vec<(u64, u64)>,
    /// For each job, the pages up to the end of the last area; in the last slice, all that are left.
    pieces: Vec<Vec<Piece>>,
}

/// Whether there are so many areas to protect that it is worth the trouble.
pub(super) fn is_worth_it(calls: &[Call]) -> bool {
    calls.len() > 2 * SLICE
}

/// Calls of a slice.
const SLICE: usize = 500;

impl Run<'_> {
    /// Has a task make the calls that protect its areas, and places the pages of these jobs, all in new areas of it.
    pub(super) fn fill_apart(&self, task: usize, jobs: &[Job<'_>]) -> Result<(), ExecuteError> {
        let planned = &self.plan.tasks[task];
        let observer = self.observer;
        let (seeds, rest): (Vec<_>, Vec<_>) = jobs.iter().map(|job| seeds(job.pieces, &planned.fresh)).unzip();
        fill::fill_alone(&with_pieces(jobs, &seeds), |bytes| observer.moved(bytes))?;
        let (protected, next) = mpsc::channel::<Slice<'_>>();
        let next = Mutex::new(next);
        let fill = || {
            let next = || next.lock().unwrap_or_else(PoisonError::into_inner).recv();
            while let Ok(slice) = next() {
                let pieces: Vec<_> = slice.pieces.iter().map(|pieces| cut(pieces, &slice.areas)).collect();
                fill::fill_alone(&with_pieces(jobs, &pieces), |bytes| observer.moved(bytes))?;
            }
            Ok::<(), SysError>(())
        };
        std::thread::scope(|scope| {
            // One processor is the task's, as long as it protects.
            let others: Vec<_> = (0..processors().saturating_sub(1).max(1)).map(|_| scope.spawn(fill)).collect();
            let mut outcome = Ok(());
            for slice in slices(planned.stage(Stage::Protect), &rest) {
                outcome = outcome.and_then(|()| self.run_calls(Stage::Protect, &[(task, slice.calls)]));
                if outcome.is_err() || protected.send(slice).is_err() {
                    break;
                }
            }
            drop(protected);
            outcome = outcome.and_then(|()| Ok(fill()?));
            others.into_iter().fold(outcome, |outcome, thread| {
                let filled = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                outcome.and(filled.map_err(ExecuteError::from))
            })
        })
    }
}

/// The same jobs with other pieces.
fn with_pieces<'a>(jobs: &[Job<'a>], pieces: &'a [Vec<Piece>]) -> Vec<Job<'a>> {
    jobs.iter().zip(pieces).map(|(&job, pieces)| Job { pieces, ..job }).collect()
}

/// One page of each of the ranges, and all other pages. Both ascend.
fn seeds(pieces: &[Piece], ranges: &[(u64, u64)]) -> (Vec<Piece>, Vec<Piece>) {
    let (mut seeds, mut rest) = (Vec::new(), Vec::with_capacity(pieces.len()));
    let mut ranges = ranges.iter().peekable();
    for &(at, len, offset) in pieces {
        while ranges.next_if(|range| range.1 <= at).is_some() {}
        if ranges.next_if(|range| range.0 <= at).is_some() {
            seeds.push((at, PAGE, offset));
            rest.push((at + PAGE, len - PAGE, offset + PAGE));
        } else {
            rest.push((at, len, offset));
        }
    }
    rest.retain(|piece| piece.1 > 0);
    (seeds, rest)
}

/// Cuts calls, and pages with them. The areas ascend; other calls come behind them and go with the last slice.
fn slices<'a>(calls: &'a [Call], jobs: &[Vec<Piece>]) -> impl Iterator<Item = Slice<'a>> {
    let areas = calls.iter().take_while(|call| call.nr == libc::SYS_mprotect).count();
    let count = (areas / SLICE).max(1);
    let mut from = 0;
    (0..count).map(move |n| {
        let last = n + 1 == count;
        let calls = &calls[n * SLICE..if last { calls.len() } else { (n + 1) * SLICE }];
        let areas: Vec<_> = calls.iter().map_while(area).collect();
        let to = areas.last().filter(|_| !last).map_or(u64::MAX, |area| area.1);
        let pieces = jobs.iter().map(|pieces| within(pieces, from, to)).collect();
        from = to;
        Slice { calls, areas, pieces }
    })
}

/// The area that a call protects.
fn area(call: &Call) -> Option<(u64, u64)> {
    match call.args[..] {
        [Arg::Value(start), Arg::Value(len), ..] if call.nr == libc::SYS_mprotect => Some((start, start + len)),
        _ => None,
    }
}

/// The parts of these pieces between two addresses.
fn within(pieces: &[Piece], start: u64, end: u64) -> Vec<Piece> {
    let part = |&(at, len, offset): &Piece| {
        let (from, to) = (at.max(start), (at + len).min(end));
        (from < to).then(|| (from, to - from, offset + (from - at)))
    };
    pieces.iter().filter_map(part).collect()
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
    fn slices_are_all_calls_and_all_pages_once_and_in_order() {
        let pieces = [vec![(0x1000, 3000 * 0x2000, 0)], vec![(0x7000_0000, 0x3000, 0x5000)]];
        for (areas, expected) in [(0, 1), (1, 1), (999, 1), (1000, 2), (1499, 2), (1750, 3)] {
            let protect = |n: u64| call!(SYS_mprotect(n * 0x2000, 0x1000u64, 1u64), "test");
            let mut calls: Vec<Call> = (0..areas).map(protect).collect();
            calls.push(call!(SYS_madvise(0u64, 0x1000u64, 102u64), "a guard"));
            let slices: Vec<Slice<'_>> = slices(&calls, &pieces).collect();
            assert_eq!(slices.len(), expected, "{areas} areas");
            assert_eq!(slices.iter().map(|slice| slice.areas.len()).sum::<usize>(), areas as usize);
            assert!(slices.iter().flat_map(|slice| slice.calls).eq(&calls));
            for (n, job) in pieces.iter().enumerate() {
                let mut joined: Vec<Piece> = Vec::new();
                for &(at, len, offset) in slices.iter().flat_map(|slice| &slice.pieces[n]) {
                    match joined.last_mut() {
                        Some(last) if last.0 + last.1 == at && last.2 + last.1 == offset => last.1 += len,
                        _ => joined.push((at, len, offset)),
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
        assert_eq!(within(&pieces, 0, 0x2000), [(0x1000, 0x1000, 0)]);
        assert_eq!(within(&pieces, 0x2000, 0x8000), [(0x2000, 0x2000, 0x1000)]);
        assert_eq!(within(&pieces, 0x8000, u64::MAX), [(0x8000, 0x1000, 0x3000)]);
    }

    #[test]
    fn each_range_has_a_page_at_once() {
        let pieces = [(0x1000, 0x1000, 0), (0x3000, 0x2000, 0x1000), (0x9000, 0x1000, 0x3000)];
        let (seeds, rest) = seeds(&pieces, &[(0x1000, 0x8000), (0x8000, 0x9000), (0x9000, 0xa000)]);
        assert_eq!(seeds, [(0x1000, 0x1000, 0), (0x9000, 0x1000, 0x3000)]);
        assert_eq!(rest, [(0x3000, 0x2000, 0x1000)]);
    }
}
