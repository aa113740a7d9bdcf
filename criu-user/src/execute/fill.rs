//! Filling memory, and protecting it again: small processes do it themselves, at the same time as the engine does it
//! for the large ones.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;

use tracing::debug;

use super::apart::is_worth_it;
use super::{ExecuteError, Run};
use crate::agent::{AgentError, Batch, Member};
use crate::kernel::fill::{self, Ground, Job, Source};
use crate::kernel::pidfd::PidFd;
use crate::kernel::uffd;
use crate::plan::{self, Assist, FileRef, Stage};

/// Files with pages.
type Sources<'a> = HashMap<FileRef, Source<'a>>;

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
        let files: BTreeSet<FileRef> = tasks.iter().flat_map(|&task| self.assists(task)).map(|a| a.file).collect();
        let sources: Sources<'_> =
            files.into_iter().filter_map(|file| Some((file, self.source(file, tasks)?))).collect();
        let mut rest = tasks.to_vec();
        for made in &made {
            if let (Some(ground), true) = (&made.ground, is_worth_it(self.plan.tasks[made.task].stage(Stage::Protect)))
            {
                let jobs: Vec<_> = self.jobs(made.task, Some(ground), &sources).collect();
                let (placed, written): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|job| job.ground.is_some());
                fill::fill(&written, |bytes| self.observer.moved(bytes))?;
                self.fill_apart(made.task, ground, &placed)?;
                rest.retain(|&n| n != made.task);
            }
        }
        if !rest.is_empty() {
            self.fill_whole(&rest, &made, &sources)?;
        }
        // With the last descriptor the areas are as any.
        let open: Vec<(usize, u64)> = made.into_iter().map(|made| (made.task, made.fd)).collect();
        for (task, fd) in open {
            let close = [crate::call!(SYS_close(fd), "the userfaultfd for filling")];
            self.run_calls(Stage::Fill, &[(task, &close)])?;
        }
        self.stage(Stage::Protect, &rest)
    }

    fn source(&self, file: FileRef, tasks: &[usize]) -> Option<Source<'_>> {
        let assists = tasks.iter().flat_map(|&task| self.assists(task));
        let placed = assists.filter(|assist| assist.file == file && assist.ground == plan::Ground::Empty);
        Some(Source::new(self.opened.get(file)?, placed.flat_map(|assist| assist.pieces.iter().copied())))
    }

    fn assists(&self, task: usize) -> impl Iterator<Item = &Assist> + Clone {
        self.plan.assists.iter().filter(move |assist| assist.task.0 == task)
    }

    /// What the engine has to do for a task.
    fn jobs<'a>(
        &'a self,
        task: usize,
        ground: Option<&'a Ground>,
        sources: &'a Sources<'a>,
    ) -> impl Iterator<Item = Job<'a>> {
        let pid = self.plan.tasks[task].pid;
        self.assists(task).filter_map(move |assist| {
            let ground = ground.filter(|_| assist.ground == plan::Ground::Empty);
            Some(Job { pid, ground, source: sources.get(&assist.file)?, pieces: &assist.pieces })
        })
    }

    fn fill_whole(&self, tasks: &[usize], made: &[Made], sources: &Sources<'_>) -> Result<(), ExecuteError> {
        let mut jobs = Vec::new();
        for &task in tasks {
            let ground = made.iter().find(|made| made.task == task).and_then(|made| made.ground.as_ref());
            jobs.extend(self.jobs(task, ground, sources));
        }
        let observer = self.observer;
        std::thread::scope(|scope| {
            let engine = scope.spawn(|| fill::fill(&jobs, |bytes| observer.moved(bytes)));
            let outcome = self.fill_by_themselves(tasks);
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
