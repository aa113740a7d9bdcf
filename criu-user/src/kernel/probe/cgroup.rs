//! The freezers of control groups: a group is made, a process put into it, frozen and thawed.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::helper::Helper;
use super::{Absent, Answer, ensure};
use crate::kernel::cgroup::{Freezer, hierarchies, memberships};
use crate::kernel::error::During;

/// How long a sleeping process may take to be frozen.
const PATIENCE: Duration = Duration::from_secs(1);

/// `freezer.state` of version 1.
pub fn freezer_v1() -> Answer {
    freezer(|controllers| controllers.split(',').any(|name| name == "freezer"))
}

/// `cgroup.freeze` of version 2.
pub fn freezer_v2() -> Answer {
    freezer(str::is_empty)
}

/// A group that goes when this does.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        // Its last process has just been reaped; the kernel may need a moment to count it out.
        let end = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn freezer(is_it: impl Fn(&str) -> bool) -> Answer {
    let hierarchy = hierarchies()?.into_iter().find(|hierarchy| is_it(&hierarchy.controllers));
    let hierarchy = hierarchy.ok_or_else(|| Absent::because("no such hierarchy is mounted"))?;
    let groups = memberships(Pid::this(), Pid::this())?;
    let own = groups.iter().find(|(controllers, _)| *controllers == hierarchy.controllers);
    let own = own.and_then(|(_, group)| hierarchy.dir(group));
    let own = own.ok_or_else(|| Absent::because("our own group lies outside of what is mounted"))?;
    let dir = own.join(format!("criu-ebpf-check-{}", Pid::this()));
    fs::create_dir(&dir).during("mkdir", dir.display())?;
    // Dropped in the opposite order: the process first.
    let group = Group(dir);
    let helper = Helper::start(|| Ok(()))?;
    let procs = group.0.join("cgroup.procs");
    fs::write(&procs, helper.pid().to_string()).during("write", procs.display())?;
    let freezer = Freezer::open(&group.0)?.ok_or_else(|| Absent::because("its groups have no freezer"))?;
    let begin = Instant::now();
    let frozen = freezer.freeze(begin + PATIENCE)?;
    freezer.thaw()?;
    ensure(frozen, "a group with one process was not frozen within a second")?;
    Ok(format!("{} freezes in {:.1} ms", hierarchy.mount.display(), begin.elapsed().as_secs_f64() * 1e3))
}
