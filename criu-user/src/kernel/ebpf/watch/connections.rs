//! What the programs know of connections.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use criu_common::watch::Socket;
use nix::unistd::Pid;

/// A TCP socket that a tracked process has open, as it was when asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Inode, as in /proc/PID/fd.
    pub inode: u64,
    /// SO_COOKIE; `None` as long as nobody has asked for it, and it has not changed its state under our eyes.
    pub cookie: Option<u64>,
    /// One who has it.
    pub pid: Pid,
    /// Under which descriptor.
    pub fd: u32,
    /// State, by the kernel's number: include/net/tcp_states.h.
    pub state: u32,
    /// Our end.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
    /// Bytes that were sent, those sent again included.
    pub sent: u64,
    /// Bytes that came.
    pub received: u64,
    /// Segments that were sent again.
    pub retransmits: u32,
    /// Bytes that wait to be taken; of a listening socket the connections that wait to be accepted.
    pub unread: u32,
    /// Bytes that were written and that the peer has not acknowledged.
    pub unacknowledged: u32,
}

impl Connection {
    /// Names of the states, by their numbers in include/net/tcp_states.h.
    pub const STATES: [&str; 13] = [
        "unknown",
        "established",
        "syn_sent",
        "syn_recv",
        "fin_wait1",
        "fin_wait2",
        "time_wait",
        "close",
        "close_wait",
        "last_ack",
        "listen",
        "closing",
        "new_syn_recv",
    ];

    /// The number of a socket that listens.
    pub const LISTEN: u32 = 10;
    /// The number of a socket that is not connected.
    pub const CLOSE: u32 = 7;

    /// The name of its state.
    pub fn state_name(&self) -> &'static str {
        Self::STATES.get(self.state as usize).copied().unwrap_or(Self::STATES[0])
    }

    pub(super) fn new(socket: &Socket) -> Self {
        let ip = |bytes: [u8; 16]| {
            let address = Ipv6Addr::from(bytes);
            address.to_ipv4_mapped().map_or(IpAddr::V6(address), IpAddr::V4)
        };
        Self {
            inode: socket.inode,
            cookie: (socket.cookie != 0).then_some(socket.cookie),
            pid: Pid::from_raw(socket.pid as i32),
            fd: socket.fd,
            state: socket.state,
            local: SocketAddr::new(ip(socket.address), socket.port),
            remote: SocketAddr::new(ip(socket.peer_address), socket.peer_port),
            sent: socket.sent,
            received: socket.received,
            retransmits: socket.retransmits,
            unread: socket.unread,
            unacknowledged: socket.unacknowledged,
        }
    }
}
