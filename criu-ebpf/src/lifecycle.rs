//! Who forks, executes another program, and ends. The set is kept here, in the kernel: a child is in it before it runs
//! for the first time, because the tracepoint of fork(2) lies between its making and its waking.

use aya_ebpf::cty::c_void;
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use criu_common::watch::{
    BY_CGROUP, Exec, Exit, Fork, Header, Kind, Loss, RecordKind, SHARED_DESCRIPTORS, SHARES_MEMORY,
};

use crate::access::{copy, get, load, off};
use crate::tracked::{
    Wake, add, entry, find, give_back, header, insert, key_of, lookup, may_be_tracked, pid_of, remove, send, tid_of,
    touch,
};

/// `sched_process_fork(parent, child)`, in the parent.
#[btf_tracepoint(function = "sched_process_fork")]
fn watch_fork(ctx: BtfTracePointContext) -> i32 {
    let (parent, child): (*const c_void, *const c_void) = (ctx.arg(0), ctx.arg(1));
    // SAFETY: both are typed pointers.
    unsafe {
        let key = key_of(parent);
        if let Some(maker) = find(key) {
            made(maker, key, parent, child);
        }
    }
    0
}

/// # Safety
/// `parent` and `child` must be typed kernel pointers.
#[inline(always)]
unsafe fn made(maker: &mut criu_common::watch::Process, key: u32, parent: *const c_void, child: *const c_void) {
    // SAFETY: as said above.
    unsafe {
        let child_key = key_of(child);
        let child_pid = pid_of(child);
        let is_thread = child_key == key;
        if is_thread {
            touch(maker, Kind::Threads);
        } else {
            touch(maker, Kind::Children);
            // A number that was used before, by somebody whose end was not seen.
            if may_be_tracked(child_key) {
                remove(child_key);
            }
            let mut process = entry(child, child_pid);
            process.parent = maker.pid;
            process.flags = maker.flags & BY_CGROUP;
            if load::<u64>(parent, off!(task_mm)) == load::<u64>(child, off!(task_mm)) {
                process.flags |= SHARES_MEMORY;
                process.lender = key;
            }
            if load::<u64>(parent, off!(task_files)) == load::<u64>(child, off!(task_files)) {
                process.flags |= SHARED_DESCRIPTORS;
                maker.flags |= SHARED_DESCRIPTORS;
            }
            insert(child_key, &process);
        }
        let header = header(RecordKind::Fork, key, maker.pid, parent);
        let record = Fork { header, child_key, child_pid, child_tid: tid_of(child), is_thread: u32::from(is_thread) };
        send(record, Loss::Lifecycle, Wake::Now);
    }
}

/// `sched_process_exec(task, old_pid, bprm)`, with the new memory in place.
#[btf_tracepoint(function = "sched_process_exec")]
fn watch_exec(ctx: BtfTracePointContext) -> i32 {
    let task: *const c_void = ctx.arg(0);
    // SAFETY: a typed pointer.
    unsafe {
        let key = key_of(task);
        if let Some(process) = find(key) {
            process.images += 1;
            // It has a table of its own from here on.
            process.flags &= !SHARED_DESCRIPTORS;
            add(&mut process.everything, 1);
            give_back(process);
            let mut record = Exec { header: header(RecordKind::Exec, key, process.pid, task), comm: [0; 16] };
            copy(record.comm.as_mut_ptr(), 16, task.cast::<u8>().add(off!(task_comm) as usize).cast());
            send(record, Loss::Lifecycle, Wake::Now);
        }
    }
    0
}

/// `sched_process_exit(task)`, of each thread.
#[btf_tracepoint(function = "sched_process_exit")]
fn watch_exit(ctx: BtfTracePointContext) -> i32 {
    let task: *const c_void = ctx.arg(0);
    // SAFETY: a typed pointer.
    unsafe {
        let key = key_of(task);
        if !may_be_tracked(key) {
            return 0;
        }
        let Some(process) = lookup(key) else { return 0 };
        let signal: u64 = get(task as u64, off!(task_signal));
        // Counted down before this is called.
        let is_last = get::<u32>(signal, off!(signal_live)) == 0;
        let group: i32 = get(signal, off!(signal_group_exit_code));
        let own: i32 = load(task, off!(task_exit_code));
        let header: Header = header(RecordKind::Exit, key, process.pid, task);
        if is_last {
            give_back(process);
            remove(key);
        } else {
            touch(process, Kind::Threads);
        }
        let code = if is_last && group != 0 { group } else { own };
        send(Exit { header, code, is_process: u32::from(is_last) }, Loss::Lifecycle, Wake::Now);
    }
    0
}
