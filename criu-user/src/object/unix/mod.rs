//! Unix sockets: streams, datagrams, packets; pairs, servers and their clients, with what waits in them.
//!
//! At dump, sock_diag(7) tells who is connected with whom, and the socket itself the rest. At restore the engine makes
//! what it can; but a socket remembers who made its other end (SO_PEERCRED), so that pairs, listening and connecting are
//! the work of the process that did it before (`build`).

mod build;
pub mod queue;
mod sent;
mod steps;
mod wiring;

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use nix::sys::stat::{fstat, stat};

use super::file::{Capture, FileKind, Planner, Seen};
use super::sockopt::{self, state};
use super::{ObjectError, Refusal};
use crate::image::proto::{
    FdTypes, FileEntry, FilePermsEntry, FownEntry, SkOptsEntry, SkPacketEntry, SkUcredEntry, UnixSkEntry,
};
use crate::image::{ImageKind, UnixFlags};
use crate::kernel::unix_diag::{self, UnixSocket};
use crate::kernel::{error::During, proc, socket};
use crate::plan::FileRef;

/// Unix sockets.
#[derive(Debug)]
pub struct Unix;

/// What a dump knows of unix sockets.
#[derive(Debug, Default)]
struct Known {
    /// All of the system, by inode.
    all: Option<Rc<HashMap<u32, UnixSocket>>>,
    /// Those of the tree: who holds them, and the entry's peer.
    tree: BTreeMap<u32, (Refusal, u32)>,
    /// What waits in them.
    packets: Vec<(SkPacketEntry, Vec<u8>)>,
    /// What waits in connections that were not accepted.
    sent: sent::Known,
}

impl FileKind for Unix {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Unixsk]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.family() == Some(libc::AF_UNIX)
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let all = all(cx)?;
        let ino = seen.stat.st_ino as u32;
        let mut entry = UnixSkEntry {
            id: seen.id,
            ino,
            flags: seen.flags,
            fown: seen.fown()?,
            opts: sockopt::capture(&seen.file)?,
            ..UnixSkEntry::default()
        };
        if let Some(found) = all.get(&ino) {
            self.describe(seen, cx, found, &all, &mut entry)?;
            let place = seen.refuse(format!("unix socket {ino}"), "");
            cx.shelf.get::<Known>().tree.insert(ino, (place, entry.peer));
            // One that was never connected has nothing, and says so with an error.
            if !is_stream(entry.r#type) || entry.state == state::ESTABLISHED {
                let packets = queue::capture(seen, cx, found)?;
                cx.shelf.get::<Known>().packets.extend(packets);
            }
        } else {
            cx.refuse(seen.refuse(
                format!("unix socket {ino} is not in the engine's network namespace"),
                "run the engine in the network namespace of the program",
            ));
        }
        Ok(wrap(entry))
    }

    fn finish(&self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        let known = cx.shelf.take::<Known>();
        let Some(all) = &known.all else { return Ok(()) };
        let mut external = BTreeMap::new();
        for (ino, (place, peer)) in &known.tree {
            if *peer != 0 && !known.tree.contains_key(peer) {
                outside(cx, *ino, place, *peer, all.get(peer), &mut external);
            }
            for client in all.get(ino).map_or(&[][..], |s| &s.pending) {
                waiting_client(cx, place, *client, all, &known.tree);
            }
        }
        for (ino, name) in external {
            let id = cx.new_id();
            cx.add_file(wrap(external_entry(id, ino, name)));
        }
        if !known.packets.is_empty() {
            let mut writer = cx.dir.writer(ImageKind::SkQueues)?;
            for (packet, data) in &known.packets {
                writer.message(packet)?;
                writer.payload(data)?;
            }
            writer.finish()?;
        }
        Ok(())
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        build::plan(entry, cx)
    }

    fn wire(&self, _: &FileEntry, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        wiring::wire(cx)
    }
}

fn wrap(usk: UnixSkEntry) -> FileEntry {
    FileEntry { r#type: FdTypes::Unixsk as i32, id: usk.id, usk: Some(Box::new(usk)), ..FileEntry::default() }
}

fn all(cx: &mut Capture<'_>) -> Result<Rc<HashMap<u32, UnixSocket>>, ObjectError> {
    let known = cx.shelf.get::<Known>();
    if let Some(all) = &known.all {
        return Ok(Rc::clone(all));
    }
    let all = Rc::new(unix_diag::all()?);
    known.all = Some(Rc::clone(&all));
    Ok(all)
}

fn is_stream(kind: u32) -> bool {
    kind != libc::SOCK_DGRAM as u32
}

impl Unix {
    fn describe(
        &self,
        seen: &Seen,
        cx: &mut Capture<'_>,
        found: &UnixSocket,
        all: &HashMap<u32, UnixSocket>,
        entry: &mut UnixSkEntry,
    ) -> Result<(), ObjectError> {
        entry.r#type = found.kind;
        entry.state = found.state;
        entry.backlog = if found.state == state::LISTEN { found.backlog } else { found.unread };
        entry.peer = found.peer.unwrap_or(0);
        entry.shutdown = sockopt::shutdown_of(found.shutdown);
        entry.pending = found.pending.iter().copied().filter(|&ino| ino != 0).collect();
        entry.peer_cred = peer_cred(seen)?;
        name(seen, found, entry)?;
        entry.orphan = (found.peer == Some(0) && !is_stream(found.kind)).then_some(true);
        if !is_stream(found.kind) || found.state != state::ESTABLISHED {
            return Ok(());
        }
        if !found.name.is_empty() {
            entry.accepted = Some(was_accepted(entry.ino, found, all));
        }
        if entry.peer == 0
            && let Some((&server, _)) = all.iter().find(|(_, s)| s.pending.contains(&entry.ino))
        {
            entry.peer = server;
            entry.own_cred = Some(holder_cred(seen)?);
            if found.unread > 0 {
                entry.sent = sent::capture(seen, cx)?;
            }
        }
        Ok(())
    }
}

/// Whether a connected socket with a name came from accept(2), and has its listener's name therefore.
fn was_accepted(ino: u32, found: &UnixSocket, all: &HashMap<u32, UnixSocket>) -> bool {
    let listener = |s: &UnixSocket| s.state == state::LISTEN && s.name == found.name && s.file == found.file;
    if all.values().any(listener) {
        return true;
    }
    match found.peer.and_then(|peer| all.get(&peer).map(|s| (peer, s))) {
        // The listener is gone. Whoever connected was there before the connection was.
        Some((peer, other)) if !other.name.is_empty() => {
            !all.values().any(|s| s.state == state::LISTEN && s.name == other.name) && ino > peer
        }
        _ => true,
    }
}

/// SO_PEERCRED; `None` where nobody has connected.
fn peer_cred(seen: &Seen) -> Result<Option<SkUcredEntry>, ObjectError> {
    let bytes = socket::option(&seen.file, libc::SOL_SOCKET, libc::SO_PEERCRED, 12)?;
    let word = |at: usize| bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok((word(0) != 0).then(|| SkUcredEntry { pid: word(0), uid: word(4), gid: word(8) }))
}

/// What a server will find of who holds a connection.
fn holder_cred(seen: &Seen) -> Result<SkUcredEntry, ObjectError> {
    let path = format!("/proc/{}/status", seen.pid);
    let text = proc::read_text(&path)?;
    let effective = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    let pid = seen.pid.as_raw() as u32;
    Ok(SkUcredEntry { pid, uid: effective("Uid:").unwrap_or(0), gid: effective("Gid:").unwrap_or(0) })
}

/// The name, and what became of the file that it stands for.
fn name(seen: &Seen, found: &UnixSocket, entry: &mut UnixSkEntry) -> Result<(), ObjectError> {
    entry.name = found.name.clone();
    if !is_path(&found.name) {
        return Ok(());
    }
    let Some(file) = socket::unix_file(&seen.file)? else { return Ok(()) };
    let held = fstat(&file).during("fstat", "file of a unix socket")?;
    entry.file_perms = Some(FilePermsEntry { mode: held.st_mode, uid: held.st_uid, gid: held.st_gid });
    let link = proc::link(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))?;
    let bound = Path::new(std::ffi::OsStr::from_bytes(path_bytes(&found.name)));
    let deleted = held.st_nlink == 0;
    entry.deleted = deleted.then_some(true);
    if bound.is_relative() {
        let text = link.as_os_str().as_bytes();
        let text = text.strip_suffix(b" (deleted)").filter(|_| deleted).unwrap_or(text);
        let dir = text.strip_suffix(path_bytes(&found.name)).and_then(|d| d.strip_suffix(b"/"));
        let dir = match dir {
            Some(b"") => Path::new("/"),
            Some(dir) => Path::new(std::ffi::OsStr::from_bytes(dir)),
            None => link.parent().unwrap_or(Path::new("/")),
        };
        entry.name_dir = Some(dir.as_os_str().as_bytes().to_vec());
    }
    let dir = entry.name_dir.as_deref().map_or(Path::new("/"), |d| Path::new(std::ffi::OsStr::from_bytes(d)));
    let there = stat(&dir.join(bound)).is_ok_and(|s| (s.st_dev, s.st_ino) == (held.st_dev, held.st_ino));
    if !deleted && !there {
        entry.moved_to = Some(link.as_os_str().as_bytes().to_vec());
    }
    Ok(())
}

/// Whether a name is a path, and not abstract.
fn is_path(name: &[u8]) -> bool {
    name.first().is_some_and(|&b| b != 0)
}

/// A path without the zero at its end.
fn path_bytes(name: &[u8]) -> &[u8] {
    name.split(|&b| b == 0).next().unwrap_or_default()
}

/// A socket whose peer is not in the tree.
fn outside(
    cx: &mut Capture<'_>,
    ino: u32,
    place: &Refusal,
    peer: u32,
    other: Option<&UnixSocket>,
    external: &mut BTreeMap<u32, Vec<u8>>,
) {
    let named = other.filter(|o| !is_stream(o.kind) && !o.name.is_empty());
    let called = other.map_or("nothing".into(), |o| String::from_utf8_lossy(path_bytes(&o.name)).into_owned());
    let (what, advice) = match named {
        Some(other) if cx.options.ext_unix_sk => {
            external.insert(peer, other.name.clone());
            return;
        }
        Some(_) => (
            format!("unix socket {ino} is connected to {called}, which is outside of the tree"),
            "give --ext-unix-sk to connect it to that name again",
        ),
        None => (
            format!("the other end ({peer}, named {called:?}) of unix socket {ino} is outside of the tree"),
            "dump both ends together, or close it; --ext-unix-sk helps with named datagram sockets only",
        ),
    };
    cx.refuse(Refusal { what, advice: advice.into(), ..place.clone() });
}

/// A client that waits to be accepted by a socket of the tree.
fn waiting_client(
    cx: &mut Capture<'_>,
    place: &Refusal,
    client: u32,
    all: &HashMap<u32, UnixSocket>,
    tree: &BTreeMap<u32, (Refusal, u32)>,
) {
    if tree.contains_key(&client) || cx.options.ext_unix_sk {
        return;
    }
    let gone = client == 0 || !all.contains_key(&client);
    let what = if gone { "has gone away again" } else { "is outside of the tree" };
    cx.refuse(Refusal {
        what: format!("a client that waits to be accepted by {} {what}", place.what),
        advice: "dump when it has been accepted, or give --ext-unix-sk to drop it".into(),
        ..place.clone()
    });
}

/// A peer outside, as CRIU writes it down.
fn external_entry(id: u32, ino: u32, name: Vec<u8>) -> UnixSkEntry {
    UnixSkEntry {
        id,
        ino,
        r#type: libc::SOCK_DGRAM as u32,
        state: state::LISTEN,
        uflags: UnixFlags::EXTERN.bits(),
        name,
        fown: FownEntry::default(),
        opts: SkOptsEntry::default(),
        ..UnixSkEntry::default()
    }
}
