//! Timers of a process: the three interval timers and the POSIX timers.

use std::collections::{BTreeMap, BTreeSet};

use nix::unistd::Pid;

use super::signals::inside;
use super::{ObjectError, clocks};
use crate::agent::{Batch, CallId, Outcome, Room};
use crate::call;
use crate::image::proto::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use crate::kernel::sys::RESTORE_IDS;
use crate::kernel::{proc, sys};
use crate::plan::{Arg, Call, Plan, Stage, TaskRef};

/// `struct itimerval` and `struct itimerspec`.
const TIMER: usize = 32;
/// How a POSIX timer's identity is written in /proc/PID/timers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Declared {
    id: u32,
    signal: u32,
    value: u64,
    notify: u32,
    thread: i32,
    clock: i32,
}

/// The timers, while they are asked for.
#[derive(Debug)]
pub struct Timers {
    interval: [(CallId, Room); 3],
    posix: Vec<(Declared, CallId, Room, CallId)>,
}

/// SIGEV_* kinds as /proc/PID/timers names them (fs/proc/base.c, `show_timer`).
const NOTIFY: [(&str, u32); 3] = [("signal", 0), ("none", 1), ("thread", 2)];
const SIGEV_SIGNAL: u32 = 0;
const SIGEV_NONE: u32 = 1;
const SIGEV_THREAD_ID: u32 = 4;
const SECOND: u64 = 1_000_000_000;

fn declared(pid: Pid) -> Result<Vec<Declared>, ObjectError> {
    let path = format!("/proc/{pid}/timers");
    let text = proc::read_text(&path)?;
    let malformed = || ObjectError::contradiction(format!("{path} is not understood: {text}"));
    let mut timers: Vec<Declared> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':').ok_or_else(malformed)?;
        let value = value.trim();
        if key == "ID" {
            timers.push(Declared { id: value.parse().map_err(|_| malformed())?, ..Declared::default() });
            continue;
        }
        let timer = timers.last_mut().ok_or_else(malformed)?;
        match key {
            "signal" => {
                let (signal, pointer) = value.split_once('/').ok_or_else(malformed)?;
                timer.signal = signal.parse().map_err(|_| malformed())?;
                timer.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).map_err(|_| malformed())?;
            }
            "notify" => {
                let (how, whom) = value.split_once('/').ok_or_else(malformed)?;
                timer.notify = NOTIFY.iter().find(|(name, _)| *name == how).map(|(_, n)| *n).ok_or_else(malformed)?;
                if let Some(tid) = whom.strip_prefix("tid.") {
                    timer.notify |= SIGEV_THREAD_ID;
                    timer.thread = tid.parse().map_err(|_| malformed())?;
                }
            }
            "ClockID" => timer.clock = value.parse().map_err(|_| malformed())?,
            _ => {}
        }
    }
    Ok(timers)
}

impl Timers {
    /// Asks for all of them.
    pub fn ask(pid: Pid, batch: &mut Batch) -> Result<Self, ObjectError> {
        let interval = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF].map(|which| {
            let room = batch.room(TIMER);
            (batch.call(libc::SYS_getitimer, &[(which as u64).into(), room.into()]), room)
        });
        let posix = declared(pid)?
            .into_iter()
            .map(|timer| {
                let room = batch.room(TIMER);
                let overrun = batch.call(libc::SYS_timer_getoverrun, &[timer.id.into()]);
                let get = batch.call(libc::SYS_timer_gettime, &[timer.id.into(), room.into()]);
                (timer, get, room, overrun)
            })
            .collect();
        Ok(Self { interval, posix })
    }

    /// The answers.
    pub fn answer(&self, pid: i32, outcome: &Outcome) -> Result<TaskTimersEntry, ObjectError> {
        let mut interval = Vec::with_capacity(3);
        for (call, room) in self.interval {
            outcome.ret(call).map_err(inside(pid, "getitimer", "an interval timer"))?;
            let word = |i: usize| outcome.u64(room, 8 * i);
            interval.push(ItimerEntry { isec: word(0), iusec: word(1), vsec: word(2), vusec: word(3) });
        }
        let mut posix = Vec::with_capacity(self.posix.len());
        for (timer, get, room, overrun) in &self.posix {
            outcome.ret(*get).map_err(inside(pid, "timer_gettime", "a POSIX timer"))?;
            let overrun = outcome.ret(*overrun).map_err(inside(pid, "timer_getoverrun", "a POSIX timer"))?;
            let word = |i: usize| outcome.u64(*room, 8 * i);
            posix.push(PosixTimerEntry {
                it_id: timer.id,
                clock_id: timer.clock as u32,
                si_signo: timer.signal,
                it_sigev_notify: timer.notify,
                sival_ptr: timer.value,
                notify_thread_id: (timer.notify & SIGEV_THREAD_ID != 0).then_some(timer.thread),
                overrun: overrun as u32,
                isec: word(0),
                insec: word(1),
                vsec: word(2),
                vnsec: word(3),
            });
        }
        let [real, virt, prof] = <[ItimerEntry; 3]>::try_from(interval).unwrap_or_default();
        Ok(TaskTimersEntry { real, virt, prof, posix })
    }
}

/// The timer as setitimer(2) takes it; `None` where there is none.
///
/// ITIMER_REAL stands still from its end until its signal is delivered, which starts it anew (kernel/signal.c,
/// `dequeue_signal`). One that is due at once comes to stand in the same way: its signal joins the one that was pending.
fn itimer(entry: &ItimerEntry) -> Option<Vec<u8>> {
    let due = [entry.vsec, entry.vusec] == [0, 0];
    if due && [entry.isec, entry.iusec] == [0, 0] {
        return None;
    }
    let vusec = if due { 1 } else { entry.vusec };
    Some([entry.isec, entry.iusec, entry.vsec, vusec].iter().flat_map(|w| w.to_le_bytes()).collect())
}

/// Plans the timers of a process, for which signals of these numbers are `pending`.
pub fn plan(
    plan: &mut Plan,
    task: TaskRef,
    timers: &TaskTimersEntry,
    pending: &BTreeSet<u32>,
) -> Result<(), ObjectError> {
    for (which, entry) in
        [(libc::ITIMER_REAL, &timers.real), (libc::ITIMER_VIRTUAL, &timers.virt), (libc::ITIMER_PROF, &timers.prof)]
    {
        if let Some(timer) = itimer(entry) {
            let why = format!("interval timer {which}");
            plan.push(task, Stage::Timers, call!(SYS_setitimer(which, timer, 0u64), why));
        }
    }
    let mut posix: BTreeMap<u32, &PosixTimerEntry> = BTreeMap::new();
    for timer in &timers.posix {
        if posix.insert(timer.it_id, timer).is_some() {
            return Err(ObjectError::contradiction(format!("two POSIX timers with id {}", timer.it_id)));
        }
    }
    if !posix.is_empty() {
        plan_posix(plan, task, &posix, pending)?;
    }
    Ok(())
}

/// How many timers may be made for nothing.
const MOST_IN_VAIN: u32 = 1000;

/// Has the next timer get id `next` plus however many are missing to `id`: a kernel that lets nobody ask for one gives them
/// out in order, from 0 on, and none twice.
fn plan_gap(plan: &mut Plan, task: TaskRef, next: u32, id: u32) -> Result<(), ObjectError> {
    if id - next > MOST_IN_VAIN {
        return Err(ObjectError::Unsupported {
            what: format!("POSIX timer {id}: this kernel gives ids out in order, and {} before it are free", id - next),
            advice: "restore it on Linux 6.15 or later",
        });
    }
    for id in next..id {
        // struct sigevent: nothing is to be told.
        let mut event = vec![0u8; 64];
        event[12..16].copy_from_slice(&SIGEV_NONE.to_le_bytes());
        let why = format!("POSIX timer {id}, which is no more");
        plan.push(
            task,
            Stage::Timers,
            call!(SYS_timer_create(libc::CLOCK_MONOTONIC, event, vec![0u8; 4]), why.clone()),
        );
        plan.push(task, Stage::Timers, call!(SYS_timer_delete(id), why));
    }
    Ok(())
}

/// Timers by their ids, in order.
fn plan_posix(
    plan: &mut Plan,
    task: TaskRef,
    timers: &BTreeMap<u32, &PosixTimerEntry>,
    pending: &BTreeSet<u32>,
) -> Result<(), ObjectError> {
    let chosen = sys::takes_timer_ids();
    if chosen {
        plan.push(task, Stage::Timers, call!(SYS_prctl(RESTORE_IDS, 1u64, 0u64, 0u64, 0u64), "choose timer ids"));
    }
    let mut next = 0;
    for timer in timers.values() {
        if !chosen {
            plan_gap(plan, task, next, timer.it_id)?;
            next = timer.it_id + 1;
        }
        // struct sigevent: value, signal, notify, thread.
        let mut event = vec![0u8; 64];
        event[0..8].copy_from_slice(&timer.sival_ptr.to_le_bytes());
        event[8..12].copy_from_slice(&timer.si_signo.to_le_bytes());
        event[12..16].copy_from_slice(&timer.it_sigev_notify.to_le_bytes());
        event[16..20].copy_from_slice(&timer.notify_thread_id.unwrap_or(0).to_le_bytes());
        let id = timer.it_id.to_le_bytes().to_vec();
        let clock = timer.clock_id as i32 as i64;
        let why = format!("POSIX timer {}", timer.it_id);
        plan.push(task, Stage::Timers, call!(SYS_timer_create(clock, event, id), why));
        let rivals = timers.values().filter(|other| other.si_signo == timer.si_signo).count() > 1;
        let alone = !rivals && !pending.contains(&timer.si_signo);
        match overrun_since(plan, timer)?.filter(|_| alone) {
            Some(since) => plan_overrun(plan, task, timer, since),
            None if timer.vsec != 0 || timer.vnsec != 0 => {
                let why = format!("what remained of POSIX timer {}", timer.it_id);
                plan.push(task, Stage::Timers, arm(timer, 0, timer.vsec, timer.vnsec, why));
            }
            None => {}
        }
    }
    if chosen {
        plan.push(
            task,
            Stage::Timers,
            call!(SYS_prctl(RESTORE_IDS, 0u64, 0u64, 0u64, 0u64), "timer ids as usual again"),
        );
    }
    Ok(())
}

fn arm(timer: &PosixTimerEntry, flags: i32, seconds: u64, nanoseconds: u64, why: String) -> Call {
    let spec = [timer.isec, timer.insec, seconds, nanoseconds];
    let spec: Vec<u8> = spec.iter().flat_map(|word| word.to_le_bytes()).collect();
    call!(SYS_timer_settime(timer.it_id, flags, Arg::Bytes(spec), 0u64), why)
}

/// When a timer would have to begin so that its next expiration is where it was, and that many lie behind it as it had
/// missed before its last signal (timer_getoverrun(2)). `None` where it has missed none, and for timers whose past cannot
/// be made: those of a processor's time or of one thread, those whose signal nobody can take, and those of a clock that does
/// not reach so far back.
fn overrun_since(plan: &Plan, timer: &PosixTimerEntry) -> Result<Option<u64>, ObjectError> {
    const CLOCKS: [i32; 3] = [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME];
    let clock = timer.clock_id as i32;
    let left = nanoseconds(timer.vsec, timer.vnsec);
    let signals = timer.it_sigev_notify == SIGEV_SIGNAL && can_be_taken(timer.si_signo);
    if timer.overrun == 0 || !signals || !CLOCKS.contains(&clock) || left == Some(0) {
        return Ok(None);
    }
    let now = clocks::now_in(plan.clocks.as_ref(), clock)? as u64;
    let periods = u64::from(timer.overrun) + 1;
    let back = nanoseconds(timer.isec, timer.insec).and_then(|interval| interval.checked_mul(periods));
    let since = back.and_then(|back| now.checked_add(left?)?.checked_sub(back));
    Ok(since.filter(|&since| since > 0 && since < now))
}

/// Whether a signal can be blocked, and taken from its queue.
fn can_be_taken(signal: u32) -> bool {
    (1..=64).contains(&signal) && ![libc::SIGKILL, libc::SIGSTOP].contains(&(signal as i32))
}

fn nanoseconds(seconds: u64, nanoseconds: u64) -> Option<u64> {
    seconds.checked_mul(SECOND)?.checked_add(nanoseconds)
}

/// Begins a timer in the past and takes the one signal that comes of it: the kernel counts the expirations since then when
/// the signal is taken (kernel/time/posix-timers.c, `posixtimer_deliver_signal`). All signals are blocked meanwhile.
fn plan_overrun(plan: &mut Plan, task: TaskRef, timer: &PosixTimerEntry, since: u64) {
    let why = format!("POSIX timer {}, since before the {} expirations that it missed", timer.it_id, timer.overrun);
    plan.push(task, Stage::Timers, arm(timer, libc::TIMER_ABSTIME, since / SECOND, since % SECOND, why));
    let set = (1u64 << (timer.si_signo - 1)).to_le_bytes().to_vec();
    let limit: Vec<u8> = [10u64, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    let why = format!("the signal of POSIX timer {}, which has been seen", timer.it_id);
    plan.push(task, Stage::Timers, call!(SYS_rt_sigtimedwait(set, 0u64, limit, 8u64), why));
}
