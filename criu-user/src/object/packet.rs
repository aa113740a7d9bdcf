//! Packet sockets: whole packets, as they come through an interface (packet(7)). A sniffer has one, and a DHCP client.
//!
//! What waits in them is dropped: the kernel shows the first packet only, and whoever watches a network knows that it may
//! miss some. A ring of packets in shared memory is refused.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use nix::poll::PollFlags;

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use super::sockopt::{self, where_there};
use crate::image::proto::{FdTypes, FileEntry, PacketMclist, PacketSockEntry};
use crate::kernel::packet_diag::{self, PacketSocket};
use crate::kernel::{fd, interfaces, socket};
use crate::plan::{FileRef, Opened, Opener};

/// Packet sockets.
#[derive(Debug)]
pub struct Packet;

/// Options of level SOL_PACKET that libc does not have: include/uapi/linux/if_packet.h.
const PACKET_VNET_HDR_SZ: i32 = 24;
const PACKET_IGNORE_OUTGOING: i32 = 23;
/// Types of fanout that are programs: PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF.
const FANOUT_PROGRAMS: [u32; 2] = [6, 7];
/// What the image says of a socket that shares its packets with no others.
const NO_FANOUT: u32 = u32::MAX;

/// Options that are on or off, and their fields.
type Switch = (i32, fn(&mut PacketSockEntry) -> bool);
const SWITCHES: [Switch; 6] = [
    (libc::PACKET_AUXDATA, |e| e.aux_data),
    (libc::PACKET_ORIGDEV, |e| e.orig_dev),
    (libc::PACKET_LOSS, |e| e.loss),
    (PACKET_IGNORE_OUTGOING, |e| e.ignore_outgoing()),
    (libc::PACKET_QDISC_BYPASS, |e| e.qdisc_bypass()),
    (libc::PACKET_TX_HAS_OFF, |e| e.tx_has_off()),
];

/// What sock_diag says, asked when the first socket is met.
#[derive(Debug, Default)]
struct Diag(Option<HashMap<u32, PacketSocket>>);

/// `struct sockaddr_ll`, as far as it is of interest. The protocol is in network order, here as in images.
fn address(protocol: u32, index: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_PACKET as u16).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(protocol as u16).to_ne_bytes());
    bytes.extend_from_slice(&index.to_le_bytes());
    bytes.resize(size_of::<libc::sockaddr_ll>(), 0);
    bytes
}

fn name_of(index: u32) -> Option<Vec<u8>> {
    interfaces::name_of(index).map(String::into_bytes)
}

impl FileKind for Packet {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Packetsk]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.family() == Some(libc::AF_PACKET)
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let diag = match &mut cx.shelf.get::<Diag>().0 {
            Some(all) => all,
            empty => empty.insert(packet_diag::all()?),
        };
        let diag = diag.get(&(seen.stat.st_ino as u32)).cloned().unwrap_or_default();
        let entry = state(seen, &diag)?;
        if let Some((what, advice)) = unsupported(&entry, &diag) {
            cx.refuse(seen.refuse(what, advice));
        }
        if fd::poll_now(&seen.file, PollFlags::POLLIN)?.contains(PollFlags::POLLIN) {
            tracing::warn!(pid = seen.pid.as_raw(), fd = seen.fd, "what waits in a packet socket is dropped");
        }
        Ok(FileEntry {
            r#type: FdTypes::Packetsk as i32,
            id: entry.id,
            psk: Some(entry.into()),
            ..FileEntry::default()
        })
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let psk =
            entry.psk.as_ref().ok_or_else(|| ObjectError::contradiction(format!("file {} is empty", entry.id)))?;
        if psk.rx_ring.is_some() || psk.tx_ring.is_some() {
            return Err(ObjectError::Unsupported {
                what: format!("packet socket {} with a ring of packets", psk.id),
                advice: "restore it by the engine that has dumped it",
            });
        }
        Ok(cx.plan.open(Make { entry: psk.clone() }))
    }
}

/// What a socket is.
fn state(seen: &Seen, diag: &PacketSocket) -> Result<PacketSockEntry, ObjectError> {
    let number = |name| socket::number(&seen.file, libc::SOL_PACKET, name);
    let switch = |name| Ok::<_, ObjectError>(where_there(number(name))?.is_some_and(|v| v != 0));
    let name = socket::own_name(&seen.file)?;
    let protocol = name.get(2..4).map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]));
    let ifindex = name.get(4..8).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let group = |member: &packet_diag::Membership| PacketMclist {
        index: member.index,
        r#type: member.kind.into(),
        addr: member.address.clone(),
        ifname: name_of(member.index),
        count: Some(member.count),
    };
    Ok(PacketSockEntry {
        id: seen.id,
        r#type: socket::number(&seen.file, libc::SOL_SOCKET, libc::SO_TYPE)? as u32,
        protocol: protocol.into(),
        flags: seen.flags,
        ifindex,
        ifname: name_of(ifindex),
        fown: seen.fown()?,
        opts: sockopt::capture(&seen.file)?,
        version: number(libc::PACKET_VERSION)? as u32,
        reserve: number(libc::PACKET_RESERVE)? as u32,
        aux_data: switch(libc::PACKET_AUXDATA)?,
        orig_dev: switch(libc::PACKET_ORIGDEV)?,
        vnet_hdr: switch(libc::PACKET_VNET_HDR)?,
        vnet_hdr_size: where_there(number(PACKET_VNET_HDR_SZ))?.map(|v| v as u32),
        loss: switch(libc::PACKET_LOSS)?,
        timestamp: number(libc::PACKET_TIMESTAMP)? as u32,
        copy_thresh: diag.copy_threshold,
        mclist: diag.memberships.iter().map(group).collect(),
        fanout: where_there(number(libc::PACKET_FANOUT))?.filter(|&v| v != 0).map(|v| v as u32),
        ignore_outgoing: Some(switch(PACKET_IGNORE_OUTGOING)?),
        qdisc_bypass: Some(switch(libc::PACKET_QDISC_BYPASS)?),
        tx_has_off: Some(switch(libc::PACKET_TX_HAS_OFF)?),
        ..PacketSockEntry::default()
    })
}

/// What of a socket cannot be carried over, and advice.
fn unsupported(entry: &PacketSockEntry, diag: &PacketSocket) -> Option<(&'static str, &'static str)> {
    if diag.has_ring {
        return Some((
            "a packet socket with a ring of packets in shared memory (PACKET_RX_RING, PACKET_TX_RING)",
            "end the capture (tcpdump, a DHCP client) before the dump",
        ));
    }
    if ![libc::SOCK_RAW, libc::SOCK_DGRAM].contains(&(entry.r#type as i32)) {
        return Some(("a packet socket of an old kind (SOCK_PACKET)", "close it before the dump"));
    }
    if entry.fanout.is_some_and(|fanout| FANOUT_PROGRAMS.contains(&(fanout >> 16 & 0xff))) {
        let what = "a packet socket that shares its packets by a program (PACKET_FANOUT_DATA), which cannot be read";
        return Some((what, "close it before the dump"));
    }
    if entry.ifindex != 0 && entry.ifname.is_none() {
        return Some(("a packet socket at an interface that has gone", "close it before the dump"));
    }
    None
}

/// Makes a packet socket.
#[derive(Debug)]
struct Make {
    entry: Box<PacketSockEntry>,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The number of an interface by now. Images of others have only the number that it had.
fn index(name: Option<&[u8]>, number: u32) -> Result<u32, Failure> {
    let Some(name) = name.map(String::from_utf8_lossy) else { return Ok(number) };
    interfaces::index_of(&name).ok_or_else(|| format!("there is no interface {name}, at which it was").into())
}

impl Opener for Make {
    fn describe(&self) -> String {
        let (protocol, ifindex) = (u16::from_be(self.entry.protocol as u16), self.entry.ifindex);
        format!("a packet socket of protocol {protocol:#06x} at interface {ifindex}")
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Failure> {
        let mut entry = *self.entry.clone();
        // Of no protocol: until it is bound it gets no packets.
        let made = socket::new(libc::AF_PACKET, entry.r#type as i32, 0)?;
        sockopt::restore(&made, &entry.opts)?;
        let set = |name, value: u32| socket::set_number(&made, libc::SOL_PACKET, name, value as i32);
        set(libc::PACKET_VERSION, entry.version)?;
        set(libc::PACKET_RESERVE, entry.reserve)?;
        set(libc::PACKET_TIMESTAMP, entry.timestamp)?;
        set(libc::PACKET_COPY_THRESH, entry.copy_thresh)?;
        for (name, field) in SWITCHES {
            if field(&mut entry) {
                set(name, 1)?;
            }
        }
        match entry.vnet_hdr_size {
            Some(size) if size != 0 => set(PACKET_VNET_HDR_SZ, size)?,
            None if entry.vnet_hdr => set(libc::PACKET_VNET_HDR, 1)?,
            _ => {}
        }
        entry.mclist.iter().try_for_each(|group| join(&made, group))?;
        let ifindex = index(entry.ifname.as_deref(), entry.ifindex)?;
        if entry.protocol != 0 || ifindex != 0 {
            socket::bind(&made, &address(entry.protocol, ifindex))?;
        }
        if let Some(fanout) = entry.fanout.filter(|&fanout| fanout != NO_FANOUT) {
            set(libc::PACKET_FANOUT, fanout)?;
        }
        fd::set_flags(&made, entry.flags as i32)?;
        Ok(made)
    }
}

/// `struct packet_mreq`, as often as it was asked for.
fn join(made: &OwnedFd, group: &PacketMclist) -> Result<(), Failure> {
    /// More than anybody asks for: an image may say anything.
    const MOST: u32 = 64;
    let mut request = index(group.ifname.as_deref(), group.index)?.to_le_bytes().to_vec();
    request.extend_from_slice(&(group.r#type as u16).to_le_bytes());
    request.extend_from_slice(&(group.addr.len() as u16).to_le_bytes());
    request.extend_from_slice(&group.addr);
    request.resize(request.len().max(size_of::<libc::packet_mreq>()), 0);
    for _ in 0..group.count.unwrap_or(1).min(MOST) {
        socket::set_option(made, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_protocol_in_network_order() {
        let bytes = address(3u16.to_be().into(), 2);
        assert_eq!((bytes.len(), &bytes[..8]), (20, [17, 0, 0, 3, 2, 0, 0, 0].as_slice()));
    }
}
