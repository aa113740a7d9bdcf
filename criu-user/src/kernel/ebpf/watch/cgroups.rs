//! Following what is in a control group.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use criu_common::watch::{Group, Order};
use nix::unistd::Pid;

use super::plain::Plain;
use super::programs::{Questions, failed};
use super::{EbpfError, EbpfResult, Watch};
use crate::kernel::cgroup::{hierarchies, members};

impl Watch {
    /// Follows all processes of a control group and the groups below it, and those that are put into it later; whoever is
    /// taken out of it is followed no more. `dir` is its directory, of either version. Gives those that are there.
    pub fn follow_cgroup(&mut self, dir: &Path) -> EbpfResult<Vec<Pid>> {
        let unusable = |source| EbpfError::Cgroup { path: dir.to_owned(), source };
        let dir = dir.canonicalize().map_err(unusable)?;
        let id = std::fs::metadata(&dir).map_err(unusable)?.ino();
        let hierarchy = hierarchy_of(&dir).ok_or_else(|| unusable(std::io::ErrorKind::Unsupported.into()))?;
        // The second says which hierarchy moves out of it are looked at in.
        for id in [id, 0] {
            let group = Plain(Group { id, hierarchy, zero: 0 });
            self.groups.insert(group, 1, 0).map_err(failed("write the map", "GROUPS"))?;
        }
        self.ask(self.questions() | Questions::CGROUPS)?;
        // From here on nobody comes in unseen. Those who are there may fork before they are followed, so until there is
        // nobody new.
        let mut followed: Vec<Pid> = Vec::new();
        loop {
            let new: Vec<Pid> = members(&dir).into_iter().filter(|pid| !followed.contains(pid)).collect();
            if new.is_empty() {
                return Ok(followed);
            }
            for pid in new {
                match self.follow_as(pid, Order::FollowByCgroup) {
                    Ok(()) | Err(EbpfError::NoProcess { .. }) => followed.push(pid),
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// Number of the hierarchy that a directory lies in, as the kernel counts them.
fn hierarchy_of(dir: &Path) -> Option<u32> {
    let all = hierarchies().ok()?;
    let of = all.iter().filter(|h| dir.starts_with(&h.mount)).max_by_key(|h| h.mount.as_os_str().len())?;
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    text.lines().find_map(|line| {
        // cgroups(7): hierarchy:controllers:path
        let mut fields = line.splitn(3, ':');
        let (number, controllers) = (fields.next()?, fields.next()?);
        (controllers == of.controllers).then(|| number.parse().ok())?
    })
}
