//! Who must not write its memory itself.
//!
//! What a process writes into a file counts for its control group: all of it on a tmpfs, and on a disk as long as it is not
//! written there. In a group that has less left than that the kernel kills somebody
//! (Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst). So the engine writes it, for whose group it counts
//! then.

use std::collections::HashMap;

use nix::unistd::Pid;
use tracing::debug;

use super::dump::estimate;
use crate::kernel::{headroom, proc};

/// Control groups, as /proc/PID/cgroup tells them, that have too little memory left.
#[derive(Debug, Default)]
pub struct Crowded(Vec<String>);

impl Crowded {
    /// Looks at the groups of these processes, which still run. Each may come to take its memory so many times.
    pub fn look(processes: &[Pid], times: u64) -> Self {
        let needed = processes.iter().map(|&pid| estimate(pid)).sum::<u64>() * times;
        let mut groups = HashMap::new();
        for &pid in processes {
            let Ok(group) = groups_of(pid) else { continue };
            groups.entry(group).or_insert(pid);
        }
        let is_crowded = |pid: Pid| match headroom::of_groups(pid) {
            Ok(Some(room)) if room.bytes < needed => {
                debug!(
                    group = room.of,
                    left = room.bytes,
                    needed,
                    "the engine writes the memory of processes in a full group"
                );
                true
            }
            Ok(_) => false,
            Err(err) => {
                debug!(%err, "how much memory a group has left is unknown");
                false
            }
        };
        Self(groups.into_iter().filter(|(_, pid)| is_crowded(*pid)).map(|(group, _)| group).collect())
    }

    /// Whether a process is in one of them.
    pub fn has(&self, pid: Pid) -> bool {
        !self.0.is_empty() && groups_of(pid).is_ok_and(|group| self.0.contains(&group))
    }
}

fn groups_of(pid: Pid) -> crate::kernel::SysResult<String> {
    proc::read_text(&format!("/proc/{pid}/cgroup"))
}
