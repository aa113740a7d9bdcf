//! The gate, from the engine's side: connections are locked by entering them into its map.
//!
//! A gate lives as long as somebody holds it: the engine, or names in a bpf file system once a dump is complete. Until
//! then it opens with the engine's death.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use criu_common::gate::{Connection, Held, bytes, from_bytes};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::bpf::Purpose;
use super::links::{self, Way};
use super::object::{Loaded, compiled};
use super::{EbpfError, EbpfResult, maps};
use crate::kernel::SysError;
use crate::kernel::interfaces::{self, Watch};

/// The compiled programs.
static OBJECT: Option<&[u8]> = compiled!("gate");

/// Where bpf file systems are mounted by custom.
const BPFFS: &str = "/sys/fs/bpf";
/// Our directory there, with one directory for each gate.
const GATES: &str = "/sys/fs/bpf/criu-ebpf";
/// The name of the map in a gate's directory.
const MAP: &str = "locked";
const KEY: usize = size_of::<Connection>();
const VALUE: usize = size_of::<Held>();

/// A gate that we hold.
#[derive(Debug)]
pub struct Gate {
    map: OwnedFd,
    /// Links, by the names that they are pinned under. None of one that somebody else has pinned.
    links: Vec<(String, OwnedFd)>,
    /// Its directory, where it is pinned.
    pinned: Option<PathBuf>,
    /// The program and what tells of interfaces that appear, where we have made the gate.
    keeper: Option<(OwnedFd, Watch)>,
}

fn failed(on: impl Into<String>) -> impl FnOnce((&'static str, std::io::Error)) -> EbpfError {
    let on = on.into();
    move |(command, source)| EbpfError::Call { command, on, source }
}

fn listing(error: SysError) -> EbpfError {
    EbpfError::Interfaces { source: error.errno.into() }
}

fn pinning(path: &Path, call: &'static str) -> impl FnOnce(std::io::Error) -> EbpfError {
    let path = path.to_owned();
    move |source| EbpfError::Pins { call, path, source }
}

impl Gate {
    /// Puts a gate at both sides of every interface of this network namespace that is up. Everything passes until something is
    /// locked.
    ///
    /// # Minimum kernel version
    /// 6.6, for links to interfaces.
    pub fn new() -> EbpfResult<Self> {
        let mut object = Loaded::new("gate", OBJECT.ok_or(EbpfError::NotBuilt)?, HashMap::new())?;
        let program = object.load("gate", Purpose::Classifier)?;
        let watch = Watch::new().map_err(listing)?;
        let map = object.take_map("LOCKED")?;
        let mut gate = Self { map, links: Vec::new(), pinned: None, keeper: Some((program, watch)) };
        gate.cover_all()?;
        Ok(gate)
    }

    /// Looks after interfaces that have come up since it was made, or since the last look. Call it at every step that
    /// takes the gate for complete.
    pub fn refresh(&mut self) -> EbpfResult<()> {
        let news = self.keeper.as_ref().map(|(_, watch)| watch.has_news()).transpose().map_err(listing)?;
        if news == Some(true) { self.cover_all() } else { Ok(()) }
    }

    /// Interfaces may come while we are about it.
    fn cover_all(&mut self) -> EbpfResult<()> {
        let Some((program, watch)) = self.keeper.take() else { return Ok(()) };
        let covered = (|| {
            while self.cover(&program)? {}
            Ok(())
        })();
        self.keeper = Some((program, watch));
        covered
    }

    /// Interfaces that a gate of an earlier engine does not stand at: they came up when nobody looked.
    pub fn uncovered(&self) -> EbpfResult<Vec<String>> {
        let Some(dir) = &self.pinned else { return Ok(Vec::new()) };
        let up = interfaces::up().map_err(listing)?;
        Ok(up
            .into_iter()
            .filter(|(_, index)| !dir.join(format!("{index}-in")).exists())
            .map(|(name, _)| name)
            .collect())
    }

    /// Attaches to interfaces that have no link yet; whether there were any.
    fn cover(&mut self, program: &OwnedFd) -> EbpfResult<bool> {
        let mut new = false;
        // Nothing comes through those that are down, and each takes its time.
        for (interface, index) in interfaces::up().map_err(listing)? {
            for (way, word) in [(Way::In, "in"), (Way::Out, "out")] {
                let name = format!("{index}-{word}");
                if self.links.iter().any(|(known, _)| *known == name) {
                    continue;
                }
                let link = match links::attach(program.as_fd(), index, way) {
                    // It has gone meanwhile.
                    Err((_, e)) if e.raw_os_error() == Some(libc::ENODEV) => continue,
                    other => other.map_err(failed(format!("the interface {interface}")))?,
                };
                self.links.push((name, link));
                new = true;
            }
        }
        Ok(new)
    }

    /// Locks connections: from now on nobody hears of the other.
    pub fn lock(&self, connections: &[Connection]) -> EbpfResult<()> {
        let keys: Vec<[u8; KEY]> = connections.iter().map(bytes).collect();
        maps::insert_zeros::<KEY, VALUE>(self.map.as_fd(), &keys)
            .map_err(failed(format!("{} connections of the gate", keys.len())))
    }

    /// Makes sure that there is a place for names, before anything depends on it.
    pub fn check_place() -> EbpfResult<()> {
        mount_bpffs()
    }

    /// Makes it outlive us, under this name.
    pub fn pin(&mut self, name: &str) -> EbpfResult<()> {
        mount_bpffs()?;
        self.refresh()?;
        let dir = directory(name);
        make_directory(&dir)?;
        let pin = |object: &OwnedFd, name: &str| {
            let path = dir.join(name);
            links::pin(object.as_fd(), &path).map_err(failed(path.display().to_string()))
        };
        let outcome = pin(&self.map, MAP).and_then(|()| self.links.iter().try_for_each(|(name, link)| pin(link, name)));
        match outcome {
            Ok(()) => self.pinned = Some(dir),
            Err(err) => {
                let _ = fs::remove_dir_all(&dir);
                return Err(err);
            }
        }
        Ok(())
    }

    /// The gate of this name that an earlier engine has left; `None` if it was opened meanwhile.
    pub fn find(name: &str) -> EbpfResult<Option<Self>> {
        let dir = directory(name);
        let map = dir.join(MAP);
        if name.contains('/') {
            return Ok(None);
        }
        match links::pinned(&map) {
            Ok(map) => Ok(Some(Self { map, links: Vec::new(), pinned: Some(dir), keeper: None })),
            Err((_, err)) if err.kind() == ErrorKind::NotFound => Ok(None),
            Err(err) => Err(failed(map.display().to_string())(err)),
        }
    }

    /// Whether a gate of this name is still closed.
    pub fn is_pinned(name: &str) -> bool {
        directory(name).join(MAP).exists()
    }

    /// The connections that it holds, and how much of them it has dropped.
    pub fn connections(&self) -> EbpfResult<Vec<(Connection, Held)>> {
        let all = maps::entries::<KEY, VALUE>(self.map.as_fd()).map_err(failed("the connections of the gate"))?;
        Ok(all.iter().map(|(key, value)| (from_bytes(key), held(value))).collect())
    }

    /// Lets everything pass, at once. Of a gate that a dump has left, it tells how many packets were held since then; of
    /// others nobody knows what came before.
    pub fn unlock(&self) -> EbpfResult<Option<HashMap<Connection, Held>>> {
        let taken = maps::take_all::<KEY, VALUE>(self.map.as_fd()).map_err(failed("the connections of the gate"))?;
        let held = || taken.iter().map(|(key, value)| (from_bytes(key), held(value))).collect();
        Ok(self.pinned.is_some().then(held))
    }

    /// Takes it away from the interfaces, for good. The kernel needs some ten milliseconds for each: who is in a hurry
    /// unlocks it first.
    pub fn remove(self) -> EbpfResult<()> {
        self.pinned.as_deref().map_or(Ok(()), unpin)
    }
}

fn held(value: &[u8; VALUE]) -> Held {
    let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
    Held { from_peer: word(value), to_peer: word(&value[8..]) }
}

fn unpin(dir: &Path) -> EbpfResult<()> {
    match fs::remove_dir_all(dir) {
        // Somebody else was faster.
        Err(err) if err.kind() == ErrorKind::NotFound => {}
        removed => removed.map_err(pinning(dir, "rmdir"))?,
    }
    // The last one takes the directory of all along.
    let _ = fs::remove_dir(GATES);
    Ok(())
}

/// A gate that stays closed though nobody works with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// Its name.
    pub name: String,
    /// For how long it has been.
    pub age: Duration,
}

impl Pinned {
    /// Takes away what is left of one that holds nothing: its engine was killed while it made or removed it.
    pub fn discard(&self) -> EbpfResult<()> {
        unpin(&Path::new(GATES).join(&self.name))
    }
}

/// All gates that are pinned.
pub fn pinned() -> EbpfResult<Vec<Pinned>> {
    let entries = match fs::read_dir(GATES) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(pinning(Path::new(GATES), "readdir"))?,
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let made = entry.metadata().and_then(|meta| meta.modified()).unwrap_or(SystemTime::now());
        let age = made.elapsed().unwrap_or_default();
        found.push(Pinned { name: entry.file_name().to_string_lossy().into_owned(), age });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Makes the directory of a gate, and that of all gates, which whoever opens the last one takes away.
fn make_directory(dir: &Path) -> EbpfResult<()> {
    const ATTEMPTS: u32 = 100;
    let make = |path: &Path| match fs::create_dir(path) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    };
    for _ in 0..ATTEMPTS {
        make(Path::new(GATES)).map_err(pinning(Path::new(GATES), "mkdir"))?;
        match make(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            other => return other.map_err(pinning(dir, "mkdir")),
        }
    }
    Err(pinning(dir, "mkdir")(ErrorKind::NotFound.into()))
}

fn directory(name: &str) -> PathBuf {
    Path::new(GATES).join(name)
}

fn mount_bpffs() -> EbpfResult<()> {
    let place = Path::new(BPFFS);
    if statfs(place).is_ok_and(|about| about.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), place, Some("bpf"), flags, Some("mode=700")).map_err(|e| pinning(place, "mount")(e.into()))
}
