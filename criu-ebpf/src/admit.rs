//! Brings back clients that nobody has accepted: their ends have no descriptor, so that only the kernel can make them.
//!
//! It does so when the last packet of a handshake comes in. To a listening socket that has forgotten how the handshake
//! began, such a packet says nothing, unless a program vouches for it (`bpf_sk_assign_tcp_reqsk`): that is what others do
//! who answer requests with cookies of their own. Here a restore sends the packet, with the mark, and the program tells the
//! kernel what had been agreed on. The socket that the kernel makes then counts from the numbers in the packet.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[expect(dead_code, reason = "what the other programs need of it")]
mod kfuncs;
#[expect(dead_code, reason = "what the other programs need of it")]
mod packet;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp, bpf_skc_to_tcp_sock};
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use criu_common::gate::{Connection, MARK};
use criu_common::pending::{Admission, MOST_CLIENTS};
use packet::Packet;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Without room set aside.
const BPF_F_NO_PREALLOC: u32 = 1;
/// The network namespace that the packet is in.
const BPF_F_CURRENT_NETNS: u64 = u64::MAX;
/// TCP_LISTEN
const LISTEN: u32 = 10;
const ENOENT: i32 = 2;
const EINVAL: i32 = 22;

/// The clients that are to be there again.
#[map]
static CLIENTS: HashMap<Connection, Admission> = HashMap::with_max_entries(MOST_CLIENTS, BPF_F_NO_PREALLOC);

/// The way in at the loopback interface.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn admit(skb: *mut __sk_buff) -> i32 {
    // SAFETY: the verifier admits only loads from the context.
    if unsafe { (*skb).mark } != MARK {
        return TC_ACT_UNSPEC;
    }
    if let Some(packet) = Packet::of(skb)
        && let Some(client) = CLIENTS.get_ptr_mut(packet.ends.swapped())
    {
        // SAFETY: a pointer into the map, which the verifier has seen checked.
        unsafe { vouch(skb, &packet.ends, client) };
    }
    TC_ACT_UNSPEC
}

/// Vouches for a packet to a listening socket; one to a socket that is there already passes as it is.
#[inline(always)]
unsafe fn vouch(skb: *mut __sk_buff, ends: &Connection, client: *mut Admission) {
    // SAFETY: the verifier's rules; `client` is the caller's word.
    unsafe {
        let mut tuple: bpf_sock_tuple = core::mem::zeroed();
        let length = if u32::from_be((*skb).protocol) >> 16 == packet::ETH_P_IP {
            let v4 = &mut tuple.__bindgen_anon_1.ipv4;
            v4.saddr = last_word(&ends.local);
            v4.daddr = last_word(&ends.remote);
            v4.sport = u16::from_ne_bytes(ends.local_port);
            v4.dport = u16::from_ne_bytes(ends.remote_port);
            size_of_val(v4)
        } else {
            let v6 = &mut tuple.__bindgen_anon_1.ipv6;
            v6.saddr = words(&ends.local);
            v6.daddr = words(&ends.remote);
            v6.sport = u16::from_ne_bytes(ends.local_port);
            v6.dport = u16::from_ne_bytes(ends.remote_port);
            size_of_val(v6)
        };
        let socket = bpf_skc_lookup_tcp(skb.cast(), &raw mut tuple, length as u32, BPF_F_CURRENT_NETNS, 0);
        if socket.is_null() {
            tried(client, -ENOENT);
            return;
        }
        if (*socket).state == LISTEN {
            let listener = bpf_skc_to_tcp_sock(socket.cast());
            let outcome = if listener.is_null() {
                -EINVAL
            } else {
                kfuncs::assign_request(skb.cast(), listener.cast(), &raw const (*client).attributes)
            };
            tried(client, outcome);
        }
        bpf_sk_release(socket.cast());
    }
}

#[inline(always)]
unsafe fn tried(client: *mut Admission, outcome: i32) {
    // SAFETY: the caller's word.
    unsafe {
        (*client).tries += 1;
        (*client).outcome = outcome;
    }
}

#[inline(always)]
fn last_word(address: &[u8; 16]) -> u32 {
    u32::from_ne_bytes([address[12], address[13], address[14], address[15]])
}

#[inline(always)]
fn words(address: &[u8; 16]) -> [u32; 4] {
    let word = |at: usize| u32::from_ne_bytes([address[at], address[at + 1], address[at + 2], address[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
