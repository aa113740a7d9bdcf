//! Clients of TCP servers that nobody has accepted yet, and what they have sent.
//!
//! Until accept(2) their ends have no descriptor through which anybody could look, and whoever accepted one would change
//! the program. But the engine has a descriptor of the listening socket: the iterator comes by all of the engine's
//! descriptors, and from those that it asks about the program goes along the queue of those that can be accepted, in that
//! order, and through each one's receive queue. (An iterator over all TCP sockets would do as well, but goes through a
//! table that is made for hundreds of thousands, which takes ten milliseconds and more.) Nothing is locked: the server
//! stands still, and the gate lets no packets through.
//!
//! Most data is in pages, which a program can read only by their address. So the engine has a page with known content
//! ready, and the program looks where the kernel sees it: that is the same distance for all.
//!
//! Those whose handshake is not over are in the kernel's table of connections, which is gone through only where a listening
//! socket has any.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[expect(dead_code, reason = "what the other programs need of it")]
mod access;
#[expect(dead_code, reason = "what the other programs need of it")]
mod kfuncs;

use access::{Scratch, copy, get, is_set, off, read};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_current_task, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap};
use criu_common::offsets::ABSENT;
use criu_common::pending::{CLIENT, Client, DATA, MOST_LISTENERS, Offsets, PIECE, Piece, Search, Told};

/// Filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;
/// Likewise.
#[unsafe(no_mangle)]
static SEARCH: Search = Search { fd: 0, content: [0; 4] };

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Without room set aside.
const BPF_F_NO_PREALLOC: u32 = 1;
/// TCP_LISTEN and TCP_NEW_SYN_RECV
const LISTEN: u8 = 10;
const NEW_SYN_RECV: u8 = 12;
/// S_IFMT and S_IFSOCK.
const TYPE: u16 = 0o170_000;
const SOCKET: u16 = 0o140_000;
/// More steps than a queue of any size takes.
const STEPS: i32 = 8 << 20;
/// How far the memory of two pages is apart at most, in GiB.
const REACH: i32 = 16 << 10;
/// Memory begins at a multiple of so much, and so does the table of pages: 64 bytes of it are one page of 4 KiB.
const ALIGNED: u64 = 1 << 30;

/// Inodes of the listening sockets that are asked about; not 0 where it was looked at: there may be more descriptors of it.
#[map]
static LISTENERS: HashMap<u64, u32> = HashMap::with_max_entries(MOST_LISTENERS, BPF_F_NO_PREALLOC);
/// What is told. The engine makes it as large as it has to be.
#[map]
static PIECES: Array<Piece> = Array::with_max_entries(1, 0);
/// One: how it went.
#[map]
static TOLD: Array<Told> = Array::with_max_entries(1, 0);

/// `struct bpf_iter__task_file`
#[repr(C)]
struct Context {
    meta: *const c_void,
    task: *const c_void,
    fd: u32,
    file: *const c_void,
}

/// Where the walk stands. Not in registers: see [`kfuncs::repeat`].
struct Walk {
    /// Its inode.
    listener: u64,
    /// The request that comes next.
    request: u64,
    /// The queue that we are in.
    queue: u64,
    /// The packet in it; 0 at its end.
    skb: u64,
    /// The packet that `skb` is a part of.
    outer: u64,
    /// The next of its fragments, and how many there are.
    frag: u64,
    frags: u64,
    /// What is being written: where, how much, and the number of its first byte.
    at: u64,
    left: u64,
    seq: u64,
    /// Steps of the search.
    step: u64,
    /// Where the record of the client is.
    client: u64,
}

static WALK: Scratch<Walk> = Scratch::new(Walk {
    listener: 0,
    request: 0,
    queue: 0,
    skb: 0,
    outer: 0,
    frag: 0,
    frags: 0,
    at: 0,
    left: 0,
    seq: 0,
    step: 0,
    client: 0,
});

/// A field of the walk.
macro_rules! walk {
    ($field:ident) => {
        (&raw mut (*WALK.get()).$field).read_volatile()
    };
    ($field:ident = $value:expr) => {
        (&raw mut (*WALK.get()).$field).write_volatile($value)
    };
}

/// `iter/task_file`: a [`Piece`] for each client that waits, and those with its data.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn pending(ctx: *const Context) -> i32 {
    // SAFETY: the kernel fills the context in; all else is read by a helper that checks the address.
    unsafe {
        let file = (*ctx).file as u64;
        if file == 0 {
            return 0;
        }
        // Those of other kinds of files may have the same number.
        let inode: u64 = get(file, off!(file_inode));
        let number: u64 = get(inode, off!(inode_ino));
        if get::<u16>(inode, off!(inode_mode)) & TYPE != SOCKET {
            return 0;
        }
        let Some(seen) = LISTENERS.get_ptr_mut(number) else { return 0 };
        if *seen != 0 {
            return 0;
        }
        *seen = 1;
        let listener: u64 = get(get(file, off!(file_private_data)), off!(socket_sk));
        if get::<u8>(listener, off!(skc_state)) != LISTEN {
            return 0;
        }
        if TOLD.get(0).is_some_and(|told| told.memory == 0) {
            walk!(step = 0);
            kfuncs::repeat(2 * REACH, || find_memory());
        }
        if let Some(told) = TOLD.get_ptr_mut(0) {
            (*told).requests += u64::from(get::<u32>(listener, off!(accept_requests)));
        }
        walk!(listener = number);
        walk!(request = get(listener, off!(accept_head)));
        walk!(skb = 0);
        walk!(outer = 0);
        walk!(left = 0);
        kfuncs::repeat(STEPS, || step());
    }
    0
}

/// `struct bpf_iter__tcp`
#[repr(C)]
struct TcpContext {
    meta: *const c_void,
    socket: *const c_void,
    uid: u32,
}

/// `iter/tcp`: a [`Piece`] for each client whose handshake with one of the listening sockets is not over.
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
        if let Some(piece) = place() {
            (*piece).kind = CLIENT;
            (*piece).length = size_of::<Client>() as u32;
            describe_request((&raw mut (*piece).bytes).cast(), number, request, listener);
        }
    }
    0
}

/// One step of the search: whether it is over.
#[inline(always)]
unsafe fn find_memory() -> bool {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let task = bpf_get_current_task();
        let files: u64 = get(task, off!(task_files));
        let table: u64 = get(get(files, off!(files_fdt)), off!(fdt_fd));
        let fd = (&raw const SEARCH.fd).read_volatile();
        let pipe: u64 = get(read::<u64>(table + fd * 8), off!(file_private_data));
        let page: u64 = get(get(pipe, off!(pipe_bufs)), off!(pipe_buffer_page));
        if page == 0 {
            return true;
        }
        // Nearest first, to both sides of something that is in memory as well.
        let step = walk!(step);
        walk!(step = step + 1);
        let apart = ((step + 1) >> 1) * ALIGNED;
        let sign = 0u64.wrapping_sub(step & 1);
        let near = (task & !(ALIGNED - 1)).wrapping_add((apart ^ sign).wrapping_sub(sign));
        let memory = near | ((page << 6) & (ALIGNED - 1));
        let found: [u64; 4] = [read(memory), read(memory + 8), read(memory + 16), read(memory + 24)];
        let content = (&raw const SEARCH.content).read_volatile();
        let differs =
            (found[0] ^ content[0]) | (found[1] ^ content[1]) | (found[2] ^ content[2]) | (found[3] ^ content[3]);
        if differs != 0 {
            return false;
        }
        if let Some(told) = TOLD.get_ptr_mut(0) {
            (*told).memory = memory.wrapping_sub(page << 6);
        }
        true
    }
}

/// One step through the clients and their data: whether it was the last.
#[inline(always)]
unsafe fn step() -> bool {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        if walk!(left) != 0 {
            data();
            return false;
        }
        if walk!(skb) != 0 {
            next_block();
            return false;
        }
        next_client()
    }
}

/// A place for the next piece, if there is room.
#[inline(always)]
unsafe fn place() -> Option<*mut Piece> {
    // SAFETY: pointers into maps, which the verifier has seen checked.
    unsafe {
        let told = TOLD.get_ptr_mut(0)?;
        let at = (*told).pieces;
        (*told).pieces = at + 1;
        PIECES.get_ptr_mut(at as u32)
    }
}

/// Writes as much as a piece takes of what there is at one address.
#[inline(always)]
unsafe fn data() {
    // SAFETY: a place is as long as a piece.
    unsafe {
        let mut length = walk!(left);
        if length > PIECE as u64 {
            length = PIECE as u64;
        }
        let (at, seq) = (walk!(at), walk!(seq));
        walk!(at = at + length);
        walk!(left = walk!(left) - length);
        walk!(seq = seq + length);
        let Some(piece) = place() else { return };
        (*piece).kind = DATA;
        (*piece).length = length as u32;
        (*piece).seq = seq as u32;
        copy((&raw mut (*piece).bytes).cast(), length as u32, at as *const c_void);
    }
}

/// Begins with a packet, or with one that is a part of another.
#[inline(always)]
unsafe fn begin(skb: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let (length, paged): (u32, u32) = (get(skb, off!(skb_length)), get(skb, off!(skb_paged)));
        walk!(skb = skb);
        walk!(at = get(skb, off!(skb_data)));
        walk!(left = u64::from(length.wrapping_sub(paged)));
        walk!(frag = 0);
        walk!(frags = u64::from(get::<u8>(shared(skb), off!(shared_count))));
    }
}

/// Where the `skb_shared_info` of a packet is.
#[inline(always)]
unsafe fn shared(skb: u64) -> u64 {
    // SAFETY: all is read by a helper that checks the address.
    unsafe { get::<u64>(skb, off!(skb_head)) + u64::from(get::<u32>(skb, off!(skb_end))) }
}

/// From one piece of memory of a packet to the next, and from packet to packet.
#[inline(always)]
unsafe fn next_block() {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let (skb, frag) = (walk!(skb), walk!(frag));
        if frag < walk!(frags) {
            walk!(frag = frag + 1);
            let at = shared(skb) + u64::from(off!(shared_frags)) + frag * u64::from(off!(frag_size));
            fragment(at);
            return;
        }
        let outer = walk!(outer);
        if outer == 0 {
            let list: u64 = get(shared(skb), off!(shared_list));
            if list != 0 {
                walk!(outer = skb);
                begin(list);
                return;
            }
        }
        let sibling: u64 = get(skb, off!(skb_next));
        if outer != 0 && sibling != 0 {
            begin(sibling);
            return;
        }
        walk!(outer = 0);
        let next = if outer == 0 { sibling } else { get(outer, off!(skb_next)) };
        packet(next);
    }
}

/// Begins with a packet of the queue, if it is one.
#[inline(always)]
unsafe fn packet(skb: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        if skb == walk!(queue) || skb == 0 {
            walk!(skb = 0);
            return;
        }
        walk!(seq = u64::from(get::<u32>(skb + u64::from(off!(skb_cb)), off!(cb_seq))));
        begin(skb);
    }
}

/// Begins with a part of a packet that is in a page.
#[inline(always)]
unsafe fn fragment(at: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let page: u64 = if off!(frag_netmem) == ABSENT { get(at, off!(frag_page)) } else { get(at, off!(frag_netmem)) };
        let memory = TOLD.get(0).map_or(0, |told| told.memory);
        walk!(left = u64::from(get::<u32>(at, off!(frag_length))));
        walk!(at = memory.wrapping_add(page << 6) + u64::from(get::<u32>(at, off!(frag_offset))));
        // With the lowest bit it is memory of a device.
        if memory == 0 || page & 1 != 0 {
            let client = PIECES.get_ptr_mut(walk!(client) as u32);
            if let Some(client) = client {
                (*(&raw mut (*client).bytes).cast::<Client>()).unreadable = 1;
            }
        }
    }
}

/// Writes the next client: whether there was none.
#[inline(always)]
unsafe fn next_client() -> bool {
    // SAFETY: all is read by a helper that checks the address; a place has room for a client.
    unsafe {
        let request = walk!(request);
        if request == 0 {
            return true;
        }
        walk!(request = get(request, off!(request_next)));
        let socket: u64 = get(request, off!(request_sk));
        if socket == 0 {
            return false;
        }
        walk!(client = TOLD.get(0).map_or(0, |told| told.pieces));
        if let Some(piece) = place() {
            (*piece).kind = CLIENT;
            (*piece).length = size_of::<Client>() as u32;
            describe((&raw mut (*piece).bytes).cast(), socket);
        }
        let queue = socket + u64::from(off!(sock_queue));
        walk!(queue = queue);
        walk!(outer = 0);
        packet(get(queue, off!(skb_next)));
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
        (*client).unreadable = 0;
        (*client).mptcp = 0;
    }
}

#[inline(always)]
unsafe fn describe(client: *mut Client, socket: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        describe_common(client, walk!(listener), socket, socket);
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
