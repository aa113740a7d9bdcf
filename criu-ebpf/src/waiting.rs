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

use access::{Scratch, copy, get, is_set, off};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::bpf_seq_write;
use criu_common::offsets::ABSENT;
use criu_common::waiting::{BYTES_MAX, DATA_MAX, Offsets, PACKETS_MAX, Packet};

/// Filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// `struct bpf_iter_meta`: part of the interface, so not looked up.
#[repr(C)]
struct Meta {
    seq: *mut c_void,
}

/// `struct bpf_iter__unix`
#[repr(C)]
struct Context {
    meta: *const Meta,
    socket: *const c_void,
    uid: u32,
}

static DATA: Scratch<[u8; DATA_MAX]> = Scratch::new([0; DATA_MAX]);
/// How many more bytes of the socket have room. Not in a register: the verifier would know its bounds, find them other ones
/// each time round the loop, and walk over all ways through it.
static ROOM: Scratch<u32> = Scratch::new(0);

/// `iter/unix`: a [`Packet`] for each one that waits in a connection that was not accepted.
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
        tell((*(*ctx).meta).seq, socket, get(inode, off!(inode_ino)));
    }
    0
}

/// Writes a record for each packet in the queue of a socket.
///
/// # Safety
/// `seq` is the iterator's own.
#[inline(always)]
unsafe fn tell(seq: *mut c_void, socket: u64, client: u64) {
    // SAFETY: as in `waiting`; the buffer is as long as the mask allows.
    unsafe {
        let queue = socket + u64::from(off!(sock_queue));
        let of: u32 = get(queue, off!(queue_length));
        let urgent: u64 = if off!(unix_urgent) == ABSENT { 0 } else { get(socket, off!(unix_urgent)) };
        let level = ids::reader_level();
        let mut skb: u64 = get(queue, off!(skb_next));
        ROOM.get().write_volatile(BYTES_MAX);
        for _ in 0..PACKETS_MAX {
            if skb == queue || skb == 0 {
                return;
            }
            let parms = skb + u64::from(off!(skb_cb));
            let length: u32 = get(skb, off!(skb_length));
            let readable = get::<u32>(skb, off!(skb_paged)) == 0 && length < DATA_MAX as u32;
            let room = ROOM.get().read_volatile();
            if readable && length > room {
                return;
            }
            let tail = if readable { length & (DATA_MAX as u32 - 1) } else { 0 };
            let packet = Packet {
                client,
                of,
                length,
                tail,
                files: u32::from(is_set(get(parms, off!(parms_files)))),
                pid: ids::id_at(get(parms, off!(parms_pid)), level),
                uid: get(parms, off!(parms_uid)),
                gid: get(parms, off!(parms_gid)),
                urgent: u32::from(skb == urgent),
            };
            if bpf_seq_write(seq.cast(), (&raw const packet).cast(), size_of::<Packet>() as u32) != 0 {
                return;
            }
            if tail != 0 {
                let data = DATA.get().cast::<u8>();
                copy(data, tail, get::<u64>(skb, off!(skb_data)) as *const c_void);
                if bpf_seq_write(seq.cast(), data.cast(), tail) != 0 {
                    return;
                }
                ROOM.get().write_volatile(room.wrapping_sub(tail));
            }
            skb = get(skb, off!(skb_next));
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
