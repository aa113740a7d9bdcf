//! The state cache of a survey by eBPF: what was read before the freeze, and is still so in it.
//!
//! A large memory map takes milliseconds to read. So it is read while the tree runs, and in the freeze only the number is
//! asked that the kernel counts up for every writer of the map (`mm_struct.mm_lock_seq`): if it is still what it was before
//! the reading, nobody, by whatever way, has made, changed or removed an area. Names of files are the exception, because a
//! file is renamed without touching who has mapped it; they are looked at again. docs/tracking.md says what else could be
//! kept, and does not pay.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use criu_common::survey as record;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::ebpf::survey::TaskRecords;
use super::ebpf::{EbpfResult, EbpfSurvey};
use super::proc::{self, Shown};
use super::survey::{Descriptor, Vma, VmaName};
use super::surveyor::SurveyError;

/// Areas from which on a map is read ahead: those of fewer take a tenth of a millisecond.
const WORTH_READING: u32 = 200;
/// Mapped files up to which their names are looked at again in the freeze; with more of them that takes as long as all.
const MOST_NAMES: usize = 200;

/// How the cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Caching {
    /// Where it pays.
    #[default]
    Used,
    /// Everywhere, and everything is read in the freeze all the same and compared: a difference is an error.
    Verified,
}

/// What shows in the freeze that a memory map is the one that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MapState {
    mm: u64,
    /// Counts programs: another one may have its map at the same place.
    exec_id: u32,
    sequence: u32,
    /// By these `[heap]` and `[stack]` have their names, and prctl(2) changes them without counting as a writer.
    names: [u64; 3],
    /// Whether filesystems are stacked is seen in mounts.
    nsproxy: u64,
}

impl MapState {
    fn of(tasks: &TaskRecords) -> Option<Self> {
        let mm: &record::Mm = tasks.mm.as_ref()?;
        // 0: this kernel has no such number. Odd: somebody writes just now.
        (mm.map_sequence != 0 && mm.map_sequence.is_multiple_of(2)).then(|| Self {
            mm: mm.mm,
            exec_id: mm.exec_id,
            sequence: mm.map_sequence,
            names: [mm.start_brk, mm.brk, mm.start_stack],
            nsproxy: tasks.threads.first().map_or(0, |thread| thread.nsproxy),
        })
    }
}

#[derive(Debug)]
struct Kept {
    state: MapState,
    areas: Vec<Vma>,
}

/// How often a cache was of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CacheUse {
    /// What was as it had been read.
    pub hits: u64,
    /// What had been changed since.
    pub misses: u64,
}

impl CacheUse {
    /// Adds another's.
    pub fn add(&mut self, other: Self) {
        self.hits += other.hits;
        self.misses += other.misses;
    }
}

/// A survey with its cache.
#[derive(Debug)]
pub struct CachedSurvey {
    survey: EbpfSurvey,
    caching: Caching,
    ahead: HashMap<Pid, Kept>,
    /// Threads as they stand in the freeze: asked once.
    tasks: HashMap<Pid, Option<TaskRecords>>,
    used: CacheUse,
}

impl CachedSurvey {
    /// Of these programs; nothing is read yet.
    pub fn new(survey: EbpfSurvey, caching: Caching) -> Self {
        Self { survey, caching, ahead: HashMap::new(), tasks: HashMap::new(), used: CacheUse::default() }
    }

    /// The programs.
    pub fn programs(&mut self) -> &mut EbpfSurvey {
        &mut self.survey
    }

    /// How often the cache was of use.
    pub fn used(&self) -> CacheUse {
        self.used
    }

    /// Reads the large maps of a tree, which runs. What cannot be read is not kept.
    pub fn read_ahead(&mut self, root: Pid) {
        for pid in proc::tree(root) {
            match self.keep(pid) {
                Ok(Some(kept)) => drop(self.ahead.insert(pid, kept)),
                Ok(None) => {}
                Err(err) => tracing::debug!(pid = pid.as_raw(), %err, "its areas are not read ahead"),
            }
        }
    }

    fn keep(&mut self, pid: Pid) -> EbpfResult<Option<Kept>> {
        let Some(tasks) = self.survey.tasks_of(pid)? else { return Ok(None) };
        // First the number, then the map.
        let Some(state) = MapState::of(&tasks) else { return Ok(None) };
        let is_large = tasks.mm.is_some_and(|mm| mm.areas >= WORTH_READING);
        if !is_large && self.caching == Caching::Used {
            return Ok(None);
        }
        let areas = self.survey.areas_by(pid, &tasks)?;
        Ok(areas.map(|areas| Kept { state, areas }))
    }

    /// The threads of a process that stands still.
    pub fn tasks(&mut self, pid: Pid) -> EbpfResult<Option<&TaskRecords>> {
        if !self.tasks.contains_key(&pid) {
            let tasks = self.survey.tasks_of(pid)?;
            self.tasks.insert(pid, tasks);
        }
        Ok(self.tasks.get(&pid).and_then(Option::as_ref))
    }

    /// The areas of a process that stands still; `None` where only /proc can tell.
    pub fn areas(&mut self, process: Shown) -> Result<Option<Vec<Vma>>, SurveyError> {
        let pid = process.pid;
        let kept = self.ahead.remove(&pid);
        let state = self.tasks(pid)?.and_then(MapState::of);
        let kept = kept.and_then(|kept| {
            let holds = Some(kept.state) == state && names_hold(process.by, &kept.areas);
            if holds {
                self.used.hits += 1
            } else {
                self.used.misses += 1
            }
            holds.then_some(kept.areas)
        });
        match (kept, self.caching) {
            (Some(kept), Caching::Used) => Ok(Some(kept)),
            (Some(kept), Caching::Verified) => {
                let read = self.read(pid)?.unwrap_or_default();
                compare(pid, &kept, &read)?;
                Ok(Some(read))
            }
            (None, _) => Ok(self.read(pid)?),
        }
    }

    fn read(&mut self, pid: Pid) -> EbpfResult<Option<Vec<Vma>>> {
        let Some(Some(tasks)) = self.tasks.get(&pid) else { return Ok(None) };
        self.survey.areas_by(pid, tasks)
    }

    /// The descriptors of processes. They are not kept: offsets and flags change without their owners' doing.
    pub fn descriptors(&mut self, processes: &[Shown]) -> EbpfResult<std::collections::BTreeMap<Pid, Vec<Descriptor>>> {
        self.survey.descriptors(processes)
    }
}

/// Whether mapped files still have the names that areas were read with: one area for each file and name is looked at.
fn names_hold(by: Pid, areas: &[Vma]) -> bool {
    let mut seen: HashSet<(u64, u64, &PathBuf)> = HashSet::new();
    for area in areas {
        let VmaName::File(name) = &area.name else { continue };
        if !seen.insert((area.dev, area.ino, name)) {
            continue;
        }
        if seen.len() > MOST_NAMES {
            return false;
        }
        let link = format!("/proc/{by}/map_files/{:x}-{:x}", area.start, area.end);
        if !std::fs::read_link(link).is_ok_and(|now| now.as_os_str().as_bytes() == name.as_os_str().as_bytes()) {
            return false;
        }
    }
    true
}

/// Finds the first area that differs.
fn compare(pid: Pid, kept: &[Vma], read: &[Vma]) -> Result<(), SurveyError> {
    let longest = kept.len().max(read.len());
    let differs = |&n: &usize| kept.get(n) != read.get(n);
    let Some(n) = (0..longest).find(differs) else { return Ok(()) };
    let tell = |area: Option<&Vma>| area.map_or_else(|| "nothing".to_owned(), |area| format!("{area:x?}"));
    Err(SurveyError::Stale { pid: pid.as_raw(), kept: tell(kept.get(n)), read: tell(read.get(n)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::survey::VmFlags;

    fn area(start: u64, flags: VmFlags) -> Vma {
        Vma { start, end: start + 4096, flags, offset: 0, dev: 0, ino: 0, name: VmaName::None }
    }

    #[test]
    fn the_first_area_that_differs_is_named() {
        let pid = Pid::from_raw(7);
        let kept = [area(0x1000, VmFlags::READ), area(0x3000, VmFlags::READ)];
        assert!(compare(pid, &kept, &kept).is_ok());
        let said = compare(pid, &kept, &[kept[0].clone(), area(0x3000, VmFlags::WRITE)]).unwrap_err().to_string();
        assert!(said.contains("start: 3000") && said.contains("process 7"), "{said}");
        let said = compare(pid, &kept, &kept[..1]).unwrap_err().to_string();
        assert!(said.contains("nothing"), "{said}");
    }

    #[test]
    fn names_of_our_own_files_hold_and_others_do_not() {
        let mut areas = crate::kernel::survey::layout_of(Pid::this()).unwrap();
        areas.retain(|area| area.ino != 0);
        assert!(names_hold(Pid::this(), &areas));
        areas[0].name = VmaName::File("/somewhere/else".into());
        assert!(!names_hold(Pid::this(), &areas));
    }
}
