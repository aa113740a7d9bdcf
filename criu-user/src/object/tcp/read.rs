//! Reads a connection from its socket.
//!
//! Repair mode lasts from the first call to the last of [`read`], some twenty microseconds: whoever reads must not be
//! killed meanwhile, or the program finds a socket that refuses everything. [`super::hold`] reads in a process that
//! nobody kills.

use std::os::fd::{AsFd, BorrowedFd};

use criu_common::numbers::Numbers;
use nix::poll::PollFlags;

use super::state::State;
use crate::image::proto::TcpStreamEntry;
use crate::kernel::fd::poll_now;
use crate::kernel::tcp::{self, Info, Lengths, Queue, Repair, options};
use crate::kernel::{SysError, socket};

/// Why a connection could not be read or made.
#[derive(Debug, thiserror::Error)]
pub enum TcpError {
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The socket is something else by now.
    #[error("TCP state {number} is none of a connection that could be kept")]
    State {
        /// What the kernel says.
        number: u8,
    },
    /// The queues changed while they were read.
    #[error("the {queue:?} queue had {expected} bytes and then {found}: packets came through; is the network locked?")]
    Moved {
        /// Which.
        queue: Queue,
        /// What was said.
        expected: u32,
        /// What was there.
        found: usize,
    },
    /// The queues grew while room was made for them.
    #[error("the queues hold {needed} bytes, more and more: packets came through; is the network locked?")]
    Long {
        /// Bytes.
        needed: usize,
    },
    /// A connection that nobody could read while something is on its way to the peer.
    #[error(
        "the peer has not acknowledged {left} bytes, which cannot be read below a socket of MPTCP; try again later"
    )]
    Undrained {
        /// Bytes.
        left: u32,
    },
    /// A connection that the eBPF program has not come by.
    #[error("a socket of MPTCP does not tell where its connection stands, and an eBPF program could not see it: {why}")]
    Unseen {
        /// Why.
        why: String,
    },
    /// A connection that the kernel encrypts, and something of it is under way.
    #[error("it is encrypted by the kernel, and something was {what} that cannot be read below TLS; try again later")]
    Encrypted {
        /// What it was.
        what: &'static str,
    },
    /// The kernel does not encrypt connections.
    #[error("it was encrypted by the kernel, and this one does not do that: {0}; load its module tls (CONFIG_TLS)")]
    NoTls(#[source] SysError),
    /// Lengths that contradict each other.
    #[error("{unsent} bytes are unsent, but only {written} were written")]
    Lengths {
        /// Never sent.
        unsent: u32,
        /// All.
        written: u32,
    },
    /// A packet could not be built.
    #[error("cannot build a packet from {from} to {to}: {why}")]
    Packet {
        /// Its sender.
        from: std::net::SocketAddr,
        /// Its receiver.
        to: std::net::SocketAddr,
        /// Why.
        why: String,
    },
}

/// A connection: what its images hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Connection {
    /// How far it is.
    pub state: State,
    /// Its numbers and what was agreed on.
    pub stream: TcpStreamEntry,
    /// What waits to be read, then what waits to be sent or acknowledged.
    pub data: Vec<u8>,
}

impl Connection {
    /// An established connection, by its numbers alone: all of it where nothing is in its queues.
    pub(super) fn of(numbers: &Numbers, info: &Info) -> Option<Self> {
        let state = State::of_number(numbers.state.into()).filter(|&state| state == State::Established)?;
        let scaled = info.options & options::WSCALE != 0;
        let stream = TcpStreamEntry {
            inq_len: numbers.rcv_nxt.wrapping_sub(numbers.copied_seq),
            inq_seq: numbers.rcv_nxt,
            outq_len: numbers.write_seq.wrapping_sub(numbers.snd_una),
            outq_seq: numbers.write_seq,
            unsq_len: Some(0),
            opt_mask: info.options.into(),
            snd_wscale: if scaled { info.snd_wscale.into() } else { 0 },
            rcv_wscale: scaled.then_some(info.rcv_wscale.into()),
            mss_clamp: numbers.mss.into(),
            timestamp: timestamp(numbers, info.options),
            rtt: Some(numbers.srtt >> 3).filter(|&rtt| rtt != 0),
            snd_wl1: Some(numbers.snd_wl1),
            snd_wnd: Some(numbers.snd_wnd),
            max_window: Some(numbers.max_window),
            rcv_wnd: Some(numbers.rcv_wnd),
            rcv_wup: Some(numbers.rcv_wup),
            ..TcpStreamEntry::default()
        };
        Some(Self { state, stream, data: Vec::new() })
    }

    /// Whether nothing is in its queues.
    pub(super) fn is_idle(&self) -> bool {
        self.stream.inq_len == 0 && self.stream.outq_len == 0
    }

    /// The same without what changes by itself.
    pub(super) fn lasting(&self) -> Self {
        let mut same = self.clone();
        (same.stream.timestamp, same.stream.rtt) = (None, None);
        same
    }
}

/// What a socket says of its next timestamp in repair mode (TCP_TIMESTAMP of `do_tcp_getsockopt`).
fn timestamp(numbers: &Numbers, agreed: u8) -> Option<u32> {
    /// Set where it is in microseconds.
    const MARK: u32 = 1;
    let of = |nanos_per_tick: u64| ((numbers.now / nanos_per_tick) as u32).wrapping_add(numbers.ts_offset);
    match (agreed & options::TIMESTAMPS != 0, agreed & options::MICROSECONDS != 0) {
        (false, _) => None,
        (true, true) => Some(of(1000) | MARK),
        (true, false) => Some(of(1_000_000) & !MARK),
    }
}

/// Room beside what queues are said to hold.
const MORE: usize = 64 << 10;

/// How often a queue is read again that has changed meanwhile: an acknowledgement may have been on its way already.
const ATTEMPTS: u32 = 5;

/// Reads a connection. Its packets must be held by then. Afterwards the socket is as it was.
pub fn read(socket: impl AsFd) -> Result<Connection, TcpError> {
    let reuse = socket::number(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
    read_with(socket, reuse != 0, &mut Vec::new())
}

/// Reads one of many connections: what is known of its SO_REUSEADDR, which repair mode changes, is not asked again, and
/// `room` serves all of them.
pub fn read_with(socket: impl AsFd, reuse: bool, room: &mut Vec<u8>) -> Result<Connection, TcpError> {
    let fd = socket.as_fd();
    let mut outcome = read_in_repair(fd, room)?;
    if let Err(TcpError::Long { needed }) = outcome {
        // Not in repair mode: memory that is first written to is looked for by the kernel, and that takes its time.
        room.resize(needed, 1);
        outcome = read_in_repair(fd, room)?;
    }
    if reuse {
        socket::set_number(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    }
    let mut connection = outcome?;
    let length = (connection.stream.inq_len + connection.stream.outq_len) as usize;
    connection.data = room[..length].to_vec();
    Ok(connection)
}

/// An error of its own is one that leaves the socket in repair mode.
fn read_in_repair(fd: BorrowedFd<'_>, room: &mut [u8]) -> Result<Result<Connection, TcpError>, TcpError> {
    tcp::set_repair(fd, Repair::On)?;
    let mut outcome = read_once(fd, room);
    for _ in 1..ATTEMPTS {
        if !matches!(outcome, Err(TcpError::Moved { .. })) {
            break;
        }
        outcome = read_once(fd, room);
    }
    tcp::set_repair(fd, Repair::Off)?;
    Ok(outcome)
}

fn read_once(fd: BorrowedFd<'_>, room: &mut [u8]) -> Result<Connection, TcpError> {
    let info = tcp::info(fd)?;
    let state = State::of_number(info.state.into()).ok_or(TcpError::State { number: info.state })?;
    let Lengths { received, unacknowledged, unsent } = state.data(tcp::lengths(fd)?);
    let scaled = info.options & options::WSCALE != 0;
    let stamped = info.options & options::TIMESTAMPS != 0;
    let mut stream = TcpStreamEntry {
        inq_len: received,
        inq_seq: tcp::queue_seq(fd, Queue::Receive)?,
        outq_len: unacknowledged,
        outq_seq: tcp::queue_seq(fd, Queue::Send)?,
        unsq_len: Some(unsent),
        opt_mask: info.options.into(),
        snd_wscale: if scaled { info.snd_wscale.into() } else { 0 },
        rcv_wscale: scaled.then_some(info.rcv_wscale.into()),
        mss_clamp: tcp::mss_clamp(fd)?,
        timestamp: if stamped { Some(tcp::timestamp(fd)?) } else { None },
        rtt: (info.rtt != 0).then_some(info.rtt),
        ..TcpStreamEntry::default()
    };
    // An error that the program has not seen yet. Asking which would take it away; there are few others than a reset.
    if state == State::Close && poll_now(fd, PollFlags::empty())?.contains(PollFlags::POLLERR) {
        stream.reset = Some(true);
    }
    let window = tcp::window(fd)?;
    stream.snd_wl1 = Some(window.snd_wl1);
    stream.snd_wnd = Some(window.snd_wnd);
    stream.max_window = Some(window.max_window);
    stream.rcv_wnd = Some(window.rcv_wnd);
    stream.rcv_wup = Some(window.rcv_wup);
    let total = (received + unacknowledged) as usize;
    // Packets are held: there will hardly be more the next time.
    if total + 2 > room.len() {
        return Err(TcpError::Long { needed: total + MORE });
    }
    // One more than the queue is said to hold: the send queue overwrites that.
    queue(fd, Queue::Receive, received, room)?;
    queue(fd, Queue::Send, unacknowledged, &mut room[received as usize..])?;
    // The bytes are taken out of the room afterwards.
    Ok(Connection { state, stream, data: Vec::new() })
}

fn queue(fd: BorrowedFd<'_>, queue: Queue, expected: u32, room: &mut [u8]) -> Result<(), TcpError> {
    if expected == 0 {
        return Ok(());
    }
    let moved = |found| Err(TcpError::Moved { queue, expected, found });
    let found = tcp::peek(fd, queue, &mut room[..expected as usize + 1])?;
    match found.checked_sub(expected as usize) {
        Some(0) => Ok(()),
        // Nobody writes now: what is more than it should be was acknowledged. The kernel keeps a segment whole until all
        // of it is (tcp_clean_rtx_queue in net/ipv4/tcp_input.c), so such bytes stand at the queue's beginning.
        Some(acknowledged) if queue == Queue::Send => {
            let mut whole = vec![0; found + 1];
            let again = tcp::peek(fd, queue, &mut whole)?;
            if again != found || tcp::lengths(fd)?.unacknowledged < expected {
                return moved(again);
            }
            room[..expected as usize].copy_from_slice(&whole[acknowledged..found]);
            Ok(())
        }
        _ => moved(found),
    }
}
