//! The last act of a restore for threads that were asleep: each makes its call with the time that was left and is
//! stopped in it, so that the kernel has a restart block for it again (see `object/waits.rs`).

use std::time::{Duration, Instant};

use crate::agent::{AgentError, Batch, CallId, Crew, Member};
use crate::kernel::ptrace;
use crate::plan::{Arg, Call, Task};

/// `-ERESTART*` of include/linux/errno.h: what a system call gives when a stop interrupts it.
const RESTARTS: std::ops::RangeInclusive<i64> = -516..=-512;
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;
/// How long a thread may take until it is in its call.
const PATIENCE: Duration = Duration::from_secs(10);

/// What became of a call that was to be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// The thread stands in it; the kernel continues it by this internal value.
    InCall(i64),
    /// It has come to its end already, with this result.
    Over(i64),
}

impl Waiting {
    /// The registers with which the thread goes on, from those that would make the call `nr` again in full.
    pub fn registers(self, again: &libc::user_regs_struct) -> libc::user_regs_struct {
        let mut regs = *again;
        regs.rip += SYSCALL_LEN;
        match self {
            Waiting::InCall(code) => {
                regs.orig_rax = again.rax;
                regs.rax = code as u64;
            }
            Waiting::Over(result) => {
                regs.orig_rax = u64::MAX;
                regs.rax = result as u64;
            }
        }
        regs
    }
}

/// Stops a thread in the call of a batch that it has been given. It has been seized, and asked to stop.
pub fn settle(crew: &Crew, member: Member, batch: &Batch, call: &Call, task: &Task) -> Result<Waiting, AgentError> {
    let begin = Instant::now();
    let first = match call.args.first() {
        Some(Arg::Value(value)) => Some(*value),
        _ => None,
    };
    loop {
        crate::execute::wait_for_interrupt(task.tid)?;
        let regs = ptrace::regs(task.tid)?;
        // The loop itself waits by futex(2) as well, but on a word of its own.
        let inside = regs.orig_rax as i64 == call.nr && first.is_none_or(|first| regs.rdi == first);
        if inside && RESTARTS.contains(&(regs.rax as i64)) {
            return Ok(Waiting::InCall(regs.rax as i64));
        }
        if let Some(outcome) = crew.outcome(member, batch) {
            let result = outcome.ret(CallId(0)).map_or_else(|errno| -(errno as i64), |value| value as i64);
            return Ok(Waiting::Over(result));
        }
        if begin.elapsed() > PATIENCE {
            let stop = format!("{} does not begin", call.name());
            return Err(AgentError::Strayed { tid: task.tid.as_raw(), stop });
        }
        ptrace::cont(task.tid, 0)?;
        std::thread::sleep(Duration::from_micros(50));
        ptrace::interrupt(task.tid)?;
    }
}
