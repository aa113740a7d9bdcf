//! Which TCP connections a process has, and which of them somebody changes between a first look at them and a second one.
//!
//! A dump reads the options of many connections while their owners run, and believes in the freeze what it has read of those
//! that nobody has touched since. Options have no number that the kernel counts up; but few calls change them, and each
//! names its socket by a descriptor. As in the watch only the return of a call is looked at: a thread that stands still is
//! past it.
//!
//! Whoever has a descriptor can change a socket, whether he belongs to the tree or not. So what comes first here is not the
//! process but the call. What counts then is whether its socket is one of those.
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

use access::{Scratch, get, load, off, read};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_seq_write};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use contexts::TaskContext;
use criu_common::touched::{Connection, MOST_SOCKETS, MOST_TOLD, Offsets, UNKNOWN};
use descriptors::socket_of;

/// Filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Without room set aside.
const BPF_F_NO_PREALLOC: u32 = 1;
/// Descriptors that are looked at in one go, in which nothing that the kernel gives up is freed.
const STEPS: i32 = 1 << 14;
/// Bit of `thread_info.status`: a call by the 32-bit interface, whose numbers are others.
const TS_COMPAT: u32 = 2;
const EBADF: i64 = 9;

/// connect(2), shutdown(2), bind(2), listen(2), setsockopt(2): the first argument is the socket.
const CALLS: [u64; 5] = [42, 48, 49, 50, 54];
/// The same by the 32-bit interface, where socketcall(2) has its arguments in memory.
const COMPAT_CALLS: [u64; 6] = [102, 361, 362, 363, 366, 373];
/// What is above this bit in the number of a call by the x32 interface: nothing.
const X32_BIT: u32 = 30;

/// The sockets by their inodes; 1 for one that was touched, or may have been.
#[map]
static SOCKETS: HashMap<u64, u32> = HashMap::with_max_entries(MOST_SOCKETS, BPF_F_NO_PREALLOC);

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const IPPROTO_TCP: u16 = 6;
/// The states that are neither without a peer (7, 10) nor on the way to one (2, 3): include/net/tcp_states.h.
const CONNECTED: [u8; 6] = [1, 4, 5, 8, 9, 11];

/// The process that is looked at; the descriptor that is looked at next, and how many connections were told of: see
/// [`kfuncs::repeat`].
static OF: Scratch<u64> = Scratch::new(0);
static NEXT: Scratch<u32> = Scratch::new(0);
static TOLD: Scratch<u32> = Scratch::new(0);

/// `iter/task`: a [`Connection`] for each descriptor in the process's own table that is one. Behind them comes
/// [`Connection::END`], or [`Connection::MORE`] where the next run goes on. Nobody holds them: an iterator over descriptors would, so that one which the
/// owner closes just then was still open when it is closed.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
extern "C" fn connections(ctx: *const TaskContext) -> i32 {
    // SAFETY: the kernel fills the context in; all else is read by a helper that checks the address. A table that the process
    // gives up meanwhile stays as long as this lasts (RCU); of a description that is made anew something else may be
    // read, and whoever is told of it looks again.
    unsafe {
        let task = (*ctx).task as u64;
        if task == 0 || get::<u64>(task, off!(task_group_leader)) != task {
            return 0;
        }
        let seq = (*(*ctx).meta).seq;
        let table: u64 = get(get(task, off!(task_files)), off!(files_fdt));
        let (most, files) = (get::<u32>(table, off!(fdt_max_fds)), get::<u64>(table, off!(fdt_fd)));
        TOLD.get().write_volatile(0);
        // The one before may have ended in the middle.
        if OF.get().read_volatile() != task {
            OF.get().write_volatile(task);
            NEXT.get().write_volatile(0);
        }
        kfuncs::repeat(STEPS, || {
            let fd = NEXT.get().read_volatile();
            if fd >= most {
                return true;
            }
            NEXT.get().write_volatile(fd + 1);
            let Some(inode) = connection(read(files + u64::from(fd) * 8)) else { return false };
            tell(seq, Connection { inode, fd, padding: 0 });
            let told = TOLD.get().read_volatile() + 1;
            TOLD.get().write_volatile(told);
            told == MOST_TOLD
        });
        let is_over = NEXT.get().read_volatile() >= most;
        if is_over {
            NEXT.get().write_volatile(0);
        }
        tell(seq, if is_over { Connection::END } else { Connection::MORE });
    }
    0
}

/// The inode of a file that is a connection.
#[inline(always)]
unsafe fn connection(file: u64) -> Option<u64> {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let (inode, socket) = socket_of(file)?;
        let family = get::<u16>(socket, off!(sock_family));
        let is_tcp =
            (family == AF_INET || family == AF_INET6) && get::<u16>(socket, off!(sock_protocol)) == IPPROTO_TCP;
        let is_one = is_tcp && CONNECTED.contains(&get::<u8>(socket, off!(sock_state)));
        if is_one { Some(inode) } else { None }
    }
}

#[inline(always)]
unsafe fn tell(seq: *mut c_void, record: Connection) {
    // SAFETY: the record lives for the call.
    unsafe { bpf_seq_write(seq.cast(), (&raw const record).cast(), size_of::<Connection>() as u32) };
}

/// `sys_exit(regs, result)`.
#[btf_tracepoint(function = "sys_exit")]
fn touched(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: typed pointers of the kernel's.
    unsafe {
        let regs: *const c_void = ctx.arg(0);
        let number: u64 = load(regs, off!(regs_nr));
        let (is_ours, is_compat) = (CALLS.contains(&number), COMPAT_CALLS.contains(&number));
        if !is_ours && !is_compat {
            if number >> X32_BIT == 1 {
                note(UNKNOWN);
            }
            return 0;
        }
        let task = bpf_get_current_task_btf().cast_const().cast::<c_void>();
        if load::<u32>(task, off!(task_status)) & TS_COMPAT != 0 {
            if is_compat {
                note(UNKNOWN);
            }
        } else if is_ours {
            match inode_of(task, load::<u64>(regs, off!(regs_arg0)) as u32) {
                0 if ctx.arg::<i64>(1) == -EBADF => {}
                // 0, where it was closed by another thread meanwhile, is the entry for what is unknown.
                inode => note(inode),
            }
        }
    }
    0
}

/// The inode of what a task has under a descriptor; 0 where there is nothing.
#[inline(always)]
unsafe fn inode_of(task: *const c_void, fd: u32) -> u64 {
    // SAFETY: all is read by a helper that checks the address.
    unsafe {
        let table: u64 = get(get(task as u64, off!(task_files)), off!(files_fdt));
        if fd >= get::<u32>(table, off!(fdt_max_fds)) {
            return 0;
        }
        let files: u64 = get(table, off!(fdt_fd));
        let file: u64 = read(files + u64::from(fd) * 8);
        if file == 0 {
            return 0;
        }
        get(get(file, off!(file_inode)), off!(inode_ino))
    }
}

#[inline(always)]
fn note(inode: u64) {
    if let Some(touched) = SOCKETS.get_ptr_mut(inode) {
        // SAFETY: a pointer into the map, not null; whoever else writes there writes the same.
        unsafe { *touched = 1 };
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
