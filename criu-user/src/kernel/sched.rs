//! How a thread is scheduled: sched(7).

use nix::errno::Errno;
use nix::unistd::Pid;

use super::processors::Processors;
use super::{SysError, SysResult, sys};

/// Policy, static priority, nice value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduling {
    /// SCHED_*, with SCHED_RESET_ON_FORK.
    pub policy: i32,
    /// 1 to 99 for the real-time policies.
    pub priority: i32,
    /// −20 to 19.
    pub nice: i32,
}

/// How a thread is scheduled.
pub fn of(tid: Pid) -> SysResult<Scheduling> {
    let failed = |call, e| SysError::new(call, tid, e);
    // SAFETY: the calls write to the live local `param` alone.
    unsafe {
        let policy =
            Errno::result(libc::sched_getscheduler(tid.as_raw())).map_err(|e| failed("sched_getscheduler", e))?;
        let mut param: libc::sched_param = std::mem::zeroed();
        Errno::result(libc::sched_getparam(tid.as_raw(), &raw mut param)).map_err(|e| failed("sched_getparam", e))?;
        // The raw call gives 20 − nice, so that it is never negative.
        let nice = sys::raw(libc::SYS_getpriority, [libc::PRIO_PROCESS as u64, tid.as_raw() as u64, 0, 0, 0, 0])
            .map_err(|e| failed("getpriority", e))?;
        Ok(Scheduling { policy, priority: param.sched_priority, nice: 20 - nice as i32 })
    }
}

/// The processors that a thread may run on. sched_getaffinity(2).
pub fn affinity(tid: Pid) -> SysResult<Processors> {
    // The kernel wants room for all processors that it could have; 8192 is the most that x86 can be built for.
    let mut mask = vec![0u8; 1024];
    let args = [tid.as_raw() as u64, mask.len() as u64, mask.as_mut_ptr() as u64, 0, 0, 0];
    // SAFETY: the kernel writes at most as many bytes as it is told that `mask` has.
    let filled = unsafe { sys::raw(libc::SYS_sched_getaffinity, args) }
        .map_err(|e| SysError::new("sched_getaffinity", tid, e))?;
    mask.truncate(filled as usize);
    Ok(Processors(mask))
}

/// Says where a thread may run; 0 is the calling one. sched_setaffinity(2).
pub fn set_affinity(tid: Pid, processors: &Processors) -> SysResult<()> {
    let Processors(mask) = processors;
    // SAFETY: the kernel reads as many bytes as it is told that `mask` has.
    unsafe {
        sys::raw(libc::SYS_sched_setaffinity, [tid.as_raw() as u64, mask.len() as u64, mask.as_ptr() as u64, 0, 0, 0])
    }
    .map_err(|e| SysError::new("sched_setaffinity", tid, e))
    .map(drop)
}

/// The processor that the calling thread runs on. sched_getcpu(3).
pub fn current_processor() -> Option<usize> {
    // SAFETY: takes nothing.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// The I/O priority of a thread, class and level; 0 where none was set. ioprio_get(2).
pub fn io_priority(tid: Pid) -> SysResult<u32> {
    const WHO_PROCESS: u64 = 1;
    // SAFETY: numbers only.
    unsafe { sys::raw(libc::SYS_ioprio_get, [WHO_PROCESS, tid.as_raw() as u64, 0, 0, 0, 0]) }
        .map(|priority| priority as u32)
        .map_err(|e| SysError::new("ioprio_get", tid, e))
}

/// The slack of the calling thread's timers, in nanoseconds. PR_GET_TIMERSLACK.
pub fn own_timer_slack() -> u64 {
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_GET_TIMERSLACK) as u64 }
}

/// Has the calling process run before all others, where that is allowed: SCHED_FIFO of sched(7).
pub fn be_urgent() {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut param: libc::sched_param = unsafe { std::mem::zeroed() };
    param.sched_priority = 1;
    // SAFETY: the argument lives for the call. Where it is refused, things go on as they are.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) };
}
