//! What UDP sockets have gathered for a datagram that is not sent yet (UDP_CORK, MSG_MORE): no call tells it.
//!
//! The iterator comes by all of the engine's descriptors, and tells of each such socket among them. Nothing is locked:
//! the tree stands still.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[expect(dead_code, reason = "what the other programs need of it")]
mod access;
#[expect(dead_code, reason = "what the other programs need of it")]
mod contexts;
mod descriptors;
#[expect(dead_code, reason = "what the other programs need of it")]
mod kfuncs;
mod queue;

use access::{Scratch, get, off};
use contexts::FileContext;
use criu_common::gathered::{Gathered, Offsets};
use criu_common::offsets::ABSENT;
use descriptors::socket_of;

/// Filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const SOCK_DGRAM: u16 = 2;
const IPPROTO_UDP: u16 = 17;
const IPPROTO_UDPLITE: u16 = 136;
/// `struct udphdr`: at the beginning of the first packet.
const HEADER: u32 = 8;

/// Whether the first packet is still to come. Not in a register: see [`kfuncs::repeat`].
static IS_FIRST: Scratch<u32> = Scratch::new(0);

/// `iter/task_file`: [`Gathered`] of each socket that has gathered anything, and its data.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn gathered(ctx: *const FileContext) -> i32 {
    // SAFETY: the kernel fills the context in; all else is read by a helper that checks the address.
    unsafe {
        let Some((inode, socket)) = socket_of((*ctx).file as u64) else { return 0 };
        let family: u16 = get(socket, off!(sock_family));
        let protocol: u16 = get(socket, off!(sock_protocol));
        if family != AF_INET && family != AF_INET6
            || get::<u16>(socket, off!(sock_type)) != SOCK_DGRAM
            || protocol != IPPROTO_UDP && protocol != IPPROTO_UDPLITE
        {
            return 0;
        }
        let pending: u32 = get(socket, off!(udp_pending));
        if pending == 0 {
            return 0;
        }
        queue::find_memory();
        if let Some(record) = queue::record::<Gathered>() {
            describe(record, socket, inode, pending as u16);
        }
        IS_FIRST.get().write_volatile(1);
        queue::clear();
        queue::begin(socket + u64::from(off!(sock_queue)), |skb| before_data(skb));
        kfuncs::repeat(queue::STEPS, || queue::step(|skb| before_data(skb)));
    }
    0
}

/// Numbers that make the data of each packet begin at 0: before it there is room for headers.
#[inline(always)]
unsafe fn before_data(skb: u64) -> u32 {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let begins = get::<u64>(skb, off!(skb_head)) + u64::from(get::<u16>(skb, off!(skb_transport)));
        let headers = begins.wrapping_sub(get(skb, off!(skb_data))) as u32;
        let first = IS_FIRST.get().read_volatile();
        IS_FIRST.get().write_volatile(0);
        0u32.wrapping_sub(headers.wrapping_add(first * HEADER))
    }
}

#[inline(always)]
unsafe fn describe(record: *mut Gathered, socket: u64, inode: u64, family: u16) {
    // SAFETY: all is read by a helper that checks the address; the place has room for a record.
    unsafe {
        let v6 = family == AF_INET6 && off!(inet6) != ABSENT;
        let [source, destination, port] = if v6 {
            [off!(flow6_source), off!(flow6_destination), off!(flow6_port)]
        } else {
            [off!(flow4_source), off!(flow4_destination), off!(flow4_port)]
        };
        (*record).socket = inode;
        (*record).source = get(socket, source);
        (*record).destination = get(socket, destination);
        (*record).port = get(socket, port);
        (*record).length = get(socket, off!(cork_length));
        (*record).interface = get(socket, off!(flow_interface));
        (*record).family = family;
        (*record).segment = get(socket, off!(cork_segment));
        (*record).padding = 0;
        if v6 {
            let inet6: u64 = get(socket, off!(inet6));
            (*record).ttl = u32::from(get::<u8>(inet6, off!(cork6_hops)));
            (*record).class = i16::from(get::<u8>(inet6, off!(cork6_class)));
        } else {
            (*record).ttl = u32::from(get::<u8>(socket, off!(cork_ttl)));
            (*record).class = get(socket, off!(cork_tos));
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
