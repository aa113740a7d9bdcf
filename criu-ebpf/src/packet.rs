//! What is looked at of a packet at an interface: the ends of a TCP connection.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes_relative;
use criu_common::gate::{Connection, mapped};

/// Offsets count from the network header: not every interface has one in front of it.
const BPF_HDR_START_NET: u32 = 1;
pub(crate) const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86dd;
const IPPROTO_TCP: u8 = 6;
/// Hop-by-hop options, routing, destination options: headers that may stand between that of IPv6 and TCP's.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// More of these than any sane packet has.
const EXTENSIONS_MAX: usize = 4;

/// What is looked at of a packet.
#[derive(Clone, Copy)]
pub(crate) struct Packet {
    /// Its ends, its sender's as the local one.
    pub(crate) ends: Connection,
    /// Whether it asks for a connection.
    pub(crate) asks: bool,
}

impl Packet {
    /// What is seen of a packet; `None` where it is not one of TCP.
    #[inline(always)]
    pub(crate) fn of(skb: *mut __sk_buff) -> Option<Self> {
        // SAFETY: the verifier admits only loads from the context.
        match u32::from_be(unsafe { (*skb).protocol }) >> 16 {
            ETH_P_IP => v4(skb),
            ETH_P_IPV6 => v6(skb),
            _ => None,
        }
    }
}

/// Bytes of the packet, counted from its network header.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the helper writes N bytes, or fails.
    let failed =
        unsafe { bpf_skb_load_bytes_relative(skb.cast(), at, bytes.as_mut_ptr().cast(), N as u32, BPF_HDR_START_NET) };
    (failed == 0).then_some(bytes)
}

#[inline(always)]
fn packet(skb: *mut __sk_buff, local: [u8; 16], remote: [u8; 16], tcp: u32) -> Option<Packet> {
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let header: [u8; 14] = load(skb, tcp)?;
    let (local_port, remote_port) = ([header[0], header[1]], [header[2], header[3]]);
    let ends = Connection { local, remote, local_port, remote_port };
    Some(Packet { ends, asks: header[13] & (SYN | ACK) == SYN })
}

#[inline(always)]
fn v4(skb: *mut __sk_buff) -> Option<Packet> {
    let header: [u8; 20] = load(skb, 0)?;
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
    // Without its first fragment a packet is none.
    if header[9] != IPPROTO_TCP || fragment != 0 {
        return None;
    }
    let local = mapped([header[12], header[13], header[14], header[15]]);
    let remote = mapped([header[16], header[17], header[18], header[19]]);
    packet(skb, local, remote, u32::from(header[0] & 0xf) * 4)
}

#[inline(always)]
fn v6(skb: *mut __sk_buff) -> Option<Packet> {
    let header: [u8; 8] = load(skb, 0)?;
    let (mut next, mut at) = (header[6], 40);
    for _ in 0..EXTENSIONS_MAX {
        if !EXTENSIONS.contains(&next) {
            break;
        }
        let extension: [u8; 2] = load(skb, at)?;
        next = extension[0];
        at += (u32::from(extension[1]) + 1) * 8;
    }
    if next != IPPROTO_TCP {
        return None;
    }
    packet(skb, load(skb, 8)?, load(skb, 24)?, at)
}
