//! Where the connections stand in their streams of which the engine has descriptors.
//!
//! Only a socket in repair mode tells that by calls, and it refuses everything else meanwhile, to whoever uses it. Most
//! connections have nothing in their queues, so that these numbers are all there is to read of them. Nothing is locked:
//! nobody uses them, and the gate lets no packets through.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[expect(dead_code, reason = "what the other programs need of it")]
mod access;
#[expect(dead_code, reason = "what the other programs need of it")]
mod contexts;
mod descriptors;

use access::{get, off};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_seq_write};
use contexts::FileContext;
use criu_common::numbers::{Numbers, Offsets};
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
const IPPROTO_TCP: u16 = 6;
const IPPROTO_MPTCP: u16 = 262;

/// `iter/task_file`: [`Numbers`] of each descriptor that is a TCP socket.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn numbers(ctx: *const FileContext) -> i32 {
    // SAFETY: the kernel fills the context in; all else is read by a helper that checks the address.
    unsafe {
        let task = (*ctx).task as u64;
        if task == 0 || get::<u64>(task, off!(task_group_leader)) != task {
            return 0;
        }
        let Some((inode, socket)) = socket_of((*ctx).file as u64) else { return 0 };
        let socket = tcp_of(socket);
        if socket != 0 {
            let record = read(socket, inode);
            bpf_seq_write((*(*ctx).meta).seq.cast(), (&raw const record).cast(), size_of::<Numbers>() as u32);
        }
    }
    0
}

/// The TCP socket that a socket is, or that it goes on as (MPTCP whose peer knows TCP only); 0 where it is another.
#[inline(always)]
unsafe fn tcp_of(socket: u64) -> u64 {
    // SAFETY: it is read by a helper that checks the address.
    unsafe {
        let family = get::<u16>(socket, off!(sock_family));
        if family != AF_INET && family != AF_INET6 {
            return 0;
        }
        match get::<u16>(socket, off!(sock_protocol)) {
            IPPROTO_TCP => socket,
            IPPROTO_MPTCP if off!(mptcp_first) != ABSENT => get(socket, off!(mptcp_first)),
            _ => 0,
        }
    }
}

#[inline(always)]
unsafe fn read(socket: u64, inode: u64) -> Numbers {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let both = || (get::<u32>(socket, off!(tcp_rcv_nxt)), get::<u32>(socket, off!(tcp_snd_una)));
        let before = both();
        let mut record = Numbers {
            inode,
            now: bpf_ktime_get_ns(),
            copied_seq: get(socket, off!(tcp_copied_seq)),
            rcv_nxt: before.0,
            rcv_wup: get(socket, off!(tcp_rcv_wup)),
            rcv_wnd: get(socket, off!(tcp_rcv_wnd)),
            snd_una: before.1,
            write_seq: get(socket, off!(tcp_write_seq)),
            snd_wl1: get(socket, off!(tcp_snd_wl1)),
            snd_wnd: get(socket, off!(tcp_snd_wnd)),
            max_window: get(socket, off!(tcp_max_window)),
            srtt: get(socket, off!(tcp_srtt)),
            ts_offset: get(socket, off!(tcp_ts_offset)),
            mss: get(socket, off!(tcp_mss)),
            state: get(socket, off!(sock_state)),
            torn: 0,
        };
        record.torn = u8::from(both() != before);
        record
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
