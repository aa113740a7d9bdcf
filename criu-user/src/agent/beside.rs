//! Engine and guest on one processor.
//!
//! Only one of the two ever works: each stop of a thread wakes the engine, and what the engine says wakes the thread, dozens
//! of times for each process. Between two processors that is an interrupt to one that mostly sleeps, 30 to 150 µs in a
//! virtual machine; on one processor it is a change of contexts, 3 µs. So the engine stays where it is for as long as it has
//! guests, and their threads come there. The guest gives its thread back the processors that it was found with, with the
//! engine's help or without.

use std::cell::Cell;

use nix::unistd::Pid;

use crate::kernel::processors::Processors;
use crate::kernel::sched;

/// Bytes that the guest has for the processors of its thread: 512 of them.
pub(super) const PROCESSORS: usize = 64;

/// The calling thread stays on one processor while this lives.
#[derive(Debug)]
pub struct Beside {
    /// Where the engine may run otherwise.
    own: Processors,
    online: Processors,
    here: Cell<usize>,
}

/// Where a thread has to be set to come to the engine, and where it is set back to.
#[derive(Debug)]
pub(super) struct Place {
    pub here: Processors,
    pub home: Processors,
}

impl Beside {
    /// Stays here; `None` where that is not allowed.
    pub fn stay() -> Option<Self> {
        let online = Processors::online()?;
        let own = sched::affinity(Pid::this()).ok()?.lasting(Pid::this(), &online);
        let here = sched::current_processor()?;
        sched::set_affinity(Pid::from_raw(0), &Processors::one(here)).ok()?;
        Some(Self { own, online, here: Cell::new(here) })
    }

    /// The place for a thread that was found with these processors; `None` if it stays where it is. The engine goes to one of
    /// them, if it is elsewhere.
    pub(super) fn place(&self, tid: Pid, found: &Processors) -> Option<Place> {
        let home = found.lasting(tid, &self.online);
        if found.count() < 2 || home.bytes().len() > PROCESSORS {
            return None;
        }
        if !found.has(self.here.get()) {
            let there = self.own.common(found)?;
            sched::set_affinity(Pid::from_raw(0), &Processors::one(there)).ok()?;
            self.here.set(there);
        }
        Some(Place { here: Processors::one(self.here.get()), home })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Err(err) = sched::set_affinity(Pid::from_raw(0), &self.own) {
            tracing::debug!(%err, "the engine stays on one processor");
        }
    }
}
