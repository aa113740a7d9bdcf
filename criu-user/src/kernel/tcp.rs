//! What only TCP sockets have: their state, their queues, and the repair mode in which both can be read and set.
//!
//! # References
//! tcp(7); include/uapi/linux/tcp.h; `do_tcp_setsockopt`, `do_tcp_getsockopt` and `tcp_repair_options_est` of
//! net/ipv4/tcp.c.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::socket::{number, option, set_number, set_option};
use super::sys::{readable_bytes, tcp_unacknowledged, tcp_unsent};
use super::{SysError, SysResult};

const SOL: i32 = libc::SOL_TCP;
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

/// Option kinds of a TCP header that TCP_REPAIR_OPTIONS takes.
const TCPOPT_MSS: u32 = 2;
const TCPOPT_WINDOW: u32 = 3;
const TCPOPT_SACK_PERMITTED: u32 = 4;
const TCPOPT_TIMESTAMP: u32 = 8;

/// Repair mode on or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Packets are neither made by calls nor sent at the end of the socket.
    On = 1,
    /// Off, and the peer hears of nothing: since Linux 4.18.
    Off = -1,
}

/// Enters or leaves repair mode. Either changes SO_REUSEADDR: on to a value of the kernel's own, off to 0.
pub fn set_repair(fd: impl AsFd, repair: Repair) -> SysResult<()> {
    set_number(fd, SOL, TCP_REPAIR, repair as i32)
}

/// Which queue calls are about in repair mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// None: what is sent is sent.
    None = 0,
    /// What was received.
    Receive = 1,
    /// What was sent: further data counts as sent already.
    Send = 2,
}

/// Chooses a queue.
pub fn choose_queue(fd: impl AsFd, queue: Queue) -> SysResult<()> {
    set_number(fd, SOL, TCP_REPAIR_QUEUE, queue as i32)
}

/// The number behind the last byte of a queue: `rcv_nxt` or `write_seq`. The queue stays chosen.
pub fn queue_seq(fd: impl AsFd, queue: Queue) -> SysResult<u32> {
    choose_queue(&fd, queue)?;
    number(fd, SOL, TCP_QUEUE_SEQ).map(|seq| seq as u32)
}

/// Sets the number of the first byte of a queue, before the socket is connected.
pub fn set_queue_seq(fd: impl AsFd, queue: Queue, seq: u32) -> SysResult<()> {
    choose_queue(&fd, queue)?;
    set_number(fd, SOL, TCP_QUEUE_SEQ, seq as i32)
}

/// What both ends agreed on, as TCP_INFO and images have it: TCPI_OPT_* of include/uapi/linux/tcp.h.
pub mod options {
    /// Packets carry timestamps.
    pub const TIMESTAMPS: u8 = 1;
    /// Selective acknowledgements are understood.
    pub const SACK: u8 = 2;
    /// Windows are scaled.
    pub const WSCALE: u8 = 4;
    /// Timestamps count microseconds.
    pub const MICROSECONDS: u8 = 64;
    /// The peer's SYN carried data that was taken.
    pub const SYN_DATA: u8 = 32;
}

/// What TCP_INFO says, as far as it is wanted here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Info {
    /// TCP_ESTABLISHED …
    pub state: u8,
    /// [`options`].
    pub options: u8,
    /// By how much the peer's windows are shifted.
    pub snd_wscale: u8,
    /// By how much ours are.
    pub rcv_wscale: u8,
    /// Of a listening socket: clients that wait to be accepted.
    pub waiting: u32,
    /// Of a listening socket: how many may.
    pub backlog: u32,
    /// For how long no data was sent; the kernel counts in ticks of some milliseconds.
    pub since_sent: Duration,
    /// The smoothed round-trip time in microseconds; 0 where none was measured.
    pub rtt: u32,
    /// The window that the peer offers.
    pub snd_wnd: u32,
}

/// Asks for it.
pub fn info(fd: impl AsFd) -> SysResult<Info> {
    // struct tcp_info: state, …, options at 5, scales in one byte at 6, words from 8 on; of a listening socket
    // `tcpi_unacked` and `tcpi_sacked` are its queue and its limit (tcp_get_info).
    const ROOM: usize = 232;
    let bytes = option(fd, SOL, libc::TCP_INFO, ROOM)?;
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    let word = |at: usize| u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]);
    Ok(Info {
        state: byte(0),
        options: byte(5),
        snd_wscale: byte(6) & 0xf,
        rcv_wscale: byte(6) >> 4,
        waiting: word(24),
        backlog: word(28),
        since_sent: Duration::from_millis(word(44).into()),
        rtt: word(68),
        snd_wnd: word(228),
    })
}

/// How many bytes are where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lengths {
    /// Received, and not read yet: SIOCINQ.
    pub received: u32,
    /// Written, and not acknowledged yet: SIOCOUTQ. A FIN counts as one.
    pub unacknowledged: u32,
    /// Of these, never sent: SIOCOUTQNSD. A FIN counts as one.
    pub unsent: u32,
}

/// Asks for the lengths of both queues.
pub fn lengths(fd: impl AsFd) -> SysResult<Lengths> {
    let fd = fd.as_fd();
    Ok(Lengths {
        received: readable_bytes(fd)? as u32,
        unacknowledged: tcp_unacknowledged(fd)? as u32,
        unsent: tcp_unsent(fd)? as u32,
    })
}

/// Bytes of memory that a datagram socket has taken for what it has not sent yet: SIOCOUTQ.
pub fn unsent_memory(fd: impl AsFd) -> SysResult<u32> {
    Ok(tcp_unacknowledged(fd.as_fd())? as u32)
}

/// `struct tcp_repair_window`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    /// The segment that last changed the window that the peer offers.
    pub snd_wl1: u32,
    /// That window, in bytes.
    pub snd_wnd: u32,
    /// The largest that it ever was.
    pub max_window: u32,
    /// What we offer.
    pub rcv_wnd: u32,
    /// `rcv_nxt` when that was last said.
    pub rcv_wup: u32,
}

/// Reads the windows, in repair mode.
pub fn window(fd: impl AsFd) -> SysResult<Window> {
    let bytes = option(fd, SOL, TCP_REPAIR_WINDOW, 20)?;
    let word = |n: usize| bytes.get(n * 4..n * 4 + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(Window { snd_wl1: word(0), snd_wnd: word(1), max_window: word(2), rcv_wnd: word(3), rcv_wup: word(4) })
}

/// Sets the windows, in repair mode, of a connected socket.
pub fn set_window(fd: impl AsFd, window: &Window) -> SysResult<()> {
    let words = [window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup];
    set_option(fd, SOL, TCP_REPAIR_WINDOW, &words.map(u32::to_le_bytes).concat())
}

/// What both ends agreed on in their first packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// The largest segment that the peer takes.
    pub mss_clamp: u32,
    /// Send and receive scale, where windows are scaled.
    pub scales: Option<(u8, u8)>,
    /// Whether selective acknowledgements are understood.
    pub sack: bool,
    /// Whether packets carry timestamps.
    pub timestamps: bool,
}

/// Sets what was agreed on, in repair mode, of a connected socket.
pub fn set_negotiated(fd: impl AsFd, agreed: &Negotiated) -> SysResult<()> {
    let mut options = Vec::new();
    if agreed.sack {
        options.push((TCPOPT_SACK_PERMITTED, 0));
    }
    if let Some((send, receive)) = agreed.scales {
        options.push((TCPOPT_WINDOW, u32::from(send) | u32::from(receive) << 16));
    }
    if agreed.timestamps {
        options.push((TCPOPT_TIMESTAMP, 0));
    }
    if agreed.mss_clamp != 0 {
        options.push((TCPOPT_MSS, agreed.mss_clamp));
    }
    let bytes: Vec<u8> =
        options.iter().flat_map(|(code, value)| [code.to_le_bytes(), value.to_le_bytes()].concat()).collect();
    set_option(fd, SOL, TCP_REPAIR_OPTIONS, &bytes)
}

/// The largest segment that the peer takes: TCP_MAXSEG, which says so in repair mode.
pub fn mss_clamp(fd: impl AsFd) -> SysResult<u32> {
    number(fd, SOL, libc::TCP_MAXSEG).map(|mss| mss as u32)
}

/// Limits the segments that are sent: TCP_MAXSEG. 0 takes the limit away.
pub fn set_segments(fd: impl AsFd, size: u32) -> SysResult<()> {
    set_number(fd, SOL, libc::TCP_MAXSEG, size as i32)
}

/// Limits the window that is offered: TCP_WINDOW_CLAMP.
pub fn limit_window(fd: impl AsFd, size: u16) -> SysResult<()> {
    set_number(fd, SOL, libc::TCP_WINDOW_CLAMP, size.into())
}

/// How large the segments are that are sent: TCP_MAXSEG, which says so out of repair mode.
pub fn segments(fd: impl AsFd) -> SysResult<u32> {
    mss_clamp(fd)
}

/// What the next packet's timestamp is counted from: TCP_TIMESTAMP.
pub fn timestamp(fd: impl AsFd) -> SysResult<u32> {
    number(fd, SOL, TCP_TIMESTAMP).map(|stamp| stamp as u32)
}

/// Makes timestamps go on from there, in repair mode.
pub fn set_timestamp(fd: impl AsFd, stamp: u32) -> SysResult<()> {
    set_number(fd, SOL, TCP_TIMESTAMP, stamp as i32)
}

/// Copies the bytes in a queue into `room`, in repair mode, and says how many there were. Room for one more than are
/// expected shows whether there were more.
pub fn peek(fd: impl AsFd, queue: Queue, room: &mut [u8]) -> SysResult<usize> {
    choose_queue(&fd, queue)?;
    look(fd, room)
}

/// Copies what waits to be read into `room`, and says how much that was.
pub fn look(fd: impl AsFd, room: &mut [u8]) -> SysResult<usize> {
    let raw = fd.as_fd().as_raw_fd();
    match recv(raw, room, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        // An empty queue.
        Err(Errno::EAGAIN) => Ok(0),
        other => other.map_err(|e| SysError::new("recv(MSG_PEEK)", format!("fd {raw}"), e)),
    }
}

/// Appends to the chosen queue, without waiting; in pieces, where the kernel has no room for all at once.
pub fn append(fd: impl AsFd, bytes: &[u8]) -> SysResult<()> {
    const SMALLEST: usize = 256;
    let raw = fd.as_fd().as_raw_fd();
    let (mut done, mut piece) = (0, bytes.len());
    while done < bytes.len() {
        let end = bytes.len().min(done + piece);
        match send(raw, &bytes[done..end], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(sent) => done += sent,
            Err(Errno::EINTR) => {}
            Err(Errno::ENOMEM) if piece > SMALLEST => piece /= 2,
            Err(e) => return Err(SysError::new("send", format!("fd {raw}, byte {done} of {}", bytes.len()), e)),
        }
    }
    Ok(())
}

/// Whether a reader comes to an end: POLLRDHUP of poll(2), which `nix` does not know.
pub fn has_end(fd: impl AsFd) -> SysResult<bool> {
    let number = fd.as_fd().as_raw_fd();
    let mut poll = libc::pollfd { fd: number, events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one element, which lives.
    Errno::result(unsafe { libc::poll(&raw mut poll, 1, 0) })
        .map_err(|e| SysError::new("poll", format!("fd {number}"), e))?;
    Ok(poll.revents & libc::POLLRDHUP != 0)
}

/// Sends at once what can be: TCP_CORK, taken away.
pub fn push(fd: impl AsFd) -> SysResult<()> {
    let corked = number(&fd, SOL, libc::TCP_CORK)?;
    set_number(&fd, SOL, libc::TCP_CORK, 0)?;
    if corked != 0 { set_number(fd, SOL, libc::TCP_CORK, 1) } else { Ok(()) }
}
