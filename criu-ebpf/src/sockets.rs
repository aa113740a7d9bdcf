//! How connections of the tree move.
//!
//! Nothing of this sits in the way of data: a program at every send, receive and segment of the whole machine would cost
//! each of them some 130 ns. The kernel counts bytes and segments for itself, so an *iterator* over the open files of a
//! process reads them when the engine asks: exactly, and also of sockets that were there before. Only what cannot be asked
//! for afterwards is watched: changes of state.
//!
//! These happen in interrupts as well, in which whatever thread happens to run is not the one concerned. So owners are
//! remembered by socket, from when one of them called connect(2) or listen(2), or the iterator saw it; what is made by a
//! listening socket belongs to whom that belongs.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_seq_write};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use criu_common::gate::mapped;
use criu_common::offsets::ABSENT;
use criu_common::watch::{
    Header, Listener, Loss, MOST_LISTENERS, MOST_SOCKETS, Owner, RecordKind, Socket, SocketState,
};

use crate::access::{Scratch, get, load, off};
use crate::contexts::FileContext;
use crate::tracked::{Wake, current, find, key_of, lost, send};

/// Without room set aside: most trees have few.
const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_ANY: u64 = 0;

/// Whose a socket is, by its address in the kernel; gone with the socket.
#[map]
static OWNERS: HashMap<u64, Owner> = HashMap::with_max_entries(MOST_SOCKETS, BPF_F_NO_PREALLOC);

/// Whose a port is that somebody listens at.
#[map]
static LISTENERS: HashMap<Listener, Owner> = HashMap::with_max_entries(MOST_LISTENERS, BPF_F_NO_PREALLOC);

const AF_INET6: u16 = 10;
const IPPROTO_TCP: u16 = 6;
const S_IFMT: u16 = 0o170_000;
const S_IFSOCK: u16 = 0o140_000;
/// include/net/tcp_states.h
const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_SYN_RECV: u32 = 3;
const TCP_LISTEN: u32 = 10;

/// # Safety
/// None of its own: the helper checks the address.
#[inline(always)]
unsafe fn listener(sk: u64) -> Listener {
    // SAFETY: as said above.
    unsafe { Listener { network: get(sk, off!(sock_net)), port: u64::from(get::<u16>(sk, off!(sock_port))) } }
}

#[inline(always)]
fn remember(sk: u64, owner: &Owner) {
    if OWNERS.insert(sk, owner, BPF_ANY).is_err() {
        lost(Loss::Connection);
    }
}

/// Whose a socket is that changes its state.
///
/// # Safety
/// None of its own: the helper checks the address.
#[inline(always)]
unsafe fn owner(sk: u64, from: u32, to: u32) -> Option<Owner> {
    // SAFETY: as said above; values of the map are copied.
    unsafe {
        if let Some(owner) = OWNERS.get(sk) {
            return Some(*owner);
        }
        let owner = if to == TCP_SYN_SENT || to == TCP_LISTEN {
            // Only connect(2) and listen(2) do that, so the current process is the socket's.
            let key = key_of(current());
            Owner { key, pid: find(key)?.pid }
        } else if from == TCP_SYN_RECV && to == TCP_ESTABLISHED {
            *LISTENERS.get(listener(sk))?
        } else {
            return None;
        };
        remember(sk, &owner);
        Some(owner)
    }
}

/// `inet_sock_set_state(sk, from, to)`.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn watch_socket_state(ctx: BtfTracePointContext) -> i32 {
    let sk: *const c_void = ctx.arg(0);
    let (from, to): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    let (from, to) = (from as u32, to as u32);
    // SAFETY: typed pointers.
    unsafe {
        if load::<u16>(sk, off!(sock_protocol)) != IPPROTO_TCP {
            return 0;
        }
        let Some(owner) = owner(sk as u64, from, to) else { return 0 };
        if to == TCP_LISTEN {
            let _ = LISTENERS.insert(listener(sk as u64), owner, BPF_ANY);
        } else if from == TCP_LISTEN {
            let _ = LISTENERS.remove(listener(sk as u64));
        }
        let cookie = bpf_get_socket_cookie(sk.cast_mut().cast());
        let header = Header {
            kind: RecordKind::Socket as u32,
            key: owner.key,
            pid: owner.pid,
            tid: owner.pid,
            time_ns: bpf_ktime_get_ns(),
        };
        send(SocketState { header, cookie, from, to }, Loss::Socket, Wake::Later);
    }
    0
}

/// `tcp_destroy_sock(sk)`: the next one at this address is another.
#[btf_tracepoint(function = "tcp_destroy_sock")]
fn watch_socket_end(ctx: BtfTracePointContext) -> i32 {
    let sk: u64 = ctx.arg(0);
    let _ = OWNERS.remove(sk);
    0
}

// SAFETY: plain data, for which zeros are a value.
static SOCKET: Scratch<Socket> = Scratch::new(unsafe { core::mem::zeroed() });

/// `iter/task_file`: a [`Socket`] for each descriptor of the process that is a TCP socket, which is remembered as its own.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn watch_sockets(ctx: *const FileContext) -> i32 {
    // SAFETY: the verifier admits only loads from the context and from typed kernel pointers; the rest is read by helpers.
    unsafe {
        let (task, file) = ((*ctx).task, (*ctx).file);
        if task.is_null() || file.is_null() {
            return 0;
        }
        let inode: u64 = get(file as u64, off!(file_inode));
        if get::<u16>(inode, off!(inode_mode)) & S_IFMT != S_IFSOCK {
            return 0;
        }
        let sk: u64 = get(get(file as u64, off!(file_private_data)), off!(socket_sk));
        if sk == 0 || get::<u16>(sk, off!(sock_protocol)) != IPPROTO_TCP {
            return 0;
        }
        let key = key_of(task);
        let Some(process) = find(key) else { return 0 };
        let owner = Owner { key, pid: process.pid };
        if OWNERS.get(sk).is_none() {
            remember(sk, &owner);
        }
        let socket = &mut *SOCKET.get();
        describe(socket, sk);
        socket.pid = owner.pid;
        socket.fd = (*ctx).fd;
        socket.inode = get(inode, off!(inode_ino));
        if socket.state == TCP_LISTEN {
            let _ = LISTENERS.insert(listener(sk), owner, BPF_ANY);
        }
        bpf_seq_write((*(*ctx).meta).seq.cast(), SOCKET.get().cast(), size_of::<Socket>() as u32);
    }
    0
}

/// What the kernel has counted, and what waits.
///
/// # Safety
/// None of its own: the helper checks addresses.
#[inline(always)]
unsafe fn describe(socket: &mut Socket, sk: u64) {
    // SAFETY: as said above.
    unsafe {
        socket.cookie = get(sk, off!(sock_cookie));
        socket.family = get(sk, off!(sock_family));
        socket.state = u32::from(get::<u8>(sk, off!(sock_state)));
        socket.port = get(sk, off!(sock_port));
        socket.peer_port = u16::from_be(get(sk, off!(sock_peer_port)));
        if socket.family == AF_INET6 && off!(sock_address6) != ABSENT {
            socket.address = get(sk, off!(sock_address6));
            socket.peer_address = get(sk, off!(sock_peer_address6));
        } else {
            socket.address = mapped(get(sk, off!(sock_address)));
            socket.peer_address = mapped(get(sk, off!(sock_peer_address)));
        }
        if socket.state == TCP_LISTEN {
            socket.unread = get(sk, off!(sock_backlog));
            socket.unacknowledged = 0;
        } else {
            let (next, taken): (u32, u32) = (get(sk, off!(tcp_rcv_nxt)), get(sk, off!(tcp_copied_seq)));
            let (written, acknowledged): (u32, u32) = (get(sk, off!(tcp_write_seq)), get(sk, off!(tcp_snd_una)));
            socket.unread = next.wrapping_sub(taken);
            socket.unacknowledged = written.wrapping_sub(acknowledged);
        }
        socket.sent = get(sk, off!(tcp_bytes_sent));
        socket.received = get(sk, off!(tcp_bytes_received));
        socket.retransmits = get(sk, off!(tcp_total_retrans));
    }
}
