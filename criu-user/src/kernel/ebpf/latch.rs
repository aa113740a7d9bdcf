//! The gate at interfaces of kernels without links to them (tcx, Linux 6.6): as filters of traffic control, through
//! `criu-ebpf/src/latch.rs`, which lets everything pass once nobody holds the gate any more.
//!
//! What stays then at the interfaces does nothing. It is taken away by a watchman, or if he is killed as well, by the next
//! gate that is made or cleared.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::Flock;

use super::bpf::{self, Purpose};
use super::links;
use super::object::{Loaded, compiled};
use super::{EbpfError, EbpfResult, maps};
use crate::kernel::apart::Watchman;
use crate::kernel::interfaces::{self, Way};
use crate::kernel::traffic::{Filter, Traffic};
use crate::kernel::{SysError, SysResult, kept};

/// The compiled program.
static OBJECT: Option<&[u8]> = compiled!("latch");

/// What filters are called at interfaces that had no `clsact` before, and at others: who takes the last one of the former
/// away takes that along.
const ALONE: &CStr = c"criu-ebpf gate (alone)";
const BESIDE: &CStr = c"criu-ebpf gate";
/// Names in the directory of a gate.
const GATE_NAME: &str = "gate";
const LATCH_NAME: &str = "latch";

/// How long the watchman waits for the kernel to empty the array of a dead engine, and how often he looks.
const PATIENCE: u32 = 200;
const PAUSE: Duration = Duration::from_millis(10);

/// Our program at interfaces. Dropped, it goes away, unless it has got names.
#[derive(Debug)]
pub struct Latch {
    program: OwnedFd,
    number: u32,
    /// Holds the gate: with the last descriptor and name of this, the gate is gone.
    gate: Option<OwnedFd>,
    /// Whether it is to stay.
    stays: bool,
    _watchman: Option<Watchman>,
}

fn failed(on: &'static str) -> impl FnOnce((&'static str, std::io::Error)) -> EbpfError {
    move |(command, source)| EbpfError::Call { command, on: on.into(), source }
}

fn at_interfaces(source: SysError) -> EbpfError {
    EbpfError::Filters { source }
}

impl Latch {
    /// Makes one for a gate; it stands nowhere yet.
    pub fn new(gate: BorrowedFd<'_>) -> EbpfResult<Self> {
        let mut object = Loaded::new("latch", OBJECT.ok_or(EbpfError::NotBuilt)?, HashMap::new())?;
        let program = object.load("latch", Purpose::Classifier)?;
        let number = bpf::program_number(program.as_fd()).map_err(failed("the latch"))?;
        let array = object.take_map("GATE")?;
        maps::set_program(array.as_fd(), gate).map_err(failed("the latch"))?;
        sweep().map_err(at_interfaces)?;
        let bare = bare().map_err(at_interfaces)?;
        let watchman = Watchman::start(move |_| sweep_after(number, &bare)).map_err(at_interfaces)?;
        Ok(Self { program, number, gate: Some(array), stays: false, _watchman: Some(watchman) })
    }

    /// Puts it at both sides of these interfaces; those that are gone meanwhile are left out.
    pub fn attach(&self, to: &[u32]) -> EbpfResult<()> {
        attach(self.program.as_fd(), to).map_err(at_interfaces)
    }

    /// The program, of which names can be made.
    pub fn program(&self) -> &OwnedFd {
        &self.program
    }

    /// Makes it outlive us, by names in this directory. Where they cannot be made it goes with us, as before.
    pub fn pin(&mut self, dir: &Path) -> EbpfResult<()> {
        links::pin_in(dir, LATCH_NAME, self.program.as_fd())?;
        if let Some(gate) = &self.gate {
            links::pin_in(dir, GATE_NAME, gate.as_fd())?;
        }
        self.stays = true;
        Ok(())
    }

    /// Takes note that somebody else has made the names.
    pub fn leave(&mut self) {
        self.stays = true;
    }

    /// The one that an earlier engine has left with its gate; `None` if that stands there by itself.
    pub fn find(dir: &Path) -> Option<Self> {
        let program = links::pinned(&dir.join(LATCH_NAME)).ok()?;
        let number = bpf::program_number(program.as_fd()).ok()?;
        Some(Self { program, number, gate: None, stays: true, _watchman: None })
    }

    /// Takes it away from the interfaces.
    pub fn remove(mut self) -> EbpfResult<()> {
        self.gate = None;
        self.stays = true;
        detach(|number| number == self.number).map_err(at_interfaces)
    }
}

impl Drop for Latch {
    fn drop(&mut self) {
        // Whatever goes wrong with the rest, the gate is open.
        self.gate = None;
        if !self.stays
            && let Err(err) = detach(|number| number == self.number)
        {
            tracing::warn!(%err, "a filter that does nothing is left at an interface");
        }
    }
}

/// The right to change what hangs at interfaces: whoever takes the last filter away must not take that of another gate
/// along, which has just come.
fn turn() -> SysResult<Flock<File>> {
    kept::turn()
        .map_err(|err| SysError::new("flock", kept::DIR, Errno::from_raw(err.raw_os_error().unwrap_or(libc::EIO))))
}

fn is_ours(filter: &Filter) -> Option<u32> {
    let (name, number) = filter.program.as_ref()?;
    [ALONE, BESIDE].iter().any(|ours| ours.to_bytes() == name.as_bytes()).then_some(*number)
}

fn attach(program: BorrowedFd<'_>, to: &[u32]) -> SysResult<()> {
    let (_turn, traffic) = (turn()?, Traffic::open()?);
    let prepared = traffic.prepared()?;
    for &interface in to {
        let attached = (|| {
            let name = if !prepared.contains(&interface) {
                traffic.prepare(interface)?;
                ALONE
            } else if traffic.filters(interface)?.iter().any(|one| is_called(one, ALONE)) {
                ALONE
            } else {
                BESIDE
            };
            Way::BOTH.iter().try_for_each(|&way| traffic.add(interface, way, program, name))
        })();
        match attached {
            Err(e) if e.errno == Errno::ENODEV => {}
            other => other?,
        }
    }
    Ok(())
}

fn is_called(filter: &Filter, name: &CStr) -> bool {
    filter.program.as_ref().is_some_and(|(known, _)| known.as_bytes() == name.to_bytes())
}

/// Takes those of our filters away whose program is `unwanted`.
fn detach(unwanted: impl Fn(u32) -> bool) -> SysResult<()> {
    let traffic = Traffic::open()?;
    let prepared = traffic.prepared()?;
    if prepared.is_empty() {
        return Ok(());
    }
    let _turn = turn()?;
    for interface in prepared {
        let filters = traffic.filters(interface)?;
        let (gone, rest): (Vec<_>, Vec<_>) =
            filters.into_iter().partition(|filter| is_ours(filter).is_some_and(&unwanted));
        for filter in &gone {
            traffic.remove(filter)?;
        }
        if rest.is_empty() && gone.iter().any(|filter| is_called(filter, ALONE)) {
            traffic.restore(interface)?;
        }
    }
    Ok(())
}

/// Takes away what engines that were killed have left.
pub fn sweep() -> SysResult<()> {
    detach(|number| is_open(number) == Some(true))
}

/// Whether everything passes a latch for good; `None` if there is none of this number.
fn is_open(number: u32) -> Option<bool> {
    let array = bpf::map_of(number).ok().flatten()?;
    maps::has_program(array.as_fd()).ok().map(|has| !has)
}

/// Interfaces that have no `clsact` as yet.
fn bare() -> SysResult<Vec<u32>> {
    let prepared = Traffic::open()?.prepared()?;
    Ok(interfaces::up()?.into_values().filter(|interface| !prepared.contains(interface)).collect())
}

/// What the watchman does when the engine has died: its helpers may hold the gate for a moment longer. One that has got
/// names stays.
fn sweep_after(number: u32, bare: &[u32]) {
    for _ in 0..PATIENCE {
        if is_open(number) != Some(false) {
            let _ = detach(|one| one == number).and_then(|()| strip(bare));
            return;
        }
        sleep(PAUSE);
    }
}

/// Takes `clsact` from interfaces where nothing hangs on it: it may have been made by an engine that died before it had put
/// a filter there.
fn strip(bare: &[u32]) -> SysResult<()> {
    let (_turn, traffic) = (turn()?, Traffic::open()?);
    let prepared = traffic.prepared()?;
    for &interface in bare.iter().filter(|interface| prepared.contains(interface)) {
        if traffic.filters(interface)?.is_empty() {
            traffic.restore(interface)?;
        }
    }
    Ok(())
}
