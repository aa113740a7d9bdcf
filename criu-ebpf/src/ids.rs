//! What processes and threads are called in the engine's pid namespace.

use aya_ebpf::helpers::generated::bpf_get_current_task;

use crate::access::{off, read};

/// Depth of the pid namespace of whoever reads the iterator: the ids are to be its own.
///
/// # Safety
/// None of its own: the helpers check the addresses.
#[inline(always)]
pub(crate) unsafe fn reader_level() -> u32 {
    // SAFETY: the helper gives the current task's address.
    unsafe {
        let pid: u64 = read(bpf_get_current_task() + u64::from(off!(task_thread_pid)));
        read(pid + u64::from(off!(pid_level)))
    }
}

/// What a `struct pid` is called at a depth of pid namespaces; 0 where it is not seen there (`pid_nr_ns`).
///
/// Without a branch: the verifier would walk over all that follows once more for each.
///
/// # Safety
/// As [`reader_level`].
#[inline(always)]
pub(crate) unsafe fn id_at(pid: u64, level: u32) -> u32 {
    // SAFETY: the helper checks the addresses, and gives zero for those near null.
    unsafe {
        let deepest = read::<u32>(pid + u64::from(off!(pid_level)));
        let upid = pid + u64::from(off!(pid_numbers)) + u64::from(level) * u64::from(off!(upid_size));
        let seen = (i64::from(level) - i64::from(deepest) - 1) >> 63;
        read::<u32>(upid + u64::from(off!(upid_nr))) & seen as u32
    }
}
