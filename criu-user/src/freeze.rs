//! Freezing a process tree: every thread is seized and stopped, until two looks find no new one.
//!
//! [`Frozen`] is a guard: whichever way its owner ends, the tree runs on as it was. Should the engine itself be killed,
//! the kernel detaches and does the same.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::agent::guest::Stopped;
use crate::kernel::cgroup::Freezer;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::pidfd::PidFd;
use crate::kernel::proc::{self, KeyValues, Shown, Stat};
use crate::kernel::ptrace::{self, PendingQueue, Stop};
use crate::kernel::seccomp_bpf::Filter;
use crate::kernel::{SysError, regs};

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

/// One thread of the tree, standing still.
#[derive(Debug)]
pub struct FrozenThread {
    /// What it was found with.
    pub stopped: Stopped,
    /// Signals queued for it alone.
    pub pending: Vec<[u8; ptrace::SIGINFO_LEN]>,
    /// Its extended register state, in XSAVE layout.
    pub xstate: Vec<u8>,
    /// Its registration of restartable sequences.
    pub rseq: Option<ptrace::RseqConfig>,
    /// Its seccomp filters, oldest first; `None` where we may not ask for them.
    pub filters: Option<Vec<Filter>>,
}

impl FrozenThread {
    /// Its id.
    pub fn tid(&self) -> Pid {
        self.stopped.tid
    }
}

/// One process of the tree.
#[derive(Debug)]
pub struct FrozenProcess {
    /// Its id.
    pub pid: Pid,
    /// Where /proc shows it.
    pub shown: Shown,
    /// What /proc/PID/stat said when it stood still.
    pub stat: Stat,
    /// Its live threads, the leader first unless that is dead. None in a zombie.
    pub threads: Vec<FrozenThread>,
    /// Signals queued for the process.
    pub pending: Vec<[u8; ptrace::SIGINFO_LEN]>,
    /// The signal that stopped it, where job control had.
    pub group_stop: Option<i32>,
    /// Its memory; `None` in a zombie.
    pub memory: Option<ProcessMemory>,
    /// Holds it identified.
    pub pidfd: PidFd,
    /// Its children.
    pub children: Vec<Pid>,
}

impl FrozenProcess {
    /// Whether its first thread has ended and others go on.
    pub fn has_dead_leader(&self) -> bool {
        self.shown.by != self.pid
    }

    /// Whether it has ended and waits for its parent.
    pub fn is_zombie(&self) -> bool {
        self.threads.is_empty()
    }
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

/// Threads that we trace; dropping it lets them all go.
#[derive(Debug, Default)]
struct Seized {
    threads: BTreeMap<Pid, Seizure>,
}

#[derive(Debug, Clone, Copy)]
struct Seizure {
    stop: Option<Stop>,
    process: Pid,
    /// Registers to leave it with, where they differ from those it has.
    release: Option<libc::user_regs_struct>,
}

impl Seized {
    fn all_stand(&self) -> bool {
        self.threads.values().all(|seizure| seizure.stop.is_some())
    }
}

impl Seized {
    /// Lets a thread that stands still go on.
    fn let_go(tid: Pid, seizure: &Seizure) {
        if let Some(regs) = &seizure.release {
            let _ = ptrace::set_regs(tid, regs);
        }
        let _ = ptrace::detach(tid);
    }
}

impl Drop for Seized {
    fn drop(&mut self) {
        let (standing, moving): (Vec<_>, Vec<_>) = self.threads.iter().partition(|(_, seizure)| seizure.stop.is_some());
        for (&tid, seizure) in standing {
            Self::let_go(tid, seizure);
        }
        // The others are still on their way to a stop, and only there can be detached from. Some were only waiting for
        // those above. A thread that does not come is let go by the kernel when the engine ends.
        let deadline = Instant::now() + PARTING;
        for (&tid, seizure) in moving {
            if let Ok(Some(_)) = wait_for_stop(tid, deadline) {
                Self::let_go(tid, seizure);
            }
        }
    }
}

/// How long threads that did not stop in time are waited for once more.
const PARTING: Duration = Duration::from_millis(20);
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
    let mut frozen = freeze_by_turns(root, begin, limit, group.as_ref().map(|group| &group.0))?;
    // One that ran before runs already.
    frozen.paused = group.filter(|group| group.0.was_frozen());
    Ok(frozen)
}

fn freeze_by_turns(root: Pid, begin: Instant, limit: Duration, group: Option<&Freezer>) -> Result<Frozen, FreezeError> {
    loop {
        let since = Instant::now();
        match attempt(root, since, begin + limit, group) {
            Ok(frozen) if !frozen.has_guest() => return Ok(frozen),
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

fn attempt(root: Pid, since: Instant, deadline: Instant, group: Option<&Freezer>) -> Result<Frozen, FreezeError> {
    let mut seized = Seized::default();
    if let Some(group) = group {
        seize_frozen(root, group, deadline, &mut seized)?;
    }
    let deadline = deadline.min(Instant::now() + ATTEMPT);
    let order = loop {
        let order = walk(root)?;
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

/// The processes of the tree, parents before children.
fn walk(root: Pid) -> Result<Vec<Pid>, FreezeError> {
    let mut order = vec![root];
    let mut at = 0;
    while at < order.len() {
        let pid = order[at];
        if pid == Pid::this() {
            return Err(FreezeError::Ourselves { pid: pid.as_raw() });
        }
        order.extend(children_of(pid));
        at += 1;
    }
    Ok(order)
}

fn children_of(pid: Pid) -> Vec<Pid> {
    let threads = proc::threads(pid).unwrap_or_default();
    // One that ends meanwhile has no children any more; the next look shows whose they became.
    let mut children: Vec<Pid> = threads.iter().flat_map(|&tid| proc::children(pid, tid).unwrap_or_default()).collect();
    children.sort_unstable();
    children
}

fn seize_threads(pid: Pid, seized: &mut Seized) -> Result<bool, FreezeError> {
    let mut new = false;
    for tid in proc::threads(pid).unwrap_or_default() {
        if seized.threads.contains_key(&tid) {
            continue;
        }
        match ptrace::seize(tid, ptrace::SUSPEND_SECCOMP | ptrace::TRACE_SYSGOOD) {
            Ok(()) => {}
            Err(e) if matches!(e.errno, Errno::EINVAL | Errno::EPERM) => {
                if is_dead(pid, tid) {
                    continue;
                }
                // A kernel without seccomp, or an engine under seccomp itself, cannot suspend the target's.
                match ptrace::seize(tid, ptrace::TRACE_SYSGOOD) {
                    Ok(()) => {}
                    Err(_) if is_dead(pid, tid) => continue,
                    // Of an earlier attempt, in which it did not stop: it still has to.
                    Err(_) if tracer_of(pid, tid) == Pid::this().as_raw() => {}
                    Err(_) => return Err(refused(pid, tid)),
                }
            }
            Err(e) if e.errno == Errno::ESRCH => continue,
            Err(e) => return Err(e.into()),
        }
        seized.threads.insert(tid, Seizure { stop: None, process: pid, release: None });
        new = true;
        if let Err(e) = ptrace::interrupt(tid)
            && e.errno != Errno::ESRCH
        {
            return Err(e.into());
        }
    }
    Ok(new)
}

fn is_dead(pid: Pid, tid: Pid) -> bool {
    proc::stat(pid, Some(tid)).map_or(true, |s| matches!(s.state, 'Z' | 'X'))
}

/// Who traces a thread; 0 if nobody does.
fn tracer_of(pid: Pid, tid: Pid) -> i32 {
    KeyValues::status(pid, tid).and_then(|status| status.number("TracerPid", 10)).unwrap_or(0) as i32
}

fn refused(pid: Pid, tid: Pid) -> FreezeError {
    let tracer = tracer_of(pid, tid);
    if tracer == 0 {
        return FreezeError::Forbidden { tid: tid.as_raw() };
    }
    let name = proc::stat(Pid::from_raw(tracer), None).map(|s| s.comm).unwrap_or_default();
    FreezeError::Traced { tid: tid.as_raw(), tracer, name }
}

fn wait_all(seized: &mut Seized, deadline: Instant) -> Result<(), FreezeError> {
    let waiting: Vec<Pid> = seized.threads.iter().filter(|(_, s)| s.stop.is_none()).map(|(&tid, _)| tid).collect();
    for tid in waiting {
        match wait_for_stop(tid, deadline)? {
            Some(stop) => {
                if let Some(seizure) = seized.threads.get_mut(&tid) {
                    seizure.stop = Some(stop);
                }
            }
            None => drop(seized.threads.remove(&tid)),
        }
    }
    Ok(())
}

/// Waits until a thread stands at our interrupt; `None` if it ended instead.
fn wait_for_stop(tid: Pid, deadline: Instant) -> Result<Option<Stop>, FreezeError> {
    let mut spins = 0u32;
    loop {
        match ptrace::try_wait(tid)? {
            Some(stop @ (Stop::Interrupt | Stop::Group(_))) => return Ok(Some(stop)),
            Some(Stop::Exited) => return Ok(None),
            // A signal that was on its way is delivered first; the interrupt follows before any of its code runs.
            Some(Stop::Signal(signal)) => ptrace::cont(tid, signal)?,
            Some(_) => ptrace::cont(tid, 0)?,
            None if Instant::now() >= deadline => {
                let what = std::fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
                let what =
                    if what.is_empty() || what == "0" { "busy".to_owned() } else { format!("waiting in {what}") };
                return Err(FreezeError::Timeout { tid: tid.as_raw(), what, limit: Duration::ZERO });
            }
            None => {
                spins += 1;
                if spins < 200 {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        }
    }
}

fn examine(pid: Pid, seized: &mut Seized) -> Result<FrozenProcess, FreezeError> {
    let mut tids: Vec<Pid> = seized.threads.iter().filter(|(_, s)| s.process == pid).map(|(&tid, _)| tid).collect();
    tids.sort_by_key(|&tid| (tid != pid, tid));
    let shown = Shown { pid, by: tids.first().copied().unwrap_or(pid) };
    let stat = process_stat(shown)?;
    let pending = match tids.first() {
        Some(&tid) => ptrace::pending_signals(tid, PendingQueue::Process)?,
        None => Vec::new(),
    };
    let memory = if tids.is_empty() { None } else { Some(ProcessMemory::open(shown.by)?) };
    let mut threads = Vec::with_capacity(tids.len());
    let mut group_stop = None;
    for tid in tids {
        let thread = examine_thread(tid, &pending, memory.as_ref())?;
        // CS 0x23 is the 32-bit code segment (arch/x86/include/asm/segment.h, __USER32_CS).
        if thread.stopped.regs.cs == 0x23 {
            return Err(FreezeError::Compat { pid: pid.as_raw(), comm: stat.comm });
        }
        if let Some(seizure) = seized.threads.get_mut(&tid) {
            let released = regs::released(&thread.stopped.regs, thread.stopped.signal_waits);
            seizure.release = (released != thread.stopped.regs).then_some(released);
            if let Some(Stop::Group(signal)) = seizure.stop {
                group_stop = Some(signal);
            }
        }
        threads.push(thread);
    }
    let pidfd = if shown.by == pid { PidFd::open(pid)? } else { PidFd::open_by_thread(shown.by)? };
    Ok(FrozenProcess { pid, shown, stat, threads, pending, group_stop, memory, pidfd, children: children_of(pid) })
}

/// Where the first thread has ended, only its name and how it ended are its own.
fn process_stat(shown: Shown) -> Result<Stat, SysError> {
    let leader = proc::stat(shown.pid, None)?;
    if shown.by == shown.pid {
        return Ok(leader);
    }
    Ok(Stat { comm: leader.comm, exit_code: leader.exit_code, ..proc::stat(shown.by, None)? })
}

fn signal_bits(pending: &[[u8; ptrace::SIGINFO_LEN]]) -> u64 {
    pending
        .iter()
        .map(|info| i32::from_le_bytes([info[0], info[1], info[2], info[3]]))
        .filter(|n| (1..=64).contains(n))
        .fold(0, |bits, n| bits | 1 << (n - 1))
}

fn examine_thread(
    tid: Pid,
    process_pending: &[[u8; ptrace::SIGINFO_LEN]],
    memory: Option<&ProcessMemory>,
) -> Result<FrozenThread, FreezeError> {
    let mut regs = ptrace::regs(tid)?;
    let sigmask = ptrace::sigmask(tid)?;
    let pending = ptrace::pending_signals(tid, PendingQueue::Thread)?;
    let signal_waits = (signal_bits(&pending) | signal_bits(process_pending)) & !sigmask != 0;
    let rseq = ptrace::rseq_config(tid);
    if let (Some(rseq), Some(memory)) = (&rseq, memory)
        && let Some(abort) = rseq_abort(rseq, memory, regs.rip)
    {
        // It must not go on within its critical section, which everything that we do breaks.
        regs.rip = abort;
    }
    let xstate = ptrace::xstate(tid)?;
    let filters = ptrace::seccomp_filters(tid)?;
    Ok(FrozenThread { stopped: Stopped { tid, regs, sigmask, signal_waits }, pending, xstate, rseq, filters })
}

/// The abort handler of the critical section that a thread is in: `struct rseq_cs` of include/uapi/linux/rseq.h.
fn rseq_abort(rseq: &ptrace::RseqConfig, memory: &ProcessMemory, rip: u64) -> Option<u64> {
    if rseq.address == 0 {
        return None;
    }
    let word = |bytes: &[u8], at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    };
    let section = word(&memory.read(rseq.address + 8, 8).ok()?, 0);
    if section == 0 {
        return None;
    }
    let section = memory.read(section, 32).ok()?;
    let (start, length, abort) = (word(&section, 8), word(&section, 16), word(&section, 24));
    (rip.wrapping_sub(start) < length).then_some(abort)
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
            // Threads mostly wait in the same few pages.
            let pages: BTreeSet<u64> = process.threads.iter().map(|t| t.stopped.regs.rip & !0xfff).collect();
            pages.into_iter().any(|page| {
                let bytes = process.memory.as_ref().and_then(|m| m.read(page, 4096).ok());
                bytes.is_some_and(|b| b.chunks(16).any(|line| line == code))
            })
        })
    }

    /// Ends the freeze. Gives back how long it lasted.
    pub fn release(self, how: Release) -> Duration {
        match how {
            Release::Resume => {}
            Release::Stop => {
                for process in self.alive() {
                    let _ = process.pidfd.kill(Signal::SIGSTOP);
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
            let _ = process.pidfd.kill(Signal::SIGKILL);
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
