//! The tracked processes of a tree.
//!
//! Which they are is told by the eBPF programs as it happens, and looked up in /proc where nobody tells, where something
//! was lost, when a process that had children has ended (they have another parent then), and for every image.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use nix::unistd::Pid;

use super::TrackError;
use super::client::Client;
use super::memory::{Look, Memory, Purpose, STILL};
use super::wire;
use super::witness::News;
use crate::freeze::{self, Frozen, Release};
use crate::kernel::cgroup::members;
use crate::kernel::pagemap::Marks;
use crate::kernel::proc;
use crate::kernel::sys::{Compare, kcmp};

/// A tree, and what is known of the memory of its processes.
#[derive(Debug)]
pub struct Tree {
    root: Pid,
    root_start: u64,
    marks: Marks,
    /// By pid.
    pub processes: BTreeMap<Pid, Memory>,
    /// Who is whose parent.
    parents: BTreeMap<Pid, Pid>,
    /// Processes whose memory is still to be met: they have just been made, or still have another's (vfork(2)).
    unmet: BTreeSet<Pid>,
    /// Processes that have another program since the last look.
    executed: BTreeSet<Pid>,
    /// What was found before the time of a look.
    early: BTreeMap<Pid, Look>,
    /// Whether what is known may be wrong.
    is_doubtful: bool,
}

/// How far what is known of the tree is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Belief {
    /// What was told is believed.
    Told,
    /// /proc is asked.
    Seen,
}

/// What one look at all processes found.
#[derive(Debug, Default)]
pub struct TreeLook {
    /// By pid.
    pub looks: BTreeMap<Pid, Look>,
    /// Longest stop of any process.
    pub stopped: Duration,
    /// How much of the look was done for good.
    pub installing: Duration,
    /// Processes that nobody had told of.
    pub met: Vec<Pid>,
    /// Processes that are not of the tree any more: they have ended, or have another parent.
    pub left: Vec<Pid>,
}

impl TreeLook {
    /// Pages written since the look before.
    pub fn written(&self) -> u64 {
        self.looks.values().map(|look| look.written).sum()
    }
}

impl Tree {
    /// The tree below `root`, whose writes `marks` tell of.
    pub fn new(root: Pid, marks: Marks) -> Result<Self, TrackError> {
        let stat = proc::stat(root, None).map_err(|_| TrackError::NoProcess { pid: root.as_raw() })?;
        Ok(Self {
            root,
            root_start: stat.start_time,
            marks,
            processes: BTreeMap::new(),
            parents: BTreeMap::new(),
            unmet: BTreeSet::new(),
            executed: BTreeSet::new(),
            early: BTreeMap::new(),
            is_doubtful: true,
        })
    }

    /// Its root.
    pub fn root(&self) -> Pid {
        self.root
    }

    /// When its root began, in clock ticks since boot.
    pub fn root_start(&self) -> u64 {
        self.root_start
    }

    /// What tells of its writes.
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// The parent of a process of the tree.
    pub fn parent(&self, pid: Pid) -> Option<Pid> {
        self.parents.get(&pid).copied()
    }

    /// Takes news in. Tells whether there is new memory that nobody watches yet.
    pub fn hear(&mut self, news: &[News]) -> bool {
        let mut is_new = false;
        for &event in news {
            match event {
                News::Forked { parent, child } if self.is_in(parent) => {
                    self.parents.insert(child, parent);
                    self.unmet.insert(child);
                    is_new = true;
                }
                News::Executed(pid) if self.is_in(pid) => {
                    self.executed.insert(pid);
                    is_new = true;
                }
                News::Ended(pid) => self.end(pid),
                News::Forked { .. } | News::Executed(_) | News::Suspicious(_) => {}
            }
        }
        is_new
    }

    fn is_in(&self, pid: Pid) -> bool {
        self.processes.contains_key(&pid) || self.unmet.contains(&pid)
    }

    fn end(&mut self, pid: Pid) {
        self.processes.remove(&pid);
        self.unmet.remove(&pid);
        self.executed.remove(&pid);
        self.early.remove(&pid);
        self.parents.remove(&pid);
        // Its children are somebody else's now, perhaps outside.
        self.is_doubtful |= self.parents.values().any(|&parent| parent == pid);
    }

    /// Something was lost: what is known may be wrong.
    pub fn doubt(&mut self) {
        self.is_doubtful = true;
    }

    /// Looks at new memory only. What is found counts for the next look.
    pub fn look_early(&mut self) -> Duration {
        self.meet();
        let mut longest = Duration::ZERO;
        let new: BTreeSet<Pid> = std::mem::take(&mut self.executed);
        for pid in new {
            let Some(memory) = self.processes.get_mut(&pid) else { continue };
            let look = look_at(memory, Purpose::Report).unwrap_or_default();
            longest = longest.max(look.stopped);
            self.early.entry(pid).or_default().written += look.written;
        }
        longest
    }

    /// Has what was found count for the next look as well, because it was not reported.
    pub fn carry(&mut self, found: &TreeLook) {
        for (&pid, look) in &found.looks {
            self.early.entry(pid).or_default().written += look.written;
        }
    }

    /// Looks at every process once: new ones are met, those that have ended forgotten. A process that cannot be looked at
    /// counts as written, and says why.
    pub fn look(&mut self, belief: Belief, purpose: Purpose) -> TreeLook {
        let mut found = TreeLook::default();
        if self.is_doubtful || belief == Belief::Seen {
            self.walk(&mut found);
            self.is_doubtful = false;
        }
        self.meet();
        self.executed.clear();
        let early = std::mem::take(&mut self.early);
        let still = if purpose == Purpose::Image { self.stand_still() } else { BTreeMap::new() };
        let is_ready = |pid| self.marks == Marks::Userfaultfd || still.contains_key(&pid);
        for (&pid, memory) in &mut self.processes {
            // The bits of a process that was not to be had stay for the image after this one.
            let purpose = if is_ready(pid) { purpose } else { Purpose::Report };
            let Some(mut look) = look_at(memory, purpose) else { continue };
            if let Some(before) = early.get(&pid) {
                look.written += before.written;
            }
            found.installing += look.installing;
            found.stopped = found.stopped.max(look.stopped);
            found.looks.insert(pid, look);
        }
        for frozen in still.into_values() {
            found.stopped = found.stopped.max(frozen.release(Release::Resume));
        }
        found
    }

    /// Stops all processes, where soft-dirty bits are to be cleared: one that is just writing to the memory of another
    /// (process_vm_writev(2)) would write to a page that was looked at before.
    fn stand_still(&self) -> BTreeMap<Pid, Frozen> {
        if self.marks == Marks::Userfaultfd {
            return BTreeMap::new();
        }
        let stop = |&pid: &Pid| match freeze::freeze_alone(pid, STILL) {
            Ok(frozen) => Some((pid, frozen)),
            Err(err) => {
                tracing::debug!(pid = pid.as_raw(), %err, "it does not stand still");
                None
            }
        };
        self.processes.keys().filter_map(stop).collect()
    }

    /// Asks /proc which processes there are.
    fn walk(&mut self, found: &mut TreeLook) {
        let now: BTreeMap<Pid, (u64, Pid)> = proc::tree(self.root)
            .into_iter()
            .filter_map(|pid| proc::stat(pid, None).ok().map(|stat| (pid, (stat.start_time, stat.ppid))))
            .collect();
        let gone = |(pid, memory): (&Pid, &Memory)| {
            now.get(pid).is_none_or(|&(start, _)| start != memory.start_time).then_some(*pid)
        };
        found.left = self.processes.iter().filter_map(gone).collect();
        for pid in &found.left {
            self.processes.remove(pid);
        }
        self.parents = now.iter().map(|(&pid, &(_, parent))| (pid, parent)).collect();
        found.met = now.keys().copied().filter(|&pid| !self.is_in(pid)).collect();
        self.unmet.retain(|pid| now.contains_key(pid));
        self.unmet.extend(&found.met);
    }

    /// Takes new processes in that have a memory of their own.
    fn meet(&mut self) {
        for pid in std::mem::take(&mut self.unmet) {
            let Ok(stat) = proc::stat(pid, None) else {
                self.parents.remove(&pid);
                continue;
            };
            if self.shares_memory(pid) {
                self.unmet.insert(pid);
                continue;
            }
            let rival = if self.marks == Marks::SoftDirty { self.rival(pid) } else { None };
            self.processes.insert(pid, Memory::new(pid, stat.start_time, self.marks, rival));
            self.executed.insert(pid);
        }
    }

    /// The root of another tree that a process belongs to and that somebody tracks.
    fn rival(&self, pid: Pid) -> Option<Pid> {
        let others: Vec<Pid> = wire::roots().into_iter().filter(|&root| root != self.root).collect();
        let parent = |&pid: &Pid| proc::stat(pid, None).ok().map(|stat| stat.ppid).filter(|parent| parent.as_raw() > 0);
        let mut line = std::iter::successors(Some(pid), parent);
        line.find(|ancestor| others.contains(ancestor) && matches!(Client::connect(*ancestor), Ok(Some(_))))
    }

    /// Whether a new process still uses the memory of another (after vfork(2), until its execve(2)): its pages are the
    /// other's, and must be found in its name.
    fn shares_memory(&self, pid: Pid) -> bool {
        self.processes.keys().any(|&other| kcmp(pid, other, Compare::Vm).is_ok_and(|order| order.is_eq()))
    }
}

/// The roots of the trees that are in a control group: its processes whose parents are not in it.
pub fn roots_in(group: &Path) -> Result<Vec<Pid>, TrackError> {
    let members: BTreeSet<Pid> = members(group).into_iter().collect();
    let is_root = |pid: &Pid| proc::stat(*pid, None).is_ok_and(|stat| !members.contains(&stat.ppid));
    let roots: Vec<Pid> = members.iter().copied().filter(is_root).collect();
    if roots.is_empty() { Err(TrackError::EmptyGroup { path: group.to_owned() }) } else { Ok(roots) }
}

fn look_at(memory: &mut Memory, purpose: Purpose) -> Option<Look> {
    let look = memory.look(purpose);
    look.inspect_err(|err| tracing::debug!(pid = memory.pid.as_raw(), %err, "its memory could not be looked at")).ok()
}
