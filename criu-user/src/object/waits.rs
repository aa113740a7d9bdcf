//! Sleeps and waits in progress: nanosleep, clock_nanosleep, poll and futex with a time limit.
//!
//! A stop interrupts them, and the kernel keeps what they were waiting for in the thread's restart block, from which
//! restart_syscall(2) goes on. The image's registers make the call again with its own arguments, in full: that is what
//! any engine can do. Where the survey has read the restart block, the image also has the time at which the wait was
//! to end: then the restored thread makes the call with what is left, and is interrupted in it, so that the kernel
//! itself has a restart block again and the program's registers can be what they were.

use super::file::Planner;
use super::{ObjectError, clocks};
use crate::call;
use crate::freeze::{FrozenProcess, FrozenThread};
use crate::image::proto::{UserX86RegsEntry, WaitEntry};
use crate::kernel::ebpf::restart::Restart;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::regs::{self, Interrupted};
use crate::kernel::threads::ThreadRecords;
use crate::plan::{Call, ClockOffsets};

const FUTEX_WAIT: u64 = 0;
const FUTEX_PRIVATE_FLAG: u64 = 128;
const SECOND: u64 = 1_000_000_000;
const MILLISECOND: u64 = 1_000_000;

/// Whether a thread is in a call that goes on with what remained of its time.
pub fn sleeps(thread: &FrozenThread) -> bool {
    let stopped = &thread.stopped;
    matches!(regs::interrupted(&stopped.regs, stopped.signal_waits), Interrupted::Remainder { .. })
}

/// The registers that make the interrupted call again in full, and when it was to end.
pub fn capture(
    process: &FrozenProcess,
    thread: &FrozenThread,
    records: &ThreadRecords,
) -> Result<(libc::user_regs_struct, Option<WaitEntry>), ObjectError> {
    let stopped = &thread.stopped;
    let mut again = regs::resumable(&stopped.regs, stopped.signal_waits);
    let Interrupted::Remainder { nr } = regs::interrupted(&stopped.regs, stopped.signal_waits) else {
        return Ok((again, None));
    };
    let Some((nr, restart)) = records.restart(thread.tid(), &stopped.regs) else {
        let first = if nr == libc::SYS_restart_syscall { first_call(process.memory.as_ref(), again.rip) } else { nr };
        again.rax = first as u64;
        return Ok((again, None));
    };
    again.rax = nr as u64;
    let end = match restart {
        Restart::Sleep { clock, until_ns, .. } => Some((clock, until_ns)),
        Restart::Poll { until_ns, .. } => until_ns.map(|until| (libc::CLOCK_MONOTONIC, until)),
        // Other waits name a point in time, which their own arguments do already.
        Restart::Futex { until_ns, .. } => is_relative(stopped.regs.rsi).then_some((libc::CLOCK_MONOTONIC, until_ns)),
    };
    let Some((clock, until)) = end else { return Ok((again, None)) };
    let until = clocks::seen_by(process.shown.by, clock, until.min(i64::MAX as u64 / 2) as i64)?;
    Ok((again, until.map(|until| WaitEntry { clock, until: until.max(0) as u64 })))
}

/// Whether a futex operation's time limit is a duration.
fn is_relative(operation: u64) -> bool {
    operation & !FUTEX_PRIVATE_FLAG == FUTEX_WAIT
}

/// The number of the call that was made before it was restarted: programs load it right before the instruction. Where
/// that cannot be seen, restart_syscall(2), which gives EINTR.
fn first_call(memory: Option<&ProcessMemory>, at: u64) -> i64 {
    /// mov $…, %eax
    const LOAD: u8 = 0xb8;
    const REACH: u64 = 48;
    const CALLS: [i64; 4] = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];
    let code = memory.and_then(|memory| memory.read(at.checked_sub(REACH)?, REACH as usize).ok()).unwrap_or_default();
    let loaded = code.windows(5).rev().find_map(|window| match *window {
        [LOAD, a, b, c, d] => Some(i64::from(u32::from_le_bytes([a, b, c, d]))).filter(|nr| CALLS.contains(nr)),
        _ => None,
    });
    loaded.unwrap_or(libc::SYS_restart_syscall)
}

/// What the tree's clocks said at the dump.
#[derive(Debug, Default)]
struct AtDump(Option<ClockOffsets>);

/// Keeps what the tree's clocks said at the dump, whether they go on from there or not.
pub fn remember(cx: &mut Planner<'_>, clocks: ClockOffsets) {
    cx.shelf.get::<AtDump>().0 = Some(clocks);
}

/// The call that goes on with the wait that `regs` are about to make again in full.
pub fn plan(cx: &mut Planner<'_>, regs: &UserX86RegsEntry, wait: Option<&WaitEntry>) -> Option<Call> {
    let (wait, clocks) = (wait?, cx.shelf.get::<AtDump>().0?);
    let then = if wait.clock == libc::CLOCK_MONOTONIC { clocks.monotonic } else { clocks.boottime };
    // Nothing left: it ends at once, but not as if there had been no limit.
    let left = wait.until.saturating_sub(then.max(0) as u64).max(1);
    let spec: Vec<u8> = [left / SECOND, left % SECOND].iter().flat_map(|w| w.to_le_bytes()).collect();
    let why = format!("{} ms remained of it", left / MILLISECOND);
    let call = match regs.ax as i64 {
        libc::SYS_nanosleep => call!(SYS_nanosleep(spec, regs.si), why),
        libc::SYS_clock_nanosleep if regs.si == 0 => call!(SYS_clock_nanosleep(regs.di, 0u64, spec, regs.r10), why),
        libc::SYS_poll => {
            let limit = left.div_ceil(MILLISECOND).min(i32::MAX as u64);
            call!(SYS_poll(regs.di, regs.si, limit), why)
        }
        libc::SYS_futex if is_relative(regs.si) => {
            call!(SYS_futex(regs.di, regs.si, regs.dx, spec, regs.r8, regs.r9), why)
        }
        _ => return None,
    };
    Some(call.trying())
}
