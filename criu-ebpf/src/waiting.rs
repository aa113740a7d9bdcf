//! What waits in connections of unix sockets that nobody has accepted yet.
//!
//! `connect(2)` makes the other end at once, and the client may write into it; but until `accept(2)` that end has no
//! descriptor through which anybody could look. It is a socket with a peer and without a `struct socket`. The iterator
//! comes by all unix sockets of the reader's network namespace, holding each while it is looked at (so that its queue
//! stays as it is), and tells of the packets in such a queue.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[expect(dead_code, reason = "what the other programs need of it")]
mod access;
mod ids;
#[expect(dead_code, reason = "what the other programs need of it")]
mod kfuncs;
mod queue;

use access::{Scratch, get, is_set, off};
use aya_ebpf::cty::c_void;
use criu_common::offsets::ABSENT;
use criu_common::waiting::{Offsets, Packet};

/// Filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// `struct bpf_iter__unix`
#[repr(C)]
struct Context {
    meta: *const c_void,
    socket: *const c_void,
    uid: u32,
}

/// What the packets of one queue have in common. Not in registers: see [`kfuncs::repeat`].
struct Common {
    client: u64,
    urgent: u64,
    of: u32,
    level: u32,
}

static COMMON: Scratch<Common> = Scratch::new(Common { client: 0, urgent: 0, of: 0, level: 0 });

/// `iter/unix`: a [`Packet`] for each one that waits in a connection that was not accepted, and its data.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/unix")]
extern "C" fn waiting(ctx: *const Context) -> i32 {
    // SAFETY: the kernel fills the context in; all else is read by a helper that checks the address.
    unsafe {
        let socket = (*ctx).socket as u64;
        if socket == 0 || get::<u64>(socket, off!(sock_socket)) != 0 {
            return 0;
        }
        let peer: u64 = get(socket, off!(unix_peer));
        if peer == 0 {
            return 0;
        }
        let client: u64 = get(peer, off!(sock_socket));
        if client == 0 {
            return 0;
        }
        let inode = client + u64::from(off!(socket_inode));
        let packets = socket + u64::from(off!(sock_queue));
        let of: u32 = get(packets, off!(queue_length));
        if of == 0 {
            return 0;
        }
        queue::find_memory();
        let urgent: u64 = if off!(unix_urgent) == ABSENT { 0 } else { get(socket, off!(unix_urgent)) };
        let client: u64 = get(inode, off!(inode_ino));
        COMMON.get().write_volatile(Common { client, urgent, of, level: ids::reader_level() });
        queue::clear();
        queue::begin(packets, |skb| tell(skb));
        kfuncs::repeat(queue::STEPS, || queue::step(|skb| tell(skb)));
    }
    0
}

/// Writes the record of a packet. Those of unix sockets have no numbers.
#[inline(always)]
unsafe fn tell(skb: u64) -> u32 {
    // SAFETY: all is read by a helper that checks the address; a place has room for a record.
    unsafe {
        let Common { client, urgent, of, level } = COMMON.get().read_volatile();
        let parms = skb + u64::from(off!(skb_cb));
        if let Some(packet) = queue::record::<Packet>() {
            (*packet).client = client;
            (*packet).of = of;
            (*packet).length = get(skb, off!(skb_length));
            (*packet).files = u32::from(is_set(get(parms, off!(parms_files))));
            (*packet).pid = ids::id_at(get(parms, off!(parms_pid)), level);
            (*packet).uid = get(parms, off!(parms_uid));
            (*packet).gid = get(parms, off!(parms_gid));
            (*packet).urgent = u32::from(skb == urgent);
        }
        0
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
