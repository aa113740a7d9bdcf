//! Bringing a userfaultfd into being inside a process, and out of it.
//!
//! It has to be made by the process itself, for it belongs to the memory of whoever makes it; from then on anybody who
//! holds it can use it. So the process is stopped for as long as three system calls take, and afterwards holds nothing:
//! the descriptor's number is one that the agent closes on its way home, with or without an engine.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::unistd::Pid;

use super::TrackError;
use crate::agent::{Batch, Beside, Guest};
use crate::freeze::{self, Frozen};
use crate::kernel::error::During;
use crate::kernel::uffd::{MAKE_FLAGS, WriteWatch};
use crate::kernel::{survey, uffd};

/// How long a process may take to stand still.
const LIMIT: Duration = Duration::from_secs(2);

/// Makes a [`WriteWatch`] for the memory of a process; `None` if that has ended. It stands still until what is given beside
/// is dropped.
pub(super) fn install(pid: Pid) -> Result<Option<(WriteWatch, Frozen)>, TrackError> {
    uffd::can_track()?;
    let null = File::open("/dev/null").during("open", "/dev/null")?;
    let frozen = freeze::freeze_alone(pid, LIMIT)?;
    let process = &frozen.processes[0];
    let (Some(memory), Some(first)) = (&process.memory, process.threads.first()) else { return Ok(None) };
    let areas = survey::layout_of(process.shown.by)?;
    let beside = Beside::stay();
    let mut guest = Guest::enter(pid, &process.pidfd, first.door(beside.as_ref()), memory, &areas)?;
    let place = guest.lend(&null)?;
    let mut batch = Batch::new();
    let made = batch.call(libc::SYS_userfaultfd, &[MAKE_FLAGS.into()]);
    batch.call(libc::SYS_dup3, &[made.into(), place.into(), libc::O_CLOEXEC.into()]);
    batch.call(libc::SYS_close, &[made.into()]);
    let outcome = guest.run(&batch)?;
    if let Some((_, errno)) = outcome.failed() {
        return Err(crate::kernel::SysError::new("userfaultfd", format!("pid {pid}"), errno).into());
    }
    let fd: OwnedFd = process.pidfd.get(place)?;
    guest.leave()?;
    Ok(Some((WriteWatch::new(fd)?, frozen)))
}
