//! The tracked set, and the ring buffer: what all questions share.

use core::mem::MaybeUninit;

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_current_task_btf, bpf_ktime_get_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, PerCpuArray, RingBuf};
use criu_common::watch::{
    Header, KINDS, Kind, LOSSES, Loss, MOST_PROCESSES, Process, RING, RecordKind, SHARES_MEMORY, SIEVE,
};

use crate::access::{Scratch, get, load, off};
use crate::ids::id_at;

/// Who is followed, by the kernel's number of the process. Room is set aside: a fork must not fail to be noticed for want
/// of memory.
#[map]
static PROCESSES: HashMap<u32, Process> = HashMap::with_max_entries(MOST_PROCESSES, 0);

/// What happens seldom.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(RING, 0);

/// What could not be noted, by [`Loss`].
#[map]
static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOSSES, 0);

/// How many of the set have a number with these lower bits. A number that has none is not in the set.
static COUNTS: Scratch<[u64; SIEVE]> = Scratch::new([0; SIEVE]);

/// Depth of the engine's pid namespace; set whenever it puts somebody into the set.
static LEVEL: Scratch<u32> = Scratch::new(0);

/// The current thread, as a pointer that the verifier trusts.
#[inline(always)]
pub(crate) fn current() -> *const c_void {
    // SAFETY: the helper gives the current task.
    unsafe { bpf_get_current_task_btf().cast_const().cast() }
}

/// Number of a thread's process.
///
/// # Safety
/// `task` must be a typed kernel pointer.
#[inline(always)]
pub(crate) unsafe fn key_of(task: *const c_void) -> u32 {
    // SAFETY: as said above.
    unsafe { load(task, off!(task_tgid)) }
}

#[inline(always)]
fn count(key: u32) -> *mut u64 {
    // SAFETY: the mask keeps the index inside.
    unsafe { COUNTS.get().cast::<u64>().add(key as usize & (SIEVE - 1)) }
}

/// Whether a process may be in the set: wrong only in saying yes.
#[inline(always)]
pub(crate) fn may_be_tracked(key: u32) -> bool {
    // SAFETY: inside the array; volatile, because others change it.
    unsafe { count(key).read_volatile() != 0 }
}

/// A process of the set.
#[inline(always)]
pub(crate) fn find(key: u32) -> Option<&'static mut Process> {
    if !may_be_tracked(key) {
        return None;
    }
    lookup(key)
}

/// The same without a look at the sieve.
#[inline(always)]
pub(crate) fn lookup(key: u32) -> Option<&'static mut Process> {
    // SAFETY: a pointer into the map, not null. Others change it at the same time; what matters is changed atomically.
    PROCESSES.get_ptr_mut(key).map(|process| unsafe { &mut *process })
}

/// Puts a process into the set; whether it was not there before.
#[inline(always)]
pub(crate) fn insert(key: u32, process: &Process) -> bool {
    const BPF_NOEXIST: u64 = 1;
    match PROCESSES.insert(key, process, BPF_NOEXIST) {
        Ok(()) => {
            // SAFETY: inside the array.
            unsafe { add_at(count(key), 1) };
            true
        }
        Err(_) => {
            if lookup(key).is_none() {
                lost(Loss::Process);
            }
            false
        }
    }
}

/// Takes a process out of the set.
#[inline(always)]
pub(crate) fn remove(key: u32) {
    if PROCESSES.remove(key).is_ok() {
        // SAFETY: inside the array.
        unsafe { add_at(count(key), u64::MAX) };
    }
}

/// A new entry.
///
/// # Safety
/// `task` must be a typed kernel pointer.
#[inline(always)]
pub(crate) unsafe fn entry(task: *const c_void, pid: u32) -> Process {
    let mut started_ns = 0;
    if off!(task_start_boottime) != criu_common::offsets::ABSENT {
        // SAFETY: as said above.
        started_ns = unsafe { load(task, off!(task_start_boottime)) };
    }
    Process {
        pid,
        parent: 0,
        images: 0,
        flags: 0,
        started_ns,
        lender: 0,
        zero: 0,
        write_faults: [0; 2],
        everything: 0,
        kinds: [0; KINDS],
    }
}

/// Adds one to a number that others count as well.
#[inline(always)]
pub(crate) fn add(to: &mut u64, n: u64) {
    // SAFETY: aligned and valid, being a reference.
    unsafe { add_at(to, n) };
}

/// `core` has no atomic addition for BPF, the processor has.
///
/// # Safety
/// `to` must be aligned and valid.
#[inline(always)]
unsafe fn add_at(to: *mut u64, n: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as said above.
    unsafe {
        core::arch::asm!("lock *(u64 *)({to} + 0) += {n}", to = in(reg) to, n = in(reg) n, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as said above.
    unsafe {
        *to = (*to).wrapping_add(n);
    }
}

/// A kind of state of the process was touched.
#[inline(always)]
pub(crate) fn touch(process: &mut Process, kind: Kind) {
    add(&mut process.kinds[kind as usize], 1);
}

/// All of it may have been, also that of the process whose memory it has.
#[inline(always)]
pub(crate) fn give_back(process: &mut Process) {
    if process.flags & SHARES_MEMORY == 0 {
        return;
    }
    process.flags &= !SHARES_MEMORY;
    if let Some(lender) = find(process.lender) {
        add(&mut lender.everything, 1);
    }
}

/// How deep the engine's pid namespace is.
#[inline(always)]
fn level() -> u32 {
    // SAFETY: valid; volatile, because the engine's iterator sets it.
    unsafe { LEVEL.get().read_volatile() }
}

#[inline(always)]
pub(crate) fn set_level(level: u32) {
    // SAFETY: always the same value.
    unsafe { LEVEL.get().write_volatile(level) };
}

/// What the engine calls a thread.
///
/// # Safety
/// `task` must be a typed kernel pointer.
#[inline(always)]
pub(crate) unsafe fn tid_of(task: *const c_void) -> u32 {
    // SAFETY: as said above.
    unsafe { id_at(get(task as u64, off!(task_thread_pid)), level()) }
}

/// What the engine calls the process of a thread.
///
/// # Safety
/// As [`tid_of`].
#[inline(always)]
pub(crate) unsafe fn pid_of(task: *const c_void) -> u32 {
    // SAFETY: as said above.
    unsafe {
        let leader: u64 = get(task as u64, off!(task_group_leader));
        id_at(get(leader, off!(task_thread_pid)), level())
    }
}

/// The beginning of a record about a thread of this process.
///
/// # Safety
/// As [`tid_of`].
#[inline(always)]
pub(crate) unsafe fn header(kind: RecordKind, key: u32, pid: u32, task: *const c_void) -> Header {
    // SAFETY: as said above.
    unsafe { Header { kind: kind as u32, key, pid, tid: tid_of(task), time_ns: bpf_ktime_get_ns() } }
}

/// Whether the engine is woken for a record.
#[derive(Clone, Copy)]
pub(crate) enum Wake {
    /// At once.
    Now,
    /// If it has read all that came before.
    Later,
}

/// Hands a record to the engine, or counts it as lost.
#[inline(always)]
pub(crate) fn send<T>(record: T, loss: Loss, wake: Wake)
where
    T: Copy + 'static,
{
    match reserve::<T>(loss) {
        None => {}
        Some(mut room) => {
            room.write(record);
            room.submit(flags(wake));
        }
    }
}

/// Room for a record, to be filled in place.
#[inline(always)]
pub(crate) fn reserve<T>(loss: Loss) -> Option<Room<T>>
where
    T: 'static,
{
    let room = RECORDS.reserve::<T>(0);
    if room.is_none() {
        lost(loss);
    }
    room
}

/// Room in the ring buffer.
pub(crate) type Room<T> = aya_ebpf::maps::ring_buf::RingBufEntry<T>;

/// What `submit` takes.
#[inline(always)]
pub(crate) fn flags(wake: Wake) -> u64 {
    const BPF_RB_FORCE_WAKEUP: u64 = 2;
    match wake {
        Wake::Now => BPF_RB_FORCE_WAKEUP,
        Wake::Later => 0,
    }
}

/// Where a record is made.
#[inline(always)]
pub(crate) fn at<T>(room: &mut MaybeUninit<T>) -> *mut T {
    room.as_mut_ptr()
}

/// Something was lost.
#[inline(always)]
pub(crate) fn lost(what: Loss) {
    if let Some(count) = LOST.get_ptr_mut(what as u32) {
        // SAFETY: a pointer into the map, not null, of this processor alone.
        unsafe { *count += 1 };
    }
}
