//! Which kinds of state a process touches, and the calls after which it may not be dumped.
//!
//! Only the *return* of calls is looked at. It is enough: a thread that the engine has stopped is past the tracepoint of
//! whatever call it made, so all that was changed is counted by then (docs/tracking.md). And with nothing attached to their
//! beginning, calls of others cost half.

use aya_ebpf::EbpfContext;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_get_stack, bpf_probe_read_user};
use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use criu_common::watch::calls::{CALLS, Check, Entry};
use criu_common::watch::{Call, FRAMES, Kind, Loss, Process, RecordKind};

use crate::access::{load, off};
use crate::tracked::{Wake, add, at, current, flags, header, key_of, lookup, may_be_tracked, reserve, touch};

/// What each call touches, filled in by the engine before the program is loaded.
#[unsafe(no_mangle)]
static TABLE: [u32; CALLS] = [0; CALLS];

/// Bit of `thread_info.status`: a call by the 32-bit interface, whose numbers are others.
const TS_COMPAT: u32 = 2;
const BPF_F_USER_STACK: u64 = 1 << 8;
/// The number of what is no call any more: rt_sigreturn(2), or one that a filter has suppressed.
const NO_CALL: u64 = u64::MAX;

/// clone(2) gives a descriptor of the child back.
const CLONE_PIDFD: u64 = 0x1000;

/// Word of the table.
#[inline(always)]
fn entry(number: u64) -> Entry {
    if number == NO_CALL {
        return Entry::NOTHING.and(Kind::Masks);
    }
    if number >= CALLS as u64 {
        return Entry::EVERYTHING;
    }
    // SAFETY: inside the table. Volatile, or the compiler would use the values that it sees.
    Entry(unsafe { core::ptr::read_volatile(TABLE.as_ptr().add(number as usize & (CALLS - 1))) })
}

/// `sys_exit(regs, result)`.
#[btf_tracepoint(function = "sys_exit")]
fn watch_sys_exit(ctx: BtfTracePointContext) -> i32 {
    let task = current();
    // SAFETY: typed pointers.
    unsafe {
        let key = key_of(task);
        if !may_be_tracked(key) {
            return 0;
        }
        let regs: *const c_void = ctx.arg(0);
        let mut entry = entry(load(regs, off!(regs_nr)));
        if load::<u32>(task, off!(task_status)) & TS_COMPAT != 0 {
            entry = Entry::EVERYTHING;
        }
        if entry == Entry::NOTHING {
            return 0;
        }
        if let Some(process) = lookup(key) {
            returned(&ctx, process, key, task, regs, entry);
        }
    }
    0
}

/// # Safety
/// `task` and `regs` must be typed kernel pointers.
#[inline(always)]
unsafe fn returned(
    ctx: &BtfTracePointContext,
    process: &mut Process,
    key: u32,
    task: *const c_void,
    regs: *const c_void,
    entry: Entry,
) {
    if entry.is_everything() {
        add(&mut process.everything, 1);
    }
    touch_number(process, entry.first());
    touch_number(process, entry.second());
    let check = entry.checks();
    if check == 0 {
        return;
    }
    // SAFETY: as said above.
    let arguments = unsafe {
        [
            load::<u64>(regs, off!(regs_arg0)),
            load(regs, off!(regs_arg1)),
            load(regs, off!(regs_arg2)),
            load(regs, off!(regs_arg3)),
            load(regs, off!(regs_arg4)),
            load(regs, off!(regs_arg5)),
        ]
    };
    if check >= Check::Fcntl as u32 {
        by_command(process, check, &arguments);
        return;
    }
    // The low byte is a signal.
    if check == Check::Clone as u32 && arguments[0] & CLONE_PIDFD != 0 {
        touch(process, Kind::Descriptors);
    }
    let result: i64 = ctx.arg(1);
    if result < 0 {
        return;
    }
    // SAFETY: as said above.
    unsafe {
        if let Some(detail) = reason(check, &arguments) {
            report(ctx, process, key, task, regs, arguments, detail, result);
        }
    }
}

/// A kind by its number plus one.
#[inline(always)]
fn touch_number(process: &mut Process, number: u32) {
    if let Some(count) = process.kinds.get_mut(number.wrapping_sub(1) as usize) {
        add(count, 1);
    }
}

/// Calls that do different things by their second argument, or first.
#[inline(always)]
fn by_command(process: &mut Process, check: u32, arguments: &[u64; 6]) {
    const F_DUPFD: u64 = 0;
    const F_SETFD: u64 = 2;
    const F_GETFD: u64 = 1;
    const F_GETFL: u64 = 3;
    const F_DUPFD_CLOEXEC: u64 = 1030;
    const LOCKS: [u64; 5] = [6, 7, 37, 38, 1024];
    let command = arguments[1] & 0xffff_ffff;
    if check == Check::Fcntl as u32 {
        match command {
            F_GETFD | F_GETFL => {}
            F_DUPFD | F_SETFD | F_DUPFD_CLOEXEC => touch(process, Kind::Descriptors),
            command if LOCKS.contains(&command) => touch(process, Kind::Locks),
            _ => touch(process, Kind::Files),
        }
    } else if check == Check::Ioctl as u32 {
        ioctl(process, command);
    } else if check == Check::Prctl as u32 {
        prctl(process, arguments[0] & 0xffff_ffff);
    }
}

#[inline(always)]
fn ioctl(process: &mut Process, command: u64) {
    const FIONCLEX: u64 = 0x5450;
    const FIOCLEX: u64 = 0x5451;
    const FIONREAD: u64 = 0x541b;
    /// Opens the other end of a pseudo terminal.
    const TIOCGPTPEER: u64 = 0x5441;
    const TERMINAL: u64 = b'T' as u64;
    const USERFAULTFD: u64 = 0xaa;
    match command {
        FIONREAD => {}
        FIOCLEX | FIONCLEX | TIOCGPTPEER => touch(process, Kind::Descriptors),
        _ => match command >> 8 & 0xff {
            TERMINAL => touch(process, Kind::Sessions),
            USERFAULTFD => touch(process, Kind::Memory),
            // A driver may do anything: hand out descriptors, map memory.
            _ => {
                touch(process, Kind::Files);
                touch(process, Kind::Descriptors);
            }
        },
    }
}

#[inline(always)]
fn prctl(process: &mut Process, option: u64) {
    const SET_SECCOMP: u64 = 22;
    const CREDENTIALS: [u64; 5] = [8, 24, 28, 38, 47];
    const MEMORY: [u64; 4] = [35, 41, 65, 0x5356_4d41];
    match option {
        SET_SECCOMP => touch(process, Kind::Seccomp),
        option if CREDENTIALS.contains(&option) => touch(process, Kind::Credentials),
        option if MEMORY.contains(&option) => touch(process, Kind::Memory),
        _ => touch(process, Kind::Settings),
    }
}

/// Whether a call that succeeded is to be reported, and what was behind its pointer.
///
/// # Safety
/// None of its own: the helper checks addresses.
#[inline(always)]
unsafe fn reason(check: u32, arguments: &[u64; 6]) -> Option<u64> {
    const CLONE_NEW: u64 = 0x7e02_0080;
    const CLONE_VM: u64 = 0x100;
    const CLONE_SHARED: u64 = 0x200 | 0x400 | 0x800;
    const CLONE_VFORK: u64 = 0x4000;
    const CLONE_THREAD: u64 = 0x1_0000;
    const HUGE: [(Check, usize, u64); 3] =
        [(Check::Map, 3, 0x4_0000), (Check::MemoryFile, 1, 4), (Check::SharedMemory, 2, 0o4000)];
    const SECCOMP_NEW_LISTENER: u64 = 8;
    const SCHED_DEADLINE: u32 = 6;
    let odd = |flags: u64| {
        let shares = flags & CLONE_THREAD == 0
            && (flags & CLONE_SHARED != 0 || flags & CLONE_VM != 0 && flags & CLONE_VFORK == 0);
        shares || flags & CLONE_NEW != 0
    };
    let [first, second, ..] = *arguments;
    if check == Check::Report as u32 {
        return Some(0);
    } else if check == Check::Socket as u32 {
        return is_odd_socket(arguments).then_some(0);
    } else if check == Check::Clone as u32 {
        return odd(first & !0xff & 0xffff_ffff).then_some(0);
    } else if check == Check::Clone3 as u32 {
        // SAFETY: as said above; `struct clone_args` begins with the flags.
        let flags: u64 = unsafe { read_user(first) };
        return odd(flags).then_some(flags);
    } else if check == Check::Trace as u32 {
        const BEGINS: [u64; 3] = [0, 16, 0x4206];
        return BEGINS.contains(&first).then_some(0);
    } else if check == Check::Filter as u32 {
        return (first == 1 && second & SECCOMP_NEW_LISTENER != 0).then_some(0);
    } else if check == Check::Bpf as u32 {
        /// Commands of bpf(2) that give a new descriptor.
        const MAKES: u64 = 1 | 1 << 5 | 1 << 7 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 17 | 1 << 18 | 1 << 28 | 1 << 33;
        return (first < 64 && MAKES >> (first & 63) & 1 != 0).then_some(0);
    } else if check == Check::Scheduling as u32 {
        // SAFETY: as said above; `struct sched_attr` has its size, then the policy.
        let policy: u32 = unsafe { read_user(second + 4) };
        return (policy == SCHED_DEADLINE).then_some(u64::from(policy));
    }
    let huge = |(kind, at, flag): &(Check, usize, u64)| check == *kind as u32 && arguments[*at] & flag != 0;
    HUGE.iter().any(huge).then_some(0)
}

/// A socket that cannot be dumped: only these families can, and of the internet's only TCP and UDP.
#[inline(always)]
fn is_odd_socket(arguments: &[u64; 6]) -> bool {
    const AF_UNIX: u64 = 1;
    const AF_INET: u64 = 2;
    const AF_INET6: u64 = 10;
    const AF_NETLINK: u64 = 16;
    const SOCK_RAW: u64 = 3;
    const SOCK_TYPE: u64 = 0xf;
    const PROTOCOLS: [u64; 3] = [0, 6, 17];
    let [family, kind, protocol, ..] = arguments.map(|argument| argument & 0xffff_ffff);
    match family {
        AF_UNIX | AF_NETLINK => false,
        AF_INET | AF_INET6 => kind & SOCK_TYPE == SOCK_RAW || !PROTOCOLS.contains(&protocol),
        _ => true,
    }
}

/// # Safety
/// None of its own: the helper checks the address. `T` must be plain data.
#[inline(always)]
unsafe fn read_user<T: Copy + Default>(address: u64) -> T {
    let mut value = T::default();
    // SAFETY: writable for its size; the helper zeroes it when it fails.
    unsafe { bpf_probe_read_user((&raw mut value).cast(), size_of::<T>() as u32, address as *const c_void) };
    value
}

/// # Safety
/// As [`returned`].
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined: a struct would be built on the stack of 512 bytes")]
unsafe fn report(
    ctx: &BtfTracePointContext,
    process: &Process,
    key: u32,
    task: *const c_void,
    regs: *const c_void,
    arguments: [u64; 6],
    detail: u64,
    result: i64,
) {
    let Some(mut room) = reserve::<Call>(Loss::Call) else { return };
    // SAFETY: as said above; the room is as large as the record.
    unsafe {
        let call = at(&mut room);
        (*call).header = header(RecordKind::Call, key, process.pid, task);
        (*call).number = load::<u64>(regs, off!(regs_nr)) as u32;
        (*call).arguments = arguments;
        (*call).result = result;
        (*call).detail = detail;
        let stack = (&raw mut (*call).stack).cast();
        let bytes = bpf_get_stack(ctx.as_ptr(), stack, (FRAMES * 8) as u32, BPF_F_USER_STACK);
        (*call).frames = if bytes > 0 { bytes as u32 / 8 } else { 0 };
    }
    room.submit(flags(Wake::Now));
}
