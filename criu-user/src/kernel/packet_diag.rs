//! What the kernel tells of packet sockets that their own calls do not: sock_diag(7), packet(7).

use std::collections::HashMap;

use super::SysResult;
use super::sock_diag::{BY_FAMILY, DUMP, ask, attributes, u16_at, u32_at};

/// A packet socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PacketSocket {
    /// Packets up to this length are copied where there is no room for more: PACKET_COPY_THRESH.
    pub copy_threshold: u32,
    /// What it takes besides packets that are meant for this machine.
    pub memberships: Vec<Membership>,
    /// Whether it shares a ring of packets with its program.
    pub has_ring: bool,
}

/// What a packet socket takes at an interface: PACKET_ADD_MEMBERSHIP.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// The interface.
    pub index: u32,
    /// PACKET_MR_*.
    pub kind: u16,
    /// How often it was asked for.
    pub count: u32,
    /// Of a group or a machine.
    pub address: Vec<u8>,
}

/// `struct packet_diag_msg`.
const MESSAGE: usize = 16;
/// PACKET_SHOW_INFO, _MCLIST, _RING_CFG of include/uapi/linux/packet_diag.h.
const SHOW: u32 = 7;
/// `struct packet_diag_mclist`.
const GROUP: usize = 44;

/// All packet sockets of this network namespace, by inode.
pub fn all() -> SysResult<HashMap<u32, PacketSocket>> {
    // struct packet_diag_req: family, any protocol, any inode, what to show, no cookie.
    let words = [u32::from(libc::AF_PACKET as u8), 0, SHOW, u32::MAX, u32::MAX];
    let request: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut found = HashMap::new();
    ask("packet", BY_FAMILY, DUMP, &request, |message| {
        let (ino, socket) = parse(message)?;
        found.insert(ino, socket);
        Some(())
    })?;
    Ok(found)
}

/// `struct packet_diag_msg` and its attributes, PACKET_DIAG_*.
fn parse(message: &[u8]) -> Option<(u32, PacketSocket)> {
    let (fixed, rest) = message.split_at_checked(MESSAGE)?;
    let mut socket = PacketSocket::default();
    attributes(rest, |kind, value| match kind {
        0 => socket.copy_threshold = u32_at(value, 12),
        1 => socket.memberships = value.chunks_exact(GROUP).map(membership).collect(),
        2 | 3 => socket.has_ring = true,
        _ => {}
    })?;
    Some((u32_at(fixed, 4), socket))
}

fn membership(entry: &[u8]) -> Membership {
    let len = usize::from(u16_at(entry, 10));
    Membership {
        index: u32_at(entry, 0),
        count: u32_at(entry, 4),
        kind: u16_at(entry, 8),
        address: entry.get(12..12 + len).unwrap_or_default().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memberships_are_in_an_attribute() {
        let mut message = [vec![17, 3, 0, 0], 77u32.to_le_bytes().to_vec(), vec![0; 8]].concat();
        let mut group = [2u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
        group.extend([0, 0, 6, 0, 1, 0, 94, 0, 0, 7]);
        group.resize(GROUP, 0);
        message.extend(((4 + GROUP) as u16).to_le_bytes());
        message.extend(1u16.to_le_bytes());
        message.extend(group);
        let (ino, socket) = parse(&message).unwrap();
        let expected = Membership { index: 2, kind: 0, count: 1, address: vec![1, 0, 94, 0, 0, 7] };
        assert_eq!((ino, socket.memberships.as_slice(), socket.has_ring), (77, [expected].as_slice(), false));
        assert_eq!(parse(&message[..10]), None);
    }
}
