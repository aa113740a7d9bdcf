//! Programs at the interfaces of the network, and the names by which links and maps outlive who made them.
//!
//! # References
//! bpf(2); include/uapi/linux/bpf.h. Links to an interface (tcx) are there since Linux 6.6.

use std::ffi::{CString, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::bpf::{BpfResult, call, owned};
use super::{EbpfError, EbpfResult};
use crate::kernel::interfaces::Way;

const OBJ_PIN: (c_int, &str) = (6, "BPF_OBJ_PIN");
const OBJ_GET: (c_int, &str) = (7, "BPF_OBJ_GET");
const LINK_CREATE: (c_int, &str) = (28, "BPF_LINK_CREATE");

/// Puts a program at an interface, after those that are there already.
pub fn attach(program: BorrowedFd<'_>, interface: u32, way: Way) -> BpfResult<OwnedFd> {
    #[repr(C)]
    struct Create {
        prog_fd: u32,
        target_ifindex: u32,
        attach_type: u32,
        flags: u32,
        relative_fd: u32,
        padding: u32,
        expected_revision: u64,
    }
    let create = Create {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: interface,
        // BPF_TCX_INGRESS, BPF_TCX_EGRESS
        attach_type: match way {
            Way::In => 46,
            Way::Out => 47,
        },
        flags: 0,
        relative_fd: 0,
        padding: 0,
        expected_revision: 0,
    };
    // SAFETY: no pointers; the answer is a new descriptor.
    Ok(unsafe { owned(call(LINK_CREATE, &create)?) })
}

/// `union bpf_attr` of commands about a pin.
#[repr(C)]
struct Pin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

fn path_of(path: &Path, command: &'static str) -> BpfResult<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| (command, io::Error::from(e)))
}

/// Gives a map, a program or a link a name in a bpf file system, by which it lives on.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> BpfResult<()> {
    let name = path_of(path, OBJ_PIN.1)?;
    let pin = Pin { pathname: name.as_ptr().addr() as u64, bpf_fd: object.as_raw_fd() as u32, file_flags: 0 };
    // SAFETY: the path lives until the call returns and ends in a zero.
    unsafe { call(OBJ_PIN, &pin) }.map(drop)
}

/// The same with a name in a directory.
pub fn pin_in(dir: &Path, name: &str, object: BorrowedFd<'_>) -> EbpfResult<()> {
    let path = dir.join(name);
    pin(object, &path).map_err(|(command, source)| EbpfError::Call { command, on: path.display().to_string(), source })
}

/// The map, program or link of a name.
pub fn pinned(path: &Path) -> BpfResult<OwnedFd> {
    let name = path_of(path, OBJ_GET.1)?;
    let get = Pin { pathname: name.as_ptr().addr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: the path lives until the call returns and ends in a zero; the answer is a new descriptor.
    Ok(unsafe { owned(call(OBJ_GET, &get)?) })
}
