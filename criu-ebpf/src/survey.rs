//! The survey: what a process has mapped, has open, and is, written by BPF iterators into their `seq_file`.
//!
//! Three iterators, each loaded by itself. They are run for one process at a time (`bpf_iter_link_info.task`), while
//! its threads stand still; they read, and change nothing. Numbers are loaded through typed pointers, which the verifier
//! checks (see `criu_common::offsets`); pointers are read with `bpf_probe_read_kernel`, because the verifier takes long
//! over a typed one.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

mod access;
mod contexts;
mod ids;
mod task;

use access::{Scratch, get, load, load_pointer, off};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_d_path, bpf_probe_read_kernel_str, bpf_seq_write};
use contexts::{FileContext, Meta};
use criu_common::offsets::{ABSENT, Offsets};
use criu_common::survey::{File, Header, Kind, NAME_MAX, PATH_MAX, Tail, Vma};

/// Filled in by the engine before the programs are loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// `struct bpf_iter__task_vma`
#[repr(C)]
struct VmaContext {
    meta: *const Meta,
    task: *const c_void,
    vma: *const c_void,
}

/// Where tails are made.
struct Text {
    path: [u8; PATH_MAX],
    name: [u8; NAME_MAX],
}

static TEXT: Scratch<Text> = Scratch::new(Text { path: [0; PATH_MAX], name: [0; NAME_MAX] });
/// The file whose path was written last.
static LAST_FILE: Scratch<u64> = Scratch::new(0);

/// `iter/task_vma`: a [`Vma`] for each area of the process.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_vma")]
extern "C" fn survey_vmas(ctx: *const VmaContext) -> i32 {
    // SAFETY: the verifier admits only loads from the context and from typed kernel pointers that are checked.
    unsafe {
        let vma = (*ctx).vma;
        if vma.is_null() {
            // The call after the last area, and the sign that the next process is another's address space.
            LAST_FILE.get().write(0);
            return 0;
        }
        let seq = (*(*ctx).meta).seq;
        let mut record = Vma {
            header: Header { kind: Kind::Vma as u32, ..Header::default() },
            start: load(vma, off!(vma_start)),
            end: load(vma, off!(vma_end)),
            flags: load(vma, off!(vma_flags)),
            pgoff: load(vma, off!(vma_pgoff)),
            has_anon: u32::from(get::<u64>(vma as u64, off!(vma_anon_vma)) != 0),
            ..Vma::default()
        };
        let mut tail: *const u8 = core::ptr::null();
        let file = load_pointer(vma, off!(vma_file));
        if file.is_null() {
            tail = name_of_area(vma, &mut record);
        } else {
            let inode = get(file as u64, off!(file_inode));
            record.file = file as u64;
            record.f_mode = load(file, off!(file_mode));
            record.inode = inode;
            record.ino = get(inode, off!(inode_ino));
            record.mode = u32::from(get::<u16>(inode, off!(inode_mode)));
            record.dev = get(get(inode, off!(inode_sb)), off!(sb_dev));
            if LAST_FILE.get().read() != file as u64 {
                tail = path_of(file, &mut record.header);
            }
        }
        if write(seq, &record, &record.header, tail) {
            LAST_FILE.get().write(record.file);
        }
    }
    0
}

/// `iter/task_file`: a [`File`] for each descriptor of the process.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn survey_files(ctx: *const FileContext) -> i32 {
    // SAFETY: as in `survey_vmas`.
    unsafe {
        let (task, file, fd) = ((*ctx).task, (*ctx).file, (*ctx).fd);
        if task.is_null() || file.is_null() {
            return 0;
        }
        let seq = (*(*ctx).meta).seq;
        let (of_task, of_file) = (task as u64, file as u64);
        let inode = get(of_file, off!(file_inode));
        let mut record = File {
            header: Header { kind: Kind::File as u32, ..Header::default() },
            fd,
            file: of_file,
            f_op: get(of_file, off!(file_op)),
            private_data: get(of_file, off!(file_private_data)),
            inode,
            ino: get(inode, off!(inode_ino)),
            size: get(inode, off!(inode_size)),
            pos: load(file, off!(file_pos)),
            dev: get(get(inode, off!(inode_sb)), off!(sb_dev)),
            rdev: get(inode, off!(inode_rdev)),
            mode: u32::from(get::<u16>(inode, off!(inode_mode))),
            nlink: get(inode, off!(inode_nlink)),
            flags: load(file, off!(file_flags)),
            f_mode: load(file, off!(file_mode)),
            table: get(of_task, off!(task_files)),
            // A kernel that has no such field to ask might have what it stands for.
            has_owner: 1,
            has_locks: 1,
            in_epoll: 1,
            ..File::default()
        };
        // Before Linux 6.12 every file has room for an owner.
        if off!(file_owner_inside) == ABSENT {
            record.has_owner = access::is_set(get(of_file, off!(file_owner)));
        }
        if off!(file_path_mnt) != ABSENT && off!(mount_mnt) != ABSENT && off!(mount_id) != ABSENT {
            let inside = get::<u64>(of_file, off!(file_path_mnt));
            record.mount = get(inside.wrapping_sub(u64::from(off!(mount_mnt))), off!(mount_id));
        }
        if off!(inode_flctx) != ABSENT {
            record.has_locks = access::is_set(get(inode, off!(inode_flctx)));
        }
        if off!(file_ep) != ABSENT {
            record.in_epoll = access::is_set(get(of_file, off!(file_ep)));
        }
        record.cloexec = task::closes_on_exec(record.table, fd);
        if get::<u64>(of_task, off!(task_group_leader)) != of_task {
            record.tid = task::own_id(task);
        }
        let tail = path_of(file, &mut record.header);
        write(seq, &record, &record.header, tail);
    }
    0
}

/// The path of a file goes into the scratch area and its length into `header`.
///
/// # Safety
/// `file` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn path_of(file: *const c_void, header: &mut Header) -> *const u8 {
    // SAFETY: `f_path` lies inside the file; the buffer is as long as it is said to be.
    unsafe {
        let buffer = (&raw mut (*TEXT.get()).path).cast::<u8>();
        let path = file.cast::<u8>().add(off!(file_path) as usize).cast_mut();
        let length = bpf_d_path(path.cast(), buffer.cast(), PATH_MAX as u32);
        if length > 1 {
            header.tail_kind = Tail::Path as u32;
            header.tail = length as u32 - 1;
        }
        buffer
    }
}

/// The name of an area without a file, if it has one.
///
/// # Safety
/// `vma` must be a pointer that the verifier trusts.
#[inline(always)]
unsafe fn name_of_area(vma: *const c_void, record: &mut Vma) -> *const u8 {
    // SAFETY: the string is bounded by the buffer; an address that is none reads as an error.
    unsafe {
        let buffer = (&raw mut (*TEXT.get()).name).cast::<u8>();
        let of_vma = vma as u64;
        let (kind, name) = if get::<u64>(of_vma, off!(vma_ops)) != 0 {
            // No file, yet operations: the kernel put it there (_install_special_mapping in mm/mmap.c).
            (Tail::Special, get::<u64>(get(of_vma, off!(vma_private_data)), off!(special_mapping_name)))
        } else if off!(vma_anon_name) != ABSENT {
            match get::<u64>(of_vma, off!(vma_anon_name)) {
                0 => return core::ptr::null(),
                name => (Tail::AnonName, name + u64::from(off!(anon_name_name))),
            }
        } else {
            return core::ptr::null();
        };
        let length = bpf_probe_read_kernel_str(buffer.cast(), NAME_MAX as u32, name as *const c_void);
        if length > 1 {
            record.header.tail_kind = kind as u32;
            record.header.tail = length as u32 - 1;
        }
        buffer
    }
}

/// Appends a record and its tail; false if there was no room, in which case the kernel asks for the same object again.
///
/// # Safety
/// `seq` is the iterator's own; `tail` is null or a scratch buffer.
#[inline(always)]
unsafe fn write<T>(seq: *mut c_void, record: &T, header: &Header, tail: *const u8) -> bool {
    // SAFETY: the record is readable for its size, and the mask keeps the length inside the buffer.
    unsafe {
        if bpf_seq_write(seq.cast(), (&raw const *record).cast(), size_of::<T>() as u32) != 0 {
            return false;
        }
        if tail.is_null() || header.tail == 0 {
            return true;
        }
        bpf_seq_write(seq.cast(), tail.cast(), header.tail & (PATH_MAX as u32 - 1)) == 0
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
