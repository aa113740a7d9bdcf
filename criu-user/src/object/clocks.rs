//! The monotonic and boot clocks of the tree, which go on from where they stood: a time namespace
//! (time_namespaces(7)) makes up for the time that passed, or for another machine's boot.

use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::ObjectError;
use crate::image::proto::{TimensEntry, Timespec};
use crate::kernel::{SysError, error::During, proc};
use crate::plan::ClockOffsets;

const SECOND: i64 = 1_000_000_000;

/// A clock of this process's namespace, in nanoseconds.
fn now(clock: ClockId) -> Result<i64, SysError> {
    let time = clock_gettime(clock).during("clock_gettime", format!("{clock:?}"))?;
    Ok(time.tv_sec() * SECOND + time.tv_nsec())
}

/// Offsets of a process's clocks to those of the machine: monotonic and boot time, in nanoseconds.
fn offsets(pid: &str) -> Result<(i64, i64), ObjectError> {
    let path = format!("/proc/{pid}/timens_offsets");
    let Ok(text) = proc::read_text(&path) else {
        // A kernel without time namespaces.
        return Ok((0, 0));
    };
    let mut found = (0, 0);
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [clock, seconds, nanoseconds] = words[..] else { continue };
        let parse = |s: &str| s.parse::<i64>().map_err(|_| ObjectError::contradiction(format!("{path}: {line}")));
        let value = parse(seconds)? * SECOND + parse(nanoseconds)?;
        match clock {
            "monotonic" => found.0 = value,
            "boottime" => found.1 = value,
            _ => {}
        }
    }
    Ok(found)
}

/// What a clock that timers can run on says now to a process, in nanoseconds.
pub fn now_of(pid: Pid, clock: i32) -> Result<i64, ObjectError> {
    let (ours, theirs) = (offsets("self")?, offsets(&pid.to_string())?);
    Ok(match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM => now(ClockId::CLOCK_REALTIME)?,
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => now(ClockId::CLOCK_BOOTTIME)? - ours.1 + theirs.1,
        _ => now(ClockId::CLOCK_MONOTONIC)? - ours.0 + theirs.0,
    })
}

/// A point in time of the machine's monotonic or boot clock, on the clock that a process sees; `None` for other clocks.
pub fn seen_by(pid: Pid, clock: i32, machine: i64) -> Result<Option<i64>, ObjectError> {
    let (monotonic, boottime) = offsets(&pid.to_string())?;
    Ok(match clock {
        libc::CLOCK_MONOTONIC => Some(machine + monotonic),
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => Some(machine + boottime),
        _ => None,
    })
}

/// What such a clock will say to a restored process when its timers are armed, at least: nothing must be due early.
pub fn now_in(clocks: Option<&ClockOffsets>, clock: i32) -> Result<i64, ObjectError> {
    match (clock, clocks) {
        (libc::CLOCK_MONOTONIC, Some(clocks)) => Ok(clocks.monotonic),
        (libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM, Some(clocks)) => Ok(clocks.boottime),
        _ => now_of(Pid::this(), clock),
    }
}

/// What the clocks of the tree say now.
pub fn capture(pid: Pid) -> Result<TimensEntry, ObjectError> {
    let (ours, theirs) = (offsets("self")?, offsets(&pid.to_string())?);
    let at = |nanoseconds: i64| Timespec {
        tv_sec: nanoseconds.div_euclid(SECOND) as u64,
        tv_nsec: nanoseconds.rem_euclid(SECOND) as u64,
    };
    Ok(TimensEntry {
        monotonic: at(now(ClockId::CLOCK_MONOTONIC)? - ours.0 + theirs.0),
        boottime: at(now(ClockId::CLOCK_BOOTTIME)? - ours.1 + theirs.1),
    })
}

/// Where the clocks are to go on.
pub fn plan(entry: &TimensEntry) -> Result<ClockOffsets, ObjectError> {
    let nanoseconds = |t: &Timespec| {
        (t.tv_sec as i64)
            .checked_mul(SECOND)
            .and_then(|s| s.checked_add(t.tv_nsec as i64))
            .filter(|_| t.tv_nsec < SECOND as u64)
            .ok_or_else(|| ObjectError::contradiction("a clock beyond all time"))
    };
    Ok(ClockOffsets { monotonic: nanoseconds(&entry.monotonic)?, boottime: nanoseconds(&entry.boottime)? })
}

/// Undoes [`enter`] for children that are none of the tree, such as scripts. The calling process has one thread.
pub fn leave() -> Result<(), ObjectError> {
    let own = std::fs::File::open("/proc/self/ns/time").during("open", "/proc/self/ns/time")?;
    let flag = nix::sched::CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
    Ok(nix::sched::setns(own, flag).during("setns", "the host's clocks")?)
}

/// Makes the calling process's future children see the clocks go on from there.
pub fn enter(clocks: &ClockOffsets) -> Result<(), ObjectError> {
    nix::sched::unshare(nix::sched::CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))
        .during("unshare(CLONE_NEWTIME)", "clocks of the tree")?;
    let ours = offsets("self")?;
    let line = |name: &str, wanted: i64, now: i64, ours: i64| {
        let offset = wanted - (now - ours);
        format!("{name} {} {}\n", offset.div_euclid(SECOND), offset.rem_euclid(SECOND))
    };
    let text = line("monotonic", clocks.monotonic, now(ClockId::CLOCK_MONOTONIC)?, ours.0)
        + &line("boottime", clocks.boottime, now(ClockId::CLOCK_BOOTTIME)?, ours.1);
    std::fs::write("/proc/self/timens_offsets", &text).during("write", format!("/proc/self/timens_offsets: {text}"))?;
    Ok(())
}
