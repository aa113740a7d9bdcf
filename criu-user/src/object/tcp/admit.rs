//! Clients that nobody had accepted, on their way back.
//!
//! No call makes a socket that waits to be accepted: only the kernel does, when a handshake is over. So the last packet of
//! each handshake is sent once more, by us and with the mark, and an eBPF program tells the kernel that it may be
//! believed, and what had been agreed on. What the client had sent follows in packets of the same kind, as the kernel
//! takes it; then the end of its side of the stream, or its reset. All the while the client hears nothing, because the
//! gate is closed; when it opens, it is told how far the server is.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use criu_common::gate;
use criu_common::pending::{Admission, Attributes};
use etherparse::TcpOptionElement;
use nix::errno::Errno;

use super::course::{Flag, Packets, Segment, scaled};
use super::packet;
use super::rebuild::{Pass, Wire};
use super::state::Numbers;
use super::{Ends, State, clients};
use crate::image::ImageKind;
use crate::image::proto::{InetSkEntry, SkOptsEntry, TcpClientEntry, TcpStreamEntry};
use crate::kernel::ebpf::admit::Door;
use crate::kernel::ebpf::pending::{Reader, Waiting, Which};
use crate::kernel::inet_diag::Asker;
use crate::kernel::tcp::options;
use crate::object::file::Planner;
use crate::object::{ObjectError, sockopt};
use crate::plan::{Deed, FileRef, Opened, Resumption};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Where the kernel keeps whether it answers with cookies, on whose way all this goes.
const COOKIES: &str = "/proc/sys/net/ipv4/tcp_syncookies";
/// How long the kernel may take for a packet.
const PATIENCE: Duration = Duration::from_secs(2);

/// A client and what it had sent.
type Waited = (TcpClientEntry, Vec<u8>);

/// What the images have, by the description of the listening socket.
#[derive(Debug, Default)]
struct Read(Option<HashMap<u32, Vec<Waited>>>);

/// Plans the way back of the clients of a listening socket.
pub fn plan(entry: &Arc<InetSkEntry>, file: FileRef, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
    if cx.shelf.get::<Read>().0.is_none() {
        let mut all: HashMap<u32, Vec<_>> = HashMap::new();
        if cx.dir.exists(ImageKind::TcpClients)? {
            let mut reader = cx.dir.reader(ImageKind::TcpClients)?;
            while let Some((client, data)) = reader.message_with_payload::<TcpClientEntry>()? {
                all.entry(client.id).or_default().push((client, data));
            }
        }
        cx.shelf.get::<Read>().0 = Some(all);
    }
    let waiting = cx.shelf.get::<Read>().0.as_mut().and_then(|all| all.remove(&entry.id)).unwrap_or_default();
    if waiting.is_empty() || cx.options.tcp_close || cx.options.skip_in_flight {
        return Ok(());
    }
    if !cx.options.tcp_established {
        return Err(ObjectError::Unsupported {
            what: format!("{} TCP client(s) that wait to be accepted on port {}", waiting.len(), entry.src_port),
            advice: "give --tcp-established to keep them, or --skip-in-flight to drop them",
        });
    }
    let clients = waiting.into_iter().map(|(client, data)| Client::of(&client, data)).collect::<Result<Vec<_>, _>>()?;
    let reception = Arc::clone(cx.shelf.get::<Arc<Reception>>());
    let wire = Arc::clone(cx.shelf.get::<Arc<Wire>>());
    let connections = &mut cx.plan.connections;
    connections.files.push(file);
    let mut guests = reception.guests();
    if guests.is_empty() {
        connections.release.push(Box::new(Receive(Arc::clone(&reception), Arc::clone(&wire))));
    }
    for client in clients {
        let client = Arc::new(client);
        connections.locked.push(client.ends.key());
        let greet = Box::new(Greet(Arc::clone(&client), Arc::clone(&wire)));
        connections.resume.push(Resumption { of: client.ends.key(), quiet: false, deed: greet });
        guests.push(Guest { server: file, entry: Arc::clone(entry), client });
    }
    Ok(())
}

/// A client on its way back.
#[derive(Debug)]
struct Client {
    ends: Ends,
    state: State,
    /// Whether it may not have heard of us yet.
    asks: bool,
    stream: TcpStreamEntry,
    numbers: Numbers,
    ts_recent: u32,
    ecn: bool,
    /// Size of its receive buffer.
    rcvbuf: u32,
    data: Vec<u8>,
    /// What its new socket offers: the window in bytes, and the largest segment.
    offer: OnceLock<(u32, u16)>,
}

impl Client {
    fn of(entry: &TcpClientEntry, data: Vec<u8>) -> Result<Self, ObjectError> {
        let ends =
            Ends::of_words(entry.family, 0, (&entry.src_addr, entry.src_port), (&entry.dst_addr, entry.dst_port));
        let wrong = |what: String| ObjectError::contradiction(format!("the client {}: {what}", ends.remote));
        let asks = entry.state == clients::UNFINISHED;
        let state = if asks { Some(State::Established) } else { State::of_number(entry.state) };
        let state = state
            .filter(|state| [State::Established, State::CloseWait, State::Close].contains(state))
            .ok_or_else(|| wrong(format!("it waits in TCP state {}", entry.state)))?;
        let numbers = Numbers::of(state, &entry.stream).map_err(|err| wrong(err.to_string()))?;
        let stream = entry.stream.clone();
        Ok(Self {
            ends,
            state,
            asks,
            stream,
            numbers,
            ts_recent: entry.ts_recent,
            ecn: entry.ecn,
            rcvbuf: entry.rcvbuf,
            data,
            offer: OnceLock::new(),
        })
    }

    /// What the kernel is told.
    fn attributes(&self) -> Attributes {
        let has = |option: u8| u8::from(self.stream.opt_mask & u32::from(option) != 0);
        let stamp = self.stream.timestamp.unwrap_or_default();
        Attributes {
            rcv_tsval: self.ts_recent,
            rcv_tsecr: stamp & !1,
            mss: self.stream.mss_clamp as u16,
            rcv_wscale: self.stream.rcv_wscale() as u8,
            snd_wscale: self.stream.snd_wscale as u8,
            ecn_ok: self.ecn.into(),
            wscale_ok: has(options::WSCALE),
            sack_ok: has(options::SACK),
            tstamp_ok: has(options::TIMESTAMPS),
            usec_ts_ok: (stamp & 1) as u8,
            reserved: [0; 3],
        }
    }

    /// What had been agreed on, as it stands in the answer to a request.
    fn agreed(&self, largest: u16) -> Vec<TcpOptionElement> {
        /// What timestamps take of each segment.
        const STAMPS: u16 = 12;
        let of = self.attributes();
        let has = |option: u8| option != 0;
        let largest = if has(of.tstamp_ok) { largest.saturating_add(STAMPS) } else { largest };
        let mut options = vec![TcpOptionElement::MaximumSegmentSize(largest)];
        if has(of.sack_ok) {
            options.push(TcpOptionElement::SelectiveAcknowledgementPermitted);
        }
        if has(of.tstamp_ok) {
            options.push(TcpOptionElement::Timestamp(of.rcv_tsecr, of.rcv_tsval));
        }
        if has(of.wscale_ok) {
            options.push(TcpOptionElement::WindowScale(of.rcv_wscale));
        }
        options
    }

    fn packets(&self) -> Packets<'_> {
        Packets { numbers: self.numbers, stream: &self.stream }
    }

    /// Sends a packet as if from the client.
    fn inject(&self, wire: &Wire, segment: &Segment, data: &[u8]) -> Result<(), Failure> {
        let ends = self.ends.swapped();
        let packet = packet::build_with(&ends, segment, None, data)?;
        Ok(wire.send(&packet, ends.on_the_wire().remote, Pass::Marked)?)
    }

    /// The receive buffer that its new socket begins with: the same, and more where most of it was full. The kernel packs
    /// bytes its own way.
    fn buffer(&self) -> u32 {
        const SPARE: u32 = 64 << 10;
        let full = self.data.len() > self.rcvbuf as usize / 2;
        if full { self.rcvbuf.saturating_add(self.rcvbuf / 4).saturating_add(SPARE) } else { self.rcvbuf }
    }

    /// The packet that ends the handshake.
    fn arrive(&self, wire: &Wire) -> Result<(), Failure> {
        let end = self.packets().peer_fin();
        self.inject(wire, &Segment { flag: Flag::None, seq: self.numbers.received_from, ..end }, &[])
    }

    /// What its socket lacks yet, as much as has room; whether it lacks anything.
    fn complete(&self, wire: &Wire, now: &Waiting) -> Result<bool, Failure> {
        let end = self.packets().peer_fin();
        let known = now.client.rcv_nxt.wrapping_sub(self.numbers.received_from) as usize;
        if let Some(mut missing) = self.data.get(known..).filter(|missing| !missing.is_empty()) {
            let offered = now.client.rcv_wup.wrapping_add(now.client.rcv_wnd).wrapping_sub(now.client.rcv_nxt);
            // One byte more than there is room for brings an answer with a new window.
            missing = &missing[..missing.len().min((offered as usize).max(1))];
            let mut seq = now.client.rcv_nxt;
            while let Some((piece, rest)) =
                missing.split_at_checked(fitting(missing.len())).filter(|(p, _)| !p.is_empty())
            {
                self.inject(wire, &Segment { flag: Flag::None, seq, ..end }, piece)?;
                seq = seq.wrapping_add(piece.len() as u32);
                missing = rest;
            }
            return Ok(true);
        }
        match self.state {
            State::CloseWait if known == self.data.len() => self.inject(wire, &end, &[])?,
            State::Close if State::of_number(now.client.state.into()) != Some(State::Close) => {
                self.inject(wire, &self.packets().reset(), &[])?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// How much of so many bytes a packet is to have. What the kernel allocates for one is a power of two, with room for its
/// own (`struct skb_shared_info`, headers), and all of it counts as used of the buffer.
fn fitting(length: usize) -> usize {
    const OWN: usize = 512;
    let sizes = [32 << 10, 16 << 10, 8 << 10, 4 << 10, 2 << 10].map(|size: usize| size - OWN);
    sizes.into_iter().find(|size| *size <= length).unwrap_or(length)
}

/// A listening socket and one of its clients.
#[derive(Debug)]
struct Guest {
    server: FileRef,
    entry: Arc<InetSkEntry>,
    client: Arc<Client>,
}

/// All clients of a restore, in the order in which they were.
#[derive(Debug, Default)]
struct Reception(Mutex<Vec<Guest>>);

impl Reception {
    fn guests(&self) -> std::sync::MutexGuard<'_, Vec<Guest>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings all clients back.
#[derive(Debug)]
struct Receive(Arc<Reception>, Arc<Wire>);

impl Deed for Receive {
    fn describe(&self) -> String {
        format!("bring back {} TCP client(s) that wait to be accepted", self.0.guests().len())
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        if std::fs::read_to_string(COOKIES).is_ok_and(|value| value.trim() == "0") {
            return Err(format!(
                "the kernel makes no sockets for them while {COOKIES} says 0: set it to 1, or give --skip-in-flight to drop them"
            )
            .into());
        }
        let guests = self.0.guests();
        let clients: Vec<&Client> = guests.iter().map(|guest| &*guest.client).collect();
        let admission = |client: &Client| Admission { attributes: client.attributes(), ..Admission::default() };
        let admissions: Vec<_> = clients.iter().map(|client| (client.ends.key(), admission(client))).collect();
        let door = Door::new(&admissions)?;
        let (wire, asker) = (&*self.1, Asker::new()?);
        let mut inodes = Vec::new();
        for guest in guests.iter() {
            let server = opened.get(guest.server).ok_or("a listening socket is not open")?;
            inodes.push(nix::sys::stat::fstat(server)?.st_ino);
            if guest.client.asks {
                // What it has asked for is in the kernel still, without anybody to answer.
                asker.forget_request(guest.client.ends.local, guest.client.ends.remote)?;
            }
            let arrive = || guest.client.arrive(wire).and_then(|()| wait_for(&guest.client, &asker, &door));
            with_buffer(server, &guest.entry.opts, guest.client.buffer(), arrive)?;
        }
        inodes.dedup();
        complete(&clients, wire, &mut Reader::new(&inodes, clients.len() as u32, Which::Connected)?)
    }
}

/// Does something while a listening socket has a receive buffer of this size: sockets that are made of it begin with that.
fn with_buffer(
    server: &OwnedFd,
    own: &SkOptsEntry,
    size: u32,
    deed: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    if size == own.so_rcvbuf {
        return deed();
    }
    sockopt::restore_buffers(server, &SkOptsEntry { so_rcvbuf: size, ..own.clone() })?;
    deed()?;
    Ok(sockopt::restore_buffers(server, own)?)
}

/// Waits until a client's socket is there.
fn wait_for(client: &Client, asker: &Asker, door: &Door) -> Result<(), Failure> {
    /// The kernel tells no inode of a socket that nobody has accepted; one with it is the listening socket.
    const NONE: u32 = 0;
    let begin = Instant::now();
    loop {
        let found = asker.find(client.ends.local, client.ends.remote)?;
        if found.is_some_and(|(inode, _)| inode == NONE) {
            return Ok(());
        }
        if begin.elapsed() > PATIENCE {
            return Err(refused(client, door));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Why the kernel has made no socket.
fn refused(client: &Client, door: &Door) -> Failure {
    let outcome = door.outcomes().ok().and_then(|all| all.get(&client.ends.key()).copied());
    let why = match outcome {
        None => "the packet that ends its handshake did not get to the server: is there a firewall at lo?".to_owned(),
        Some(0) => "the server's queue is full, or its port is no longer as it was".to_owned(),
        Some(libc::EINVAL) => "what was agreed on with it is switched off here: see tcp_timestamps, tcp_sack and tcp_window_scaling in /proc/sys/net/ipv4".to_owned(),
        Some(errno) => Errno::from_raw(errno).desc().to_owned(),
    };
    format!("no socket can be made for the client {}: {why}; --skip-in-flight drops such clients", client.ends.remote)
        .into()
}

/// Gives the clients' sockets all that they had, as fast as they take it.
fn complete(clients: &[&Client], wire: &Wire, reader: &mut Reader) -> Result<(), Failure> {
    let mut progress = (Instant::now(), 0);
    loop {
        let mut now: HashMap<gate::Connection, Waiting> =
            reader.read()?.into_iter().map(|waiting| (clients::ends(&waiting.client).key(), waiting)).collect();
        let mut incomplete = None;
        for client in clients {
            let gone = || format!("the client {} has gone again while it was brought back", client.ends.remote);
            let found = now.get(&client.ends.key()).ok_or_else(gone)?;
            if client.complete(wire, found)? {
                incomplete = Some(client.ends.remote);
            }
        }
        let Some(incomplete) = incomplete else {
            return clients.iter().try_for_each(|client| settle(client, now.remove(&client.ends.key())));
        };
        let received = now.values().map(|waiting| u64::from(waiting.client.rcv_nxt)).sum::<u64>();
        if received != progress.1 {
            progress = (Instant::now(), received);
        } else if progress.0.elapsed() > PATIENCE {
            return Err(stuck(incomplete));
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn stuck(client: SocketAddr) -> Failure {
    format!("the kernel does not take back all that the client {client} had sent; --skip-in-flight drops such clients")
        .into()
}

/// Makes sure that a client's socket is what it was.
fn settle(client: &Client, now: Option<Waiting>) -> Result<(), Failure> {
    let Some(Waiting { client: socket, data, .. }) = now.filter(|now| now.data == client.data) else {
        return Err(format!("what the client {} had sent is not what its new socket has", client.ends.remote).into());
    };
    tracing::debug!(ends = %client.ends, state = socket.state, bytes = data.len(), "a client waits again");
    client.offer.get_or_init(|| (socket.rcv_wnd, socket.advmss));
    Ok(())
}

/// Tells a client how far its server is: what was on its way to it meanwhile has been dropped. One that has asked for the
/// connection may be waiting for the answer; where it has that already, it takes it for a late copy.
#[derive(Debug)]
struct Greet(Arc<Client>, Arc<Wire>);

impl Deed for Greet {
    fn describe(&self) -> String {
        format!("greet the TCP client {}", self.0.ends.remote)
    }

    fn run(&self, _: &Opened) -> Result<(), Failure> {
        let client = &self.0;
        if client.state == State::Close {
            return Ok(());
        }
        let ack = client.numbers.received_to.wrapping_add(client.state.has_received_fin().into());
        let (window, largest) = client.offer.get().copied().unwrap_or_default();
        let segment =
            |scale| Segment { flag: Flag::None, seq: client.numbers.sent_to, ack, window: scaled(window, scale) };
        let packet = if client.asks {
            packet::answer(&client.ends, &segment(0), &client.agreed(largest))?
        } else {
            packet::build(&client.ends, &segment(client.stream.rcv_wscale()))?
        };
        Ok(self.1.send(&packet, client.ends.on_the_wire().remote, Pass::Plain)?)
    }
}
