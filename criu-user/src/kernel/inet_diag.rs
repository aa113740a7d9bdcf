//! What the kernel tells of TCP sockets that their own calls do not: sock_diag(7).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{SockaddrIn, bind};
use nix::sys::stat::fstat;

use super::sock_diag::{self, ACK, BY_FAMILY, DESTROY, DUMP, ask, ask_for_one, attributes, u32_at};
use super::{SysError, SysResult, socket};

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

/// Attributes: INET_DIAG_MD5SIG and INET_DIAG_ULP_INFO of include/uapi/linux/inet_diag.h.
const MD5SIG: u16 = 18;
const ULP_INFO: u16 = 19;
/// The extension INET_DIAG_INFO, without which there are no attributes of either kind (`inet_sk_diag_fill`).
const WITH_INFO: u8 = 1 << 1;
/// `struct inet_diag_msg`.
const MESSAGE: usize = 72;
/// Where the cookie is in it.
const COOKIE: usize = 44;
/// What tells a socket from all others that ever were.
type Cookie = [u8; 8];
/// Without a cookie sockets are found by their ends alone.
const NO_COOKIE: Cookie = [0xff; 8];
/// TCP_SYN_RECV: what is told of a request for a connection.
const SYN_RECV: u8 = 3;

/// TCP sockets that are no listeners, of this network namespace, by inode.
pub fn all() -> SysResult<HashMap<u32, TcpSocket>> {
    /// All states but TCP_TIME_WAIT, TCP_LISTEN and TCP_NEW_SYN_RECV, which belong to no connection of a process.
    const STATES: u32 = !(1 << 6 | 1 << 10 | 1 << 12);
    let mut found = HashMap::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        ask("tcp", BY_FAMILY, DUMP, &request(family, STATES, &[0; 48]), |message| {
            let (inode, socket) = socket_of(message)?;
            found.insert(inode, socket);
            Some(())
        })?;
    }
    Ok(found)
}

/// Asks for one connection after the other. The kernel finds one by its ends; to list all it goes through tables that are
/// made for hundreds of thousands.
#[derive(Debug)]
pub struct Asker(OwnedFd);

impl Asker {
    /// A new one.
    pub fn new() -> SysResult<Self> {
        sock_diag::open().map(Self)
    }

    /// The connection between these ends, and its inode. Those at a certain interface alone are not found.
    pub fn find(&self, local: SocketAddr, remote: SocketAddr) -> SysResult<Option<(u32, TcpSocket)>> {
        let mut found = None;
        let request = request(family(local), u32::MAX, &id(local, remote, NO_COOKIE));
        match ask_for_one(self.0.as_fd(), "tcp", &request, |message| {
            found = Some(socket_of(message)?);
            Some(())
        }) {
            Err(e) if e.errno == Errno::ENOENT => Ok(None),
            other => other.map(|()| found),
        }
    }

    /// Has the kernel forget a request for a connection between these ends, whose listening socket is gone. Needs
    /// CONFIG_INET_DIAG_DESTROY.
    pub fn forget_request(&self, local: SocketAddr, remote: SocketAddr) -> SysResult<()> {
        let mut found = None;
        let wanted = request(family(local), u32::MAX, &id(local, remote, NO_COOKIE));
        match ask_for_one(self.0.as_fd(), "tcp", &wanted, |message| {
            found = (*message.get(1)? == SYN_RECV).then_some(*message.get(COOKIE..)?.first_chunk::<8>()?);
            Some(())
        }) {
            Err(e) if e.errno == Errno::ENOENT => return Ok(()),
            other => other?,
        }
        // By its ends alone the kernel might find a listening socket by now.
        match found {
            None => Ok(()),
            Some(cookie) => destroy_one(local, remote, cookie),
        }
    }
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
    destroy_one(local, remote, NO_COOKIE)
}

fn destroy_one(local: SocketAddr, remote: SocketAddr, cookie: Cookie) -> SysResult<()> {
    match ask("tcp", DESTROY, ACK, &request(family(local), u32::MAX, &id(local, remote, cookie)), |_| Some(())) {
        Err(e) if [Errno::ENOENT, Errno::ESTALE].contains(&e.errno) => Ok(()),
        other => other,
    }
}

fn family(end: SocketAddr) -> i32 {
    if end.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// `struct inet_diag_sockid` of a connection.
fn id(local: SocketAddr, remote: SocketAddr, cookie: Cookie) -> Vec<u8> {
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
    id.extend_from_slice(&cookie);
    id
}

/// `struct inet_diag_req_v2`.
fn request(family: i32, states: u32, id: &[u8]) -> Vec<u8> {
    let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, WITH_INFO, 0];
    request.extend_from_slice(&states.to_le_bytes());
    request.extend_from_slice(id);
    request
}

/// One `struct inet_diag_msg` and its attributes.
fn socket_of(message: &[u8]) -> Option<(u32, TcpSocket)> {
    let (fixed, rest) = message.split_at_checked(MESSAGE)?;
    let v4 = i32::from(fixed[0]) == libc::AF_INET;
    let end = |port: usize, address: usize| {
        let bytes: &[u8; 16] = fixed[address..].first_chunk()?;
        let ip = if v4 { IpAddr::from(*bytes.first_chunk::<4>()?) } else { IpAddr::from(*bytes) };
        Some(SocketAddr::new(ip, u16::from_be_bytes([fixed[port], fixed[port + 1]])))
    };
    let mut socket = TcpSocket { local: end(4, 8)?, remote: end(6, 24)?, signed: false, has_upper_layer: false };
    attributes(rest, |kind, _| {
        socket.signed |= kind == MD5SIG;
        socket.has_upper_layer |= kind == ULP_INFO;
    })?;
    Some((u32_at(fixed, 68), socket))
}
