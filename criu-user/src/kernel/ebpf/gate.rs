//! The gate, from the engine's side: connections are locked by entering them into its map.
//!
//! A gate lives as long as somebody holds it: the engine, or names in a bpf file system once a dump is complete. Until
//! then it opens with the engine's death.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use criu_common::gate::{Connection, Held, MOST, bytes, from_bytes};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::bpf::{BpfResult, Purpose};
use super::latch::Latch;
use super::links;
use super::object::{Loaded, compiled};
use super::{EbpfError, EbpfResult, maps};
use crate::kernel::SysError;
use crate::kernel::interfaces::{self, Watch, Way};

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

/// Room that every gate has: for clients that nobody has accepted, of which nobody knows beforehand. To read what a gate
/// holds takes half a millisecond more where it has room for [`MOST`].
const LEAST: u32 = 1 << 12;

/// A gate that we hold.
#[derive(Debug)]
pub struct Gate {
    map: OwnedFd,
    /// What it stands at, by the names that are pinned: links, or where the kernel has none to interfaces, the latch. None
    /// of one that somebody else has pinned.
    links: Vec<(String, OwnedFd)>,
    /// What stands at the interfaces where the kernel has no links to them.
    latch: Option<Latch>,
    /// Its directory, where it is pinned.
    pinned: Option<PathBuf>,
    /// The program and what tells of interfaces that appear, where we have made the gate.
    keeper: Option<(OwnedFd, Watch)>,
    /// How many connections it can hold, where we have made it.
    room: u32,
    /// One that was too small, and is open. It goes with this: the kernel takes its time.
    outgrown: Option<Box<Gate>>,
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
    /// locked. There is room for about as many connections as are `expected`, and it becomes more where that is too little.
    ///
    /// It is links to interfaces (Linux 6.6), or else filters of traffic control.
    pub fn new(expected: usize) -> EbpfResult<Self> {
        Self::by(expected, |_| Ok(None))
    }

    /// The same by filters of traffic control, also where the kernel has links to interfaces.
    pub fn by_filters(expected: usize) -> EbpfResult<Self> {
        Self::by(expected, |program| Latch::new(program.as_fd()).map(Some))
    }

    fn by(expected: usize, latch: impl FnOnce(&OwnedFd) -> EbpfResult<Option<Latch>>) -> EbpfResult<Self> {
        let room = u32::try_from(expected * 2).unwrap_or(MOST).next_power_of_two().clamp(LEAST, MOST);
        let object = OBJECT.ok_or(EbpfError::NotBuilt)?;
        let mut object = Loaded::with_sizes("gate", object, HashMap::new(), &[("LOCKED", room)])?;
        let program = object.load("gate", Purpose::Classifier)?;
        let watch = Watch::new().map_err(listing)?;
        let map = object.take_map("LOCKED")?;
        let latch = latch(&program)?;
        maps::insert_zeros::<KEY, VALUE>(map.as_fd(), &[bytes(&Connection::ANY)]).map_err(failed("the gate"))?;
        let mut gate =
            Self { map, links: Vec::new(), latch, pinned: None, keeper: Some((program, watch)), room, outgrown: None };
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
            .filter(|(_, index)| !dir.join(name_of(*index, Way::In)).exists())
            .map(|(name, _)| name)
            .collect())
    }

    /// Attaches to interfaces at which it does not stand yet; whether there were any.
    fn cover(&mut self, program: &OwnedFd) -> EbpfResult<bool> {
        // Nothing comes through those that are down, and each takes its time.
        let mut new = interfaces::up().map_err(listing)?;
        new.retain(|_, index| !self.links.iter().any(|(known, _)| *known == name_of(*index, Way::In)));
        if new.is_empty() {
            return Ok(false);
        }
        if self.latch.is_none() && !self.link(program, &new)? {
            self.latch = Some(Latch::new(program.as_fd())?);
        }
        if let Some(latch) = &self.latch {
            latch.attach(&new.values().copied().collect::<Vec<_>>())?;
            for (index, way) in new.values().flat_map(|index| Way::BOTH.map(|way| (*index, way))) {
                let program = latch.program().try_clone().map_err(|source| EbpfError::Interfaces { source })?;
                self.links.push((name_of(index, way), program));
            }
        }
        Ok(true)
    }

    /// Makes links to interfaces; whether the kernel knows such links.
    fn link(&mut self, program: &OwnedFd, to: &BTreeMap<String, u32>) -> EbpfResult<bool> {
        for (interface, &index) in to {
            for way in Way::BOTH {
                match links::attach(program.as_fd(), index, way) {
                    Ok(link) => self.links.push((name_of(index, way), link)),
                    // It has gone meanwhile.
                    Err((_, e)) if e.raw_os_error() == Some(libc::ENODEV) => {}
                    Err((_, e)) if e.raw_os_error() == Some(libc::EINVAL) && self.links.is_empty() => return Ok(false),
                    Err(err) => return Err(failed(format!("the interface {interface}"))(err)),
                }
            }
        }
        Ok(true)
    }

    /// Locks connections: from now on nobody hears of the other.
    pub fn lock(&mut self, connections: &[Connection]) -> EbpfResult<()> {
        match self.enter(connections) {
            Err((_, err)) if err.raw_os_error() == Some(libc::E2BIG) && self.keeper.is_some() && self.room < MOST => {
                self.grow(connections)
            }
            outcome => outcome.map_err(failed(format!("{} connections of the gate", connections.len()))),
        }
    }

    /// It holds them also where it had been opened: its engine was killed before it took the gate away.
    fn enter(&self, connections: &[Connection]) -> BpfResult<()> {
        let keys: Vec<[u8; KEY]> = connections.iter().chain([&Connection::CLOSED]).map(bytes).collect();
        maps::insert_zeros::<KEY, VALUE>(self.map.as_fd(), &keys)
    }

    /// Another gate takes the place of this one, with room for all there can be; it is closed before this one opens.
    fn grow(&mut self, connections: &[Connection]) -> EbpfResult<()> {
        let all = MOST as usize;
        let larger = if self.latch.is_some() { Self::by_filters(all)? } else { Self::new(all)? };
        let held: Vec<Connection> = self.connections()?.into_iter().map(|(connection, _)| connection).collect();
        let on = || failed(format!("{} connections of the gate", held.len() + connections.len()));
        larger.enter(&held).and_then(|()| larger.enter(connections)).map_err(on())?;
        self.open().map_err(on())?;
        // What this one has held counts.
        let counted = maps::entries::<KEY, VALUE>(self.map.as_fd()).map_err(on())?;
        let counted = counted.into_iter().filter(|(_, value)| held_of(value) != Held::default());
        let (keys, values): (Vec<_>, Vec<_>) = counted.unzip();
        maps::insert(larger.map.as_fd(), &keys, &values).map_err(on())?;
        let outgrown = std::mem::replace(self, larger);
        self.outgrown = Some(Box::new(outgrown));
        Ok(())
    }

    fn open(&self) -> BpfResult<()> {
        maps::delete(self.map.as_fd(), &bytes(&Connection::CLOSED))
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
        let pin = |object: &OwnedFd, name: &str| links::pin_in(&dir, name, object.as_fd());
        let outcome = pin(&self.map, MAP)
            .and_then(|()| self.links.iter().try_for_each(|(name, link)| pin(link, name)))
            .and_then(|()| self.latch.as_mut().map_or(Ok(()), |latch| latch.pin(&dir)));
        match outcome {
            Ok(()) => self.pinned = Some(dir),
            Err(err) => {
                let _ = fs::remove_dir_all(&dir);
                return Err(err);
            }
        }
        Ok(())
    }

    /// Takes note that a copy of this process has pinned it: nothing is taken away with us.
    pub fn leave(&mut self) {
        if let Some(latch) = &mut self.latch {
            latch.leave();
        }
    }

    /// The gate of this name that an earlier engine has left; `None` if it was opened meanwhile.
    pub fn find(name: &str) -> EbpfResult<Option<Self>> {
        let dir = directory(name);
        let map = dir.join(MAP);
        if name.contains('/') {
            return Ok(None);
        }
        match links::pinned(&map) {
            Ok(map) => {
                let latch = Latch::find(&dir);
                Ok(Some(Self {
                    map,
                    links: Vec::new(),
                    latch,
                    pinned: Some(dir),
                    keeper: None,
                    room: 0,
                    outgrown: None,
                }))
            }
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
        let mut all: Vec<_> = all.iter().map(|(key, value)| (from_bytes(key), held_of(value))).collect();
        if !all.iter().any(|(connection, _)| *connection == Connection::CLOSED) {
            return Ok(Vec::new());
        }
        all.retain(|(connection, _)| !connection.is_nobody());
        Ok(all)
    }

    /// Lets everything pass, at once. Of a gate that a dump has left, it tells of which connections packets were held since
    /// then; of others nobody knows what came before.
    ///
    /// What it held stays in its map until it is taken away: of a thousand connections that would take a millisecond.
    pub fn unlock(&self) -> EbpfResult<Option<HashSet<Connection>>> {
        let on = || failed("the connections of the gate");
        self.open().map_err(on())?;
        if self.pinned.is_none() {
            return Ok(None);
        }
        let any = maps::lookup::<KEY, VALUE>(self.map.as_fd(), &bytes(&Connection::ANY)).map_err(on())?;
        if any.is_some_and(|any| held_of(&any) == Held::default()) {
            return Ok(Some(HashSet::new()));
        }
        let all = maps::entries::<KEY, VALUE>(self.map.as_fd()).map_err(on())?;
        let was_held = all.iter().filter(|(_, value)| held_of(value) != Held::default());
        Ok(Some(was_held.map(|(key, _)| from_bytes(key)).collect()))
    }

    /// Takes it away from the interfaces, for good. The kernel needs some ten milliseconds for each: who is in a hurry
    /// unlocks it first.
    pub fn remove(self) -> EbpfResult<()> {
        self.pinned.as_deref().map_or(Ok(()), unpin)?;
        self.latch.map_or(Ok(()), Latch::remove)
    }
}

/// The name of what stands at one side of an interface.
fn name_of(index: u32, way: Way) -> String {
    let word = match way {
        Way::In => "in",
        Way::Out => "out",
    };
    format!("{index}-{word}")
}

fn held_of(value: &[u8; VALUE]) -> Held {
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
