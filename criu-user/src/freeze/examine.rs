//! What stopped processes and threads are found with.

use nix::unistd::Pid;

use super::FreezeError;
use super::seize::{Seized, children_of};
use crate::agent::guest::{Door, Stopped};
use crate::agent::{Beside, alone};
use crate::kernel::mem::ProcessMemory;
use crate::kernel::pidfd::PidFd;
use crate::kernel::proc::{self, Shown, Stat};
use crate::kernel::processors::Processors;
use crate::kernel::ptrace::{self, PendingQueue, Stop};
use crate::kernel::seccomp_bpf::Filter;
use crate::kernel::{SysError, regs, sched};

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
    /// The processors that it may run on.
    pub processors: Processors,
    /// Its seccomp filters, oldest first; `None` where we may not ask for them.
    pub filters: Option<Vec<Filter>>,
}

impl FrozenThread {
    /// Its id.
    pub fn tid(&self) -> Pid {
        self.stopped.tid
    }

    /// The way into its process, for who waits beside, if this may be moved there.
    pub fn door<'d>(&'d self, beside: Option<&'d Beside>) -> Door<'d> {
        let may_move = self.filters.as_deref().is_some_and(alone::can_be_moved);
        Door { thread: self.stopped, processors: &self.processors, beside: beside.filter(|_| may_move) }
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

pub(super) fn examine(pid: Pid, seized: &mut Seized) -> Result<FrozenProcess, FreezeError> {
    let mut tids: Vec<Pid> = seized.threads.iter().filter(|(_, s)| s.process == pid).map(|(&tid, _)| tid).collect();
    tids.sort_by_key(|&tid| (tid != pid, tid));
    let shown = Shown { pid, by: tids.first().copied().unwrap_or(pid) };
    let stat = process_stat(shown)?;
    let mut pending = match tids.first() {
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
    // One that was stopped already changes nothing; else it stands where it is about to stop. It cannot be blocked, so a
    // restore could not keep it pending.
    let mut queues: Vec<_> = threads.iter_mut().map(|thread| &mut thread.pending).collect();
    queues.push(&mut pending);
    if queues.into_iter().filter_map(take_stop).count() > 0 {
        group_stop = group_stop.or(Some(libc::SIGSTOP));
    }
    let pidfd = if shown.by == pid { PidFd::open(pid)? } else { PidFd::open_by_thread(shown.by)? };
    Ok(FrozenProcess { pid, shown, stat, threads, pending, group_stop, memory, pidfd, children: children_of(pid) })
}

/// Takes SIGSTOP out of a queue, if it is there.
fn take_stop(queue: &mut Vec<[u8; ptrace::SIGINFO_LEN]>) -> Option<()> {
    let before = queue.len();
    queue.retain(|info| i32::from_le_bytes([info[0], info[1], info[2], info[3]]) != libc::SIGSTOP);
    (queue.len() != before).then_some(())
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
    let code = |at| memory?.read(at, regs::SYSCALL.len()).ok();
    regs = regs::before_restart(&regs, code).unwrap_or(regs);
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
    let processors = sched::affinity(tid)?;
    let stopped = Stopped { tid, regs, sigmask, signal_waits };
    Ok(FrozenThread { stopped, pending, xstate, rseq, processors, filters })
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
