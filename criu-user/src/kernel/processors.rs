//! Sets of processors.

use nix::unistd::Pid;

use super::{cgroup, proc};

/// A set of processors as the kernel has it: bit n of the bytes for processor n, in whole words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processors(pub(super) Vec<u8>);

impl Processors {
    /// One alone.
    pub fn one(processor: usize) -> Self {
        let mut mask = vec![0; (processor / 64 + 1) * 8];
        mask[processor / 8] = 1 << (processor % 8);
        Self(mask)
    }

    /// Those that are switched on.
    pub fn online() -> Option<Self> {
        Self::listed("/sys/devices/system/cpu/online")
    }

    fn listed(file: &str) -> Option<Self> {
        Self::from_list(&proc::read_text(file).ok()?).filter(|listed| listed.count() > 0)
    }

    /// From a list of the kernel's: `0-3,8`.
    fn from_list(list: &str) -> Option<Self> {
        let mut mask = Vec::new();
        for range in list.trim().split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            for processor in first.parse::<usize>().ok()?..=last.parse::<usize>().ok()? {
                mask.resize(mask.len().max((processor / 64 + 1) * 8), 0u8);
                mask[processor / 8] |= 1 << (processor % 8);
            }
        }
        Some(Self(mask))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The same without zeros at the end.
    pub fn trimmed(&self) -> &[u8] {
        &self.0[..self.0.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1)]
    }

    /// How many they are.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Whether one is among them.
    pub fn has(&self, processor: usize) -> bool {
        self.0.get(processor / 8).is_some_and(|byte| byte >> (processor % 8) & 1 == 1)
    }

    /// The first that is in another set as well.
    pub fn common(&self, other: &Self) -> Option<usize> {
        (0..self.0.len() * 8).find(|&processor| self.has(processor) && other.has(processor))
    }

    /// What a thread that was found with these is to be set to, so that nobody will see that anybody set it.
    ///
    /// The kernel remembers what a thread was set to, and from then on lets it have of the processors of its control group
    /// only these (`user_cpus_ptr` in kernel/sched/core.c). A thread that has all that are `online`, or all of its group's,
    /// was most likely never set to any: it is set to all that there could be, and will have whatever its group has.
    pub fn lasting(&self, tid: Pid, online: &Self) -> Self {
        if self.trimmed() == online.trimmed() || self.are_of_group(tid) {
            return Self(vec![0xff; self.0.len()]);
        }
        self.clone()
    }

    /// Whether they are those of the control group of a thread.
    fn are_of_group(&self, tid: Pid) -> bool {
        let Ok(hierarchies) = cgroup::hierarchies() else { return false };
        let memberships = cgroup::memberships(tid, tid).unwrap_or_default();
        memberships.into_iter().any(|(controllers, group)| {
            let hierarchy = hierarchies.iter().find(|hierarchy| hierarchy.controllers == controllers);
            let dirs = hierarchy.and_then(|hierarchy| Some((hierarchy, hierarchy.dir(&group)?)));
            dirs.is_some_and(|(hierarchy, dir)| {
                // In version 2, a group without the controller has what the next above has that has it.
                let above = dir.ancestors().take_while(|dir| dir.starts_with(&hierarchy.mount));
                let files =
                    above.flat_map(|dir| ["cpuset.cpus.effective", "cpuset.effective_cpus"].map(|f| dir.join(f)));
                let nearest = files.into_iter().find(|file| file.exists());
                let listed = nearest.and_then(|file| Self::listed(&file.to_string_lossy()));
                listed.is_some_and(|listed| listed.trimmed() == self.trimmed())
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::sched;
    use super::*;

    #[test]
    fn lists_of_the_kernel_are_read() {
        let some = Processors::from_list("0-2,65\n").expect("a list");
        assert_eq!(some.bytes(), [7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((some.count(), some.has(65), some.has(64), some.has(1000)), (4, true, false, false));
        assert_eq!(some.trimmed(), [7, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(some.common(&Processors::one(2)), Some(2));
        assert_eq!(some.common(&Processors::one(3)), None);
        assert_eq!(Processors::from_list("x"), None);
        assert_eq!(Processors::from_list("").expect("an empty list").count(), 0);
    }

    #[test]
    fn who_has_all_processors_is_set_to_all_that_there_could_be() {
        let own = sched::affinity(Pid::this()).expect("affinity");
        assert!(own.lasting(Pid::this(), &own).bytes().iter().all(|&byte| byte == 0xff));
        let online = Processors::online().expect("processors");
        let some = Processors(vec![0b1010_0000, 0, 0, 0, 0, 0, 0, 0x80]);
        assert_eq!(some.lasting(Pid::this(), &online), some);
    }
}
