//! Clients that have connected to a server and that it has not accepted yet.
//!
//! Their ends have no descriptor, so nobody can put them into repair mode; and whoever accepted one would change the
//! program, also where the dump fails or the program is to run on. An eBPF iterator looks at them where they wait, and
//! takes nothing. How they come back is told in [`super::admit`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use criu_common::gate;
use criu_common::pending;

use super::{Ends, State};
use crate::dump::DumpOptions;
use crate::image::proto::{InetSkEntry, TcpClientEntry, TcpStreamEntry};
use crate::image::{ImageDir, ImageKind};
use crate::kernel::ebpf::EbpfResult;
use crate::kernel::ebpf::pending::{Reader, Waiting, Which};
use crate::kernel::gate::Gate;
use crate::kernel::tcp::{self, options};
use crate::object::file::{Capture, Seen};
use crate::object::inet::{IPPROTO_MPTCP, split_end};
use crate::object::tcp::lock::LockError;
use crate::object::{ObjectError, Refusal};

/// What can be done where they cannot be carried over.
const ADVICE: &str = "dump when it has accepted them, or give --skip-in-flight to drop them";

/// Why the clients of a listening socket cannot be carried over at all, behind what they are, and what can be done.
pub fn obstacle(options: &DumpOptions, entry: &InetSkEntry) -> Option<(&'static str, &'static str)> {
    if !options.tcp_established {
        return Some(("", "give --tcp-established to keep them, or --skip-in-flight to drop them"));
    }
    if entry.proto as i32 == IPPROTO_MPTCP {
        return Some((": connections of MPTCP, which nobody can make anew", ADVICE));
    }
    None
}

/// A listening socket.
#[derive(Debug)]
struct Server {
    /// The description.
    id: u32,
    ino: u64,
    /// Whose it is.
    pid: i32,
    fd: i32,
    /// Open for as long as it is asked about.
    file: Arc<OwnedFd>,
}

/// A client as images have it.
#[derive(Debug)]
struct Client {
    entry: TcpClientEntry,
    data: Vec<u8>,
    ends: Ends,
    /// Why it cannot be carried over.
    refused: Option<&'static str>,
    /// Whose it would be.
    pid: i32,
    fd: i32,
}

/// All clients of a dump that wait.
#[derive(Debug, Default)]
pub struct Clients {
    servers: Vec<Server>,
    /// How many there were when the listening sockets were seen.
    expected: u32,
    /// Whether some may be in the middle of a handshake, of which a listening socket tells nothing.
    unfinished: bool,
    reader: Option<Reader>,
    found: Vec<Client>,
}

impl Clients {
    /// Adds a listening socket where so many wait as yet. `unfinished`: whether handshakes are to be carried over that are
    /// not over.
    pub fn add(&mut self, seen: &Seen, entry: &InetSkEntry, waiting: u32, unfinished: bool) {
        self.expected += waiting;
        self.unfinished |= unfinished;
        let (pid, file) = (seen.pid.as_raw(), Arc::clone(&seen.file));
        self.servers.push(Server { id: seen.id, ino: entry.ino.into(), pid, fd: seen.fd, file });
    }

    /// Closes what we hold of the servers.
    pub fn let_go(&mut self) {
        self.servers.clear();
    }

    /// Whether there is nothing to carry over.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Whether there may be some by now.
    pub fn are_likely(&self) -> Result<bool, ObjectError> {
        Ok(self.unfinished || self.waiting()? > 0)
    }

    /// How many wait by now.
    fn waiting(&self) -> Result<u32, ObjectError> {
        self.servers.iter().try_fold(0, |sum, server| Ok(sum + tcp::info(&server.file)?.waiting))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// The first look, at which more may come at any time: what cannot be carried over is refused.
    pub fn look(&mut self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        if self.expected == 0 {
            return Ok(());
        }
        match self.reader(self.expected).and_then(|reader| self.reader.insert(reader).read()) {
            Ok(waiting) => self.found = self.clients(waiting),
            Err(err) => {
                for server in &self.servers {
                    let what = format!("TCP clients wait to be accepted, and cannot be looked at: {err}");
                    let advice = ADVICE.to_owned();
                    cx.refuse(Refusal { pid: server.pid, fd: Some(server.fd), what, advice });
                }
            }
        }
        for (client, why) in self.found.iter().filter_map(|client| Some((client, client.refused?))) {
            let what = format!("TCP client {}, which waits to be accepted, {why}", client.ends.remote);
            cx.refuse(Refusal { pid: client.pid, fd: Some(client.fd), what, advice: ADVICE.to_owned() });
        }
        Ok(())
    }

    fn reader(&self, expected: u32) -> EbpfResult<Reader> {
        let inodes: Vec<u64> = self.servers.iter().map(|server| server.ino).collect();
        Reader::new(&inodes, expected, Which::All)
    }

    /// What the gate knows those by that were found.
    pub fn keys(&self) -> impl Iterator<Item = gate::Connection> {
        self.found.iter().map(|client| client.ends.key())
    }

    /// What reads them, unless there are none.
    fn late_reader(&mut self) -> Result<Option<Reader>, ObjectError> {
        if self.reader.is_some() || !self.are_likely()? {
            return Ok(self.reader.take());
        }
        let waiting = self.waiting()?;
        match self.reader(waiting) {
            Ok(reader) => Ok(Some(reader)),
            Err(err) if waiting == 0 => {
                tracing::warn!(%err, "clients whose handshake with a server is not over are not carried over");
                Ok(None)
            }
            Err(err) => Err(self.failed(err.to_string())),
        }
    }

    /// Reads them while they are held. Some may have come since the last look: these are held as well, and all are read
    /// again.
    pub fn read(&mut self, mut gate: Option<&mut Gate>) -> Result<(), ObjectError> {
        /// However many come.
        const ATTEMPTS: u32 = 100;
        let Some(mut reader) = self.late_reader()? else { return Ok(()) };
        for _ in 0..ATTEMPTS {
            let held: std::collections::HashSet<gate::Connection> = self.keys().collect();
            let waiting = reader.read().map_err(|err| self.failed(err.to_string()))?;
            self.found = self.clients(waiting);
            let new: Vec<gate::Connection> = self.keys().filter(|key| !held.contains(key)).collect();
            if new.is_empty() || gate.is_none() {
                return self.found.iter().try_for_each(Client::check);
            }
            if let Some(gate) = &mut gate {
                gate.lock(&new).map_err(LockError::from)?;
            }
        }
        Err(self.failed(format!("more and more came, {} by now", self.found.len())))
    }

    fn failed(&self, why: String) -> ObjectError {
        let (pid, fd) = self.servers.first().map_or((0, 0), |server| (server.pid, server.fd));
        ObjectError::Clients { pid, fd, why }
    }

    fn clients(&self, waiting: Vec<Waiting>) -> Vec<Client> {
        let server = |ino: u64| self.servers.iter().find(|server| server.ino == ino);
        waiting
            .into_iter()
            .filter_map(|one| server(one.client.listener).map(|server| Client::of(one, server)))
            .collect()
    }

    /// Writes the image.
    pub fn write(&self, dir: &ImageDir) -> Result<(), ObjectError> {
        if self.found.is_empty() {
            return Ok(());
        }
        let mut image = dir.writer(ImageKind::TcpClients)?;
        for client in &self.found {
            image.message_with_payload(&client.entry, &client.data)?;
        }
        image.finish()?;
        Ok(())
    }
}

impl Client {
    fn of(waiting: Waiting, server: &Server) -> Self {
        let ends = ends(&waiting.client);
        let refused = unsupported(&waiting, &ends);
        let entry = entry(&waiting, &ends, server.id);
        Self { entry, data: waiting.data, ends, refused, pid: server.pid, fd: server.fd }
    }

    fn check(&self) -> Result<(), ObjectError> {
        let Some(why) = self.refused else { return Ok(()) };
        Err(ObjectError::Clients { pid: self.pid, fd: self.fd, why: format!("{} {why}", self.ends.remote) })
    }
}

/// A client as images have it, but for whose it is, and why it cannot be carried over.
pub fn described(waiting: &Waiting) -> (TcpClientEntry, Option<&'static str>) {
    let ends = ends(&waiting.client);
    (entry(waiting, &ends, 0), unsupported(waiting, &ends))
}

/// The ends of a client's connection, the server's as the local one.
pub fn ends(client: &pending::Client) -> Ends {
    let words = |bytes: &[u8; 16]| -> Vec<u32> {
        bytes.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect()
    };
    let [local, remote] = [words(&client.local), words(&client.remote)];
    let [own, peers] = client.ports.map(|port| u32::from(u16::from_be_bytes(port)));
    Ends::of_words(client.family.into(), 0, (&local, own), (&remote, peers))
}

/// TCP_NEW_SYN_RECV, of a handshake that is not over. It comes back as if it were.
pub const UNFINISHED: u32 = 12;

/// The state that a client's socket is in when it is back.
fn state(number: u8) -> Option<State> {
    if u32::from(number) == UNFINISHED { Some(State::Established) } else { State::of_number(number.into()) }
}

/// Why a client cannot be carried over.
fn unsupported(waiting: &Waiting, ends: &Ends) -> Option<&'static str> {
    /// TCP_SYN_RECV
    const FAST_OPEN: u8 = 3;
    /// The kernel makes no connections with less (`bpf_sk_assign_tcp_reqsk` in net/core/filter.c).
    const SEGMENTS: [u16; 2] = [536, 1220];
    let client = &waiting.client;
    let v6 = ends.on_the_wire().local.is_ipv6();
    match state(client.state) {
        _ if client.state == FAST_OPEN => {
            Some("has sent data with its first packet (TCP Fast Open), and is not connected yet")
        }
        Some(State::Established | State::CloseWait | State::Close) if client.snd_nxt == client.snd_una => {
            match client {
                _ if client.keys != [0; 2] => {
                    Some("signs its packets (TCP MD5 or TCP-AO), and the kernel keeps the keys to itself")
                }
                _ if client.mptcp != 0 => Some("has asked for MPTCP"),
                _ if client.urgent != 0 => Some("has sent urgent data"),
                _ if client.interface != 0 => {
                    Some("is at one interface alone (SO_BINDTODEVICE, or an address of one link)")
                }
                _ if client.mss < SEGMENTS[usize::from(v6)] => {
                    Some("takes smaller segments than the kernel makes anew")
                }
                _ if !waiting.is_whole() => Some("has sent data that cannot be read"),
                _ => None,
            }
        }
        _ => Some("has been answered already"),
    }
}

fn entry(waiting: &Waiting, ends: &Ends, id: u32) -> TcpClientEntry {
    let client = &waiting.client;
    let ((src_addr, src_port), (dst_addr, dst_port)) = (split_end(ends.local), split_end(ends.remote));
    TcpClientEntry {
        id,
        family: client.family.into(),
        src_addr,
        src_port,
        dst_addr,
        dst_port,
        state: client.state.into(),
        stream: stream(waiting),
        ts_recent: client.ts_recent,
        ecn: client.ecn & 1 != 0,
        rcvbuf: client.rcvbuf,
    }
}

/// What a client takes that has offered nothing yet, as far as the kernel tells: more than is sent at first (RFC 6928), and
/// less than any client offers.
const FIRST_WINDOW: u32 = 32 << 10;

/// Its stream, as that of another connection. Nothing was ever sent to it.
fn stream(waiting: &Waiting) -> TcpStreamEntry {
    let client = &waiting.client;
    let reset = State::of_number(client.state.into()) == Some(State::Close);
    let option = |has: u8, option: u8| if has != 0 { u32::from(option) } else { 0 };
    TcpStreamEntry {
        inq_len: waiting.data.len() as u32,
        // A connection that was reset counts as one that has ended, whether its client had said so or not.
        inq_seq: client.rcv_nxt.wrapping_add((reset && !waiting.has_ended()).into()),
        outq_seq: client.snd_nxt.wrapping_add(reset.into()),
        unsq_len: Some(0),
        opt_mask: option(client.timestamps, options::TIMESTAMPS)
            | option(client.sack, options::SACK)
            | option(client.scaled, options::WSCALE),
        snd_wscale: client.snd_wscale.into(),
        rcv_wscale: Some(client.rcv_wscale.into()),
        mss_clamp: client.mss.into(),
        timestamp: (client.timestamps != 0).then(|| timestamp(client)),
        snd_wnd: Some(if u32::from(client.state) == UNFINISHED { FIRST_WINDOW } else { client.snd_wnd }),
        rcv_wnd: Some(client.rcv_wnd),
        rcv_wup: Some(client.rcv_wup),
        reset: reset.then_some(true),
        ..TcpStreamEntry::default()
    }
}

/// What its socket would send for a timestamp now, as TCP_TIMESTAMP tells it: the lowest bit says what it counts in.
fn timestamp(client: &pending::Client) -> u32 {
    let microseconds = client.microseconds != 0;
    let ticks = client.now / if microseconds { 1_000 } else { 1_000_000 };
    let stamp = (ticks as u32).wrapping_add(client.ts_offset);
    // Never before one that was sent.
    stamp.wrapping_add(1) & !1 | u32::from(microseconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::tcp::state::Numbers;

    fn waiting(change: impl FnOnce(&mut pending::Client)) -> Waiting {
        let mut client = pending::Client {
            family: libc::AF_INET as u16,
            state: State::Established as u8,
            copied_seq: 1000,
            rcv_nxt: 1003,
            snd_nxt: 7,
            snd_una: 7,
            mss: 1460,
            ..pending::Client::default()
        };
        client.local[..4].copy_from_slice(&[127, 0, 0, 1]);
        client.remote[..4].copy_from_slice(&[10, 0, 0, 1]);
        client.ports = [80u16.to_be_bytes(), 4000u16.to_be_bytes()];
        change(&mut client);
        Waiting { client, data: b"one".to_vec(), readable: true }
    }

    fn refused(change: impl FnOnce(&mut pending::Client)) -> bool {
        let waiting = waiting(change);
        unsupported(&waiting, &ends(&waiting.client)).is_some()
    }

    #[test]
    fn what_cannot_be_carried_over_is_refused() {
        assert!(!refused(|_| {}));
        assert!(!refused(|c| (c.state, c.rcv_nxt) = (State::CloseWait as u8, 1004)));
        assert!(!refused(|c| c.state = State::Close as u8));
        assert!(refused(|c| c.state = 3));
        assert!(refused(|c| c.state = State::FinWait1 as u8));
        assert!(refused(|c| c.snd_nxt = 8));
        assert!(refused(|c| c.keys[1] = 1));
        assert!(refused(|c| c.urgent = 1));
        assert!(refused(|c| c.interface = 2));
        assert!(refused(|c| c.mss = 500));
        assert!(refused(|c| c.rcv_nxt = 1010));
        let unreadable = Waiting { readable: false, ..waiting(|_| {}) };
        assert!(unsupported(&unreadable, &ends(&unreadable.client)).is_some());
    }

    #[test]
    fn numbers_are_those_of_other_connections() {
        let numbers = |change: fn(&mut pending::Client)| {
            let waiting = waiting(change);
            let state = State::of_number(waiting.client.state.into()).expect("a state");
            let numbers = Numbers::of(state, &stream(&waiting)).expect("whole");
            (numbers.received_from, numbers.received_to, numbers.sent_from, numbers.written_to)
        };
        let expected = (1000, 1003, 7, 7);
        assert_eq!(numbers(|_| {}), expected);
        assert_eq!(numbers(|c| (c.state, c.rcv_nxt) = (State::CloseWait as u8, 1004)), expected);
        assert_eq!(numbers(|c| c.state = State::Close as u8), expected);
        assert_eq!(numbers(|c| (c.state, c.rcv_nxt) = (State::Close as u8, 1004)), expected);
    }

    #[test]
    fn both_ends_have_addresses() {
        assert_eq!(ends(&waiting(|_| {}).client).to_string(), "127.0.0.1:80 to 10.0.0.1:4000");
    }

    #[test]
    fn timestamps_go_on() {
        let stamp = |microseconds: u8, now: u64, ts_offset: u32| {
            timestamp(&pending::Client { microseconds, now, ts_offset, ..pending::Client::default() })
        };
        assert_eq!(stamp(0, 5_000_000, 10), 16);
        assert_eq!(stamp(1, 5_000, 11), 17);
        assert_eq!(stamp(0, 1_000_000, u32::MAX), 0);
    }
}
