//! Freezing a process tree: every thread is seized and stopped, until two looks find no new one.
//!
//! [`Frozen`] is a guard: whichever way its owner ends, the tree runs on as it was. Should the engine itself be killed,
//! the kernel detaches and does the same.

mod examine;
mod seize;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use examine::examine;
pub use examine::{FrozenProcess, FrozenThread};
pub use seize::catch_up;
use seize::{Seized, seize_threads, wait_all, walk};

use crate::kernel::SysError;
use crate::kernel::cgroup::Freezer;
use crate::kernel::proc::{self, KeyValues};
use crate::kernel::ptrace;
use crate::kernel::survey::PAGE;

/// Why a tree could not be frozen; it runs on.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No such process.
    #[error("there is no process {pid}")]
    NoProcess {
        /// The pid that was asked for.
        pid: i32,
    },
    /// The number is a thread's.
    #[error("{tid} is a thread of process {pid}: name the process")]
    IsThread {
        /// What was asked for.
        tid: i32,
        /// Its process.
        pid: i32,
    },
    /// The kernel's own.
    #[error("pid {pid} ({comm}) is a thread of the kernel: there is nothing that could be dumped")]
    KernelThread {
        /// What was asked for.
        pid: i32,
        /// Its name.
        comm: String,
    },
    /// The engine would have to stop itself.
    #[error("process {pid} is part of the tree to dump and runs the dump itself: start criu-ebpf outside of the tree")]
    Ourselves {
        /// The engine.
        pid: i32,
    },
    /// Somebody else traces it.
    #[error("tid {tid} is traced by process {tracer} ({name}); end that (debugger, strace) first")]
    Traced {
        /// The thread.
        tid: i32,
        /// Its tracer.
        tracer: i32,
        /// The tracer's name.
        name: String,
    },
    /// Not allowed.
    #[error("no permission to trace tid {tid} (needs CAP_SYS_PTRACE, and no ptrace restriction above the target)")]
    Forbidden {
        /// The thread.
        tid: i32,
    },
    /// It did not come to rest in time.
    #[error("the tree did not stand still within {} s: tid {tid} is {what}; raise --timeout", limit.as_secs())]
    Timeout {
        /// The last thread waited for.
        tid: i32,
        /// What it does.
        what: String,
        /// The limit.
        limit: Duration,
    },
    /// What an earlier engine left is still under way.
    #[error(
        "a dump that was killed has left its agent in the tree of process {pid}, and it has not gone home within {} s: \
         let the tree go on (SIGCONT, if it is stopped), and dump it again", limit.as_secs()
    )]
    Guest {
        /// The root of the tree.
        pid: i32,
        /// The limit.
        limit: Duration,
    },
    /// A 32-bit program.
    #[error("pid {pid} ({comm}) is a 32-bit program, which is not supported")]
    Compat {
        /// The process.
        pid: i32,
        /// Its name.
        comm: String,
    },
    /// The group has no freezer.
    #[error("{dir} is no control group with a freezer: neither freezer.state (v1) nor cgroup.freeze (v2) is there", dir = dir.display())]
    NoFreezer {
        /// Its directory.
        dir: PathBuf,
    },
    /// The group did not freeze.
    #[error("the control group {dir} was not frozen within {} s; raise --timeout, or do without --freeze-cgroup", limit.as_secs(), dir = dir.display())]
    NotFrozen {
        /// Its directory.
        dir: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

/// What becomes of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// It runs on.
    Resume,
    /// It stays where it is, stopped by SIGSTOP.
    Stop,
    /// It is killed.
    Kill,
}

/// A tree that stands still for as long as this lives.
#[derive(Debug)]
pub struct Frozen {
    /// The processes, parents before children.
    pub processes: Vec<FrozenProcess>,
    /// When the first thread was asked to stop.
    pub since: Instant,
    /// How long it took until all stood still.
    pub took: Duration,
    /// A group that was frozen before; it is so again before the threads are let go.
    paused: Option<Paused>,
    seized: Seized,
}

/// A control group that was frozen when we came; dropping this freezes it again.
#[derive(Debug)]
struct Paused(Freezer);

impl Drop for Paused {
    fn drop(&mut self) {
        if let Err(err) = self.0.give_back() {
            tracing::warn!(%err, "the control group is no longer frozen as it was");
        }
    }
}

/// How long one attempt waits for a thread before all are let go for a moment: a parent in vfork(2) stops only after
/// its child has gone on.
const ATTEMPT: Duration = Duration::from_millis(300);
const BREATH: Duration = Duration::from_millis(5);

/// Freezes the tree below `root`, with the help of a control group's freezer where one is named.
pub fn freeze(root: Pid, limit: Duration, group: Option<&Path>) -> Result<Frozen, FreezeError> {
    let begin = Instant::now();
    check_root(root)?;
    let no_freezer = |dir: &Path| FreezeError::NoFreezer { dir: dir.to_owned() };
    let group = match group {
        Some(dir) => Some(Paused(Freezer::open(dir)?.ok_or_else(|| no_freezer(dir))?)),
        None => None,
    };
    let mut frozen = freeze_by_turns(begin, limit, |since, deadline| {
        let mut seized = Seized::default();
        if let Some(Paused(group)) = &group {
            seize_frozen(root, group, deadline, &mut seized)?;
        }
        attempt(&|| walk(root), since, deadline, seized)
    })?;
    // One that ran before runs already.
    frozen.paused = group.filter(|group| group.0.was_frozen());
    Ok(frozen)
}

/// Freezes one process without those below it: for what is done to it alone. What it was in the middle of (a fork) may be
/// seen half done by others.
pub fn freeze_alone(pid: Pid, limit: Duration) -> Result<Frozen, FreezeError> {
    check_root(pid)?;
    freeze_by_turns(Instant::now(), limit, |since, deadline| {
        attempt(&|| Ok(vec![pid]), since, deadline, Seized::default())
    })
}

fn freeze_by_turns(
    begin: Instant,
    limit: Duration,
    attempt: impl Fn(Instant, Instant) -> Result<Frozen, FreezeError>,
) -> Result<Frozen, FreezeError> {
    loop {
        let since = Instant::now();
        match attempt(since, begin + limit) {
            Ok(frozen) if !frozen.has_guest() => return Ok(frozen),
            Ok(frozen) if begin.elapsed() + BREATH >= limit => {
                return Err(FreezeError::Guest { pid: frozen.root().as_raw(), limit });
            }
            // A guest of an engine that died is on its way home.
            Ok(_) => {}
            Err(FreezeError::Timeout { tid, what, .. }) if begin.elapsed() + BREATH >= limit => {
                return Err(FreezeError::Timeout { tid, what, limit });
            }
            Err(FreezeError::Timeout { .. }) => {}
            Err(other) => return Err(other),
        }
        std::thread::sleep(BREATH);
    }
}

/// Flag of the kernel's own threads, include/linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;

fn check_root(root: Pid) -> Result<(), FreezeError> {
    let status = KeyValues::status(root, root).map_err(|_| FreezeError::NoProcess { pid: root.as_raw() })?;
    let tgid = status.number("Tgid", 10)? as i32;
    if tgid != root.as_raw() {
        return Err(FreezeError::IsThread { tid: root.as_raw(), pid: tgid });
    }
    if let Ok(stat) = proc::stat(root, None)
        && stat.flags & PF_KTHREAD != 0
    {
        return Err(FreezeError::KernelThread { pid: root.as_raw(), comm: stat.comm });
    }
    Ok(())
}

/// Freezes the processes that `walk` finds, the first of which is their root.
fn attempt(
    walk: &dyn Fn() -> Result<Vec<Pid>, FreezeError>,
    since: Instant,
    deadline: Instant,
    mut seized: Seized,
) -> Result<Frozen, FreezeError> {
    let deadline = deadline.min(Instant::now() + ATTEMPT);
    let order = loop {
        let order = walk()?;
        let mut new = false;
        for &pid in &order {
            new |= seize_threads(pid, &mut seized)?;
        }
        wait_all(&mut seized, deadline)?;
        // Standing still, nothing forks: a look that finds nobody new is the last.
        if !new && seized.all_stand() {
            break order;
        }
    };
    let took = since.elapsed();
    let mut processes = Vec::with_capacity(order.len());
    for pid in order {
        processes.push(examine(pid, &mut seized)?);
    }
    Ok(Frozen { processes, since, took, paused: None, seized })
}

/// Takes hold of all threads while their group is frozen and nobody forks; thawed, each goes on into its stop.
fn seize_frozen(root: Pid, group: &Freezer, deadline: Instant, seized: &mut Seized) -> Result<(), FreezeError> {
    let begin = Instant::now();
    if !group.freeze(deadline)? {
        return Err(FreezeError::NotFrozen { dir: group.dir().to_owned(), limit: begin.elapsed() });
    }
    let held = walk(root).and_then(|order| order.iter().try_for_each(|&pid| seize_threads(pid, seized).map(drop)));
    group.thaw()?;
    held
}

impl Frozen {
    /// The root of the tree.
    pub fn root(&self) -> Pid {
        self.processes[0].pid
    }

    /// The processes that are alive.
    pub fn alive(&self) -> impl Iterator<Item = &FrozenProcess> {
        self.processes.iter().filter(|p| !p.is_zombie())
    }

    /// Whether a thread runs an agent that an earlier engine left when it died.
    fn has_guest(&self) -> bool {
        let code = &crate::agent::code::guest()[..16];
        self.alive().any(|process| {
            // Threads mostly wait in the same few pages. The code may reach over the end of one into the next.
            let page = |thread: &FrozenThread| thread.stopped.regs.rip & !(PAGE - 1);
            let pages: BTreeSet<u64> = process.threads.iter().map(page).collect();
            pages.into_iter().any(|page| {
                let read = |start, len| process.memory.as_ref().and_then(|memory| memory.read(start, len).ok());
                let bytes = read(page.saturating_sub(PAGE), 2 * PAGE as usize).or_else(|| read(page, PAGE as usize));
                bytes.is_some_and(|bytes| bytes.chunks(16).any(|line| line == code))
            })
        })
    }

    /// Ends the freeze. Gives back how long it lasted.
    pub fn release(self, how: Release) -> Duration {
        match how {
            Release::Resume => {}
            Release::Stop => {
                for process in self.alive() {
                    if let Err(err) = process.pidfd.kill(Signal::SIGSTOP) {
                        tracing::warn!(pid = process.pid.as_raw(), %err, "it is not stopped");
                    }
                }
            }
            Release::Kill => return self.kill(),
        }
        let since = self.since;
        drop(self);
        since.elapsed()
    }

    fn kill(mut self) -> Duration {
        // A frozen task of version 1 does not even die.
        std::mem::forget(self.paused.take());
        for process in &self.processes {
            // A zombie is no longer there for signals.
            if let Err(err) = process.pidfd.kill(Signal::SIGKILL)
                && !process.is_zombie()
            {
                tracing::error!(pid = process.pid.as_raw(), %err, "it is still there: kill it before a restore");
            }
        }
        let frozen = self.since.elapsed();
        let threads = std::mem::take(&mut self.seized.threads);
        // Leaders are reported only after their threads.
        for (&tid, seizure) in threads.iter().filter(|(tid, s)| **tid != s.process).chain(threads.iter()) {
            let _ = seizure;
            ptrace::reap(tid);
        }
        frozen
    }
}
