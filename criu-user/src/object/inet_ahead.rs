//! TCP connections that were asked before the freeze.
//!
//! A socket tells its options in some fifty calls, which a thousand connections would have to stand still for. So they are
//! asked while the tree runs, and a program looks after them meanwhile: what it tells of all calls by which anybody changes
//! a socket. In the freeze those that nobody has touched are believed, but for the little that the kernel changes by
//! itself; that is asked again. docs/tcp.md has the whole of it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::stat::fstat;
use nix::unistd::Pid;

use super::ObjectError;
use super::inet::Facts;
use super::seen::Seen;
use crate::kernel::ebpf::EbpfResult;
use crate::kernel::ebpf::touched::{Lookout, Touched, Watchful};
use crate::kernel::pidfd::PidFd;
use crate::kernel::proc;
use crate::kernel::survey_cache::{CacheUse, Caching};
use crate::parallel;

/// Connections from which on it pays: fewer are asked in about the time that the programs take to load, a millisecond.
const MANY: usize = 64;

/// What connections told before the freeze.
#[derive(Debug, Default)]
pub struct Ahead {
    caching: Caching,
    are_likely: bool,
    /// By inode.
    known: HashMap<u32, Facts>,
    watchful: Option<Watchful>,
    /// Asked once, in the freeze.
    touched: OnceLock<Touched>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// A connection by its descriptor.
struct Connection {
    pid: Pid,
    fd: i32,
    inode: u64,
}

impl Ahead {
    /// Asks the connections of a tree that runs, if they are many. Where that cannot be done they are asked in the freeze.
    pub fn ask(tree: &[Pid], caching: Caching) -> Self {
        let outcome = Self::try_ask(tree, caching);
        outcome.inspect_err(|err| tracing::debug!(%err, "connections are asked in the freeze only")).unwrap_or_default()
    }

    fn try_ask(tree: &[Pid], caching: Caching) -> EbpfResult<Self> {
        let least = if caching == Caching::Verified { 1 } else { MANY };
        let descriptors: usize = tree.iter().map(|&pid| count(pid)).sum();
        if descriptors < least {
            return Ok(Self { are_likely: tree.iter().any(|&pid| has_sockets(pid)), ..Self::default() });
        }
        let lookout = Lookout::new(descriptors * 2)?;
        let mut connections = Vec::new();
        for &pid in tree {
            let found = lookout.connections(pid)?;
            connections.extend(found.iter().map(|it| Connection { pid, fd: it.fd as i32, inode: it.inode }));
        }
        let are_likely = !connections.is_empty();
        if connections.len() < least {
            return Ok(Self { are_likely, ..Self::default() });
        }
        let inodes: Vec<u64> = connections.iter().map(|connection| connection.inode).collect();
        // First somebody looks after them, then they are asked.
        let watchful = lookout.begin(&inodes)?;
        let known = parallel::map(&connections, Connection::ask).into_iter().flatten().collect();
        Ok(Self { caching, are_likely, known, watchful: Some(watchful), ..Self::default() })
    }

    /// Whether the tree may have any.
    pub fn are_likely(&self) -> bool {
        self.are_likely
    }

    /// How many connections were asked.
    pub fn connections(&self) -> usize {
        self.known.len()
    }

    /// What a socket tells that stands still.
    pub fn facts(&self, seen: &Seen) -> Result<Facts, ObjectError> {
        let inode = seen.stat.st_ino;
        let Some(known) = self.known.get(&(inode as u32)) else { return Facts::read(&seen.file, inode) };
        let untouched = self.watchful.as_ref().is_some_and(|watchful| !self.touched(watchful).has(inode));
        let kept = if untouched { known.as_of_now(&seen.file)? } else { None };
        let counter = if kept.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        match (kept, self.caching) {
            (Some(kept), Caching::Used) => Ok(kept),
            (Some(kept), Caching::Verified) => {
                let read = Facts::read(&seen.file, inode)?;
                self.compare(&kept, &read, seen)?;
                Ok(read)
            }
            (None, _) => Facts::read(&seen.file, inode),
        }
    }

    /// What was believed has to be what is told, unless somebody outside of the tree has touched it just now.
    fn compare(&self, kept: &Facts, read: &Facts, seen: &Seen) -> Result<(), ObjectError> {
        /// From a call's effect to its end.
        const MOMENT: Duration = Duration::from_millis(5);
        let Some((kept, read)) = kept.difference(read) else { return Ok(()) };
        std::thread::sleep(MOMENT);
        let touched = self.watchful.as_ref().map(Watchful::touched);
        if touched.is_some_and(|touched| touched.is_ok_and(|touched| touched.has(seen.stat.st_ino))) {
            return Ok(());
        }
        Err(ObjectError::Stale { pid: seen.pid.as_raw(), fd: seen.fd, kept, read })
    }

    fn touched(&self, watchful: &Watchful) -> &Touched {
        self.touched.get_or_init(|| {
            watchful.touched().unwrap_or_else(|err| {
                tracing::debug!(%err, "all connections are asked again");
                Touched::Unknown
            })
        })
    }

    /// How often it was of use.
    pub fn used(&self) -> CacheUse {
        CacheUse { hits: self.hits.load(Ordering::Relaxed), misses: self.misses.load(Ordering::Relaxed) }
    }
}

/// Descriptors of a process; on kernels before 6.2 they have to be counted.
fn count(pid: Pid) -> usize {
    match proc::count_descriptors(pid) {
        0 => proc::descriptors(pid).map_or(0, |all| all.len()),
        count => count,
    }
}

/// Whether a process has a socket of any kind.
fn has_sockets(pid: Pid) -> bool {
    let link = |&fd: &i32| std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
    let all = proc::descriptors(pid).unwrap_or_default();
    all.iter().any(|fd| link(fd).is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:")))
}

impl Connection {
    /// What it tells, if it is still there. It is held no longer than that takes: its owner may close it any time.
    fn ask(&self) -> Option<(u32, Facts)> {
        let file: OwnedFd = PidFd::open(self.pid).ok()?.get(self.fd).ok()?;
        let is_it = fstat(&file).is_ok_and(|stat| stat.st_ino == self.inode);
        let facts = if is_it { Facts::read(&file, self.inode).ok() } else { None };
        facts.filter(Facts::is_connection).map(|facts| (self.inode as u32, facts))
    }
}
