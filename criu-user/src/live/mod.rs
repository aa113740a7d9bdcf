//! A live dump: in the freeze each process is copied, and the copies' memory is written while the program runs on. Where
//! nearly all of its memory is in parent images already, the rest is written in the freeze instead.
//!
//! Where a copy cannot be had, or might cost the program its life, the process is written in the freeze as in any other dump,
//! and a warning says why. See docs/live.md.

pub mod round;
mod sparing;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use tracing::{debug, info, warn};

use crate::agent::copy::Orphans;
use crate::agent::{AgentError, Aside, Guest, alone};
use crate::freeze::{self, FrozenProcess};
use crate::image::proto::{CoreEntry, MmEntry};
use crate::image::{ImageDir, ImageKind};
use crate::kernel::survey::Vma;
use crate::kernel::{headroom, proc};
use crate::object::ObjectError;
use crate::object::file::Capture;
use crate::object::memory::{self, Pages, Snapshot};
use crate::observer::Observer;

pub use sparing::spared;

/// How the memory of a tree comes into the images of a live dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Manner {
    /// Much memory in rounds, little from copies
    #[default]
    Auto,
    /// From copies of the processes, made in the freeze and written afterwards
    Copies,
    /// In rounds: all of it while the tree runs, and in the freeze what was written meanwhile
    Rounds,
}

/// How the memory of a tree is written.
#[derive(Debug, Default)]
pub struct Live {
    wanted: bool,
    /// Processes that need no copy, as far as is known before the freeze.
    pub spared: HashSet<Pid>,
    /// How many processes needed none.
    pub not_needed: usize,
    /// Copies whose memory is still to be written.
    copies: Vec<Pending>,
    /// How many processes were copied.
    pub copied: usize,
    /// Why others were not.
    pub fallbacks: Vec<String>,
    /// What was written after the freeze.
    pub pages: Pages,
    /// How long that took.
    pub writing: Duration,
}

/// A process to be copied.
#[derive(Debug, Clone, Copy)]
pub struct Original<'o> {
    /// It.
    pub process: &'o FrozenProcess,
    /// Its areas.
    pub vmas: &'o [Vma],
    /// Number of its pages file.
    pub pages_id: u32,
    /// Whether it adopts orphans, of which its own copies are some for a moment.
    pub orphans: Orphans,
}

#[derive(Debug)]
struct Pending {
    snapshot: Snapshot,
    pages_id: u32,
    /// The message about the address space; where guarded pages are only the copy shows.
    mm: MmEntry,
}

impl Live {
    /// Looks whether the machine and the groups of a tree can bear the copies of all processes but the spared ones, before
    /// it is frozen.
    pub fn prepare(root: Pid, spared: HashSet<Pid>) -> Self {
        let copied: Vec<Pid> = proc::tree(root).into_iter().filter(|pid| !spared.contains(pid)).collect();
        let mut live = Self { wanted: true, spared, ..Self::default() };
        if copied.is_empty() {
            return live;
        }
        // Its parent adopts all orphans, and cannot be told not to.
        if root.as_raw() == 1 {
            live.fall_back(
                root,
                "it is the first process of its pid namespace, and would have to reap its own copies".into(),
            );
            live.wanted = false;
            return live;
        }
        let needed: u64 = copied.into_iter().map(memory::estimate).sum();
        match headroom::of(root) {
            Ok(room) if room.bytes < needed => {
                let why = format!(
                    "if it wrote to all of its memory meanwhile it would need {} MiB more, and {} has {} MiB left",
                    needed >> 20,
                    room.of,
                    room.bytes >> 20
                );
                live.fall_back(root, why);
                live.wanted = false;
            }
            Ok(_) => {}
            Err(err) => debug!(%err, "how much memory is left is unknown"),
        }
        live
    }

    /// Whether there is still something to be written after the freeze.
    pub fn is_pending(&self) -> bool {
        !self.copies.is_empty()
    }

    fn fall_back(&mut self, pid: Pid, why: String) {
        warn!(pid = pid.as_raw(), why, "no live dump of this process: its memory is written while it stands still");
        self.fallbacks.push(format!("pid {pid}: {why}"));
    }

    /// Copies a process. Gives the message back where it has to be written as it stands there.
    pub fn copy(
        cx: &mut Capture<'_>,
        guest: &mut Guest<'_>,
        original: Original<'_>,
        mm: MmEntry,
        aside: &Aside<'_>,
    ) -> Result<Option<MmEntry>, ObjectError> {
        let Original { process, vmas, pages_id, orphans } = original;
        // What was known of a process may be worth nothing in the freeze.
        let known = cx.past.history.has(process.pid);
        let live = cx.shelf.get::<Self>();
        let needs_none = known && live.spared.contains(&process.pid);
        live.not_needed += usize::from(live.wanted && needs_none);
        if !live.wanted || needs_none {
            return Ok(Some(mm));
        }
        let filters = process.threads.first().and_then(|thread| thread.filters.as_deref());
        let obstacle = filters.and_then(alone::obstacle_to_copying);
        let obstacle = obstacle.map(|call| format!("it forbids itself the call {call}, which makes a copy safe"));
        // There are only so many. Who writes to one that a copy has as well needs another, and is killed if there is none.
        let huge =
            || vmas.iter().any(memory::has_private_huge_pages).then(|| "it has huge pages of hugetlbfs".to_owned());
        let taken = match obstacle.or_else(huge) {
            Some(why) => Err(why),
            None => match Snapshot::take(cx, guest, process, vmas, orphans, aside.busy()?) {
                Ok(snapshot) => Ok(snapshot),
                Err(ObjectError::Agent(AgentError::NoCopy { errno, .. })) => {
                    Err(format!("no copy can be made ({})", errno.desc()))
                }
                Err(other) => return Err(other),
            },
        };
        let live = cx.shelf.get::<Self>();
        match taken {
            Ok(snapshot) => {
                debug!(pid = process.pid.as_raw(), copy = snapshot.pid().as_raw(), "it is copied");
                live.copies.push(Pending { snapshot, pages_id, mm });
                live.copied += 1;
                Ok(None)
            }
            Err(why) => {
                live.fall_back(process.pid, why);
                Ok(Some(mm))
            }
        }
    }

    /// Writes the memory of all copies. The tree runs.
    pub fn finish(&mut self, dir: &ImageDir, observer: &dyn Observer) -> Result<(), ObjectError> {
        let begin = Instant::now();
        for Pending { snapshot, pages_id, mut mm } in std::mem::take(&mut self.copies) {
            freeze::catch_up();
            let (copy, pid) = (snapshot.pid().as_raw(), snapshot.of().as_raw());
            let part = snapshot.write(dir, observer, pages_id, &mut mm.vmas)?;
            dir.write_one(ImageKind::Mm.id(pid as u64), &mm)?;
            debug!(pid, copy, scanned = part.scanned, written = part.written, "its copy's memory is written");
            self.pages.add(part);
        }
        self.writing = begin.elapsed();
        info!(copies = self.copied, pages = self.pages.written, took = ?self.writing, "the memory of all copies is written");
        Ok(())
    }
}

/// Whether a process adopts orphans, from what its threads are.
pub fn orphans(cores: &[(Pid, CoreEntry)]) -> Orphans {
    let adopts = cores.iter().filter_map(|(_, core)| core.tc.as_ref()).any(|tc| tc.child_subreaper());
    if adopts { Orphans::Here } else { Orphans::Elsewhere }
}

/// Lets go of a process whose part is done. One that adopts orphans must not do so until its descendants are copied.
pub fn leave<'f>(
    live: &Live,
    guest: Guest<'f>,
    process: &FrozenProcess,
    orphans: Orphans,
    aside: &mut Aside<'f>,
) -> Result<(), AgentError> {
    if live.wanted && orphans == Orphans::Here && !process.children.is_empty() {
        return aside.take(guest);
    }
    guest.leave()
}
