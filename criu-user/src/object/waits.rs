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
const FUTEX_WAIT_BITSET: u64 = 9;
const FUTEX_PRIVATE_FLAG: u64 = 128;
const FUTEX_CLOCK_REALTIME: u64 = 256;
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
        let first =
            if nr == libc::SYS_restart_syscall { first_call(process.memory.as_ref(), &again) } else { Some(nr) };
        match first {
            Some(nr) => again.rax = nr as u64,
            None => (again.rip, again.rax) = (stopped.regs.rip, -i64::from(libc::EINTR) as u64),
        }
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

/// The number of the call that was made before it was restarted, whose arguments `regs` still hold. Where it cannot be
/// told, the call has to end with EINTR: another thread, as a restore makes it, has nothing to restart.
fn first_call(memory: Option<&ProcessMemory>, regs: &libc::user_regs_struct) -> Option<i64> {
    const REACH: u64 = 48;
    let memory = memory?;
    let words = |at: u64| {
        let bytes = memory.read(at, 16).ok()?;
        let (first, second) = (bytes.first_chunk()?, bytes.last_chunk()?);
        Some([u64::from_le_bytes(*first), u64::from_le_bytes(*second)])
    };
    let fitting = fitting_calls(regs, words);
    let code = regs.rip.checked_sub(REACH).and_then(|at| memory.read(at, REACH as usize).ok()).unwrap_or_default();
    // Programs load the number right before the instruction.
    loaded_numbers(&code).find(|nr| fitting.contains(nr)).or(match fitting[..] {
        [only] => Some(only),
        _ => None,
    })
}

/// Calls that the kernel continues by restart_syscall(2) and that could have these arguments. `words` reads two words
/// of the program's memory.
fn fitting_calls(regs: &libc::user_regs_struct, words: impl Fn(u64) -> Option<[u64; 2]>) -> Vec<i64> {
    const OPERATIONS: [u64; 2] = [FUTEX_WAIT, FUTEX_WAIT_BITSET];
    /// What the number of open files cannot exceed: fs.nr_open, as it is usually set.
    const MOST_FILES: u64 = 1 << 20;
    // None of them waits for no time.
    let duration =
        |at: u64| words(at).is_some_and(|time| time != [0, 0] && time[0] < u64::MAX / SECOND && time[1] < SECOND);
    let operation = regs.rsi & !(FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME);
    let futex = regs.rdi.is_multiple_of(4) && words(regs.rdi).is_some() && OPERATIONS.contains(&operation);
    let clock = i32::try_from(regs.rdi as i64).is_ok_and(|clock| clock < 16);
    let last = regs.rdi.wrapping_add(8 * regs.rsi.saturating_sub(1));
    let files = regs.rsi <= MOST_FILES && (regs.rsi == 0 || words(last).is_some());
    // An int, whether its sign was extended or not.
    let limit = regs.rdx as i32 != 0 && (regs.rdx <= u64::from(u32::MAX) || i32::try_from(regs.rdx as i64).is_ok());
    let found = [
        (libc::SYS_futex, futex && duration(regs.r10)),
        (libc::SYS_poll, files && limit),
        (libc::SYS_nanosleep, duration(regs.rdi) && (regs.rsi == 0 || words(regs.rsi).is_some())),
        (libc::SYS_clock_nanosleep, clock && regs.rsi == 0 && duration(regs.rdx)),
    ];
    found.into_iter().filter(|(_, fits)| *fits).map(|(nr, _)| nr).collect()
}

/// What a piece of code loads into registers as a constant, the last first: `mov $…, %e..`.
fn loaded_numbers(code: &[u8]) -> impl Iterator<Item = i64> {
    code.windows(5).rev().filter_map(|window| match *window {
        [0xb8..=0xbf, a, b, c, d] => Some(i64::from(u32::from_le_bytes([a, b, c, d]))),
        _ => None,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A duration of a second, and a word beside it, in a memory that has nothing else.
    fn words(at: u64) -> Option<[u64; 2]> {
        match at {
            0x7000 => Some([1, 0]),
            0x8000 => Some([u64::MAX, u64::MAX]),
            _ => None,
        }
    }

    fn with(rdi: u64, rsi: u64, rdx: u64, r10: u64) -> Vec<i64> {
        fitting_calls(&regs::tests::with_arguments(rdi, rsi, rdx, r10), words)
    }

    #[test]
    fn arguments_tell_the_call() {
        assert_eq!(with(0x8000, FUTEX_PRIVATE_FLAG, 0, 0x7000), [libc::SYS_futex]);
        assert_eq!(with(0, 0, 1200, 0), [libc::SYS_poll]);
        assert_eq!(with(0x7ff8, 2, u64::from(u32::MAX), 0), [libc::SYS_poll]);
        assert_eq!(with(0x7000, 0x7000, 1 << 40, 0), [libc::SYS_nanosleep]);
        assert_eq!(with(1, 0, 0x7000_0000_7000, 0), [0; 0]);
        assert_eq!(with(7, 0, 0x7000, 0), [libc::SYS_poll, libc::SYS_clock_nanosleep]);
    }

    #[test]
    fn a_number_may_be_loaded_into_any_register() {
        let code = [0xbb, 0xca, 0, 0, 0, 0x48, 0x89, 0xd8, 0x41, 0xbc, 0x80, 0, 0, 0, 0x0f];
        assert_eq!(loaded_numbers(&code).collect::<Vec<_>>(), [0x80, libc::SYS_futex]);
    }
}
