//! Along a queue of packets and through each of them, with all that is in it.
//!
//! Most data is in pages, which a program can read only by their address. So the engine has a page with known content
//! ready, and the program looks where the kernel sees it: that is the same distance for all.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::bpf_get_current_task;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use criu_common::offsets::ABSENT;
use criu_common::pieces::{DATA, PIECE, Piece, RECORD, Search, Told, UNREADABLE};

use crate::access::{Scratch, copy, get, off, read};
use crate::kfuncs;

/// Filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static SEARCH: Search = Search { fd: 0, content: [0; 4] };

/// More steps than a queue of any size takes.
pub(crate) const STEPS: i32 = 8 << 20;
/// How far the memory of two pages is apart at most, in GiB.
const REACH: i32 = 16 << 10;
/// Memory begins at a multiple of so much, and so does the table of pages: 64 bytes of it are one page of 4 KiB.
const ALIGNED: u64 = 1 << 30;

/// What is told. The engine makes it as large as it has to be.
#[map]
static PIECES: Array<Piece> = Array::with_max_entries(1, 0);
/// One: how it went.
#[map]
pub(crate) static TOLD: Array<Told> = Array::with_max_entries(1, 0);

/// Where the walk stands. Not in registers: see [`kfuncs::repeat`].
struct Walk {
    /// The queue.
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
}

static WALK: Scratch<Walk> =
    Scratch::new(Walk { queue: 0, skb: 0, outer: 0, frag: 0, frags: 0, at: 0, left: 0, seq: 0, step: 0 });

/// A field of the walk.
macro_rules! walk {
    ($field:ident) => {
        (&raw mut (*WALK.get()).$field).read_volatile()
    };
    ($field:ident = $value:expr) => {
        (&raw mut (*WALK.get()).$field).write_volatile($value)
    };
}

/// Finds out where the kernel sees the memory of pages, unless it is known.
///
/// # Safety
/// None of its own: the helpers check the addresses.
#[inline(always)]
pub(crate) unsafe fn find_memory() {
    // SAFETY: as said above.
    unsafe {
        if TOLD.get(0).is_some_and(|told| told.memory == 0) {
            walk!(step = 0);
            kfuncs::repeat(2 * REACH, || search());
        }
    }
}

/// One step of the search: whether it is over.
#[inline(always)]
unsafe fn search() -> bool {
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

/// Forgets where the walk stood.
///
/// # Safety
/// None of its own.
#[inline(always)]
pub(crate) unsafe fn clear() {
    // SAFETY: the walk is ours.
    unsafe {
        walk!(skb = 0);
        walk!(outer = 0);
        walk!(left = 0);
    }
}

/// Begins with a queue, a `struct sk_buff_head`, and its first packet: see [`step`].
///
/// # Safety
/// None of its own: the helpers check the addresses.
#[inline(always)]
pub(crate) unsafe fn begin(queue: u64, begins: impl Fn(u64) -> u32) {
    // SAFETY: as said above.
    unsafe {
        walk!(queue = queue);
        walk!(outer = 0);
        packet(get(queue, off!(skb_next)), begins);
    }
}

/// One step along the queue: whether it is at its end. `begins` is told of each packet, and gives the number of its first
/// byte.
///
/// # Safety
/// None of its own: the helpers check the addresses.
#[inline(always)]
pub(crate) unsafe fn step(begins: impl Fn(u64) -> u32) -> bool {
    // SAFETY: as said above.
    unsafe {
        if walk!(left) != 0 {
            data();
            return false;
        }
        if walk!(skb) != 0 {
            next_block(begins);
            return false;
        }
        true
    }
}

/// A place for the next record, if there is room.
///
/// # Safety
/// The record is to be filled in.
#[inline(always)]
pub(crate) unsafe fn record<T>() -> Option<*mut T> {
    // SAFETY: a place is longer than any record.
    unsafe {
        let piece = place()?;
        (*piece).kind = RECORD;
        (*piece).length = size_of::<T>() as u32;
        Some((&raw mut (*piece).bytes).cast())
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
unsafe fn part(skb: u64) {
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
unsafe fn next_block(begins: impl Fn(u64) -> u32) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let (skb, frag) = (walk!(skb), walk!(frag));
        if frag < walk!(frags) {
            walk!(frag = frag + 1);
            let at =
                shared(skb) + u64::from(off!(shared_frags)) + frag * u64::from(either(off!(frag_size), off!(vec_size)));
            fragment(at);
            return;
        }
        let outer = walk!(outer);
        if outer == 0 {
            let list: u64 = get(shared(skb), off!(shared_list));
            if list != 0 {
                walk!(outer = skb);
                part(list);
                return;
            }
        }
        let sibling: u64 = get(skb, off!(skb_next));
        if outer != 0 && sibling != 0 {
            part(sibling);
            return;
        }
        walk!(outer = 0);
        packet(if outer == 0 { sibling } else { get(outer, off!(skb_next)) }, begins);
    }
}

/// Begins with a packet of the queue, if it is one.
#[inline(always)]
unsafe fn packet(skb: u64, begins: impl Fn(u64) -> u32) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        if skb == walk!(queue) || skb == 0 {
            walk!(skb = 0);
            return;
        }
        walk!(seq = u64::from(begins(skb)));
        part(skb);
    }
}

/// Of a fragment, where a field is: before Linux 6.9 it is a `bio_vec`.
#[inline(always)]
fn either(fragment: u32, vec: u32) -> u32 {
    if fragment == ABSENT { vec } else { fragment }
}

/// Begins with a part of a packet that is in a page.
#[inline(always)]
unsafe fn fragment(at: u64) {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let page: u64 = get(at, either(off!(frag_netmem), off!(vec_page)));
        let length: u32 = get(at, either(off!(frag_length), off!(vec_length)));
        let memory = TOLD.get(0).map_or(0, |told| told.memory);
        // With the lowest bit it is memory of a device.
        if memory == 0 || page & 1 != 0 {
            if let Some(piece) = place() {
                (*piece).kind = UNREADABLE;
                (*piece).length = 0;
            }
            return;
        }
        walk!(left = u64::from(length));
        walk!(
            at =
                memory.wrapping_add(page << 6) + u64::from(get::<u32>(at, either(off!(frag_offset), off!(vec_offset))))
        );
    }
}
