//! What stands in the maps: generations, faults, losses.

use std::time::Duration;

use criu_common::watch::{BLOCK_SHIFT, Faults, KINDS, Kind, Process, SHARED_DESCRIPTORS};
use nix::unistd::Pid;

/// How often each kind of state of a process was touched, as of one moment.
///
/// State that was read after this can be used later, as long as the kind's generation is still the same: whatever changes
/// it counts when the call returns, so after the change. How far a generation can be believed at all differs from kind to
/// kind: docs/tracking.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generations {
    /// When the process began, on the boot clock: pids are used again.
    pub started: Duration,
    /// How often it has called execve(2).
    pub images: u32,
    /// Counted anew each time that the watch began to look at system calls, or missed one.
    pub(super) session: u64,
    /// What counts for all kinds.
    everything: u64,
    kinds: [u64; KINDS],
    /// Its descriptors are, or were, also another process's.
    shared_descriptors: bool,
}

impl Generations {
    pub(super) fn new(process: &Process, session: u64) -> Self {
        Self {
            started: Duration::from_nanos(process.started_ns),
            images: process.images,
            session,
            everything: process.everything,
            kinds: process.kinds,
            shared_descriptors: process.flags & SHARED_DESCRIPTORS != 0,
        }
    }

    /// How often a kind was touched: for statistics. What may have touched everything counts for each.
    pub fn touched(&self, kind: Kind) -> u64 {
        self.kinds[kind as usize] + self.everything
    }

    /// Whether a kind has been left alone since an earlier moment: also the same process, the same program in it, and
    /// watched all the time.
    pub fn is_unchanged_since(&self, earlier: &Self, kind: Kind) -> bool {
        let about = |g: &Self| (g.started, g.images, g.session, g.everything);
        // Others that share a table of descriptors count for themselves.
        if kind == Kind::Descriptors && self.shared_descriptors {
            return false;
        }
        about(self) == about(earlier) && self.kinds[kind as usize] == earlier.kinds[kind as usize]
    }
}

/// Write faults in a block of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockFaults {
    /// Where it begins.
    pub address: u64,
    /// On pages that were there: write-protected, or shared until then.
    pub protected: u64,
    /// On pages that were not.
    pub missing: u64,
    /// The last of them, on the monotonic clock.
    pub last: Duration,
}

impl BlockFaults {
    /// Size of a block in bytes.
    pub const SIZE: u64 = 1 << BLOCK_SHIFT;

    pub(super) fn new(block: u64, by_processor: impl Iterator<Item = Faults>) -> Self {
        let mut sum = Self { address: block << BLOCK_SHIFT, protected: 0, missing: 0, last: Duration::ZERO };
        for faults in by_processor {
            sum.protected += faults.protected;
            sum.missing += faults.missing;
            sum.last = sum.last.max(Duration::from_nanos(faults.last_ns));
        }
        sum
    }
}

/// Write faults of a process since it is watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultTotals {
    /// On pages that were there.
    pub protected: u64,
    /// On pages that were not.
    pub missing: u64,
}

/// A process of the tracked set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// Its pid.
    pub pid: Pid,
    /// Its parent's, if it was forked while the parent was watched.
    pub parent: Option<Pid>,
    /// When it began, on the boot clock.
    pub started: Duration,
    /// How often it has called execve(2) since it is watched.
    pub images: u32,
    /// Its write faults.
    pub faults: FaultTotals,
}

impl Tracked {
    pub(super) fn new(process: &Process) -> Self {
        let [protected, missing] = process.write_faults;
        Self {
            pid: Pid::from_raw(process.pid as i32),
            parent: (process.parent != 0).then(|| Pid::from_raw(process.parent as i32)),
            started: Duration::from_nanos(process.started_ns),
            images: process.images,
            faults: FaultTotals { protected, missing },
        }
    }
}

/// What could not be noted since the watch began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Processes for which the set had no room: it is not whole.
    pub processes: u64,
    /// Records of lifecycle. The set itself is right all the same.
    pub lifecycle: u64,
    /// Records of first writes.
    pub blocks: u64,
    /// Records of system calls.
    pub calls: u64,
    /// Records of connections' states.
    pub sockets: u64,
    /// Write faults that no block had room for.
    pub faults: u64,
    /// Connections that there was no room for.
    pub connections: u64,
    /// Records that made no sense to the engine.
    pub undecoded: u64,
    /// Calls of programs that did not take place, because the same one was running on that processor.
    pub missed: u64,
}
