//! Ending and reaping processes by their pids.

use std::{
    collections::BTreeSet,
    sync::Once,
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::proc;

/// How often something is looked at that cannot be waited for.
pub const POLL: Duration = Duration::from_millis(2);

/// Makes this process the parent of everything in its trees that loses its own: a tree restored with `-d`, and the
/// children of a killed program. Without it they would go to init, which reaps late, and their pids would stay taken.
pub fn become_subreaper() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        prctl::set_child_subreaper(true).expect("prctl(PR_SET_CHILD_SUBREAPER)");
    });
}

/// Reaps `pid` if it is a dead child of ours; `None` if it lives or is not ours (yet).
pub fn try_reap(pid: i32) -> Option<WaitStatus> {
    match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) | Err(_) => None,
        Ok(status) => Some(status),
    }
}

/// Waits until none of `pids` exists any more, reaping those that are ours. Gives back the ones that are left.
pub fn wait_gone(pids: &BTreeSet<i32>, limit: Duration) -> BTreeSet<i32> {
    let end = Instant::now() + limit;
    let mut left = pids.clone();
    loop {
        left.retain(|&pid| try_reap(pid).is_none() && proc::exists(pid));
        if left.is_empty() || Instant::now() > end {
            return left;
        }
        sleep(POLL);
    }
}

/// Kills and reaps `pids` and everything below them, until a look finds nothing more.
pub fn kill_trees(pids: impl IntoIterator<Item = i32>) {
    let mut roots: BTreeSet<i32> = pids.into_iter().collect();
    let end = Instant::now() + Duration::from_secs(10);
    while !roots.is_empty() && Instant::now() < end {
        let all: BTreeSet<i32> = roots.iter().flat_map(|&root| proc::tree(root)).collect();
        for &pid in &all {
            // A process that has gone meanwhile is as good as killed.
            let _: Result<(), Errno> = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        roots = wait_gone(&all, Duration::from_millis(200));
    }
}
