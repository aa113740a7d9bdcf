//! The plan of all unix sockets of a tree: opening them. What comes then is in [`wiring`](super::wiring).
//!
//! `SO_PEERCRED` of a socket is whoever made or connected its other end, or listened there. So pairs are made, sockets
//! listen and connect in the process that did it before, if that is part of the tree, with the ids that it had then;
//! the engine then takes over what was made, and those who hold it fetch it from there. All else is the engine's work.
//!
//! | stage | what happens |
//! | --- | --- |
//! | opening | the engine makes and binds all sockets; those that others make have a stand-in |
//! | Groups | pairs are made; servers listen |
//! | Connect | clients connect whose other end was accepted |
//! | Fetch | holders fetch what was made or accepted; clients connect that wait to be accepted |
//! | Files | everything comes to its number; then the engine fills the queues and sets options |

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::rc::Rc;

use super::super::ObjectError;
use super::super::file::Planner;
use super::super::sockopt::state;
use super::steps::{Binding, Make, Place, Scratch, TakeSecond};
use super::{is_path, is_stream, path_bytes};
use crate::image::proto::{FileEntry, SkPacketEntry, UnixSkEntry};
use crate::image::{ImageKind, UnixFlags};
use crate::plan::FileRef;

/// All unix sockets of the images, and what became of them so far.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub(super) loaded: bool,
    pub(super) wired: bool,
    /// By inode.
    pub(super) entries: BTreeMap<u32, Rc<UnixSkEntry>>,
    /// Inodes by description.
    pub(super) inodes: HashMap<u32, u32>,
    /// What waits, by the description that it waits for.
    pub(super) packets: BTreeMap<u32, Vec<(SkPacketEntry, Vec<u8>)>>,
    /// Sockets that are planned, by inode.
    pub(super) made: BTreeMap<u32, FileRef>,
    /// Where those with a name can be reached.
    pub(super) places: BTreeMap<u32, Place>,
    /// Pairs whose ends are to be made by a task.
    pub(super) pairs: Vec<(u32, FileRef, FileRef)>,
    /// Connections with a name: the client's inode, the accepted end's.
    pub(super) connections: Vec<(u32, u32, Option<u32>)>,
    /// The other ends of sockets whose peer was closed.
    pub(super) others: BTreeMap<u32, FileRef>,
    pub(super) scratch: Option<FileRef>,
    pub(super) names: usize,
}

fn load(cx: &mut Planner<'_>) -> Result<(), ObjectError> {
    if cx.shelf.get::<Sockets>().loaded {
        return Ok(());
    }
    let mut sockets = Sockets { loaded: true, ..Sockets::default() };
    for entry in cx.files.values().filter_map(|f| f.usk.as_ref()) {
        if entry.name.len() > 108 {
            return Err(ObjectError::contradiction(format!("unix socket {} has a name that is too long", entry.ino)));
        }
        let same = sockets.entries.insert(entry.ino, Rc::new(UnixSkEntry::clone(entry)));
        if same.is_some() {
            return Err(ObjectError::contradiction(format!("there are two unix sockets {}", entry.ino)));
        }
        sockets.inodes.insert(entry.id, entry.ino);
    }
    if cx.dir.exists(ImageKind::SkQueues)? {
        let mut reader = cx.dir.reader(ImageKind::SkQueues)?;
        while let Some(packet) = reader.message::<SkPacketEntry>()? {
            let data = reader.payload(packet.length.into())?;
            sockets.packets.entry(packet.id_for).or_default().push((packet, data));
        }
    }
    *cx.shelf.get::<Sockets>() = sockets;
    Ok(())
}

impl Sockets {
    pub(super) fn peer_of(&self, entry: &UnixSkEntry) -> Result<Option<Rc<UnixSkEntry>>, ObjectError> {
        match entry.peer {
            0 => Ok(None),
            peer => self.entries.get(&peer).cloned().map(Some).ok_or_else(|| {
                ObjectError::contradiction(format!("unix socket {} has a peer {peer} that is nowhere", entry.ino))
            }),
        }
    }

    /// The listening socket that has the name of an accepted one.
    fn listener_of(&self, accepted: &UnixSkEntry) -> Option<u32> {
        let same = |e: &UnixSkEntry| {
            e.state == state::LISTEN
                && e.r#type == accepted.r#type
                && e.name == accepted.name
                && e.name_dir == accepted.name_dir
                && e.uflags & UnixFlags::EXTERN.bits() == 0
        };
        self.entries.values().find(|e| same(e)).map(|e| e.ino)
    }
}

/// Plans a socket, together with its other end where both are made at once.
pub fn plan(entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
    load(cx)?;
    let usk = entry.usk.as_ref().ok_or_else(|| ObjectError::contradiction(format!("file {} is empty", entry.id)))?;
    plan_socket(&usk.clone(), cx)
}

fn plan_socket(entry: &UnixSkEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
    let sockets = cx.shelf.get::<Sockets>();
    if let Some(&made) = sockets.made.get(&entry.ino) {
        return Ok(made);
    }
    let peer = sockets.peer_of(entry)?;
    if entry.uflags & (UnixFlags::CALLBACK | UnixFlags::INHERIT).bits() != 0 {
        return Err(ObjectError::Unsupported {
            what: format!("unix socket {}, which a plugin or the caller is to provide", entry.ino),
            advice: "restore with the engine and options that it was dumped with",
        });
    }
    let connected = is_stream(entry.r#type) && entry.state == state::ESTABLISHED;
    match peer {
        Some(peer) if peer.peer == entry.ino && peer.ino != entry.ino => {
            let named = |e: &UnixSkEntry| !e.name.is_empty();
            if connected && (named(entry) || named(&peer)) {
                return plan_connection(entry, &peer, cx);
            }
            if connected || !(named(entry) && named(&peer)) {
                return plan_pair(entry, &peer, cx);
            }
        }
        None if connected => return plan_orphan(entry, cx),
        None if entry.name.is_empty() && !is_stream(entry.r#type) => {
            let waiting = cx.shelf.get::<Sockets>().packets.contains_key(&entry.id);
            if entry.orphan() || waiting {
                return plan_orphan(entry, cx);
            }
        }
        _ => {}
    }
    let binding = binding(entry, cx)?;
    Ok(make(entry, binding, cx))
}

fn make(entry: &UnixSkEntry, binding: Option<Binding>, cx: &mut Planner<'_>) -> FileRef {
    let made = cx.plan.open(Make { kind: entry.r#type, second: None, binding });
    cx.shelf.get::<Sockets>().made.insert(entry.ino, made);
    made
}

/// Two ends that know only each other.
fn plan_pair(one: &UnixSkEntry, two: &UnixSkEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
    if one.r#type != two.r#type {
        let what = format!("unix sockets {} and {} are of different types", one.ino, two.ino);
        return Err(ObjectError::contradiction(what));
    }
    let bindings = [one, two].map(|e| if is_stream(e.r#type) { Ok(None) } else { binding(e, cx) });
    let [first, second] = bindings;
    let end = Rc::default();
    let a = cx.plan.open(Make { kind: one.r#type, second: Some(Rc::clone(&end)), binding: first? });
    let b = cx.plan.open(TakeSecond { second: end, binding: second? });
    let sockets = cx.shelf.get::<Sockets>();
    sockets.made.extend([(one.ino, a), (two.ino, b)]);
    if one.name.is_empty() && two.name.is_empty() {
        sockets.pairs.push((one.ino, a, b));
    }
    Ok(a)
}

/// A client and the socket that its server has accepted, which has its listener's name.
fn plan_connection(one: &UnixSkEntry, two: &UnixSkEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
    let accepted_first = one.accepted.unwrap_or(two.accepted != Some(true) && !one.name.is_empty());
    let (client, accepted) = if accepted_first { (two, one) } else { (one, two) };
    let own = binding(client, cx)?;
    make(client, own, cx);
    make(accepted, None, cx);
    let sockets = cx.shelf.get::<Sockets>();
    let listener = sockets.listener_of(accepted);
    sockets.connections.push((client.ino, accepted.ino, listener));
    Ok(sockets.made[&one.ino])
}

/// A socket whose other end was closed: that is there until the queue is full.
fn plan_orphan(entry: &UnixSkEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
    let end = Rc::default();
    let a = cx.plan.open(Make { kind: entry.r#type, second: Some(Rc::clone(&end)), binding: None });
    let b = cx.plan.open(TakeSecond { second: end, binding: None });
    let sockets = cx.shelf.get::<Sockets>();
    sockets.made.insert(entry.ino, a);
    sockets.others.insert(entry.ino, b);
    sockets.pairs.push((entry.ino, a, b));
    Ok(a)
}

pub(super) fn scratch(cx: &mut Planner<'_>) -> (FileRef, String) {
    let root = match cx.shelf.get::<Sockets>().scratch {
        Some(root) => root,
        None => {
            let root = cx.plan.open(Scratch);
            cx.shelf.get::<Sockets>().scratch = Some(root);
            root
        }
    };
    let sockets = cx.shelf.get::<Sockets>();
    sockets.names += 1;
    (root, format!("s{}", sockets.names))
}

/// How a socket gets its name.
fn binding(entry: &UnixSkEntry, cx: &mut Planner<'_>) -> Result<Option<Binding>, ObjectError> {
    if entry.name.is_empty() {
        return Ok(None);
    }
    let name = entry.name.clone();
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let moved_to = entry.moved_to.as_deref().map(path);
    let dir = entry.name_dir.as_deref().map_or_else(|| PathBuf::from("/"), path);
    let place = if !is_path(&name) {
        Place::Abstract(name.clone())
    } else if entry.deleted() {
        let (root, short) = scratch(cx);
        Place::Scratch(root, short)
    } else {
        // Short enough for an address wherever the directory is: relative to it.
        let whole = moved_to.clone().unwrap_or_else(|| dir.join(path(path_bytes(&name))));
        match (whole.parent(), whole.file_name()) {
            (Some(parent), Some(base)) => Place::Disk(cx.options.root.join(parent), base.into()),
            _ => return Err(ObjectError::contradiction(format!("unix socket {} has no file name", entry.ino))),
        }
    };
    cx.shelf.get::<Sockets>().places.insert(entry.ino, place.clone());
    // Binding happens from where the name starts, connecting from where the file is.
    let place = match place {
        Place::Disk(_, base) => Place::Disk(dir, base),
        other => other,
    };
    Ok(Some(Binding { name, place, root: cx.options.root.clone(), perms: entry.file_perms, moved_to }))
}
