//! Clients of TCP servers that nobody has accepted yet, and what they have sent.
//!
//! Until accept(2) their ends have no descriptor through which anybody could look, and whoever accepted one would change
//! the program. But the engine has a descriptor of the listening socket: the iterator comes by all of the engine's
//! descriptors, and from those that it asks about the program goes along the queue of those that can be accepted, in that
//! order, and through each one's receive queue. Nothing is locked: the server stands still, and the gate
//! lets no packets through.
//!
//! Those whose handshake is not over are in the kernel's table of connections, which is gone through only where a listening
//! socket has any.
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

use access::{Scratch, get, is_set, off};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use contexts::FileContext;
use criu_common::offsets::ABSENT;
use criu_common::pending::{Client, MOST_LISTENERS, Offsets};
use descriptors::socket_of;
use queue::{STEPS, TOLD};

/// Filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Without room set aside.
const BPF_F_NO_PREALLOC: u32 = 1;
/// TCP_LISTEN and TCP_NEW_SYN_RECV
const LISTEN: u8 = 10;
const NEW_SYN_RECV: u8 = 12;
/// Inodes of the listening sockets that are asked about; not 0 where it was looked at: there may be more descriptors of it.
#[map]
static LISTENERS: HashMap<u64, u32> = HashMap::with_max_entries(MOST_LISTENERS, BPF_F_NO_PREALLOC);

/// The inode of the listening socket, and the request that comes next. Not in registers: see [`kfuncs::repeat`].
static LISTENER: Scratch<u64> = Scratch::new(0);
static REQUEST: Scratch<u64> = Scratch::new(0);

/// `iter/task_file`: a [`Client`] for each that waits, and its data.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn pending(ctx: *const FileContext) -> i32 {
    // SAFETY: the kernel fills the context in; all else is read by a helper that checks the address.
    unsafe {
        let Some((number, listener)) = socket_of((*ctx).file as u64) else { return 0 };
        let Some(seen) = LISTENERS.get_ptr_mut(number) else { return 0 };
        if *seen != 0 {
            return 0;
        }
        *seen = 1;
        if get::<u8>(listener, off!(skc_state)) != LISTEN {
            return 0;
        }
        if let Some(told) = TOLD.get_ptr_mut(0) {
            (*told).requests += u64::from(get::<u32>(listener, off!(accept_requests)));
        }
        queue::find_memory();
        LISTENER.get().write_volatile(number);
        REQUEST.get().write_volatile(get(listener, off!(accept_head)));
        queue::clear();
        kfuncs::repeat(STEPS, || queue::step(|skb| numbered(skb)) && next_client());
    }
    0
}

/// The number of a packet's first byte.
#[inline(always)]
unsafe fn numbered(skb: u64) -> u32 {
    // SAFETY: it is read by a helper that checks the address.
    unsafe { get(skb + u64::from(off!(skb_cb)), off!(cb_seq)) }
}

/// `struct bpf_iter__tcp`
#[repr(C)]
struct TcpContext {
    meta: *const c_void,
    socket: *const c_void,
    uid: u32,
}

/// `iter/tcp`: a [`Client`] for each whose handshake with one of the listening sockets is not over.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
extern "C" fn requests(ctx: *const TcpContext) -> i32 {
    // SAFETY: the kernel fills the context in; all else is read by a helper that checks the address.
    unsafe {
        let request = (*ctx).socket as u64;
        if request == 0 || get::<u8>(request, off!(skc_state)) != NEW_SYN_RECV {
            return 0;
        }
        let listener: u64 = get(request, off!(skc_listener));
        let socket: u64 = get(listener, off!(sock_socket));
        if socket == 0 {
            return 0;
        }
        let number: u64 = get(socket + u64::from(off!(socket_inode)), off!(inode_ino));
        if LISTENERS.get(number).is_none() {
            return 0;
        }
        if let Some(client) = queue::record::<Client>() {
            describe_request(client, number, request, listener);
        }
    }
    0
}

/// Begins with the next client: whether there is none.
#[inline(always)]
unsafe fn next_client() -> bool {
    // SAFETY: all is read by a helper that checks the address; a place has room for a client.
    unsafe {
        let request = REQUEST.get().read_volatile();
        if request == 0 {
            return true;
        }
        REQUEST.get().write_volatile(get(request, off!(request_next)));
        let socket: u64 = get(request, off!(request_sk));
        if socket == 0 {
            return false;
        }
        if let Some(client) = queue::record::<Client>() {
            describe(client, socket);
        }
        queue::begin(socket + u64::from(off!(sock_queue)), |skb| numbered(skb));
        false
    }
}

/// Bits of a byte.
#[inline(always)]
unsafe fn bits(socket: u64, offset: u32, bit: u32, mask: u8) -> u8 {
    // SAFETY: it is read by a helper that checks the address.
    unsafe { get::<u8>(socket, offset) >> bit & mask }
}

/// What sockets and requests have in common: whose it is, and both ends but for our port. `signs` is what has the keys of
/// signed packets.
#[inline(always)]
unsafe fn describe_common(client: *mut Client, listener: u64, socket: u64, signs: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let v6 = get::<u16>(socket, off!(skc_family)) == 10 && off!(skc_v6_daddr) != ABSENT;
        let [from, to] =
            if v6 { [off!(skc_v6_rcv_saddr), off!(skc_v6_daddr)] } else { [off!(skc_rcv_saddr), off!(skc_daddr)] };
        let pointer = |offset: u32| if offset == ABSENT { 0 } else { get::<u64>(signs, offset) };
        (*client).listener = listener;
        (*client).now = bpf_ktime_get_ns();
        (*client).keys = [pointer(off!(tcp_md5)), pointer(off!(tcp_ao))];
        (*client).local = get(socket, from);
        (*client).remote = get(socket, to);
        (*client).family = get(socket, off!(skc_family));
        (*client).state = get(socket, off!(skc_state));
        (*client).interface = get(socket, off!(skc_interface));
        (*client).mptcp = 0;
    }
}

#[inline(always)]
unsafe fn describe(client: *mut Client, socket: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        describe_common(client, LISTENER.get().read_volatile(), socket, socket);
        (*client).ports = [get(socket, off!(inet_sport)), get(socket, off!(skc_dport))];
        (*client).ecn = if off!(tcp_ecn) == ABSENT { 0 } else { get(socket, off!(tcp_ecn)) };
        (*client).copied_seq = get(socket, off!(tcp_copied_seq));
        (*client).rcv_nxt = get(socket, off!(tcp_rcv_nxt));
        (*client).snd_nxt = get(socket, off!(tcp_snd_nxt));
        (*client).snd_una = get(socket, off!(tcp_snd_una));
        (*client).snd_wnd = get(socket, off!(tcp_snd_wnd));
        (*client).rcv_wnd = get(socket, off!(tcp_rcv_wnd));
        (*client).rcv_wup = get(socket, off!(tcp_rcv_wup));
        (*client).rcvbuf = get(socket, off!(sock_rcvbuf));
        (*client).ts_recent = get(socket, off!(tcp_ts_recent));
        (*client).ts_offset = get(socket, off!(tcp_ts_offset));
        (*client).mss = get(socket, off!(tcp_mss));
        (*client).advmss = get(socket, off!(tcp_advmss));
        (*client).urgent = get(socket, off!(tcp_urgent));
        (*client).timestamps = bits(socket, off!(tcp_timestamps), off!(tcp_timestamps_bit), 1);
        (*client).microseconds = if off!(tcp_microseconds) == ABSENT {
            0
        } else {
            bits(socket, off!(tcp_microseconds), off!(tcp_microseconds_bit), 1)
        };
        (*client).scaled = bits(socket, off!(tcp_scaled), off!(tcp_scaled_bit), 1);
        (*client).snd_wscale = bits(socket, off!(tcp_snd_wscale), off!(tcp_snd_wscale_bit), 15);
        (*client).rcv_wscale = bits(socket, off!(tcp_rcv_wscale), off!(tcp_rcv_wscale_bit), 15);
        (*client).sack = is_set(bits(socket, off!(tcp_sack), off!(tcp_sack_bit), 7).into());
    }
}

/// A request counts from the numbers of both first packets.
#[inline(always)]
unsafe fn describe_request(client: *mut Client, number: u64, request: u64, listener: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let flag = |offset: u32| if offset == ABSENT { 0 } else { get::<u8>(request, offset) };
        let received = get::<u32>(request, off!(asked_rcv_isn)).wrapping_add(1);
        let sent = get::<u32>(request, off!(asked_snt_isn)).wrapping_add(1);
        describe_common(client, number, request, listener);
        (*client).ports = [get::<u16>(request, off!(skc_num)).to_be_bytes(), get(request, off!(skc_dport))];
        (*client).ecn = bits(request, off!(asked_ecn), off!(asked_ecn_bit), 1);
        (*client).copied_seq = received;
        (*client).rcv_nxt = received;
        (*client).rcv_wup = received;
        (*client).snd_nxt = sent;
        (*client).snd_una = sent;
        (*client).snd_wnd = 0;
        (*client).rcv_wnd = 0;
        (*client).rcvbuf = get(listener, off!(sock_rcvbuf));
        (*client).ts_recent = get(request, off!(request_ts_recent));
        (*client).ts_offset = get(request, off!(asked_ts_offset));
        (*client).mss = get(request, off!(request_mss));
        (*client).advmss = 0;
        (*client).urgent = 0;
        (*client).timestamps = bits(request, off!(asked_timestamps), off!(asked_timestamps_bit), 1);
        (*client).microseconds = flag(off!(asked_microseconds));
        (*client).scaled = bits(request, off!(asked_scaled), off!(asked_scaled_bit), 1);
        (*client).snd_wscale = bits(request, off!(asked_snd_wscale), off!(asked_snd_wscale_bit), 15);
        (*client).rcv_wscale = bits(request, off!(asked_rcv_wscale), off!(asked_rcv_wscale_bit), 15);
        (*client).sack = bits(request, off!(asked_sack), off!(asked_sack_bit), 1);
        (*client).mptcp = flag(off!(asked_mptcp));
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
