//! timerfd_create(2): a timer, with what remains of it and the expirations that nobody has read yet.
//!
//! A timer that was armed for a point in time is armed for the same point again: one of the time of day that passed
//! while the program did not exist is due at once. All others go on with what remained.

use std::os::fd::OwnedFd;

use super::file::{Capture, FileKind, Planner, Seen};
use super::{ObjectError, clocks};
use crate::call;
use crate::image::proto::{FdTypes, FileEntry, TimerfdEntry};
use crate::kernel::proc::KeyValues;
use crate::kernel::{self, events};
use crate::plan::{FileRef, Opened, Opener, Stage};

const ABSOLUTE: u32 = libc::TFD_TIMER_ABSTIME as u32;
const SECOND: u64 = 1_000_000_000;

/// Timers behind descriptors.
#[derive(Debug)]
pub struct TimerFd;

impl FileKind for TimerFd {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Timerfd]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.is_anon("timerfd")
    }

    fn capture(&self, seen: &Seen, _: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let (value, interval) = events::timerfd_remaining(&seen.file)?;
        // Only now it says how often a periodic timer has expired.
        let info = KeyValues::fdinfo(seen.pid, seen.fd)?;
        let clock = info.number("clockid", 10)? as i32;
        let settime_flags = info.number("settime flags", 8)? as u32;
        let armed_for = settime_flags & ABSOLUTE != 0 && !value.is_zero();
        let due = match armed_for {
            true => Some((clocks::now_of(seen.pid, clock)? as u64).saturating_add(value.as_nanos() as u64)),
            false => None,
        };
        let tfd = TimerfdEntry {
            id: seen.id,
            flags: seen.flags,
            fown: seen.fown()?,
            clockid: clock as u32,
            ticks: info.number("ticks", 10)?,
            settime_flags,
            vsec: value.as_secs(),
            vnsec: value.subsec_nanos().into(),
            isec: interval.as_secs(),
            insec: interval.subsec_nanos().into(),
            due,
        };
        Ok(FileEntry { r#type: FdTypes::Timerfd as i32, id: seen.id, tfd: Some(tfd.into()), ..FileEntry::default() })
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let tfd = entry.tfd.as_deref().ok_or_else(|| ObjectError::empty(entry))?;
        Ok(cx.plan.open(OpenTimerFd { clock: tfd.clockid as i32, flags: tfd.flags }))
    }

    /// Armed by a process that has it: only there the clocks are those of the tree.
    fn wire(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        let tfd = entry.tfd.as_deref().ok_or_else(|| ObjectError::empty(entry))?;
        let Some(&(task, fd)) = cx.holders.get(&entry.id).and_then(|holders| holders.first()) else { return Ok(()) };
        if tfd.vnsec >= SECOND || tfd.insec >= SECOND {
            return Err(ObjectError::contradiction(format!("timerfd {} has more nanoseconds than a second", entry.id)));
        }
        if tfd.vsec != 0 || tfd.vnsec != 0 {
            let absolute = tfd.settime_flags & ABSOLUTE != 0;
            let (seconds, nanoseconds) = if absolute { due(tfd, cx)? } else { (tfd.vsec, tfd.vnsec) };
            let spec: Vec<u8> =
                [tfd.isec, tfd.insec, seconds, nanoseconds].iter().flat_map(|w| w.to_le_bytes()).collect();
            let why = format!("what remained of timerfd {fd}");
            let arm = call!(SYS_timerfd_settime(fd, tfd.settime_flags, spec, 0u64), why);
            cx.plan.push(task, Stage::Timers, arm);
        }
        if tfd.ticks != 0 {
            let why = format!("{} expirations of timerfd {fd} that nobody has read", tfd.ticks);
            let ticks = tfd.ticks.to_le_bytes().to_vec();
            cx.plan.push(task, Stage::Timers, call!(SYS_ioctl(fd, events::TFD_IOC_SET_TICKS, ticks), why));
        }
        Ok(())
    }
}

/// When a timer that was armed for a point in time is due, in seconds and nanoseconds of its clock.
fn due(tfd: &TimerfdEntry, cx: &Planner<'_>) -> Result<(u64, u64), ObjectError> {
    let clock = tfd.clockid as i32;
    let of_day = clock == libc::CLOCK_REALTIME || clock == libc::CLOCK_REALTIME_ALARM;
    let due = match tfd.due {
        // The host's monotonic clock is not the one that the point in time was on.
        Some(due) if of_day || cx.plan.clocks.is_some() => due,
        _ => {
            let now = clocks::now_in(cx.plan.clocks.as_ref(), clock)? as u64;
            now.saturating_add(tfd.vsec.saturating_mul(SECOND)).saturating_add(tfd.vnsec)
        }
    };
    Ok((due / SECOND, due % SECOND))
}

/// Makes a timer that is not armed yet.
#[derive(Debug)]
struct OpenTimerFd {
    clock: i32,
    flags: u32,
}

impl Opener for OpenTimerFd {
    fn describe(&self) -> String {
        format!("timerfd with flags {:#o} on clock {}", self.flags, self.clock)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let file = events::timerfd(self.clock, 0)?;
        kernel::fd::set_flags_of_new(&file, self.flags as i32)?;
        Ok(file)
    }
}
