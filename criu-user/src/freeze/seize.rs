//! Taking hold of threads, and letting them go.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::FreezeError;
use crate::kernel::proc::{self, KeyValues};
use crate::kernel::ptrace::{self, Stop};

/// How long threads that did not stop in time are waited for once more.
const PARTING: Duration = Duration::from_millis(20);

/// Threads that we trace; dropping it lets them all go.
#[derive(Debug, Default)]
pub(super) struct Seized {
    pub(super) threads: BTreeMap<Pid, Seizure>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Seizure {
    pub(super) stop: Option<Stop>,
    pub(super) process: Pid,
    /// Registers to leave it with, where they differ from those it has.
    pub(super) release: Option<libc::user_regs_struct>,
}

impl Seized {
    pub(super) fn all_stand(&self) -> bool {
        self.threads.values().all(|seizure| seizure.stop.is_some())
    }

    /// Lets a thread that stands still go on.
    fn let_go(tid: Pid, seizure: &Seizure) {
        if let Some(regs) = &seizure.release {
            let _ = ptrace::set_regs(tid, regs);
        }
        detach(tid);
    }
}

thread_local! {
    /// Threads that we still trace and want to be rid of. Only the thread that traces them can let them go.
    static LATE: RefCell<BTreeSet<Pid>> = const { RefCell::new(BTreeSet::new()) };
}

/// Ends tracing. One that was killed while it stood still cannot be detached from, and its parent is told of its end only
/// when we have collected it.
fn detach(tid: Pid) {
    if ptrace::detach(tid).is_err_and(|err| err.errno == Errno::ESRCH) {
        LATE.with_borrow_mut(|late| late.insert(tid));
    }
}

/// Lets threads go that had not come to a stop, or not to their end, when their freeze was over. Whoever lives on after a
/// freeze calls this now and then while it gives `true`: some are still on their way.
pub fn catch_up() -> bool {
    let late = LATE.take();
    let is_late = |&tid: &Pid| match ptrace::try_wait(tid) {
        Ok(Some(Stop::Interrupt | Stop::Group(_))) => ptrace::detach(tid).is_err(),
        Ok(Some(Stop::Signal(signal))) => ptrace::cont(tid, signal).is_ok(),
        // Collected, or nobody of ours any more.
        Ok(Some(Stop::Exited)) | Err(_) => false,
        Ok(Some(_)) => ptrace::cont(tid, 0).is_ok(),
        Ok(None) => true,
    };
    let still: BTreeSet<Pid> = late.into_iter().filter(is_late).collect();
    LATE.with_borrow_mut(|late| {
        late.extend(still);
        !late.is_empty()
    })
}

impl Drop for Seized {
    fn drop(&mut self) {
        let (standing, moving): (Vec<_>, Vec<_>) = self.threads.iter().partition(|(_, seizure)| seizure.stop.is_some());
        for (&tid, seizure) in standing {
            Self::let_go(tid, seizure);
        }
        // The others are still on their way to a stop, and only there can be detached from. Some were only waiting for
        // those above. A thread that does not come is let go by the kernel when the engine ends, or by `catch_up`.
        let deadline = Instant::now() + PARTING;
        for (&tid, seizure) in moving {
            match wait_for_stop(tid, deadline) {
                Ok(Some(_)) => Self::let_go(tid, seizure),
                Err(FreezeError::Timeout { .. }) => {
                    LATE.with_borrow_mut(|late| late.insert(tid));
                }
                Ok(None) | Err(_) => {}
            }
        }
        while catch_up() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// The processes of the tree, parents before children.
pub(super) fn walk(root: Pid) -> Result<Vec<Pid>, FreezeError> {
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

pub(super) fn children_of(pid: Pid) -> Vec<Pid> {
    let threads = proc::threads(pid).unwrap_or_default();
    // One that ends meanwhile has no children any more; the next look shows whose they became.
    let mut children: Vec<Pid> = threads.iter().flat_map(|&tid| proc::children(pid, tid).unwrap_or_default()).collect();
    children.sort_unstable();
    children
}

pub(super) fn seize_threads(pid: Pid, seized: &mut Seized) -> Result<bool, FreezeError> {
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
        LATE.with_borrow_mut(|late| late.remove(&tid));
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

pub(super) fn wait_all(seized: &mut Seized, deadline: Instant) -> Result<(), FreezeError> {
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
