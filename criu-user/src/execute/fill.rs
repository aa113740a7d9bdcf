//! Filling memory, and protecting it again: small processes do it themselves, at the same time as the engine does it
//! for the large ones.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use tracing::debug;

use super::{ExecuteError, Run};
use crate::agent::{AgentError, Batch, Member};
use crate::kernel::SysError;
use crate::kernel::fill::{self, Ground, Job, Piece};
use crate::kernel::pidfd::PidFd;
use crate::kernel::uffd;
use crate::plan::{self, Arg, Assist, Call, Stage};

/// A userfaultfd that a task has made: its number there, and what it gives to us.
struct Made {
    task: usize,
    fd: u64,
    ground: Option<Ground>,
}

impl Run<'_> {
    /// Has these tasks' pages filled, and their areas protected as they were.
    pub(super) fn fill(&self, tasks: &[usize]) -> Result<(), ExecuteError> {
        let made = self.make_grounds(tasks)?;
        let mut rest = tasks.to_vec();
        for made in &made {
            let planned = &self.plan.tasks[made.task];
            let slices = slices(planned.stage(Stage::Protect), &planned.fresh);
            if let (Some(ground), true) = (&made.ground, slices.len() > 1) {
                self.fill_in_slices(made.task, ground, &slices)?;
                rest.retain(|&n| n != made.task);
            }
        }
        self.fill_whole(&rest, &made)?;
        // With the last descriptor the areas are as any.
        let open: Vec<(usize, u64)> = made.into_iter().map(|made| (made.task, made.fd)).collect();
        for (task, fd) in open {
            let close = [crate::call!(SYS_close(fd), "the userfaultfd for filling")];
            self.run_calls(Stage::Fill, &[(task, &close)])?;
        }
        self.stage(Stage::Protect, &rest)
    }

    fn assists(&self, task: usize) -> impl Iterator<Item = &Assist> {
        self.plan.assists.iter().filter(move |assist| assist.task.0 == task)
    }

    /// What the engine has to do of an assist.
    fn job<'a>(&'a self, assist: &'a Assist, ground: Option<&'a Ground>) -> Option<Job<'a>> {
        let ground = ground.filter(|_| assist.ground == plan::Ground::Empty);
        let (pid, file) = (self.plan.tasks[assist.task.0].pid, self.opened.get(assist.file)?);
        Some(Job { pid, ground, file, pieces: &assist.pieces })
    }

    fn fill_whole(&self, tasks: &[usize], made: &[Made]) -> Result<(), ExecuteError> {
        let mut jobs = Vec::new();
        for &task in tasks {
            let ground = made.iter().find(|made| made.task == task).and_then(|made| made.ground.as_ref());
            jobs.extend(self.assists(task).filter_map(|assist| self.job(assist, ground)));
        }
        let observer = self.observer;
        std::thread::scope(|scope| {
            let engine = scope.spawn(|| fill::fill(&jobs, |bytes| observer.moved(bytes)));
            let outcome = self.fill_by_themselves(tasks);
            let engine = engine.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.and(engine.map_err(ExecuteError::from))
        })
    }

    /// Fills a task with thousands of areas to protect slice by slice: while it protects one, the engine fills the next.
    /// The first area of each slice is protected before: so each slice is an area of its own to the kernel, and neither
    /// waits for the other's lock.
    fn fill_in_slices(&self, task: usize, ground: &Ground, slices: &[Range<usize>]) -> Result<(), ExecuteError> {
        let calls = self.plan.tasks[task].stage(Stage::Protect);
        let borders: Vec<Call> = slices[1..].iter().map(|slice| calls[slice.start].clone()).collect();
        self.run_calls(Stage::Protect, &[(task, &borders)])?;
        let borders: Vec<(u64, u64)> = slices.iter().map(|slice| area(&calls[slice.start])).collect();
        let whole: Vec<_> = self.assists(task).filter_map(|a| self.job(a, Some(ground))).collect();
        let observer = self.observer;
        let (filled, next) = mpsc::channel();
        std::thread::scope(|scope| {
            let engine = scope.spawn(move || {
                for (n, &(start, border)) in borders.iter().enumerate() {
                    let (start, end) = (if n == 0 { 0 } else { start }, borders.get(n + 1).map_or(u64::MAX, |b| b.0));
                    let cut =
                        |job: &Job<'_>| [within(job.pieces, start, border), within(job.pieces, border, end)].concat();
                    let cut: Vec<_> = whole.iter().map(cut).collect();
                    let jobs: Vec<_> = whole.iter().zip(&cut).map(|(&job, pieces)| Job { pieces, ..job }).collect();
                    fill::fill(&jobs, |bytes| observer.moved(bytes))?;
                    // Nobody listens any more where a call has failed.
                    if filled.send(()).is_err() {
                        break;
                    }
                }
                Ok::<_, SysError>(())
            });
            let mut outcome = Ok(());
            for slice in slices {
                // The end of the channel is an error of the engine's.
                if outcome.is_ok() && next.recv().is_ok() {
                    outcome = self.run_calls(Stage::Protect, &[(task, &calls[slice.clone()])]);
                }
            }
            drop(next);
            let engine = engine.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.and(engine.map_err(ExecuteError::from))
        })
    }

    /// Makes the tasks' fresh areas ready for pages to be placed, where the kernel can do that. Where it cannot, pages
    /// are written.
    fn make_grounds(&self, tasks: &[usize]) -> Result<Vec<Made>, ExecuteError> {
        let fresh: Vec<usize> = tasks.iter().copied().filter(|&n| !self.plan.tasks[n].fresh.is_empty()).collect();
        if fresh.is_empty() || fill::huge_by_default() {
            return Ok(Vec::new());
        }
        let mut made = Vec::new();
        for task in fresh {
            let Some(fd) = self.userfault(task)? else { break };
            let planned = &self.plan.tasks[task];
            let take = || -> Result<OwnedFd, _> { PidFd::open(planned.pid)?.get(fd as i32) };
            let ground = take().and_then(|userfault| Ground::new(userfault, &planned.fresh));
            if let Err(err) = &ground {
                debug!(%err, "pages are written, not placed");
            }
            made.push(Made { task, fd, ground: ground.ok() });
        }
        Ok(made)
    }

    /// Has a task make a userfaultfd; `None` where it cannot.
    fn userfault(&self, task: usize) -> Result<Option<u64>, AgentError> {
        let mut batch = Batch::new();
        let make = batch.try_call(libc::SYS_userfaultfd, &[uffd::MAKE_FLAGS.into()]);
        self.crew.start(Member(task), &batch)?;
        let fd = self.crew.finish(Member(task), &batch)?.ret(make);
        if let Err(errno) = fd {
            debug!(%errno, "userfaultfd");
        }
        Ok(fd.ok())
    }
}

/// Calls that protect areas, in slices worth filling one after the other, each but the first beginning with an area in
/// which pages are placed: those can be protected before. The areas ascend; what comes behind them goes with the last
/// slice.
fn slices(calls: &[Call], fresh: &[(u64, u64)]) -> Vec<Range<usize>> {
    /// Calls of a slice.
    const SLICE: usize = 1000;
    let areas = calls.iter().take_while(|call| call.nr == libc::SYS_mprotect).count();
    let is_placed = |call: &Call| {
        let (start, end) = area(call);
        fresh.iter().any(|range| range.0 <= start && end <= range.1)
    };
    let mut starts = vec![0];
    while let Some(next) = starts.last().map(|start| start + SLICE).filter(|next| next + SLICE <= areas)
        && let Some(more) = calls[next..areas].iter().position(is_placed)
    {
        starts.push(next + more);
    }
    let ends = starts[1..].iter().copied().chain([calls.len()]);
    starts.iter().zip(ends).map(|(&start, end)| start..end).collect()
}

/// The area that a call protects.
fn area(call: &Call) -> (u64, u64) {
    match call.args[..] {
        [Arg::Value(start), Arg::Value(len), ..] => (start, start + len),
        _ => (u64::MAX, u64::MAX),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call;

    #[test]
    fn slices_are_all_calls_once_and_in_order() {
        let protect = |n: u64| call!(SYS_mprotect(n * 0x2000, 0x1000u64, 1u64), "test");
        for (areas, expected) in [(0, 1), (1, 1), (1999, 1), (2000, 2), (2999, 2), (3500, 3)] {
            let mut calls: Vec<Call> = (0..areas).map(protect).collect();
            calls.push(call!(SYS_madvise(0u64, 0x1000u64, 102u64), "a guard"));
            let slices = slices(&calls, &[(0, u64::MAX)]);
            assert_eq!(slices.len(), expected, "{areas} areas");
            assert_eq!((slices[0].start, slices[slices.len() - 1].end), (0, calls.len()));
            assert!(slices.windows(2).all(|w| w[0].end == w[1].start));
        }
    }

    #[test]
    fn slices_begin_where_pages_are_placed() {
        let calls: Vec<Call> = (0..3000u64).map(|n| call!(SYS_mprotect(n * 0x2000, 0x1000u64, 1u64), "test")).collect();
        assert_eq!(slices(&calls, &[]).len(), 1);
        assert_eq!(slices(&calls, &[(1234 * 0x2000, 1300 * 0x2000)]), [0..1234, 1234..3000]);
    }

    #[test]
    fn pieces_are_cut_at_borders() {
        let pieces = [(0x1000, 0x3000, 0), (0x8000, 0x1000, 0x3000)];
        assert_eq!(within(&pieces, 0, 0x2000), [(0x1000, 0x1000, 0)]);
        assert_eq!(within(&pieces, 0x2000, 0x8000), [(0x2000, 0x2000, 0x1000)]);
        assert_eq!(within(&pieces, 0x8000, u64::MAX), [(0x8000, 0x1000, 0x3000)]);
    }
}
