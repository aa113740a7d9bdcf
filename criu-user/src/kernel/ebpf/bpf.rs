//! Every raw bpf(2) call that the engine makes; those about maps and links are in `maps` and `links`.
//!
//! # References
//! bpf(2); `union bpf_attr` in include/uapi/linux/bpf.h. The kernel takes a shorter attribute than its own for one whose
//! rest is zero, so each command's struct ends with the last field that is used.

use std::ffi::{CStr, c_int, c_long};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use aya_obj::generated::{bpf_insn, bpf_prog_info};

const MAP_CREATE: (c_int, &str) = (0, "BPF_MAP_CREATE");
const MAP_UPDATE_ELEM: (c_int, &str) = (2, "BPF_MAP_UPDATE_ELEM");
const PROG_LOAD: (c_int, &str) = (5, "BPF_PROG_LOAD");
const PROG_GET_FD_BY_ID: (c_int, &str) = (13, "BPF_PROG_GET_FD_BY_ID");
const MAP_GET_FD_BY_ID: (c_int, &str) = (14, "BPF_MAP_GET_FD_BY_ID");
const OBJ_GET_INFO: (c_int, &str) = (15, "BPF_OBJ_GET_INFO_BY_FD");
const RAW_TRACEPOINT_OPEN: (c_int, &str) = (17, "BPF_RAW_TRACEPOINT_OPEN");
const MAP_FREEZE: (c_int, &str) = (22, "BPF_MAP_FREEZE");
const LINK_CREATE: (c_int, &str) = (28, "BPF_LINK_CREATE");
const ITER_CREATE: (c_int, &str) = (33, "BPF_ITER_CREATE");

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_RAW_TP: u32 = 23;
const BPF_TRACE_ITER: u32 = 28;
const BPF_F_RDONLY_PROG: u32 = 1 << 7;

/// A failed call: the command's name and what the kernel said.
pub type BpfResult<T> = Result<T, (&'static str, io::Error)>;

/// Whether a map's content can still change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// By programs and by the engine.
    ReadWrite,
    /// By nobody: the verifier takes its values for constants.
    Frozen,
}

/// A map with one element that holds global variables.
pub fn globals_map(content: &[u8], access: Access) -> BpfResult<OwnedFd> {
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
    }
    #[repr(C)]
    struct Update {
        map_fd: u32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let map_flags = if access == Access::Frozen { BPF_F_RDONLY_PROG } else { 0 };
    let value_size = content.len() as u32;
    let create = Create { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, max_entries: 1, map_flags };
    // SAFETY: the command takes no pointers and answers with a new descriptor.
    let map = unsafe { owned(call(MAP_CREATE, &create)?) };
    if access == Access::Frozen || content.iter().any(|byte| *byte != 0) {
        let key = 0u32;
        let (key, value) = ((&raw const key).addr() as u64, content.as_ptr().addr() as u64);
        let update = Update { map_fd: map.as_raw_fd() as u32, padding: 0, key, value, flags: 0 };
        // SAFETY: key and value live until the call returns and are as long as the map says.
        unsafe { call(MAP_UPDATE_ELEM, &update)? };
    }
    if access == Access::Frozen {
        // SAFETY: the attribute is a descriptor alone.
        unsafe { call(MAP_FREEZE, &(map.as_raw_fd() as u32))? };
    }
    Ok(map)
}

/// What a program is for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// An iterator, with the BTF id of its function.
    Iterator(u32),
    /// A tracepoint, with the BTF id of its type (`btf_trace_…`).
    Tracepoint(u32),
    /// Packets of an interface.
    Classifier,
}

/// A program to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// Name, cut to what the kernel keeps of it.
    pub name: &'a str,
    /// Instructions, their relocations done.
    pub instructions: &'a [bpf_insn],
    /// Licence.
    pub license: &'a CStr,
    /// What it is for.
    pub purpose: Purpose,
}

/// Loads a program. The verifier writes into `log`, if there is one.
pub fn load(program: Program<'_>, log: Option<&mut [u8]>) -> BpfResult<OwnedFd> {
    #[repr(C)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
        prog_btf_fd: u32,
        func_info_rec_size: u32,
        func_info: u64,
        func_info_cnt: u32,
        line_info_rec_size: u32,
        line_info: u64,
        line_info_cnt: u32,
        attach_btf_id: u32,
    }
    let mut prog_name = [0; 16];
    for (to, from) in prog_name[..15].iter_mut().zip(program.name.bytes()) {
        *to = from;
    }
    let (log_level, log_size, log_buf) =
        log.map_or((0, 0, 0), |log| (1, log.len() as u32, log.as_mut_ptr().expose_provenance() as u64));
    let (prog_type, expected_attach_type, attach_btf_id) = match program.purpose {
        Purpose::Iterator(function) => (BPF_PROG_TYPE_TRACING, BPF_TRACE_ITER, function),
        Purpose::Tracepoint(name) => (BPF_PROG_TYPE_TRACING, BPF_TRACE_RAW_TP, name),
        Purpose::Classifier => (BPF_PROG_TYPE_SCHED_CLS, 0, 0),
    };
    let load = Load {
        prog_type,
        insn_cnt: program.instructions.len() as u32,
        insns: program.instructions.as_ptr().addr() as u64,
        license: program.license.as_ptr().addr() as u64,
        log_level,
        log_size,
        log_buf,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type,
        prog_btf_fd: 0,
        func_info_rec_size: 0,
        func_info: 0,
        func_info_cnt: 0,
        line_info_rec_size: 0,
        line_info: 0,
        line_info_cnt: 0,
        attach_btf_id,
    };
    // SAFETY: instructions, licence and log outlive the call and are as long as they are said to be.
    Ok(unsafe { owned(call(PROG_LOAD, &load)?) })
}

/// A link of an iterator to one process, and a descriptor from which its output is read. The link is not needed once
/// that is open, so it is closed.
pub fn iterate(program: BorrowedFd<'_>, pid: u32) -> BpfResult<OwnedFd> {
    /// `bpf_iter_link_info.task`
    #[repr(C)]
    struct OfTask {
        tid: u32,
        pid: u32,
        pid_fd: u32,
    }
    let task = OfTask { tid: 0, pid, pid_fd: 0 };
    // SAFETY: `task` lives until the call returns and is as long as is said.
    unsafe { open_iterator(program, (&raw const task).addr() as u64, size_of::<OfTask>() as u32) }
}

/// The same of an iterator that goes over all that there is.
pub fn iterate_all(program: BorrowedFd<'_>) -> BpfResult<OwnedFd> {
    // SAFETY: there is nothing to point to.
    unsafe { open_iterator(program, 0, 0) }
}

/// # Safety
/// At `iter_info` have to be as many bytes as is said.
unsafe fn open_iterator(program: BorrowedFd<'_>, iter_info: u64, iter_info_len: u32) -> BpfResult<OwnedFd> {
    #[repr(C)]
    struct Create {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
        iter_info: u64,
        iter_info_len: u32,
        padding: u32,
    }
    let create = Create {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        iter_info,
        iter_info_len,
        padding: 0,
    };
    // SAFETY: the caller's word; the answer is a new descriptor.
    let link = unsafe { owned(call(LINK_CREATE, &create)?) };
    // SAFETY: no pointers; the answer is a new descriptor.
    Ok(unsafe { owned(call(ITER_CREATE, &[link.as_raw_fd() as u32, 0])?) })
}

/// Puts a program at the tracepoint that it was loaded for.
pub fn attach_tracepoint(program: BorrowedFd<'_>) -> BpfResult<OwnedFd> {
    #[repr(C)]
    struct Open {
        name: u64,
        prog_fd: u32,
    }
    let open = Open { name: 0, prog_fd: program.as_raw_fd() as u32 };
    // SAFETY: no pointers; the answer is a new descriptor.
    Ok(unsafe { owned(call(RAW_TRACEPOINT_OPEN, &open)?) })
}

/// How often a program was passed over because it was running already on the same processor. 0 on kernels before 5.12,
/// which do not count it.
pub fn misses(program: BorrowedFd<'_>) -> BpfResult<u64> {
    Ok(about(program, &mut [])?.recursion_misses)
}

/// The number by which the kernel knows a program.
pub fn program_number(program: BorrowedFd<'_>) -> BpfResult<u32> {
    Ok(about(program, &mut [])?.id)
}

/// The only map of a program, given its number; `None` if the program is gone or has another number of maps.
pub fn map_of(number: u32) -> BpfResult<Option<OwnedFd>> {
    // SAFETY: no pointers; the answer is a new descriptor.
    let program = match unsafe { call(PROG_GET_FD_BY_ID, &number).map(|fd| owned(fd)) } {
        Err((_, err)) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut maps = [0];
    if about(program.as_fd(), &mut maps)?.nr_map_ids != 1 {
        return Ok(None);
    }
    // SAFETY: no pointers; the answer is a new descriptor.
    unsafe { call(MAP_GET_FD_BY_ID, &maps[0]).map(|fd| Some(owned(fd))) }
}

/// What the kernel tells of a program, and the numbers of its maps as far as there is room for them.
fn about(program: BorrowedFd<'_>, maps: &mut [u32]) -> BpfResult<bpf_prog_info> {
    #[repr(C)]
    struct Info {
        fd: u32,
        len: u32,
        at: u64,
    }
    // SAFETY: plain numbers, for which zeros are a value.
    let mut about: bpf_prog_info = unsafe { std::mem::zeroed() };
    about.nr_map_ids = maps.len() as u32;
    about.map_ids = maps.as_mut_ptr().expose_provenance() as u64;
    let at = (&raw mut about).expose_provenance() as u64;
    let info = Info { fd: program.as_raw_fd() as u32, len: size_of::<bpf_prog_info>() as u32, at };
    // SAFETY: there is room for as much as is said; the kernel writes what it has.
    unsafe { call(OBJ_GET_INFO, &info)? };
    Ok(about)
}

/// # Safety
/// What the attribute points to has to be what the command expects.
pub(in crate::kernel) unsafe fn call<T>((command, name): (c_int, &'static str), attribute: &T) -> BpfResult<RawFd> {
    // SAFETY: the attribute is readable for its size; the rest is the caller's word.
    let answer: c_long = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attribute, size_of::<T>()) };
    if answer < 0 { Err((name, io::Error::last_os_error())) } else { Ok(answer as RawFd) }
}

/// A call that writes its answer into the attribute.
///
/// # Safety
/// What the attribute points to has to be what the command expects.
pub(in crate::kernel) unsafe fn call_mut<T>(command: (c_int, &'static str), attribute: &mut T) -> BpfResult<RawFd> {
    // SAFETY: the attribute is writable for its size; the rest is the caller's word.
    let answer: c_long = unsafe { libc::syscall(libc::SYS_bpf, command.0, &raw mut *attribute, size_of::<T>()) };
    if answer < 0 { Err((command.1, io::Error::last_os_error())) } else { Ok(answer as RawFd) }
}

/// # Safety
/// `fd` has to be a descriptor that nobody else owns.
pub(in crate::kernel) unsafe fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller's word.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
