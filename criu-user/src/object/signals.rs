//! Signals: actions, and those that are pending.
//!
//! Actions are the process's own secret: only calls inside of it tell them. Pending signals are queued again in their
//! order with all their bytes, by the task itself: rt_sigqueueinfo(2) lets nobody else claim what the kernel says.

use nix::errno::Errno;

use super::ObjectError;
use crate::agent::{Batch, CallId, Outcome, Room};
use crate::call;
use crate::image::proto::{SaEntry, SiginfoEntry, SignalQueueEntry};
use crate::kernel::ptrace::SIGINFO_LEN;
use crate::plan::{Plan, Stage, TaskRef, Why};

/// Number of signals.
const SIGNALS: u64 = 64;
const SIGKILL: u64 = libc::SIGKILL as u64;
const SIGSTOP: u64 = libc::SIGSTOP as u64;
/// `struct kernel_sigaction`: handler, flags, restorer, mask.
const ACTION: usize = 32;

/// The actions, while they are asked for.
#[derive(Debug)]
pub struct Actions {
    calls: Vec<(CallId, Room)>,
}

impl Actions {
    /// Asks for all of them.
    pub fn ask(batch: &mut Batch) -> Self {
        let calls = (1..=SIGNALS)
            .filter(|&n| n != SIGKILL && n != SIGSTOP)
            .map(|n| {
                let room = batch.room(ACTION);
                let call = batch.call(libc::SYS_rt_sigaction, &[n.into(), 0u64.into(), room.into(), 8u64.into()]);
                (call, room)
            })
            .collect();
        Self { calls }
    }

    /// The answers.
    pub fn answer(&self, pid: i32, outcome: &Outcome) -> Result<Vec<SaEntry>, ObjectError> {
        self.calls
            .iter()
            .map(|&(call, room)| {
                outcome.ret(call).map_err(|errno| ObjectError::Inside {
                    pid,
                    call: "rt_sigaction",
                    what: "a signal action",
                    errno,
                })?;
                Ok(SaEntry {
                    sigaction: outcome.u64(room, 0),
                    flags: outcome.u64(room, 8),
                    restorer: outcome.u64(room, 16),
                    mask: outcome.u64(room, 24),
                    ..SaEntry::default()
                })
            })
            .collect()
    }
}

/// Plans the actions. All tasks begin with the default for each: what the engine itself ignores, the root gives up
/// before it forks (CLONE_CLEAR_SIGHAND leaves that as it is).
pub fn plan_actions(plan: &mut Plan, task: TaskRef, actions: &[SaEntry]) -> Result<(), ObjectError> {
    let numbers = (1..=SIGNALS).filter(|&n| n != SIGKILL && n != SIGSTOP);
    if actions.len() as u64 > SIGNALS - 2 {
        return Err(ObjectError::contradiction(format!("{} signal actions", actions.len())));
    }
    if plan.task(task).parent.is_none() {
        for n in numbers.clone() {
            let why = Why::Number("default for signal", n);
            plan.push(task, Stage::Empty, call!(SYS_rt_sigaction(n, vec![0u8; 32], 0u64, 8u64), why));
        }
    }
    for (n, action) in numbers.zip(actions) {
        let action = [action.sigaction, action.flags, action.restorer, action.mask];
        if action != [0; 4] {
            let bytes: Vec<u8> = action.iter().flat_map(|w| w.to_le_bytes()).collect();
            let why = Why::Number("action of signal", n);
            plan.push(task, Stage::Process, call!(SYS_rt_sigaction(n, bytes, 0u64, 8u64), why));
        }
    }
    Ok(())
}

/// Pending signals as the image has them.
pub fn queue(pending: &[[u8; SIGINFO_LEN]]) -> SignalQueueEntry {
    SignalQueueEntry { signals: pending.iter().map(|info| SiginfoEntry { siginfo: info.to_vec() }).collect() }
}

/// The numbers of the signals in a queue.
pub fn numbers(queue: &SignalQueueEntry) -> impl Iterator<Item = u32> {
    let number = |entry: &SiginfoEntry| entry.siginfo.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    queue.signals.iter().filter_map(number)
}

/// Whose queue signals go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The process's.
    Process,
    /// The thread's.
    Thread,
}

/// Plans pending signals; all are blocked until the task goes on.
pub fn plan_pending(plan: &mut Plan, task: TaskRef, queue: &SignalQueueEntry, whose: Whose) -> Result<(), ObjectError> {
    let (pid, tid) = (plan.task(task).pid.as_raw(), plan.task(task).tid.as_raw());
    for entry in &queue.signals {
        let info = &entry.siginfo;
        if info.len() != SIGINFO_LEN {
            return Err(ObjectError::contradiction(format!("a pending signal of {} bytes", info.len())));
        }
        let signo = i32::from_le_bytes([info[0], info[1], info[2], info[3]]);
        if !(1..=SIGNALS as i32).contains(&signo) {
            return Err(ObjectError::contradiction(format!("pending signal {signo}")));
        }
        // It cannot be blocked, and would stop the task in the middle of its own making.
        if signo == SIGSTOP as i32 {
            continue;
        }
        let why = format!("signal {signo} was pending");
        let call = match whose {
            Whose::Process => call!(SYS_rt_sigqueueinfo(pid, signo, info.clone()), why),
            Whose::Thread => call!(SYS_rt_tgsigqueueinfo(pid, tid, signo, info.clone()), why),
        };
        plan.push(task, Stage::Thread, call);
    }
    Ok(())
}

/// The error of a call that the target made.
pub fn inside(pid: i32, call: &'static str, what: &'static str) -> impl Fn(Errno) -> ObjectError {
    move |errno| ObjectError::Inside { pid, call, what, errno }
}
