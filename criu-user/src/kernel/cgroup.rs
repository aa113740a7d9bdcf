//! Control groups as files: where the hierarchies are mounted, who is where, and the two freezers. cgroups(7).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::error::During;
use super::{SysResult, proc};

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its controllers as /proc/PID/cgroup names them: `cpu,cpuacct`, `name=systemd`; empty for version 2.
    pub controllers: String,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The group that is mounted there: `/` unless a part only is.
    root: String,
}

impl Hierarchy {
    /// The directory of a group, if it lies below what is mounted.
    pub fn dir(&self, group: &str) -> Option<PathBuf> {
        let below = group.strip_prefix(self.root.trim_end_matches('/'))?;
        (below.is_empty() || below.starts_with('/')).then(|| self.mount.join(below.trim_start_matches('/')))
    }
}

/// The processes of the group with this directory and of those below it, as far as this pid namespace shows them.
pub fn members(dir: &Path) -> Vec<Pid> {
    let mut found = Vec::new();
    let mut dirs: Vec<PathBuf> = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
        let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        dirs.extend(entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
    // 0: of another pid namespace.
    found.retain(|pid| pid.as_raw() != 0);
    found
}

/// The hierarchies that are mounted.
pub fn hierarchies() -> SysResult<Vec<Hierarchy>> {
    let mut found: Vec<Hierarchy> = Vec::new();
    let known = memberships(Pid::this(), Pid::this())?;
    for line in proc::read_text("/proc/self/mountinfo")?.lines() {
        // proc_pid_mountinfo(5): id parent dev root mount options tags… - type source superoptions
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(&root), Some(&mount)) = (left.get(3), left.get(4)) else { continue };
        let options: Vec<&str> = right.get(2).map(|o| o.split(',').collect()).unwrap_or_default();
        let controllers = match right.first() {
            Some(&"cgroup2") => String::new(),
            Some(&"cgroup") => {
                // All controllers of a hierarchy are among the options of its mount.
                let of = known.iter().map(|(controllers, _)| controllers).filter(|c| !c.is_empty());
                let Some(own) = of.into_iter().find(|c| c.split(',').all(|c| options.contains(&c))) else { continue };
                own.clone()
            }
            _ => continue,
        };
        if !found.iter().any(|h| h.controllers == controllers) {
            found.push(Hierarchy { controllers, mount: mount.into(), root: root.to_owned() });
        }
    }
    Ok(found)
}

/// The groups of a thread: (controllers, group) for each hierarchy. `/proc/PID/task/TID/cgroup`.
pub fn memberships(pid: Pid, tid: Pid) -> SysResult<Vec<(String, String)>> {
    let text = proc::read_text(&format!("/proc/{pid}/task/{tid}/cgroup"))?;
    let mut groups: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, group) = rest.split_once(':')?;
            Some((controllers.to_owned(), group.to_owned()))
        })
        .collect();
    groups.sort();
    Ok(groups)
}

/// A group whose tasks can be frozen.
#[derive(Debug)]
pub struct Freezer {
    dir: PathBuf,
    version: Version,
    was_frozen: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Freezer {
    /// The group with this directory; `None` if it has no freezer.
    pub fn open(dir: &Path) -> SysResult<Option<Self>> {
        let version = if dir.join("freezer.state").exists() {
            Version::One
        } else if dir.join("cgroup.freeze").exists() {
            Version::Two
        } else {
            return Ok(None);
        };
        let mut freezer = Self { dir: dir.to_owned(), version, was_frozen: false };
        freezer.was_frozen = freezer.state()? != "THAWED";
        Ok(Some(freezer))
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether it was frozen when it was opened.
    pub fn was_frozen(&self) -> bool {
        self.was_frozen
    }

    fn state(&self) -> SysResult<String> {
        let file = match self.version {
            Version::One => "freezer.state",
            Version::Two => "cgroup.events",
        };
        let path = self.dir.join(file);
        let text = std::fs::read_to_string(&path).during("read", path.display())?;
        Ok(match self.version {
            Version::One => text.trim().to_owned(),
            Version::Two if text.lines().any(|line| line == "frozen 1") => "FROZEN".to_owned(),
            Version::Two => "THAWED".to_owned(),
        })
    }

    fn set(&self, frozen: bool) -> SysResult<()> {
        let (file, value) = match (self.version, frozen) {
            (Version::One, true) => ("freezer.state", "FROZEN"),
            (Version::One, false) => ("freezer.state", "THAWED"),
            (Version::Two, true) => ("cgroup.freeze", "1"),
            (Version::Two, false) => ("cgroup.freeze", "0"),
        };
        let path = self.dir.join(file);
        std::fs::write(&path, value).during("write", path.display())
    }

    /// Freezes all tasks of the group. Gives whether that was done by `deadline`; if not, it is thawed again.
    pub fn freeze(&self, deadline: Instant) -> SysResult<bool> {
        self.set(true)?;
        while self.state()? != "FROZEN" {
            if Instant::now() >= deadline {
                self.thaw()?;
                return Ok(false);
            }
            std::thread::sleep(Duration::from_micros(200));
            if self.version == Version::One {
                // A task that was on its way through a system call is frozen at a further attempt.
                self.set(true)?;
            }
        }
        Ok(true)
    }

    /// Lets the tasks of the group run, as far as nothing else stops them.
    pub fn thaw(&self) -> SysResult<()> {
        self.set(false)
    }

    /// Freezes it again if it was so when it was opened.
    pub fn give_back(&self) -> SysResult<()> {
        self.set(self.was_frozen)
    }
}
