//! What the kernel tells of all unix sockets: sock_diag(7).

use std::collections::HashMap;

use super::SysResult;
use super::sock_diag::{BY_FAMILY, DUMP, ask, attributes, u32_at};

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
/// `struct unix_diag_msg`.
const MESSAGE: usize = 16;
/// NAME, VFS, PEER, ICONS, RQLEN: UDIAG_SHOW_* of include/uapi/linux/unix_diag.h.
const SHOW: u32 = 0x1f;

/// All unix sockets of this network namespace, by inode.
pub fn all() -> SysResult<HashMap<u32, UnixSocket>> {
    let words = [u32::from(libc::AF_UNIX as u8), u32::MAX, 0, SHOW, u32::MAX, u32::MAX];
    let request: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut found = HashMap::new();
    ask("unix", BY_FAMILY, DUMP, &request, |message| {
        let (ino, socket) = parse(message)?;
        found.insert(ino, socket);
        Some(())
    })?;
    Ok(found)
}

/// `struct unix_diag_msg` and its attributes, UNIX_DIAG_* of include/uapi/linux/unix_diag.h.
fn parse(message: &[u8]) -> Option<(u32, UnixSocket)> {
    let fixed = message.get(..MESSAGE)?;
    let mut socket = UnixSocket { kind: fixed[1].into(), state: fixed[2].into(), ..UnixSocket::default() };
    attributes(&message[MESSAGE..], |kind, value| match kind {
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
    })?;
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
