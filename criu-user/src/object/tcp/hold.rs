//! The connections of a dump: held from the first look at them until they are images and nobody's.
//!
//! Sockets are out of repair mode at all times but for the microseconds in which one is read, and that is done in a
//! process of its own: if the engine is killed, the socket that is being read comes out of repair mode all the same (a
//! thread that is let go in these very microseconds may see an EPERM), the gate opens because nobody holds it any more, and the program goes on with its connections. The gate becomes
//! permanent in the same breath in which the tree is killed, again by a process that finishes what it has begun.
//! Only then, when nobody can use them any more, are the sockets put into repair mode, in which they die without a word.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use criu_common::gate;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use prost::Message;
use tracing::{debug, info};

use super::clients::Clients;
use super::lock::LockError;
use super::read::{TcpError, read_with};
use super::{Connection, Ends, NetworkLock, State, ends, fallback, tls};
use crate::dump::DumpOptions;
use crate::freeze::Frozen;
use crate::image::proto::{InetSkEntry, InventoryEntry, TcpStreamEntry};
use crate::image::{ImageDir, ImageKind};
use crate::kernel::ebpf::numbers::Reader;
use crate::kernel::gate::Gate;
use crate::kernel::sched::be_urgent;
use crate::kernel::survey_cache::Caching;
use crate::kernel::tcp::{Info, Repair, set_repair};
use crate::kernel::{SysResult, apart, inet_diag, proc};
use crate::object::ObjectError;
use crate::object::file::{Capture, Seen};
use crate::parallel;

/// CRIU's number of a dump without a lock that it would have to take away.
const CRIU_LOCK_SKIP: u32 = 2;

/// Room for the queues of most connections.
const ROOM: usize = 64 << 10;

/// A connection whose socket we hold as well.
#[derive(Debug)]
struct Socket {
    /// The description.
    id: u32,
    ino: u32,
    /// Whose it is.
    pid: i32,
    fd: i32,
    file: Arc<OwnedFd>,
    ends: Ends,
    /// Its SO_REUSEADDR.
    reuse: bool,
    info: Info,
    layer: Layer,
}

/// What a connection's socket has above TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Nothing.
    None,
    /// MPTCP, and the connection goes on as plain TCP.
    FallenBack,
    /// TLS.
    Tls,
}

impl Socket {
    /// That it could not be read.
    fn unread(&self, why: impl ToString) -> ObjectError {
        ObjectError::Connection { pid: self.pid, fd: self.fd, ends: self.ends, why: why.to_string() }
    }
}

/// All connections of a dump, and the gate before them.
#[derive(Debug, Default)]
pub struct Hold {
    lock: NetworkLock,
    gate: Option<Gate>,
    /// What the gate is called once it is permanent.
    name: String,
    sockets: Vec<Socket>,
    /// What reads many.
    numbers: Option<Reader>,
    caching: Caching,
    /// Ends that nobody may ask for a connection with.
    listeners: Vec<gate::Connection>,
    /// What was read of each, by its inode.
    read: Vec<(u32, Connection)>,
    /// Those that nobody has accepted.
    pub(super) clients: Clients,
}

/// What the reading process says of one connection.
type Told = Result<Connection, String>;

impl Hold {
    /// Makes everything ready that need not be done while the tree stands still.
    pub fn prepare(options: &DumpOptions) -> Result<Self, LockError> {
        let (pid, lock) = (options.pid, options.network_lock);
        if options.lock_listeners && lock == NetworkLock::Skip {
            return Err(LockError::NoLock);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        // All of them may be connections, and their number may grow as long as the tree runs.
        let descriptors: usize = proc::tree(pid).iter().map(|&pid| proc::count_descriptors(pid)).sum();
        let gate = lock.gate(descriptors * 2)?;
        gate.iter().try_for_each(Gate::check_place)?;
        let lock = match &gate {
            Some(Gate::Ebpf(_)) => NetworkLock::Ebpf,
            Some(Gate::Nftables(_)) => NetworkLock::Nftables,
            None => lock,
        };
        Ok(Self { lock, gate, name: format!("{pid}-{now:x}"), ..Self::default() })
    }

    /// Adds a connection.
    pub fn add(&mut self, seen: &Seen, entry: &InetSkEntry, info: Info, layer: Layer) {
        let file = Arc::clone(&seen.file);
        let (pid, ends, reuse) = (seen.pid.as_raw(), Ends::of(entry, 0), entry.opts.reuseaddr());
        self.sockets.push(Socket { id: seen.id, ino: entry.ino, pid, fd: seen.fd, file, ends, reuse, info, layer });
    }

    /// Makes ready for connections that have nothing in their queues: they will be read together, and without repair mode.
    /// Where that cannot be done they are read like the others.
    pub fn expect_idle(&mut self, caching: Caching) {
        self.caching = caching;
        let reader = Reader::new().inspect_err(|err| debug!(%err, "connections are read one by one"));
        self.numbers = reader.ok();
    }

    /// Adds a listening socket: requests for connections with it will be dropped.
    pub fn add_listener(&mut self, entry: &InetSkEntry) -> Result<(), ObjectError> {
        let end = Ends::of(entry, 0).local;
        self.listeners.extend(ends::reached_at(end, entry.v6only())?.map(ends::asking));
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.sockets.is_empty() && self.listeners.is_empty() && self.clients.is_empty()
    }

    /// Looks at the clients that nobody has accepted, and refuses what cannot be carried over.
    pub fn look(&mut self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        self.clients.look(cx)
    }

    /// Closes the gate, then reads all connections.
    pub fn read(&mut self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        if self.is_idle() && !self.clients.are_likely()? {
            return Ok(());
        }
        for socket in self.under(Layer::FallenBack) {
            fallback::drain(&socket.file).map_err(|why| socket.unread(why))?;
        }
        if let Some(first) = self.under(Layer::Tls).next() {
            let encrypted: Vec<_> = self.under(Layer::Tls).map(|socket| socket.file.as_ref()).collect();
            tls::drain(&encrypted).map_err(|why| first.unread(why))?;
        }
        if let Some(gate) = &mut self.gate {
            gate.refresh().map_err(LockError::from)?;
            let sockets = self.sockets.iter().map(|socket| socket.ends.key());
            let keys: Vec<_> = sockets.chain(self.clients.keys()).chain(self.listeners.clone()).collect();
            gate.lock(&keys).map_err(LockError::from)?;
        }
        let mut read = self.read_fallen_back()?;
        read.extend(self.read_plain()?);
        let mut states = HashMap::new();
        for socket in &self.sockets {
            let Some(connection) = read.remove(&socket.ino) else { continue };
            debug!(pid = socket.pid, fd = socket.fd, ends = %socket.ends, state = ?connection.state, "connection read");
            states.insert(socket.id, connection.state);
            self.read.push((socket.ino, connection));
        }
        cx.amend(|entry| {
            if let (Some(&state), Some(isk)) = (states.get(&entry.id), &mut entry.isk) {
                isk.state = state as u32;
            }
        });
        self.clients.read(self.gate.as_mut())?;
        info!(connections = self.sockets.len(), clients = self.clients.len(), lock = ?self.lock, "connections are held and read");
        Ok(())
    }

    /// Connections of sockets that are TCP and nothing else, by inode.
    fn read_plain(&self) -> Result<HashMap<u32, Connection>, ObjectError> {
        let mut idle = self.idle();
        let plain = self.sockets.iter().filter(|socket| socket.layer != Layer::FallenBack);
        let others: Vec<&Socket> = match self.caching {
            Caching::Used => plain.filter(|socket| !idle.contains_key(&socket.ino)).collect(),
            Caching::Verified => plain.collect(),
        };
        for socket in others.iter().filter(|socket| socket.layer == Layer::Tls) {
            tls::expect_idle(&socket.file).map_err(|why| socket.unread(why))?;
        }
        let mut read = HashMap::new();
        let told = parallel::share(&others, read_apart).into_iter().collect::<SysResult<Vec<_>>>()?.concat();
        let mut told = told.as_slice();
        for socket in others {
            let connection = listen(&mut told)
                .unwrap_or_else(|| Err("the process that reads connections ended early".into()))
                .map_err(|why| socket.unread(why))?;
            if let Some(idle) = idle.remove(&socket.ino) {
                self.compare(socket, &idle, &connection)?;
            }
            read.insert(socket.ino, connection);
        }
        info!(idle = idle.len(), others = read.len(), "connections are read");
        read.extend(idle);
        for socket in self.under(Layer::Tls) {
            let Some(connection) = read.get_mut(&socket.ino) else { continue };
            connection.stream.tls = Some(tls::read(&socket.file, connection.state).map_err(|why| socket.unread(why))?);
        }
        Ok(read)
    }

    fn under(&self, layer: Layer) -> impl Iterator<Item = &Socket> {
        self.sockets.iter().filter(move |socket| socket.layer == layer)
    }

    /// Connections of MPTCP that go on as plain TCP, by inode.
    fn read_fallen_back(&self) -> Result<HashMap<u32, Connection>, ObjectError> {
        let mut gathered = HashMap::new();
        for socket in self.under(Layer::FallenBack) {
            gathered.insert(socket.ino, fallback::gather(&socket.file).map_err(|why| socket.unread(why))?);
        }
        let Some(first) = self.under(Layer::FallenBack).next() else { return Ok(HashMap::new()) };
        let numbers = fallback::numbers(self.numbers.as_ref()).map_err(|why| first.unread(why))?;
        let read = |socket: &Socket| {
            let gathered = gathered.get(&socket.ino).copied().unwrap_or_default();
            let read = fallback::read(&socket.file, gathered, numbers.get(&socket.ino.into()), &socket.info);
            read.map(|connection| (socket.ino, connection)).map_err(|why| socket.unread(why))
        };
        self.under(Layer::FallenBack).map(read).collect()
    }

    /// Connections that have nothing in their queues, by inode.
    fn idle(&self) -> HashMap<u32, Connection> {
        let Some(reader) = &self.numbers else { return HashMap::new() };
        let numbers = reader.read().unwrap_or_else(|err| {
            debug!(%err, "connections are read one by one");
            HashMap::new()
        });
        let connection = |socket: &Socket| Connection::of(numbers.get(&socket.ino.into())?, &socket.info);
        let plain = self.sockets.iter().filter(|socket| socket.layer != Layer::FallenBack);
        let found = plain.filter_map(|socket| Some((socket.ino, connection(socket)?)));
        found.filter(|(_, connection)| connection.is_idle()).collect()
    }

    /// What was believed has to be what is told, unless a packet was on its way when the gate was closed.
    fn compare(&self, socket: &Socket, idle: &Connection, read: &Connection) -> Result<(), ObjectError> {
        if idle.lasting() == read.lasting()
            || self.idle().get(&socket.ino).is_none_or(|now| now.lasting() != idle.lasting())
        {
            return Ok(());
        }
        let [kept, read] = [idle, read].map(|connection| format!("{:?}", connection.stream));
        Err(ObjectError::Stale { pid: socket.pid, fd: socket.fd, kept, read })
    }

    /// Writes the images. A tree that runs on need not wait for that.
    pub fn write(&self, dir: &ImageDir) -> Result<(), ObjectError> {
        for (ino, connection) in &self.read {
            let kind = if connection.stream.tls.is_some() { ImageKind::TcpTls } else { ImageKind::TcpStream };
            let mut image = dir.writer(kind.id((*ino).into()))?;
            image.message_with_payload(&connection.stream, &connection.data)?;
            image.finish()?;
        }
        self.clients.write(dir)
    }

    /// Lets packets pass again: the tree is about to run on, and the sockets are as they were. Ours of them are closed, so
    /// that one which the tree closes is closed.
    pub fn let_go(&mut self) {
        self.sockets.clear();
        self.clients.let_go();
        if let Some(Err(err)) = self.gate.as_ref().map(Gate::unlock) {
            tracing::warn!(%err, "connections are held until this engine ends");
        }
    }

    /// Says in the inventory how connections are held.
    pub fn describe(&self, inventory: &mut InventoryEntry) {
        if self.is_idle() {
            return;
        }
        inventory.network_lock_method = Some(CRIU_LOCK_SKIP);
        inventory.network_lock = Some(self.lock.number());
        inventory.gate = self.gate.is_some().then(|| self.name.clone());
    }

    /// Makes the gate permanent and kills the tree, whatever becomes of us meanwhile.
    pub fn seal(&mut self, frozen: &Frozen) -> Result<(), ObjectError> {
        let idle = self.is_idle();
        let Some(gate) = self.gate.as_mut().filter(|_| !idle) else { return Ok(()) };
        let failure = apart::run(|| {
            if let Err(err) = gate.pin(&self.name) {
                return Ok(err.to_string().into_bytes());
            }
            for process in &frozen.processes {
                // One that is dead already is as good as killed.
                let _ = process.pidfd.kill(Signal::SIGKILL);
            }
            Ok(Vec::new())
        })?;
        if failure.is_empty() {
            gate.leave();
            return Ok(());
        }
        Err(ObjectError::Unpinned { why: String::from_utf8_lossy(&failure).into_owned() })
    }

    /// Has the sockets end without a word to anybody, when the tree is gone.
    pub fn silence(&self) {
        for socket in &self.sockets {
            // What has no repair mode can be ended all the same: the gate swallows its last words.
            let silenced = match socket.layer {
                Layer::FallenBack => inet_diag::destroy(socket.ends.local, socket.ends.remote),
                Layer::None | Layer::Tls => set_repair(&socket.file, Repair::On),
            };
            if let Err(err) = silenced {
                tracing::warn!(ends = %socket.ends, %err, "a socket may leave something behind");
            }
        }
    }
}

/// Reads connections in a process that nobody kills, and gives what [`listen`] understands.
fn read_apart(sockets: &[&Socket]) -> SysResult<Vec<u8>> {
    /// So many are read, a quarter of a millisecond, before anybody asks whether it is still wanted.
    const SOME: usize = 16;
    let engine = Pid::this();
    apart::run(|| {
        // Whoever is in repair mode is not to be interrupted by the program, if that runs on because we die.
        be_urgent();
        let (mut out, mut room) = (Vec::new(), vec![1; ROOM]);
        let lives = |n: &usize| !n.is_multiple_of(SOME) || Pid::parent() == engine;
        for (_, socket) in sockets.iter().enumerate().take_while(|(n, _)| lives(n)) {
            tell(read_with(&socket.file, socket.reuse, &mut room), &mut out);
        }
        Ok(out)
    })
}

/// What was read of a connection, as bytes for the engine: whether that went well, the length, and the connection or the
/// error.
fn tell(outcome: Result<Connection, TcpError>, out: &mut Vec<u8>) {
    let (good, body) = match outcome {
        Ok(connection) => {
            let mut body = vec![connection.state as u8];
            // Growing a vector cannot fail.
            let _ = connection.stream.encode_length_delimited(&mut body);
            body.extend(connection.data);
            (1, body)
        }
        Err(err) => (0, err.to_string().into_bytes()),
    };
    out.push(good);
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend(body);
}

/// What [`tell`] has told of the next connection.
fn listen(told: &mut &[u8]) -> Option<Told> {
    let (&good, rest) = told.split_first()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let (body, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    *told = rest;
    if good == 0 {
        return Some(Err(String::from_utf8_lossy(body).into_owned()));
    }
    let (&state, mut body) = body.split_first()?;
    let state = State::of_number(state.into())?;
    let stream = TcpStreamEntry::decode_length_delimited(&mut body).ok()?;
    Some(Ok(Connection { state, stream, data: body.to_vec() }))
}
