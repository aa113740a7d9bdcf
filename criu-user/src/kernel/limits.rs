//! The engine's own limit of open files.

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// As many open files as the kernel allows, for as long as this lives: a tree's descriptors are the engine's too, and
/// shells give 1024. getrlimit(2).
#[derive(Debug)]
pub struct ManyFiles {
    before: Option<(rlim_t, rlim_t)>,
}

impl ManyFiles {
    /// Raises the limit, the hard one as well where that is allowed. Where it is not, whoever opens too many is told.
    pub fn allow() -> Self {
        let before = getrlimit(Resource::RLIMIT_NOFILE).ok();
        if let Some((soft, hard)) = before {
            let most = most().max(hard);
            if soft < most && setrlimit(Resource::RLIMIT_NOFILE, most, most).is_err() {
                let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
            }
        }
        Self { before }
    }
}

impl Drop for ManyFiles {
    fn drop(&mut self) {
        if let Some((soft, hard)) = self.before {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, soft, hard);
        }
    }
}

/// What no limit may exceed: proc_sys_fs(5).
fn most() -> rlim_t {
    std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// How many files this process may have open.
pub fn open_files() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_comes_back() {
        let before = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let raised = ManyFiles::allow();
        assert!(open_files() >= before.1);
        drop(raised);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), before);
    }
}
