//! How much more memory a process can take before somebody is killed for it: the machine's, and its control groups'.

use std::path::Path;

use nix::unistd::Pid;

use super::proc::{self, KeyValues};
use super::{SysResult, cgroup};

/// What is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headroom {
    /// In bytes.
    pub bytes: u64,
    /// Whose, for a reader.
    pub of: String,
}

/// The least that the machine or one of the groups of a process has left. Caches that can be given back count as free.
pub fn of(pid: Pid) -> SysResult<Headroom> {
    let meminfo = KeyValues::read("/proc/meminfo".to_owned())?;
    let kib =
        |key| meminfo.words(key).map(|words| words.first().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024);
    let machine = Headroom { bytes: kib("MemAvailable")? + kib("SwapFree")?, of: "the machine".to_owned() };
    Ok(match of_groups(pid)? {
        Some(group) if group.bytes < machine.bytes => group,
        _ => machine,
    })
}

/// The least that one of the groups of a process has left; `None` if none has a limit.
pub fn of_groups(pid: Pid) -> SysResult<Option<Headroom>> {
    let mut least: Option<Headroom> = None;
    let hierarchies = cgroup::hierarchies()?;
    for (controllers, group) in cgroup::memberships(pid, pid)? {
        if !controllers.is_empty() && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        let Some(hierarchy) = hierarchies.iter().find(|h| h.controllers == controllers) else { continue };
        let Some(mut dir) = hierarchy.dir(&group) else { continue };
        while dir.starts_with(&hierarchy.mount) {
            let is_less = |&bytes: &u64| least.as_ref().is_none_or(|known| bytes < known.bytes);
            if let Some(bytes) = left_in(&dir).filter(is_less) {
                least = Some(Headroom { bytes, of: format!("the control group {}", dir.display()) });
            }
            if !dir.pop() {
                break;
            }
        }
    }
    Ok(least)
}

/// What a group has left below its limit; `None` without one. Version 2 first, then version 1.
fn left_in(dir: &Path) -> Option<u64> {
    let read = |name: &str| proc::read_text(&dir.join(name).to_string_lossy()).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let (limit, used) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?),
        None => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?),
    };
    let stat = read("memory.stat").unwrap_or_default();
    Some((limit.saturating_add(cached(&stat))).saturating_sub(used))
}

/// Pages of files, of the group and those below it. Version 1 has them in lines that begin with `total_`.
fn cached(stat: &str) -> u64 {
    let of = |key: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|number| number.parse::<u64>().ok())
    };
    let both = |prefix: &str| Some(of(&format!("{prefix}inactive_file"))? + of(&format!("{prefix}active_file"))?);
    both("total_").or_else(|| both("")).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_are_found_in_both_versions() {
        assert_eq!(cached("anon 5\ninactive_file 7\nactive_file 8\n"), 15);
        assert_eq!(cached("inactive_file 1\nactive_file 1\ntotal_inactive_file 7\ntotal_active_file 9\n"), 16);
        assert_eq!(cached(""), 0);
    }

    #[test]
    fn the_machine_has_something_left() {
        assert!(of(Pid::this()).expect("headroom").bytes > 0);
    }
}
