//! What happens to unix sockets between opening and going on: who listens, connects, makes pairs, fetches and fills. The
//! stages are those of [`build`](super::build).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::super::ObjectError;
use super::super::file::Planner;
use super::super::sockopt::{Fresh, state};
use super::build::{Sockets, scratch};
use super::steps::{
    Accept, Binding, Collect, Connect, Engine, Fill, Forget, Listen, Make, Place, Sender, Settle, address,
};
use super::{is_path, is_stream, path_bytes, sent};
use crate::call;
use crate::image::UnixFlags;
use crate::image::proto::{SkPacketEntry, SkUcredEntry, UnixSkEntry};
use crate::plan::{Arg, Buffer, Call, FileRef, Plan, Role, Stage, TaskRef, fetch};

/// Plans everything that is not opening, for all sockets at once.
pub fn wire(cx: &mut Planner<'_>) -> Result<(), ObjectError> {
    if std::mem::replace(&mut cx.shelf.get::<Sockets>().wired, true) {
        return Ok(());
    }
    let rights = plan_rights(cx)?;
    let sockets = cx.shelf.take::<Sockets>();
    let mut wiring = Wiring { sockets, fetched: BTreeSet::new(), rights, accepted: BTreeSet::new() };
    let outcome = wiring.all(cx);
    *cx.shelf.get::<Sockets>() = wiring.sockets;
    outcome
}

/// Plans the files that are on their way in queues, which may be sockets with further files in their queues.
fn plan_rights(cx: &mut Planner<'_>) -> Result<HashMap<u32, FileRef>, ObjectError> {
    let mut rights = HashMap::new();
    loop {
        let sockets = cx.shelf.get::<Sockets>();
        let planned = |id: &u32| sockets.inodes.get(id).is_some_and(|ino| sockets.made.contains_key(ino));
        let wanted: Vec<u32> = sockets
            .packets
            .iter()
            .filter(|(id, _)| planned(id))
            .flat_map(|(_, packets)| packets.iter().flat_map(|(p, _)| p.scm.iter().flat_map(|s| &s.rights)))
            .copied()
            .filter(|id| !rights.contains_key(id))
            .collect();
        if wanted.is_empty() {
            return Ok(rights);
        }
        for id in wanted {
            let file = cx.file_ref(id)?;
            rights.insert(id, file);
        }
    }
}

struct Wiring {
    sockets: Sockets,
    /// Files that their holders must fetch, and who has made them.
    fetched: BTreeSet<(FileRef, Option<TaskRef>)>,
    rights: HashMap<u32, FileRef>,
    /// Inodes of sockets that are accepted: they have some options from who listened.
    accepted: BTreeSet<u32>,
}

impl Wiring {
    fn all(&mut self, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        self.pairs(cx)?;
        let waiting = self.listeners(cx)?;
        self.connections(cx)?;
        self.fetch(cx);
        self.waiting_clients(cx, &waiting)?;
        self.datagrams(cx)?;
        self.queues(cx)?;
        let mut fresh: HashMap<u32, Rc<Fresh>> = HashMap::new();
        for (ino, &socket) in &self.sockets.made {
            let entry = self.entry(*ino);
            let fresh = (!self.accepted.contains(ino)).then(|| Rc::clone(fresh.entry(entry.r#type).or_default()));
            // Who connects has some options from who listens (since Linux 6.16): these come first there.
            let stage = if entry.state == state::LISTEN { Stage::Connect } else { Stage::Files };
            cx.plan.after(stage, Settle { socket, entry, fresh });
        }
        if let Some(root) = self.sockets.scratch {
            cx.plan.after(Stage::Wiring, Forget { root });
        }
        Ok(())
    }

    fn entry(&self, ino: u32) -> Rc<UnixSkEntry> {
        Rc::clone(&self.sockets.entries[&ino])
    }

    /// The process of the tree that is to make a call, and the ids that it has by then. Where the images do not tell,
    /// it is the first that holds the socket.
    fn maker(&self, cx: &Planner<'_>, cred: Option<&SkUcredEntry>, holds: u32) -> Option<(TaskRef, [u32; 2])> {
        let leader = |task: &TaskRef| matches!(cx.plan.tasks[task.0].role, Role::Leader);
        match cred {
            Some(cred) => {
                let task = cx.tasks.get(&(cred.pid as i32)).copied().filter(leader)?;
                Some((task, [cred.uid, cred.gid]))
            }
            None => {
                let task = cx.holders.get(&holds)?.first()?.0;
                Some((task, own_ids())).filter(|(task, _)| leader(task))
            }
        }
    }

    fn pairs(&mut self, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        let mut made: BTreeMap<TaskRef, Vec<FileRef>> = BTreeMap::new();
        for (n, (ino, a, b)) in std::mem::take(&mut self.sockets.pairs).into_iter().enumerate() {
            let entry = self.entry(ino);
            let Some((task, ids)) = self.maker(cx, entry.peer_cred.as_ref(), entry.id) else { continue };
            let both = Buffer { name: PAIRS + n as u32, len: 16 };
            let why = format!("the pair of unix sockets {ino} and {}", entry.peer);
            let calls = vec![
                call!(SYS_socketpair(libc::AF_UNIX, entry.r#type, 0u32, Arg::Fill(both)), why),
                call!(SYS_dup3(Arg::ValueAt(both, 0), a, libc::O_CLOEXEC), "one end"),
                call!(SYS_dup3(Arg::ValueAt(both, 4), b, libc::O_CLOEXEC), "the other end"),
                call!(SYS_close(Arg::ValueAt(both, 0)), "it has its place"),
                call!(SYS_close(Arg::ValueAt(both, 4)), "it has its place"),
            ];
            push_as(&mut cx.plan, task, Stage::Groups, ids, calls);
            made.entry(task).or_default().extend([a, b]);
            self.fetched.extend([(a, Some(task)), (b, Some(task))]);
        }
        for (task, files) in made {
            let from = cx.plan.task(task).tid;
            cx.plan.after(Stage::Groups, Collect { from, files });
        }
        Ok(())
    }

    /// Has all servers listen; gives the clients that will wait, by server.
    fn listeners(&mut self, cx: &mut Planner<'_>) -> Result<BTreeMap<u32, Vec<u32>>, ObjectError> {
        let mut waiting = BTreeMap::new();
        let all: Vec<_> = self.sockets.made.iter().map(|(&ino, &made)| (self.entry(ino), made)).collect();
        for (entry, socket) in all.into_iter().filter(|(e, _)| e.state == state::LISTEN) {
            let mut clients: Vec<u32> = (self.sockets.made.keys().copied())
                .filter(|ino| self.sockets.entries[ino].peer == entry.ino && is_stream(entry.r#type))
                .collect();
            clients.sort_by_key(|ino| entry.pending.iter().position(|p| p == ino).unwrap_or(usize::MAX));
            let accepted = self.sockets.connections.iter().filter(|c| c.2 == Some(entry.ino)).count();
            let room = entry.backlog.max(clients.len() as u32).max(accepted as u32);
            let stages: &[_] = if room == entry.backlog {
                &[(Stage::Groups, room)]
            } else {
                &[(Stage::Groups, room), (Stage::Files, entry.backlog)]
            };
            for &(stage, backlog) in stages {
                match self.maker(cx, entry.peer_cred.as_ref(), entry.id) {
                    Some((task, ids)) => {
                        let call = call!(SYS_listen(socket, backlog), format!("unix socket {} is a server", entry.ino));
                        push_as(&mut cx.plan, task, stage, ids, vec![call]);
                    }
                    None => cx.plan.after(stage, Listen { socket, backlog }),
                }
            }
            waiting.insert(entry.ino, clients);
        }
        Ok(waiting)
    }

    fn connections(&mut self, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        let mut accepts: BTreeMap<FileRef, Vec<(FileRef, FileRef)>> = BTreeMap::new();
        for (client, accepted, listener) in std::mem::take(&mut self.sockets.connections) {
            let (client, accepted) = (self.entry(client), self.entry(accepted));
            let (socket, session) = (self.sockets.made[&client.ino], self.sockets.made[&accepted.ino]);
            let planned =
                listener.and_then(|l| Some((*self.sockets.made.get(&l)?, self.sockets.places.get(&l)?.clone())));
            let (server, place) = match planned {
                Some(known) => known,
                None => self.stand_in(cx, &client, &accepted)?,
            };
            self.connect(cx, Stage::Connect, socket, &place, accepted.peer_cred.as_ref(), client.id);
            accepts.entry(server).or_default().push((socket, session));
            self.fetched.insert((session, None));
            self.accepted.insert(accepted.ino);
        }
        for (listener, pairs) in accepts {
            cx.plan.after(Stage::Connect, Accept { listener, pairs });
        }
        Ok(())
    }

    /// A listening socket of the name that an accepted one has, where the real one is gone.
    fn stand_in(
        &mut self,
        cx: &mut Planner<'_>,
        client: &UnixSkEntry,
        accepted: &UnixSkEntry,
    ) -> Result<(FileRef, Place), ObjectError> {
        let place = if is_path(&accepted.name) {
            *cx.shelf.get::<Sockets>() = std::mem::take(&mut self.sockets);
            let (root, short) = scratch(cx);
            self.sockets = cx.shelf.take::<Sockets>();
            Place::Scratch(root, short)
        } else {
            Place::Abstract(accepted.name.clone())
        };
        let root = cx.options.root.clone();
        let binding = Binding { name: accepted.name.clone(), place: place.clone(), root, perms: None, moved_to: None };
        let socket = cx.plan.open(Make { kind: accepted.r#type, second: None, binding: Some(binding) });
        match self.maker(cx, client.peer_cred.as_ref(), accepted.id) {
            Some((task, ids)) => {
                let call = call!(SYS_listen(socket, 1u32), format!("stands in for the server of {}", accepted.ino));
                push_as(&mut cx.plan, task, Stage::Groups, ids, vec![call]);
            }
            None => cx.plan.after(Stage::Groups, Listen { socket, backlog: 1 }),
        }
        Ok((socket, place))
    }

    fn connect(
        &self,
        cx: &mut Planner<'_>,
        stage: Stage,
        socket: FileRef,
        place: &Place,
        cred: Option<&SkUcredEntry>,
        holds: u32,
    ) {
        let Some((task, ids)) = self.maker(cx, cred, holds) else {
            cx.plan.after(stage, Connect { socket, to: place.clone() });
            return;
        };
        let (stand, name) = match place {
            Place::Abstract(name) => (None, name.clone()),
            Place::Disk(dir, base) => {
                let mut path = dir.as_os_str().as_bytes().to_vec();
                path.push(0);
                (Some(call!(SYS_chdir(path), "where the server's name is")), base.as_os_str().as_bytes().to_vec())
            }
            Place::Scratch(root, short) => {
                (Some(call!(SYS_fchdir(*root), "where the server's name is")), short.clone().into_bytes())
            }
        };
        let to = address(&name);
        let len = to.len();
        let connect = call!(SYS_connect(socket, to, len), "the unix socket was connected by this process");
        push_as(&mut cx.plan, task, stage, ids, stand.into_iter().chain([connect]).collect());
    }

    /// Everyone who holds a file that somebody else has made gets it from the engine.
    fn fetch(&mut self, cx: &mut Planner<'_>) {
        if self.fetched.is_empty() {
            return;
        }
        let engine = cx.plan.open(Engine);
        let ids: HashMap<FileRef, u32> =
            self.sockets.made.iter().map(|(ino, &file)| (file, self.sockets.entries[ino].id)).collect();
        for (file, maker) in std::mem::take(&mut self.fetched) {
            let holders = ids.get(&file).and_then(|id| cx.holders.get(id)).cloned().unwrap_or_default();
            let tasks: BTreeSet<TaskRef> = holders.into_iter().map(|(task, _)| task).collect();
            for task in tasks.into_iter().filter(|&task| Some(task) != maker) {
                for call in fetch(engine.into(), file, "a socket that another process has made") {
                    cx.plan.push(task, Stage::Fetch, call);
                }
            }
        }
    }

    fn waiting_clients(&self, cx: &mut Planner<'_>, waiting: &BTreeMap<u32, Vec<u32>>) -> Result<(), ObjectError> {
        for (server, clients) in waiting {
            for client in clients {
                let entry = self.entry(*client);
                let place = self.sockets.places.get(server).ok_or_else(|| {
                    ObjectError::contradiction(format!("unix socket {server} has clients and no name"))
                })?;
                let socket = self.sockets.made[client];
                self.connect(cx, Stage::Fetch, socket, place, entry.own_cred.as_ref(), entry.id);
                if !entry.sent.is_empty() {
                    let stream = entry.r#type == libc::SOCK_STREAM as u32;
                    cx.plan.after(Stage::Files, sent::again(socket, entry.id, stream, &entry.sent));
                }
            }
        }
        Ok(())
    }

    /// Connects datagram sockets; nobody remembers who did that.
    fn datagrams(&self, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        for (&ino, &socket) in &self.sockets.made {
            let entry = self.entry(ino);
            let Some(peer) = self.sockets.peer_of(&entry)?.filter(|_| !is_stream(entry.r#type)) else { continue };
            let outside = peer.uflags & UnixFlags::EXTERN.bits() != 0;
            if outside && !cx.options.ext_unix_sk {
                return Err(ObjectError::Unsupported {
                    what: format!("unix socket {ino}, whose peer is outside of the dump"),
                    advice: "give --ext-unix-sk to connect it to the peer's name again",
                });
            }
            let mutual = peer.peer == ino && peer.ino != ino;
            if mutual && (entry.name.is_empty() || peer.name.is_empty()) {
                continue;
            }
            let to = if outside { Some(outside_place(&peer)) } else { self.sockets.places.get(&peer.ino).cloned() };
            let to = to.ok_or_else(|| {
                ObjectError::contradiction(format!("unix socket {ino} is connected to {}, which has no name", peer.ino))
            })?;
            cx.plan.after(Stage::Groups, Connect { socket, to });
        }
        Ok(())
    }

    fn queues(&mut self, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        for (id, waiting) in std::mem::take(&mut self.sockets.packets) {
            let Some(ino) = self.sockets.inodes.get(&id).copied().filter(|i| self.sockets.made.contains_key(i)) else {
                // Of another kind of socket, or one that nobody holds.
                continue;
            };
            let receiver = self.entry(ino);
            let mut packets = Vec::with_capacity(waiting.len());
            for (packet, data) in waiting {
                let files: Vec<FileRef> = packet
                    .scm
                    .iter()
                    .filter(|s| s.r#type == libc::SCM_RIGHTS as u32)
                    .flat_map(|s| &s.rights)
                    .map(|id| self.rights.get(id).copied())
                    .collect::<Option<_>>()
                    .ok_or_else(|| ObjectError::contradiction(format!("a packet for file {id} lacks its files")))?;
                let sender = self.sender(cx, &receiver, &packet)?;
                packets.push((packet, data, files, sender));
            }
            let stream = receiver.r#type == libc::SOCK_STREAM as u32;
            cx.plan.after(Stage::Files, Fill { packets, stream });
        }
        Ok(())
    }

    /// Who sends a packet again.
    fn sender(
        &mut self,
        cx: &mut Planner<'_>,
        receiver: &UnixSkEntry,
        packet: &SkPacketEntry,
    ) -> Result<Sender, ObjectError> {
        if let Some(&other) = self.sockets.others.get(&receiver.ino) {
            return Ok(Sender::Peer(other));
        }
        if let Some(&peer) = self.sockets.made.get(&receiver.peer) {
            let connected = self.entry(receiver.peer).peer == receiver.ino;
            return match self.sockets.places.get(&receiver.ino) {
                _ if connected => Ok(Sender::Peer(peer)),
                Some(place) => Ok(Sender::Other(peer, place.clone())),
                None => Err(unreachable(receiver)),
            };
        }
        let place = self.sockets.places.get(&receiver.ino).cloned().ok_or_else(|| unreachable(receiver))?;
        let Some(name) = &packet.sender_name else { return Ok(Sender::Nobody(None, place)) };
        let same = |ino: &u32| path_bytes_or_all(&self.sockets.entries[ino].name) == path_bytes_or_all(name);
        if let Some((_, &from)) = self.sockets.made.iter().find(|(ino, _)| same(ino)) {
            return Ok(Sender::Other(from, place));
        }
        let own = if is_path(name) {
            *cx.shelf.get::<Sockets>() = std::mem::take(&mut self.sockets);
            let (root, short) = scratch(cx);
            self.sockets = cx.shelf.take::<Sockets>();
            Place::Scratch(root, short)
        } else {
            Place::Abstract(name.clone())
        };
        let root = cx.options.root.clone();
        let binding = Binding { name: name.clone(), place: own, root, perms: None, moved_to: None };
        Ok(Sender::Nobody(Some(binding), place))
    }
}

/// Names of buffers: others in the same stage have theirs.
const PAIRS: u32 = 0x5550_0000;

fn unreachable(entry: &UnixSkEntry) -> ObjectError {
    ObjectError::contradiction(format!("unix socket {} has data and nobody who could have sent it", entry.ino))
}

fn path_bytes_or_all(name: &[u8]) -> &[u8] {
    if is_path(name) { path_bytes(name) } else { name }
}

fn outside_place(peer: &UnixSkEntry) -> Place {
    if !is_path(&peer.name) {
        return Place::Abstract(peer.name.clone());
    }
    let path = Path::new(OsStr::from_bytes(path_bytes(&peer.name)));
    Place::Disk(
        path.parent().unwrap_or(Path::new("/")).to_owned(),
        path.file_name().map(PathBuf::from).unwrap_or_default(),
    )
}

/// Effective ids of the engine, which tasks have until the end.
fn own_ids() -> [u32; 2] {
    [nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()]
}

/// Has a task make calls with other effective ids: the kernel remembers these in sockets. What the calls may do is
/// decided by the fsuid and with the capabilities that come with it (capabilities(7)), which are the engine's still.
fn push_as(plan: &mut Plan, task: TaskRef, stage: Stage, ids: [u32; 2], calls: Vec<Call>) {
    const KEEP: u32 = u32::MAX;
    let own = own_ids();
    let change = ids != own;
    if change {
        plan.push(task, stage, call!(SYS_setresgid(KEEP, ids[1], KEEP), "as the group that did it"));
        plan.push(task, stage, call!(SYS_setresuid(KEEP, ids[0], KEEP), "as the user who did it"));
        plan.push(task, stage, call!(SYS_setfsuid(own[0]), "but with all access"));
    }
    for call in calls {
        plan.push(task, stage, call);
    }
    if change {
        plan.push(task, stage, call!(SYS_setresuid(KEEP, own[0], KEEP), "back"));
        plan.push(task, stage, call!(SYS_setresgid(KEEP, own[1], KEEP), "back"));
    }
}
