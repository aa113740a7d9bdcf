//! What the kernel tells of all unix sockets: sock_diag(7).
//!
//! The netlink crates know no more of it than these few attributes either, and would be four crates more.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use nix::errno::Errno;

use super::socket::{self, Extra};
use super::{SysError, SysResult};

/// A unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// SOCK_*.
    pub kind: u32,
    /// TCP_ESTABLISHED, TCP_LISTEN or TCP_CLOSE; of datagram sockets as well.
    pub state: u32,
    /// As bound: a path with a zero behind it, or an abstract name with a zero in front; empty if not bound.
    pub name: Vec<u8>,
    /// The inode of the file that it is bound to.
    pub file: Option<u32>,
    /// The other end; 0 for one that nobody holds (it was closed, or is still to be accepted).
    pub peer: Option<u32>,
    /// Clients that wait to be accepted, in order; 0 for one that has gone away again.
    pub pending: Vec<u32>,
    /// Of a listening socket: how many may wait.
    pub backlog: u32,
    /// Bytes that wait to be read; clients that wait to be accepted.
    pub queued: u32,
    /// Bytes that it has sent and nobody has read yet.
    pub unread: u32,
    /// Which halves are shut down: RCV_SHUTDOWN (1), SEND_SHUTDOWN (2).
    pub shutdown: u8,
}

/// TCP_LISTEN, which unix sockets use as well.
const LISTEN: u32 = 10;
/// SOCK_DIAG_BY_FAMILY.
const BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `struct nlmsghdr`, `struct unix_diag_msg`.
const HEADER: usize = 16;
const MESSAGE: usize = 16;
/// NAME, VFS, PEER, ICONS, RQLEN: UDIAG_SHOW_* of include/uapi/linux/unix_diag.h.
const SHOW: u32 = 0x1f;
/// The kernel's dumps come in pieces of at most 32 KiB.
const ROOM: usize = 64 << 10;

/// All unix sockets of this network namespace, by inode.
pub fn all() -> SysResult<HashMap<u32, UnixSocket>> {
    let netlink = socket::new(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
    let words = [u32::from(libc::AF_UNIX as u8), u32::MAX, 0, SHOW, u32::MAX, u32::MAX];
    let mut request = Vec::with_capacity(HEADER + 24);
    request.extend_from_slice(&((HEADER + 24) as u32).to_le_bytes());
    request.extend_from_slice(&BY_FAMILY.to_le_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_le_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    socket::send(&netlink, &request, &Extra::default())?;
    let mut found = HashMap::new();
    while receive(&netlink, &mut found)? {}
    Ok(found)
}

fn malformed() -> SysError {
    SysError::new("sock_diag", "unix", Errno::EBADMSG)
}

/// Takes one piece of the dump; whether there is more.
fn receive(netlink: &OwnedFd, into: &mut HashMap<u32, UnixSocket>) -> SysResult<bool> {
    let mut piece = vec![0; ROOM];
    let len = nix::sys::socket::recv(
        std::os::fd::AsRawFd::as_raw_fd(netlink),
        &mut piece,
        nix::sys::socket::MsgFlags::empty(),
    )
    .map_err(|e| SysError::new("recv", "sock_diag", e))?;
    let mut rest = &piece[..len];
    while rest.len() >= HEADER {
        let (len, kind) = (u32_at(rest, 0) as usize, u16_at(rest, 4));
        let message = rest.get(HEADER..len).ok_or_else(malformed)?;
        match kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                let errno = message.get(..4).map_or(0, |_| u32_at(message, 0) as i32);
                return Err(SysError::new("sock_diag", "unix", Errno::from_raw(-errno)));
            }
            BY_FAMILY => {
                let (ino, socket) = parse(message).ok_or_else(malformed)?;
                into.insert(ino, socket);
            }
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

/// `struct unix_diag_msg` and its attributes, UNIX_DIAG_* of include/uapi/linux/unix_diag.h.
fn parse(message: &[u8]) -> Option<(u32, UnixSocket)> {
    let fixed = message.get(..MESSAGE)?;
    let mut socket = UnixSocket { kind: fixed[1].into(), state: fixed[2].into(), ..UnixSocket::default() };
    let mut rest = &message[MESSAGE..];
    while rest.len() >= 4 {
        let (len, kind) = (usize::from(u16_at(rest, 0)), u16_at(rest, 2));
        let value = rest.get(4..len)?;
        match kind {
            0 => socket.name = value.to_vec(),
            1 => socket.file = Some(u32_at(value, 0)),
            2 => socket.peer = Some(u32_at(value, 0)),
            3 => socket.pending = value.chunks_exact(4).map(|c| u32_at(c, 0)).collect(),
            4 => {
                socket.queued = u32_at(value, 0);
                let write = u32_at(value, 4);
                if socket.state == LISTEN {
                    socket.backlog = write;
                } else {
                    socket.unread = write;
                }
            }
            6 => socket.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((u32_at(fixed, 4), socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_le_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn attributes_are_told_apart() {
        let mut message = vec![1, 1, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend(attribute(0, b"/run/x\0"));
        message.extend(attribute(2, &9u32.to_le_bytes()));
        message.extend(attribute(6, &[2]));
        let (ino, socket) = parse(&message).expect("whole");
        assert_eq!((ino, socket.name.as_slice(), socket.peer, socket.shutdown), (7, &b"/run/x\0"[..], Some(9), 2));
    }

    #[test]
    fn what_was_cut_short_is_refused() {
        let mut message = vec![0; MESSAGE];
        message.extend([40, 0, 2, 0, 1]);
        assert_eq!(parse(&message), None);
        assert_eq!(parse(&message[..8]), None);
    }
}
