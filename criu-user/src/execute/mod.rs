//! Carries a plan out: opens its files, spawns the crew, has every task make its calls stage by stage, and lets all of
//! them go at once.
//!
//! Until that last step, whatever fails ends the whole crew: they die with the engine, and the images stay as they are.

mod apart;
mod calls;
mod empty;
mod error;
mod fill;
mod go;
mod images;
mod layout;
mod open;

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::Pid;
use tracing::{debug, info, warn};

pub use calls::describe;
pub use error::ExecuteError;
use images::Images;
use layout::Layout;

use crate::agent::{AgentError, Batch, Crew, Member};
use crate::kernel::apart::Watchman;
use crate::kernel::clone;
use crate::kernel::error::During;
use crate::kernel::gate::{self, Gate};
use crate::kernel::proc;
use crate::kernel::ptrace::{self, Stop};
use crate::object::{ObjectError, clocks};
use crate::observer::{Moment, Observer, tell};
use crate::parallel;
use crate::plan::{Call, Deed, KernelArea, Opened, Plan, Role, Stage, TaskRef};
use crate::restore::RestoreOptions;

/// Carries out a plan and gives the root of the tree.
pub fn execute(plan: &Plan, options: &RestoreOptions, observer: &dyn Observer) -> Result<Pid, ExecuteError> {
    execute_locked(plan, options, observer).map_err(|source| match &plan.connections.gate {
        Some(gate) if Gate::is_pinned(gate) => ExecuteError::Locked { gate: gate.clone(), source: Box::new(source) },
        _ => source,
    })
}

fn execute_locked(plan: &Plan, options: &RestoreOptions, observer: &dyn Observer) -> Result<Pid, ExecuteError> {
    refuse_taken_pids(plan)?;
    let gate = options.network_lock.close(&plan.connections).map_err(ObjectError::from)?;
    let images = Images::of(plan)?;
    let opened = open::open_all(plan, images.as_ref().map(Images::first), observer)?;
    info!(files = opened.len(), "files are open");
    // Until they go on, nothing may interrupt the tasks.
    let mask = |set: &SigSet| sigprocmask(SigmaskHow::SIG_SETMASK, Some(set), None).during("sigprocmask", "restore");
    let before = SigSet::thread_get_mask().during("sigprocmask", "restore")?;
    mask(&SigSet::all())?;
    let outcome = execute_blocked(plan, options, observer, (opened, images), gate);
    mask(&before)?;
    outcome
}

fn execute_blocked(
    plan: &Plan,
    options: &RestoreOptions,
    observer: &dyn Observer,
    (opened, images): (Opened, Option<Images>),
    gate: Option<Gate>,
) -> Result<Pid, ExecuteError> {
    if let Some(offsets) = &plan.clocks {
        // The kernel does that for a process of one thread alone (setns(2) of a time namespace).
        proc::wait_until_alone()?;
        clocks::enter(offsets)?;
    }
    let layout = Layout::choose(plan)?;
    let crew = Crew::new(layout.crew, &layout.members(plan))?;
    let mut kernel_at = vec![Vec::new(); plan.tasks.len()];
    kernel_at[0] = layout.kernel.clone();
    let mut run =
        Run { plan, options, observer, crew, layout, opened, images, gate, watchman: None, kernel_at, rseq: None };
    let root = run.spawn()?;
    info!(pid = root.as_raw(), "the root of the tree is there");
    if plan.clocks.is_some()
        && let Err(err) = clocks::leave()
    {
        warn!(%err, "scripts will see the clocks of the tree");
    }
    let outcome = run.adopt(root).and_then(|()| run.all(root));
    if outcome.is_err() {
        run.kill(root);
    } else if let Some(Err(err)) = run.gate.take().map(Gate::remove) {
        tracing::warn!(%err, "the gate holds nothing any more, but is still there");
    }
    outcome.map(|()| root)
}

/// How long an ended process may take to be noted by its parent; init is slow at it.
const LATE: Duration = Duration::from_secs(2);

fn refuse_taken_pids(plan: &Plan) -> Result<(), ExecuteError> {
    let begin = Instant::now();
    // To ask by a signal that is none costs less than to look it up in /proc.
    for task in plan.tasks.iter().filter(|task| kill(task.tid, None) != Err(Errno::ESRCH)) {
        let holder = || proc::stat(task.tid, None);
        while begin.elapsed() < LATE && holder().is_ok_and(|stat| stat.state == 'Z') {
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Ok(stat) = holder() {
            let (pid, parent) = (task.tid.as_raw(), stat.ppid.as_raw());
            return Err(match stat.state {
                'Z' => ExecuteError::PidOfZombie { pid, parent, comm: stat.comm },
                _ => ExecuteError::PidTaken { pid, comm: stat.comm },
            });
        }
    }
    Ok(())
}

/// Calls that a task is making.
struct Started<'c> {
    task: usize,
    calls: &'c [Call],
    batch: Batch,
}

struct Run<'a> {
    plan: &'a Plan,
    options: &'a RestoreOptions,
    observer: &'a dyn Observer,
    crew: Crew,
    layout: Layout,
    opened: Opened,
    /// Pages files that are not inherited.
    images: Option<Images>,
    /// Holds the packets of connections.
    gate: Option<Gate>,
    /// Looks on at the last steps.
    watchman: Option<Watchman>,
    /// Where the kernel's own areas of each task are just now.
    kernel_at: Vec<Vec<KernelArea>>,
    /// Gives up the first task's inherited registration of restartable sequences: its memory goes away.
    rseq: Option<Call>,
}

impl Run<'_> {
    fn spawn(&mut self) -> Result<Pid, ExecuteError> {
        for (n, task) in self.plan.tasks.iter().enumerate() {
            let parent = match task.role {
                Role::Thread(leader) => self.parent_of(leader),
                _ => self.parent_of(TaskRef(n)),
            };
            self.crew.expect_parent(Member(n), parent);
        }
        let mut flags = clone::CLEAR_SIGHAND;
        if self.options.sibling {
            flags |= libc::CLONE_PARENT as u64;
        }
        Ok(self.crew.spawn(Member(0), flags)?)
    }

    /// Ties the first task's life to ours, and learns what it has inherited.
    fn adopt(&mut self, root: Pid) -> Result<(), ExecuteError> {
        ptrace::seize(root, self.tracing())?;
        ptrace::interrupt(root)?;
        wait_for_interrupt(root)?;
        if let Some(rseq) = ptrace::rseq_config(root).filter(|r| r.address != 0) {
            const UNREGISTER: u64 = 1;
            self.rseq = Some(crate::call!(
                SYS_rseq(rseq.address, rseq.size, UNREGISTER, rseq.signature),
                "give up the inherited restartable sequences"
            ));
        }
        Ok(ptrace::cont(root, 0)?)
    }

    fn parent_of(&self, task: TaskRef) -> Pid {
        match self.plan.tasks[task.0].parent {
            Some(parent) => self.plan.tasks[parent.0].pid,
            None if self.options.sibling => Pid::parent(),
            None => Pid::this(),
        }
    }

    fn all(&mut self, root: Pid) -> Result<(), ExecuteError> {
        self.generations()?;
        info!("memory is filled, and all processes are there");
        let rest = Stage::ALL.into_iter().filter(|s| *s > Stage::Tree);
        let mut born: Vec<usize> =
            (0..self.plan.tasks.len()).filter(|&n| !matches!(self.plan.tasks[n].role, Role::Thread(_))).collect();
        for stage in rest {
            if stage == Stage::Credentials {
                self.seize(root, &born)?;
            }
            if stage == Stage::Last && self.ends(0, stage) {
                // Its threads die with us from here on; a dead tracee that did would take them along at our very end.
                ptrace::interrupt(root)?;
                wait_for_interrupt(root)?;
                ptrace::set_options(root, 0)?;
                ptrace::detach(root)?;
            }
            self.stage(stage, &born)?;
            if stage == Stage::Threads {
                born = (0..self.plan.tasks.len()).collect();
            }
            if stage == Stage::Files {
                born.retain(|&n| self.plan.tasks[n].role != Role::Ends);
            }
            if stage != Stage::Last {
                self.deeds(stage)?;
            }
        }
        self.watchman = self.watchman()?;
        self.release()?;
        info!(tasks = born.len(), "all tasks are complete");
        tell(self.observer, Moment::PostRestore, Some(root))?;
        // Whoever waits for the end of a pipe must not find us at the other one.
        self.opened.keep_only(&self.plan.connections.files);
        self.go(root, &born)
    }

    /// Somebody who looks on at the last steps, where a dump has left a gate that stays. If we are killed when every task
    /// runs on without us, he opens it; if only some do, he kills them, and a second restore works.
    fn watchman(&self) -> Result<Option<Watchman>, ExecuteError> {
        let Some(name) = self.plan.connections.gate.as_ref().filter(|_| self.gate.is_some()) else { return Ok(None) };
        let processes: Vec<Pid> =
            self.plan.tasks.iter().filter(|task| task.role == Role::Leader).map(|task| task.pid).collect();
        let act = |all_run: bool| {
            if !all_run {
                // They have had no time to be forgotten, so that nobody else can be called so by now.
                for pid in &processes {
                    let _ = kill(*pid, Signal::SIGKILL);
                }
                return;
            }
            // There is nobody to be told if that fails. Where we have begun to take it away, only a part of it is left.
            for gate in gate::pinned().unwrap_or_default().iter().filter(|gate| gate.name == *name) {
                let _ = gate.clear();
            }
        };
        Ok(Some(Watchman::start(act)?))
    }

    /// What the engine does after a stage.
    fn deeds(&self, stage: Stage) -> Result<(), ExecuteError> {
        self.plan.deeds.iter().filter(|(s, _)| *s == stage).try_for_each(|(_, deed)| self.deed(deed.as_ref()))
    }

    fn deed(&self, deed: &dyn Deed) -> Result<(), ExecuteError> {
        perform(deed, &self.opened)
    }

    /// What is done with connections while packets are still held, each apart from the others.
    fn release(&self) -> Result<(), ExecuteError> {
        let opened = &self.opened;
        let release = |some: &[Box<dyn Deed + Sync>]| some.iter().try_for_each(|deed| perform(deed.as_ref(), opened));
        parallel::share(&self.plan.connections.release, release).into_iter().collect()
    }

    /// Lets packets of connections pass. Nothing can be taken back any more: what fails is told.
    fn connect(&mut self) {
        // Of which packets were held, as far as that is known since before the dump's first look at them.
        let held = match self.gate.as_ref().map(Gate::unlock) {
            Some(Ok(held)) => held,
            Some(Err(err)) => {
                tracing::error!(%err, "the connections of the tree are still held");
                None
            }
            None => None,
        };
        let was_held = |of| held.as_ref().is_none_or(|held| held.contains(of));
        for resumption in self.plan.connections.resume.iter().filter(|r| !r.quiet || was_held(&r.of)) {
            if let Err(err) = resumption.deed.run(&self.opened) {
                warn!(%err, "{} did not work", resumption.deed.describe());
            }
        }
        self.opened.close();
    }

    /// Processes get their memory before they fork: generation by generation.
    fn generations(&mut self) -> Result<(), ExecuteError> {
        let mut generation = vec![0];
        while !generation.is_empty() {
            for &n in &generation {
                self.empty(n)?;
            }
            self.stage(Stage::Memory, &generation)?;
            self.fill(&generation)?;
            if generation == [0] {
                self.give_up_images()?;
            }
            self.stage(Stage::Tree, &generation)?;
            let mut next = Vec::new();
            for &n in &generation {
                let created = self.plan.tasks[n].stage(Stage::Tree).iter().filter_map(|call| call.creates);
                for child in created {
                    self.kernel_at[child.0] = self.kernel_at[n].clone();
                    next.push(child.0);
                }
            }
            generation = next;
        }
        Ok(())
    }

    fn stage(&self, stage: Stage, tasks: &[usize]) -> Result<(), ExecuteError> {
        let work = self.work(stage, tasks);
        debug!(?stage, tasks = work.len(), "stage");
        self.run_calls(stage, &work)
    }

    fn work(&self, stage: Stage, tasks: &[usize]) -> Vec<(usize, &[Call])> {
        tasks.iter().map(|&n| (n, self.plan.tasks[n].stage(stage))).filter(|(_, calls)| !calls.is_empty()).collect()
    }

    /// Has several tasks make their calls at the same time.
    fn run_calls(&self, stage: Stage, work: &[(usize, &[Call])]) -> Result<(), ExecuteError> {
        let mut left = work.to_vec();
        while !left.is_empty() {
            let started: Vec<_> = left.iter().map(|(n, calls)| self.start(*n, calls)).collect::<Result<_, _>>()?;
            for started in &started {
                self.finish(stage, started)?;
            }
            for (rest, started) in left.iter_mut().zip(&started) {
                rest.1 = &rest.1[started.calls.len()..];
            }
            left.retain(|(_, calls)| !calls.is_empty());
        }
        Ok(())
    }

    /// Lets a task make the first of these calls, as many as its slot holds.
    fn start<'c>(&self, task: usize, calls: &'c [Call]) -> Result<Started<'c>, ExecuteError> {
        let (batch, taken) = self.batch(task, calls)?;
        self.crew.start(Member(task), &batch)?;
        Ok(Started { task, calls: &calls[..taken], batch })
    }

    /// Waits until it has made them.
    fn finish(&self, stage: Stage, started: &Started<'_>) -> Result<(), ExecuteError> {
        let &Started { task, calls, ref batch } = started;
        match self.crew.finish(Member(task), batch) {
            Ok(outcome) => self.check(task, calls, &outcome)?,
            Err(AgentError::Gone { .. }) if self.ends(task, stage) => return Ok(()),
            Err(err) => return Err(err.into()),
        }
        if stage == Stage::Fill {
            self.observer.moved(calls.iter().map(Call::memory).sum());
        }
        Ok(())
    }

    /// Whether a task ends in this stage: a process that had ended, or the first thread of one that goes on.
    fn ends(&self, n: usize, stage: Stage) -> bool {
        let task = &self.plan.tasks[n];
        match task.role {
            Role::Ends => stage == Stage::Files,
            _ => task.resume.is_none() && stage == Stage::Last,
        }
    }

    /// Ends everything that was spawned.
    fn kill(&self, root: Pid) {
        for task in &self.plan.tasks {
            // Only those that the plan has created and that are ours: children of the crew or the engine.
            let ours =
                proc::read_text(&format!("/proc/{}/maps", task.tid)).is_ok_and(|maps| maps.contains("memfd:criu-ebpf"));
            if ours || task.tid == root {
                let _ = kill(task.pid, Signal::SIGKILL);
            }
        }
        // A process is gone only when those of its threads that we trace are collected.
        for task in self.plan.tasks.iter().filter(|task| task.tid != root) {
            ptrace::reap(task.tid);
        }
        ptrace::reap(root);
    }
}

fn perform(deed: &dyn Deed, opened: &Opened) -> Result<(), ExecuteError> {
    debug!("{}", deed.describe());
    deed.run(opened).map_err(|source| ExecuteError::Deed { what: deed.describe(), source })
}

/// Waits until a thread stands at an interrupt that it was asked for.
pub(crate) fn wait_for_interrupt(tid: Pid) -> Result<(), AgentError> {
    loop {
        match ptrace::wait(tid)? {
            Stop::Interrupt | Stop::Group(_) => return Ok(()),
            Stop::Signal(signal) => ptrace::cont(tid, signal)?,
            Stop::Exited => return Err(AgentError::Gone { pid: tid.as_raw() }),
            _ => ptrace::cont(tid, 0)?,
        }
    }
}
