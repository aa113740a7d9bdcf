//! The tracked processes of a tree.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::unistd::Pid;

use super::TrackError;
use super::memory::{Look, Memory};
use crate::kernel::proc;
use crate::kernel::sys::{Compare, kcmp};

/// A tree, and what is known of the memory of its processes.
#[derive(Debug)]
pub struct Tree {
    root: Pid,
    root_start: u64,
    /// By pid.
    pub processes: BTreeMap<Pid, Memory>,
}

/// What one look at all processes found.
#[derive(Debug, Default)]
pub struct TreeLook {
    /// By pid.
    pub looks: BTreeMap<Pid, Look>,
    /// Longest stop of any process.
    pub stopped: Duration,
}

impl TreeLook {
    /// Pages written since the look before.
    pub fn written(&self) -> u64 {
        self.looks.values().map(|look| look.written).sum()
    }
}

impl Tree {
    /// The tree below `root`.
    pub fn new(root: Pid) -> Result<Self, TrackError> {
        let stat = proc::stat(root, None).map_err(|_| TrackError::NoProcess { pid: root.as_raw() })?;
        Ok(Self { root, root_start: stat.start_time, processes: BTreeMap::new() })
    }

    /// Its root.
    pub fn root(&self) -> Pid {
        self.root
    }

    /// When its root began, in clock ticks since boot.
    pub fn root_start(&self) -> u64 {
        self.root_start
    }

    /// Whether the root is still there and alive.
    pub fn is_alive(&self) -> bool {
        proc::stat(self.root, None).is_ok_and(|stat| stat.start_time == self.root_start)
            && proc::Shown::find(self.root).is_some()
    }

    /// Looks at every process once: new ones are met, those that have ended forgotten. A process that cannot be looked at
    /// counts as written, and says why.
    pub fn look(&mut self) -> TreeLook {
        self.meet();
        let mut found = TreeLook::default();
        for (&pid, memory) in &mut self.processes {
            match memory.look() {
                Ok(look) => {
                    found.stopped = found.stopped.max(look.stopped);
                    found.looks.insert(pid, look);
                }
                Err(err) => tracing::debug!(pid = pid.as_raw(), %err, "its memory could not be looked at"),
            }
        }
        found
    }

    fn meet(&mut self) {
        let now: BTreeMap<Pid, u64> = proc::tree(self.root)
            .into_iter()
            .filter_map(|pid| Some((pid, proc::stat(pid, None).ok()?.start_time)))
            .collect();
        self.processes.retain(|pid, memory| now.get(pid) == Some(&memory.start_time));
        for (&pid, &start_time) in &now {
            if !self.processes.contains_key(&pid) && !self.shares_memory(pid) {
                self.processes.insert(pid, Memory::new(pid, start_time));
            }
        }
    }

    /// Whether a new process still uses the memory of another (after vfork(2), until its execve(2)): its pages are the
    /// other's, and must be found in its name.
    fn shares_memory(&self, pid: Pid) -> bool {
        self.processes.keys().any(|&other| kcmp(pid, other, Compare::Vm).is_ok_and(|order| order.is_eq()))
    }
}
