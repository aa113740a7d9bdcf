//! What the kernel tells of TCP sockets that their own calls do not: sock_diag(7).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrIn, bind, recv};
use nix::sys::stat::fstat;

use super::socket::{self, Extra};
use super::{SysError, SysResult};

/// A TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its own end.
    pub local: SocketAddr,
    /// The other one.
    pub remote: SocketAddr,
    /// Whether its packets are signed (RFC 2385).
    pub signed: bool,
    /// Whether something sits on top of it: TLS of the kernel's, or the like.
    pub has_upper_layer: bool,
}

const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Attributes: INET_DIAG_MD5SIG and INET_DIAG_ULP_INFO of include/uapi/linux/inet_diag.h.
const MD5SIG: u16 = 18;
const ULP_INFO: u16 = 19;
/// The extension INET_DIAG_INFO, without which there are no attributes of either kind (`inet_sk_diag_fill`).
const WITH_INFO: u8 = 1 << 1;
/// `struct nlmsghdr`, `struct inet_diag_req_v2`, `struct inet_diag_msg`.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// The kernel's dumps come in pieces of at most 32 KiB.
const ROOM: usize = 64 << 10;
/// Without a cookie sockets are found by their ends alone.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// TCP sockets that are no listeners, of this network namespace, by inode.
pub fn all() -> SysResult<HashMap<u32, TcpSocket>> {
    /// All states but TCP_TIME_WAIT, TCP_LISTEN and TCP_NEW_SYN_RECV, which belong to no connection of a process.
    const STATES: u32 = !(1 << 6 | 1 << 10 | 1 << 12);
    let mut found = HashMap::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let netlink = ask(BY_FAMILY, NLM_F_DUMP, family, STATES, &[0; 48])?;
        while receive(&netlink, &mut found)? {}
    }
    Ok(found)
}

/// Whether [`all`] has sockets that are bound and nothing else, found out with one of our own: TCP_BOUND_INACTIVE, Linux
/// 6.8.
pub fn lists_bound() -> SysResult<bool> {
    let own = socket::new(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
    let any_port = SockaddrIn::new(127, 0, 0, 1, 0);
    bind(own.as_raw_fd(), &any_port).map_err(|e| SysError::new("bind", "127.0.0.1", e))?;
    let inode = fstat(&own).map_err(|e| SysError::new("fstat", "socket", e))?.st_ino as u32;
    Ok(all()?.contains_key(&inode))
}

/// Ends a socket that nobody holds any more: what was left of it when its program was killed. Nothing happens if there is
/// none. Needs CONFIG_INET_DIAG_DESTROY.
pub fn destroy(local: SocketAddr, remote: SocketAddr) -> SysResult<()> {
    let mut id = Vec::with_capacity(48);
    id.extend_from_slice(&local.port().to_be_bytes());
    id.extend_from_slice(&remote.port().to_be_bytes());
    for end in [local, remote] {
        let mut address = match end.ip() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        address.resize(16, 0);
        id.extend(address);
    }
    id.extend_from_slice(&[0; 4]);
    id.extend_from_slice(&NO_COOKIE);
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let netlink = ask(DESTROY, NLM_F_ACK, family, u32::MAX, &id)?;
    match receive(&netlink, &mut HashMap::new()) {
        Err(e) if e.errno == Errno::ENOENT => Ok(()),
        other => other.map(drop),
    }
}

fn ask(kind: u16, flags: u16, family: i32, states: u32, id: &[u8]) -> SysResult<OwnedFd> {
    let netlink = socket::new(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
    let mut request = Vec::with_capacity(HEADER + REQUEST);
    request.extend_from_slice(&((HEADER + REQUEST) as u32).to_le_bytes());
    request.extend_from_slice(&kind.to_le_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | flags).to_le_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&[family as u8, libc::IPPROTO_TCP as u8, WITH_INFO, 0]);
    request.extend_from_slice(&states.to_le_bytes());
    request.extend_from_slice(id);
    socket::send(&netlink, &request, &Extra::default())?;
    Ok(netlink)
}

fn malformed() -> SysError {
    SysError::new("sock_diag", "tcp", Errno::EBADMSG)
}

/// Takes one piece of an answer; whether there is more.
fn receive(netlink: &OwnedFd, into: &mut HashMap<u32, TcpSocket>) -> SysResult<bool> {
    let mut piece = vec![0; ROOM];
    let len =
        recv(netlink.as_raw_fd(), &mut piece, MsgFlags::empty()).map_err(|e| SysError::new("recv", "sock_diag", e))?;
    let mut rest = &piece[..len];
    while rest.len() >= HEADER {
        let (len, kind) = (u32_at(rest, 0) as usize, u16_at(rest, 4));
        let message = rest.get(HEADER..len).ok_or_else(malformed)?;
        match kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                return match message.get(..4).map_or(0, |_| u32_at(message, 0) as i32) {
                    0 => Ok(false),
                    errno => Err(SysError::new("sock_diag", "tcp", Errno::from_raw(-errno))),
                };
            }
            _ => {
                let (inode, socket) = socket_of(message).ok_or_else(malformed)?;
                into.insert(inode, socket);
            }
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// One `struct inet_diag_msg` and its attributes.
fn socket_of(message: &[u8]) -> Option<(u32, TcpSocket)> {
    let (fixed, mut attributes) = message.split_at_checked(MESSAGE)?;
    let v4 = i32::from(fixed[0]) == libc::AF_INET;
    let end = |port: usize, address: usize| {
        let bytes: &[u8; 16] = fixed[address..].first_chunk()?;
        let ip = if v4 { IpAddr::from(*bytes.first_chunk::<4>()?) } else { IpAddr::from(*bytes) };
        Some(SocketAddr::new(ip, u16::from_be_bytes([fixed[port], fixed[port + 1]])))
    };
    let mut socket = TcpSocket { local: end(4, 8)?, remote: end(6, 24)?, signed: false, has_upper_layer: false };
    while attributes.len() >= 4 {
        let (len, kind) = (u16_at(attributes, 0) as usize, u16_at(attributes, 2));
        socket.signed |= kind == MD5SIG;
        socket.has_upper_layer |= kind == ULP_INFO;
        attributes = attributes.get(len.max(4).next_multiple_of(4)..).unwrap_or_default();
    }
    Some((u32_at(fixed, 68), socket))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
