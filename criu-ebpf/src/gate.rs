//! The gate: drops the packets of locked connections, at every interface and in both directions, while a program is on
//! its way into images and back.
//!
//! A packet for which there is no socket is answered with a reset, and the peer's connection is gone. So from before a
//! socket is read until it is there again, nobody's packets reach anybody. What carries the mark passes: these are the
//! packets with which a restore puts a socket into its state.
//!
//! Between two programs of one machine both ends are seen here, on the way out and on the way in: a packet is looked up
//! as one to the peer and as one from it. Dropped on its way out, it counts as never sent; the sender tries again as
//! soon as anything reaches it.
//!
//! Where the listening sockets of a tree are locked as well, requests for connections with them are dropped: the client
//! asks again later, instead of being told that nobody listens.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_skb_load_bytes_relative;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use criu_common::gate::{Connection, Held, MARK, MOST, mapped};

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Without room set aside: most gates hold few connections.
const BPF_F_NO_PREALLOC: u32 = 1;
/// Offsets count from the network header: not every interface has one in front of it.
const BPF_HDR_START_NET: u32 = 1;
const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86dd;
const IPPROTO_TCP: u8 = 6;
/// Hop-by-hop options, routing, destination options: headers that may stand between that of IPv6 and TCP's.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// More of these than any sane packet has.
const EXTENSIONS_MAX: usize = 4;

/// The connections that are held.
#[map]
static LOCKED: HashMap<Connection, Held> = HashMap::with_max_entries(MOST, BPF_F_NO_PREALLOC);

/// Both hooks of every interface: lets a packet pass, or drops it.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn gate(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the verifier admits only loads from the context.
    let (mark, protocol) = unsafe { ((*skb).mark, (*skb).protocol) };
    if mark == MARK {
        return TC_ACT_UNSPEC;
    }
    let packet = match u32::from_be(protocol) >> 16 {
        ETH_P_IP => v4(skb),
        ETH_P_IPV6 => v6(skb),
        _ => None,
    };
    match packet {
        Some(packet) if is_held(packet) => TC_ACT_SHOT,
        _ => TC_ACT_UNSPEC,
    }
}

/// Looks a packet up both ways, and counts it.
#[inline(always)]
fn is_held(Packet { ends: packet, asks }: Packet) -> bool {
    if let Some(held) = LOCKED.get_ptr_mut(packet) {
        // SAFETY: a pointer into the map, which the verifier has seen checked. Two processors may count at once, and one
        // be lost: these are for a reader.
        unsafe { (*held).to_peer += 1 };
        return true;
    }
    let back = Connection {
        local: packet.remote,
        remote: packet.local,
        local_port: packet.remote_port,
        remote_port: packet.local_port,
    };
    if let Some(held) = LOCKED.get_ptr_mut(back) {
        // SAFETY: as above.
        unsafe { (*held).from_peer += 1 };
        return true;
    }
    if !asks {
        return false;
    }
    let Some(held) = LOCKED.get_ptr_mut(Connection::asking(packet.remote, packet.remote_port)) else { return false };
    // SAFETY: as above.
    unsafe { (*held).from_peer += 1 };
    true
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

/// What is looked at of a packet.
#[derive(Clone, Copy)]
struct Packet {
    /// Its ends, its sender's as the local one.
    ends: Connection,
    /// Whether it asks for a connection.
    asks: bool,
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

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
