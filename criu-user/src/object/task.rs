//! What a process and its threads are beside their registers and memory: names, limits, scheduling, the odds and ends
//! of prctl(2), and the messages (`core-*.img`, `mm-*.img`) that hold all of it.

use std::collections::HashMap;

use nix::unistd::Pid;

use super::facts::{self, ThreadFacts};
use super::file::{Capture, Planner};
use super::signals::{Actions, Whose, inside, numbers, plan_actions, plan_pending, queue};
use super::timers::Timers;
use super::{ObjectError, Refusal, cgroup, creds, memory, regfile, registers, seccomp, timers, waits};
use crate::agent::{Batch, CallId, Guest, Outcome, Room};
use crate::call;
use crate::freeze::{FrozenProcess, FrozenThread};
use crate::image::TaskState;
use crate::image::proto::{
    CoreEntry, CredsEntry, MmEntry, RlimitEntry, RseqEntry, TaskCoreEntry, TaskRlimitsEntry, ThreadCoreEntry,
    ThreadInfoX86, ThreadSasEntry, VmaEntry, core_entry::March,
};
use crate::kernel::proc::{self, Stat};
use crate::kernel::threads::ThreadRecords;
use crate::kernel::{sched, sys};
use crate::plan::{Resume, Stage, TaskRef, Why};

const PR_SET_PDEATHSIG: u64 = 1;
const PR_GET_DUMPABLE: u64 = 3;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_NAME: u64 = 15;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const PR_GET_THP_DISABLE: u64 = 42;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;
const PR_SET_TIMERSLACK: u64 = 29;
/// SCHED_RESET_ON_FORK of include/uapi/linux/sched.h.
const SCHED_RESET_ON_FORK: i32 = 0x4000_0000;
const SS_ONSTACK: u32 = 1;
const SS_DISABLE: u32 = 2;

/// The message of a thread.
fn thread_core(
    cx: &mut Capture<'_>,
    process: &FrozenProcess,
    thread: &FrozenThread,
    facts: ThreadFacts,
    records: &ThreadRecords,
) -> Result<CoreEntry, ObjectError> {
    let tid = thread.tid();
    let (general, wait) = waits::capture(process, thread, records)?;
    let (futex_rla, futex_rla_len) = sys::robust_list(tid)?;
    let scheduling = sched::of(tid)?;
    if scheduling.policy & !SCHED_RESET_ON_FORK > libc::SCHED_IDLE {
        cx.refuse(Refusal {
            pid: process.pid.as_raw(),
            fd: None,
            what: format!(
                "thread {tid} is scheduled by policy {}, whose parameters are not carried over",
                scheduling.policy
            ),
            advice: "give it an ordinary or a real-time policy for the dump, see chrt(1)".into(),
        });
    }
    let (seccomp_mode, seccomp_filter) = seccomp::capture(cx, process.pid, thread, facts.seccomp_mode)?;
    let css_set = records.get(tid).map(|record| record.cgroups).filter(|&css_set| css_set != 0);
    let cg_set = cgroup::capture(cx, process.pid, tid, css_set)?;
    let (ss_sp, ss_size, ss_flags) = facts.altstack;
    let rseq_entry = thread.rseq.filter(|r| r.address != 0).map(|r| RseqEntry {
        rseq_abi_pointer: r.address,
        rseq_abi_size: r.size,
        signature: r.signature,
        rseq_cs_pointer: None,
    });
    Ok(CoreEntry {
        mtype: March::X8664 as i32,
        thread_info: Some(ThreadInfoX86 {
            clear_tid_addr: facts.clear_child_tid,
            gpregs: registers::general(&general),
            fpregs: registers::extended(&thread.xstate),
            tls: Vec::new(),
        }),
        thread_core: Some(ThreadCoreEntry {
            futex_rla,
            futex_rla_len: futex_rla_len as u32,
            sched_nice: Some(scheduling.nice),
            sched_policy: Some(scheduling.policy as u32),
            sched_prio: Some(scheduling.priority as u32),
            blk_sigset: Some(thread.stopped.sigmask),
            signals_p: Some(queue(&thread.pending)),
            sas: Some(ThreadSasEntry { ss_sp, ss_size, ss_flags }),
            pdeath_sig: Some(facts.parent_death_signal).filter(|&s| s != 0),
            creds: Some(facts.creds),
            comm: Some(facts.comm),
            rseq_entry,
            seccomp_mode,
            seccomp_filter,
            cg_set,
            affinity: Some(thread.processors.trimmed().to_vec()),
            io_priority: Some(sched::io_priority(tid)?).filter(|&priority| priority != 0),
            timer_slack: Some(facts.timer_slack).filter(|&slack| slack != 0),
            wait,
            ..ThreadCoreEntry::default()
        }),
        ..CoreEntry::default()
    })
}

/// What only the process itself can tell.
#[derive(Debug)]
struct ProcessQuestion {
    actions: Actions,
    timers: Timers,
    brk: CallId,
    dumpable: CallId,
    thp_disable: CallId,
    subreaper: (CallId, Room),
    membarrier: CallId,
    limits: Vec<(CallId, Room)>,
}

impl ProcessQuestion {
    fn ask(pid: Pid, batch: &mut Batch) -> Result<Self, ObjectError> {
        let subreaper = batch.room(8);
        let limits = (0..16u64)
            .map(|which| {
                let room = batch.room(16);
                (batch.call(libc::SYS_prlimit64, &[0u64.into(), which.into(), 0u64.into(), room.into()]), room)
            })
            .collect();
        Ok(Self {
            actions: Actions::ask(batch),
            timers: Timers::ask(pid, batch)?,
            brk: batch.call(libc::SYS_brk, &[0u64.into()]),
            dumpable: batch.call(libc::SYS_prctl, &[PR_GET_DUMPABLE.into()]),
            thp_disable: batch.try_call(libc::SYS_prctl, &[PR_GET_THP_DISABLE.into()]),
            subreaper: (batch.call(libc::SYS_prctl, &[PR_GET_CHILD_SUBREAPER.into(), subreaper.into()]), subreaper),
            // Linux 6.3.
            membarrier: batch.try_call(libc::SYS_membarrier, &[MEMBARRIER_GET_REGISTRATIONS.into()]),
            limits,
        })
    }

    fn core(&self, process: &FrozenProcess, out: &Outcome) -> Result<TaskCoreEntry, ObjectError> {
        let pid = process.pid;
        let raw = pid.as_raw();
        let limits = self
            .limits
            .iter()
            .map(|&(call, room)| {
                out.ret(call).map_err(inside(raw, "prlimit", "a resource limit"))?;
                Ok(RlimitEntry { cur: out.u64(room, 0), max: out.u64(room, 8) })
            })
            .collect::<Result<_, ObjectError>>()?;
        let personality = proc::read_text(&format!("/proc/{pid}/personality"))?;
        let oom = proc::read_text(&format!("/proc/{pid}/oom_score_adj"))?;
        let state = if process.group_stop.is_some() { TaskState::Stopped } else { TaskState::Alive };
        Ok(TaskCoreEntry {
            task_state: state.to_raw(),
            exit_code: 0,
            personality: u32::from_str_radix(personality.trim(), 16).unwrap_or(0),
            flags: process.stat.flags,
            blk_sigset: process.threads.first().map_or(0, |t| t.stopped.sigmask),
            comm: proc::comm(pid, pid)?,
            timers: Some(self.timers.answer(raw, out)?),
            rlimits: Some(TaskRlimitsEntry { rlimits: limits }),
            oom_score_adj: oom.trim().parse().ok(),
            child_subreaper: Some(out.u32(self.subreaper.1, 0) != 0),
            membarrier_registration_mask: out.ret(self.membarrier).ok().map(|m| m as u32).filter(|&m| m != 0),
            sigactions: self.actions.answer(raw, out)?,
            signals_s: Some(queue(&process.pending)),
            stop_signo: process.group_stop.map(|s| s as u32),
            exit_signal: Some(process.stat.exit_signal as u32).filter(|&signal| signal != libc::SIGCHLD as u32),
            ..TaskCoreEntry::default()
        })
    }
}

/// What one process is: one message for each thread, and one for the address space.
#[derive(Debug)]
pub struct Captured {
    /// By tid.
    pub cores: Vec<(Pid, CoreEntry)>,
    /// The address space.
    pub mm: MmEntry,
}

/// Asks a process and its threads.
pub fn capture(
    cx: &mut Capture<'_>,
    process: &FrozenProcess,
    guest: &mut Guest<'_>,
    vmas: Vec<VmaEntry>,
    records: &ThreadRecords,
) -> Result<Captured, ObjectError> {
    let pid = process.pid;
    let mut batch = Batch::new();
    let about_process = ProcessQuestion::ask(pid, &mut batch)?;
    let out = guest.run(&batch)?;
    let task = about_process.core(process, &out)?;
    let mm = address_space(cx, process.shown.by, &process.stat, &about_process, &out, vmas)?;
    let facts = facts::of_process(records, guest, process)?;
    let mut cores = Vec::with_capacity(process.threads.len());
    for (thread, facts) in process.threads.iter().zip(facts) {
        cores.push((thread.tid(), thread_core(cx, process, thread, facts, records)?));
    }
    match cores.iter_mut().find(|(tid, _)| *tid == pid) {
        Some((_, core)) => core.tc = Some(task),
        None => cores.push((pid, dead_leader(process, task))),
    }
    Ok(Captured { cores, mm })
}

fn address_space(
    cx: &mut Capture<'_>,
    pid: Pid,
    stat: &Stat,
    question: &ProcessQuestion,
    out: &Outcome,
    vmas: Vec<VmaEntry>,
) -> Result<MmEntry, ObjectError> {
    let raw = pid.as_raw();
    let auxv_path = format!("/proc/{pid}/auxv");
    let auxv = std::fs::read(&auxv_path).map_err(|e| crate::kernel::SysError::io("read", &auxv_path, &e))?;
    let mut words: Vec<u64> =
        auxv.chunks_exact(8).map(|c| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]])).collect();
    // The kernel shows it up to AT_NULL and keeps it in a fixed array; so do others who write this format.
    words.truncate(44);
    Ok(MmEntry {
        mm_start_code: stat.start_code,
        mm_end_code: stat.end_code,
        mm_start_data: stat.start_data,
        mm_end_data: stat.end_data,
        mm_start_stack: stat.start_stack,
        mm_start_brk: stat.start_brk,
        mm_brk: out.ret(question.brk).map_err(inside(raw, "brk", "the heap's end"))?,
        mm_arg_start: stat.arg_start,
        mm_arg_end: stat.arg_end,
        mm_env_start: stat.env_start,
        mm_env_end: stat.env_end,
        exe_file_id: regfile::by_path(cx, raw, &format!("/proc/{pid}/exe"), libc::O_RDONLY as u32)?,
        mm_saved_auxv: words,
        vmas,
        dumpable: out.ret(question.dumpable).ok().map(|d| d as i32),
        thp_disabled: Some(out.ret(question.thp_disable).is_ok_and(|d| d != 0)),
        aios: Vec::new(),
    })
}

/// The message of a first thread that has ended before the others: what its process is, and nothing of its own.
fn dead_leader(process: &FrozenProcess, task: TaskCoreEntry) -> CoreEntry {
    let exit_code = process.stat.exit_code as u32;
    CoreEntry {
        mtype: March::X8664 as i32,
        tc: Some(TaskCoreEntry { exit_code, leader_ended: Some(true), ..task }),
        ..CoreEntry::default()
    }
}

/// What remains of a process that has ended: its exit code.
pub fn zombie(stat: &Stat) -> CoreEntry {
    CoreEntry {
        mtype: March::X8664 as i32,
        tc: Some(TaskCoreEntry {
            task_state: TaskState::Dead.to_raw(),
            exit_code: stat.exit_code as u32,
            comm: stat.comm.clone().into_bytes(),
            flags: stat.flags,
            ..TaskCoreEntry::default()
        }),
        ..CoreEntry::default()
    }
}

/// Plans what a process is.
pub fn plan_process(
    cx: &mut Planner<'_>,
    task: TaskRef,
    entry: &CoreEntry,
    core: &TaskCoreEntry,
    mm: &MmEntry,
) -> Result<(), ObjectError> {
    let stage = Stage::Process;
    cx.plan.push(task, stage, call!(SYS_personality(core.personality), "personality"));
    if let Some(score) = core.oom_score_adj
        && score != cx.shelf.get::<Inherited>().oom_score()
    {
        let pid = cx.plan.task(task).pid;
        cx.plan.after(stage, OomScore { pid, score });
    }
    plan_actions(&mut cx.plan, task, &core.sigactions)?;
    if core.child_subreaper == Some(true) {
        cx.plan.push(task, stage, call!(SYS_prctl(PR_SET_CHILD_SUBREAPER, 1u64), "child subreaper"));
    }
    if let Some(mask) = core.membarrier_registration_mask {
        for command in (0..32).filter(|n| mask & 1 << n != 0) {
            let why = "membarrier registration";
            cx.plan.push(task, stage, call!(SYS_membarrier(1u64 << command, 0u64), why));
        }
    }
    memory::plan_facts(cx, task, mm)?;
    if let Some(timers) = &core.timers {
        let own = entry.thread_core.as_ref().and_then(|thread| thread.signals_p.as_ref());
        let pending = core.signals_s.iter().chain(own).flat_map(numbers).collect();
        timers::plan(&mut cx.plan, task, timers, &pending)?;
    }
    for (which, limit) in core.rlimits.iter().flat_map(|l| &l.rlimits).enumerate() {
        let own = cx.shelf.get::<Inherited>().limit(which as u64)?;
        check_limit(which, limit, own)?;
        if own != [limit.cur, limit.max] {
            let bytes: Vec<u8> = [limit.cur, limit.max].iter().flat_map(|w| w.to_le_bytes()).collect();
            let why = Why::Number("resource limit", which as u64);
            cx.plan.push(task, Stage::Credentials, call!(SYS_prlimit64(0u64, which, bytes, 0u64), why));
        }
    }
    Ok(())
}

/// What all tasks have from the engine, as far as it has been asked.
#[derive(Debug, Default)]
struct Inherited {
    oom_score: Option<i32>,
    limits: HashMap<u64, [u64; 2]>,
}

impl Inherited {
    fn oom_score(&mut self) -> i32 {
        let read = || proc::read_text("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok());
        *self.oom_score.get_or_insert_with(|| read().unwrap_or(0))
    }

    /// Soft and hard limit. No resource has a number above those that Linux has: there is nothing to inherit.
    fn limit(&mut self, which: u64) -> Result<[u64; 2], ObjectError> {
        if let Some(known) = self.limits.get(&which) {
            return Ok(*known);
        }
        if which >= LIMITS.len() as u64 {
            return Err(ObjectError::contradiction(format!("resource limit {which} is none that Linux has")));
        }
        let own = sys::limit(which)?;
        self.limits.insert(which, own);
        Ok(own)
    }
}

/// Resource limits by their numbers: include/uapi/asm-generic/resource.h.
const LIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// A hard limit can be raised only by those who are above all limits.
fn check_limit(which: usize, wanted: &RlimitEntry, [_, own]: [u64; 2]) -> Result<(), ObjectError> {
    if wanted.max <= own || sys::has_capability(sys::CAP_SYS_RESOURCE) {
        return Ok(());
    }
    let (name, wanted) = (LIMITS[which], wanted.max);
    Err(ObjectError::Unsupported {
        what: format!("the hard limit RLIMIT_{name} of {wanted}: the restoring process may have {own} at most"),
        advice: "raise the limit of the shell that restores, or restore with CAP_SYS_RESOURCE",
    })
}

/// Sets a process's oom_score_adj: a file of /proc.
#[derive(Debug)]
struct OomScore {
    pid: Pid,
    score: i32,
}

impl crate::plan::Deed for OomScore {
    fn describe(&self) -> String {
        format!("write {} to /proc/{}/oom_score_adj", self.score, self.pid)
    }

    fn run(&self, _: &crate::plan::Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(std::fs::write(format!("/proc/{}/oom_score_adj", self.pid), self.score.to_string())?)
    }
}

/// Plans what a thread is, and how it goes on.
pub fn plan_thread(cx: &mut Planner<'_>, task: TaskRef, core: &CoreEntry, own: &CredsEntry) -> Result<(), ObjectError> {
    let tid = cx.plan.task(task).tid;
    let missing = |what: &str| ObjectError::contradiction(format!("core-{tid}.img has no {what}"));
    let thread = core.thread_core.as_ref().ok_or_else(|| missing("thread part"))?;
    let info = core.thread_info.as_ref().ok_or_else(|| missing("registers"))?;
    let stage = Stage::Thread;
    let mut push = |call| cx.plan.push(task, stage, call);
    if let Some(comm) = thread.comm.as_ref().or(core.tc.as_ref().map(|tc| &tc.comm)) {
        push(call!(SYS_prctl(PR_SET_NAME, name_bytes(comm)), "name"));
    }
    // One is inherited over a fork, so that even none has to be said. SS_ONSTACK cannot be set: it follows from rsp.
    let stack = match &thread.sas {
        Some(sas) if sas.ss_flags & SS_DISABLE == 0 => [sas.ss_sp, u64::from(sas.ss_flags & !SS_ONSTACK), sas.ss_size],
        _ => [0, SS_DISABLE.into(), 0],
    };
    let stack: Vec<u8> = stack.iter().flat_map(|w| w.to_le_bytes()).collect();
    push(call!(SYS_sigaltstack(stack, 0u64), "alternate signal stack"));
    push(call!(SYS_set_tid_address(info.clear_tid_addr), "word to clear at the end"));
    if thread.futex_rla != 0 {
        push(call!(SYS_set_robust_list(thread.futex_rla, thread.futex_rla_len), "robust futexes"));
    }
    if let Some(rseq) = &thread.rseq_entry
        && rseq.rseq_abi_pointer != 0
    {
        let why = "restartable sequences";
        push(call!(SYS_rseq(rseq.rseq_abi_pointer, rseq.rseq_abi_size, 0u64, rseq.signature), why));
    }
    plan_scheduling(cx, task, thread)?;
    if let Some(pending) = &thread.signals_p {
        plan_pending(&mut cx.plan, task, pending, Whose::Thread)?;
    }
    if let Some(pending) = core.tc.as_ref().and_then(|tc| tc.signals_s.as_ref()) {
        plan_pending(&mut cx.plan, task, pending, Whose::Process)?;
    }
    cgroup::plan_task(cx, task, thread.cg_set.or(core.tc.as_ref().and_then(|tc| tc.cg_set)))?;
    seccomp::plan(cx, task, thread)?;
    if let Some(theirs) = &thread.creds {
        creds::plan(&mut cx.plan, task, theirs, own)?;
    }
    // A change of credentials clears it.
    let signal = thread.pdeath_sig.unwrap_or(0);
    cx.plan.push(task, Stage::Credentials, call!(SYS_prctl(PR_SET_PDEATHSIG, signal), "parent-death signal"));
    let sigmask = thread.blk_sigset.or(core.tc.as_ref().map(|tc| tc.blk_sigset)).unwrap_or(0);
    let resume = Resume {
        regs: registers::to_general(&info.gpregs),
        xstate: registers::to_extended(&info.fpregs)?,
        sigmask,
        wait: waits::plan(cx, &info.gpregs, thread.wait.as_ref()),
    };
    let stopped = core.tc.as_ref().is_some_and(|tc| tc.task_state == TaskState::Stopped.to_raw());
    let planned = cx.plan.task(task);
    planned.resume = Some(resume);
    planned.stopped = stopped;
    Ok(())
}

/// Plans a first thread that ends before the others go on, as it had.
pub fn plan_dead_leader(cx: &mut Planner<'_>, task: TaskRef, core: &TaskCoreEntry) -> Result<(), ObjectError> {
    cx.plan.push(task, Stage::Thread, call!(SYS_prctl(PR_SET_NAME, name_bytes(&core.comm)), "name"));
    if let Some(pending) = &core.signals_s {
        plan_pending(&mut cx.plan, task, pending, Whose::Process)?;
    }
    cx.plan.task(task).stopped = core.task_state == TaskState::Stopped.to_raw();
    Ok(())
}

/// The last thing that such a thread does.
pub fn plan_leaders_end(cx: &mut Planner<'_>, task: TaskRef, core: &TaskCoreEntry) {
    // It was to die with the engine; a dead thread that still is takes its process along.
    cx.plan.push(task, Stage::Last, call!(SYS_prctl(PR_SET_PDEATHSIG, 0u64), "no parent-death signal"));
    let status = core.exit_code >> 8 & 0xff;
    let why = format!("the first thread had ended with status {status}");
    cx.plan.push(task, Stage::Last, call!(SYS_exit(status), why));
}

/// A thread's name as prctl(2) takes it.
fn name_bytes(comm: &[u8]) -> Vec<u8> {
    let mut name = comm.to_vec();
    name.truncate(15);
    name.push(0);
    name
}

/// What a task starts with, because the engine has it.
#[derive(Debug, Clone)]
struct Own {
    affinity: Vec<u8>,
    io_priority: u32,
    timer_slack: u64,
}

impl Own {
    fn read() -> Result<Self, ObjectError> {
        let tid = Pid::this();
        let (affinity, io_priority) = (sched::affinity(tid)?.trimmed().to_vec(), sched::io_priority(tid)?);
        Ok(Self { affinity, io_priority, timer_slack: sched::own_timer_slack() })
    }

    /// Read once for a restore.
    fn of(cx: &mut Planner<'_>) -> Result<Self, ObjectError> {
        match cx.shelf.get::<Option<Self>>() {
            Some(known) => Ok(known.clone()),
            slot => Ok(slot.insert(Self::read()?).clone()),
        }
    }
}

/// Plans the scheduling; a task starts with the engine's.
fn plan_scheduling(cx: &mut Planner<'_>, task: TaskRef, thread: &ThreadCoreEntry) -> Result<(), ObjectError> {
    let own = Own::of(cx)?;
    let policy = thread.sched_policy.unwrap_or(0);
    let priority = (thread.sched_prio.unwrap_or(0) as i32).to_le_bytes().to_vec();
    if let Some(nice) = thread.sched_nice {
        let call = call!(SYS_setpriority(libc::PRIO_PROCESS, 0u64, nice), "nice value");
        cx.plan.push(task, Stage::Thread, call);
    }
    cx.plan.push(task, Stage::Thread, call!(SYS_sched_setscheduler(0u64, policy, priority), "scheduling policy"));
    if let Some(mask) = &thread.affinity
        && *mask != own.affinity
    {
        // The kernel takes whole words.
        let mut mask = mask.clone();
        mask.resize(mask.len().next_multiple_of(8), 0);
        let call = call!(SYS_sched_setaffinity(0u64, mask.len(), mask), "processors that it may run on");
        cx.plan.push(task, Stage::Thread, call);
    }
    let io_priority = thread.io_priority.unwrap_or(0);
    if io_priority != own.io_priority {
        const WHO_PROCESS: u64 = 1;
        let call = call!(SYS_ioprio_set(WHO_PROCESS, 0u64, io_priority), "I/O priority");
        cx.plan.push(task, Stage::Thread, call);
    }
    // After the policy, which changes it.
    if let Some(slack) = thread.timer_slack
        && slack != own.timer_slack
    {
        cx.plan.push(task, Stage::Thread, call!(SYS_prctl(PR_SET_TIMERSLACK, slack), "slack of its timers"));
    }
    Ok(())
}

/// A change of credentials makes a process undumpable (prctl(2)); what it was comes last.
pub fn plan_dumpable(cx: &mut Planner<'_>, task: TaskRef, mm: &MmEntry) {
    // 2 (root only) cannot be set by anybody; a change of credentials gives it where it was so.
    let dumpable = mm.dumpable.unwrap_or(1);
    if dumpable != 2 {
        let call = call!(SYS_prctl(PR_SET_DUMPABLE, dumpable), "dumpable");
        cx.plan.push(task, Stage::Last, call);
    }
}
