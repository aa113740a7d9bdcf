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

mod packet;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use criu_common::gate::{Connection, Held, MARK, MOST, SWALLOWED};
use packet::Packet;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Without room set aside: most gates hold few connections.
const BPF_F_NO_PREALLOC: u32 = 1;
/// The connections that are held.
#[map]
static LOCKED: HashMap<Connection, Held> = HashMap::with_max_entries(MOST, BPF_F_NO_PREALLOC);

/// Both hooks of every interface: lets a packet pass, or drops it.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn gate(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the verifier admits only loads from the context.
    let mark = unsafe { (*skb).mark };
    if mark == MARK {
        return TC_ACT_UNSPEC;
    }
    match Packet::of(skb) {
        Some(packet) if mark == SWALLOWED && LOCKED.get_ptr(packet.ends).is_some() => swallow(),
        Some(packet) if is_held(packet) => TC_ACT_SHOT,
        _ => TC_ACT_UNSPEC,
    }
}

/// Drops a packet, and its sender takes it for sent: it goes to an interface that there is not.
#[inline(always)]
fn swallow() -> i32 {
    // SAFETY: the helper notes the number, and reads nothing.
    unsafe { bpf_redirect(0, 0) as i32 }
}

/// Looks a packet up both ways, and counts it.
#[inline(always)]
fn is_held(Packet { ends: packet, asks }: Packet) -> bool {
    let (held, is_from_peer) = if let Some(held) = LOCKED.get_ptr_mut(packet) {
        (held, false)
    } else if let Some(held) = LOCKED.get_ptr_mut(packet.swapped()) {
        (held, true)
    } else if asks && let Some(held) = LOCKED.get_ptr_mut(Connection::asking(packet.remote, packet.remote_port)) {
        (held, true)
    } else {
        return false;
    };
    if LOCKED.get_ptr(Connection::CLOSED).is_none() {
        return false;
    }
    count(held, is_from_peer);
    if let Some(any) = LOCKED.get_ptr_mut(Connection::ANY) {
        count(any, is_from_peer);
    }
    true
}

#[inline(always)]
fn count(held: *mut Held, is_from_peer: bool) {
    // SAFETY: a pointer into the map, which the verifier has seen checked. Two processors may count at once, and one be
    // lost: whoever counts leaves more than zero, and how much more is for a reader.
    unsafe {
        match is_from_peer {
            true => (*held).from_peer += 1,
            false => (*held).to_peer += 1,
        }
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
