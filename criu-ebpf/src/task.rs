//! `iter/task`: threads, and once for each process what its threads share.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::bpf_seq_write;
use criu_common::offsets::ABSENT;
use criu_common::survey::{AUXV_WORDS, Header, Kind, LIMITS, Mm, Process, RESTART_MAX, Thread};

use crate::access::{Scratch, copy, get, is_set, load, off, read};
use crate::contexts::TaskContext;
use crate::ids::{id_at, reader_level};

/// Index of the process group and of the session in `signal_struct.pids` (`enum pid_type`).
const PIDTYPE_PGID: u64 = 2;
const PIDTYPE_SID: u64 = 3;
/// Bit of `task_struct.atomic_flags` (include/linux/sched.h).
const PFA_NO_NEW_PRIVS: u64 = 1;

// SAFETY: plain data, for which zeros are a value.
static THREAD: Scratch<Thread> = Scratch::new(unsafe { core::mem::zeroed() });
// SAFETY: as above.
static PROCESS: Scratch<Process> = Scratch::new(unsafe { core::mem::zeroed() });
// SAFETY: as above.
static MM: Scratch<Mm> = Scratch::new(unsafe { core::mem::zeroed() });

/// A [`Thread`] for each thread; with the leader a [`Process`]; with the first that has memory an [`Mm`] (every thread
/// writes one where the leader is dead: the engine takes the first).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
extern "C" fn survey_tasks(ctx: *const TaskContext) -> i32 {
    // SAFETY: the verifier admits only loads from the context and from typed kernel pointers.
    unsafe {
        let task = (*ctx).task;
        if task.is_null() {
            return 0;
        }
        let seq = (*(*ctx).meta).seq;
        let level = reader_level();
        let leader: u64 = get(task as u64, off!(task_group_leader));
        let tgid = id_at(get(leader, off!(task_thread_pid)), level);

        fill_thread(THREAD.get(), task, level);
        (*THREAD.get()).header = Header { kind: Kind::Thread as u32, tail_kind: 0, tail: 0, tgid };
        if bpf_seq_write(seq.cast(), THREAD.get().cast(), size_of::<Thread>() as u32) != 0 {
            return 0;
        }
        let mm: u64 = get(task as u64, off!(task_mm));
        let is_leader = leader == task as u64;
        if mm != 0 && (is_leader || get::<u64>(leader, off!(task_mm)) == 0) {
            fill_mm(MM.get(), mm);
            if off!(task_self_exec_id) != ABSENT {
                (*MM.get()).exec_id = load(task, off!(task_self_exec_id));
            }
            (*MM.get()).header = Header { kind: Kind::Mm as u32, tail_kind: 0, tail: 0, tgid };
            if bpf_seq_write(seq.cast(), MM.get().cast(), size_of::<Mm>() as u32) != 0 {
                return 0;
            }
        }
        if is_leader {
            fill_process(PROCESS.get(), leader, level);
            (*PROCESS.get()).header = Header { kind: Kind::Process as u32, tail_kind: 0, tail: 0, tgid };
            bpf_seq_write(seq.cast(), PROCESS.get().cast(), size_of::<Process>() as u32);
        }
    }
    0
}

/// # Safety
/// `to` is scratch, `task` a pointer that the verifier trusts.
#[inline(always)]
unsafe fn fill_thread(to: *mut Thread, task: *const c_void, level: u32) {
    // SAFETY: as said above.
    unsafe {
        let t = &mut *to;
        let of_task = task as u64;
        t.tid = id_at(get(of_task, off!(task_thread_pid)), level);
        let parent: u64 = get(get(of_task, off!(task_real_parent)), off!(task_group_leader));
        t.ppid = id_at(get(parent, off!(task_thread_pid)), level);
        copy((&raw mut t.comm).cast(), 16, field(task, off!(task_comm)));
        t.flags = load(task, off!(task_flags));
        t.exit_state = load(task, off!(task_exit_state));
        t.exit_code = load(task, off!(task_exit_code));
        t.exit_signal = load(task, off!(task_exit_signal));
        t.pdeath_signal = load(task, off!(task_pdeath_signal));
        t.personality = load(task, off!(task_personality));
        t.no_new_privs = u32::from(load::<u64>(task, off!(task_atomic_flags)) & PFA_NO_NEW_PRIVS != 0);
        if off!(task_seccomp_mode) != ABSENT {
            t.seccomp_mode = load(task, off!(task_seccomp_mode));
        }
        t.policy = load(task, off!(task_policy));
        t.static_prio = load(task, off!(task_static_prio));
        t.rt_priority = load(task, off!(task_rt_priority));
        t.timer_slack_ns = load(task, off!(task_timer_slack));
        if off!(task_start_boottime) != ABSENT {
            t.start_boottime_ns = load(task, off!(task_start_boottime));
        }
        t.blocked = get(of_task, off!(task_blocked));
        t.pending = get(of_task, off!(task_pending));
        t.sas_ss_sp = load(task, off!(task_sas_ss_sp));
        t.sas_ss_size = load(task, off!(task_sas_ss_size));
        t.sas_ss_flags = load(task, off!(task_sas_ss_flags));
        t.set_child_tid = get(of_task, off!(task_set_child_tid));
        t.clear_child_tid = get(of_task, off!(task_clear_child_tid));
        if off!(task_robust_list) != ABSENT {
            t.robust_list = get(of_task, off!(task_robust_list));
        }
        fill_rseq(t, task);
        fill_identities(t, of_task);
        t.restart_len = off!(restart_size);
        if off!(restart_size) <= RESTART_MAX as u32 {
            copy((&raw mut t.restart).cast(), off!(restart_size), field(task, off!(task_restart_block)));
        }
    }
}

/// The rseq registration: fields of the task, or since Linux 6.19 of a struct in the task.
///
/// # Safety
/// As [`fill_thread`].
#[inline(always)]
unsafe fn fill_rseq(t: &mut Thread, task: *const c_void) {
    // SAFETY: as said above.
    unsafe {
        if off!(task_rseq_usrptr) != ABSENT {
            t.rseq = get(task as u64, off!(task_rseq_usrptr));
            if off!(task_rseq_len_nested) != ABSENT && off!(task_rseq_sig_nested) != ABSENT {
                t.rseq_len = load(task, off!(task_rseq_len_nested));
                t.rseq_sig = load(task, off!(task_rseq_sig_nested));
            }
        } else if off!(task_rseq) != ABSENT && off!(task_rseq_len) != ABSENT && off!(task_rseq_sig) != ABSENT {
            t.rseq = get(task as u64, off!(task_rseq));
            t.rseq_len = load(task, off!(task_rseq_len));
            t.rseq_sig = load(task, off!(task_rseq_sig));
        }
    }
}

/// The pointers that tell what is shared with whom.
///
/// # Safety
/// As [`fill_thread`].
#[inline(always)]
unsafe fn fill_identities(t: &mut Thread, task: u64) {
    // SAFETY: as said above.
    unsafe {
        t.mm = get(task, off!(task_mm));
        t.files = get(task, off!(task_files));
        t.fs = get(task, off!(task_fs));
        t.signal = get(task, off!(task_signal));
        t.sighand = get(task, off!(task_sighand));
        t.nsproxy = get(task, off!(task_nsproxy));
        t.cred = get(task, off!(task_cred));
        t.securebits = get(t.cred, off!(cred_securebits));
        if off!(task_cgroups) != ABSENT {
            t.cgroups = get(task, off!(task_cgroups));
        }
    }
}

/// # Safety
/// As [`fill_thread`].
#[inline(always)]
unsafe fn fill_process(to: *mut Process, task: u64, level: u32) {
    // SAFETY: as said above.
    unsafe {
        let p = &mut *to;
        let signal: u64 = get(task, off!(task_signal));
        let pids = signal + u64::from(off!(signal_pids));
        p.pgid = id_at(read(pids + PIDTYPE_PGID * 8), level);
        p.sid = id_at(read(pids + PIDTYPE_SID * 8), level);
        p.flags = get(signal, off!(signal_flags));
        p.session_leader = get(signal, off!(signal_leader));
        let byte = get::<u8>(signal, off!(signal_is_child_subreaper));
        p.is_child_subreaper = u32::from(byte) >> (off!(signal_is_child_subreaper_bit) & 7) & 1;
        p.oom_score_adj = i32::from(get::<i16>(signal, off!(signal_oom_score_adj)));
        p.oom_score_adj_min = i32::from(get::<i16>(signal, off!(signal_oom_score_adj_min)));
        // Without the field to ask, there may be some.
        p.has_posix_timers = 1;
        if off!(signal_posix_timers) != ABSENT {
            p.has_posix_timers = u32::from(is_set(get(signal, off!(signal_posix_timers))));
        }
        if off!(signal_tty) != ABSENT {
            p.tty = get(signal, off!(signal_tty));
        }
        if off!(signal_it_real_incr) != ABSENT {
            p.it_real_interval_ns = get(signal, off!(signal_it_real_incr));
        }
        p.pending = get(signal, off!(signal_shared_pending));
        copy((&raw mut p.limits).cast(), (LIMITS * 16) as u32, at(signal, off!(signal_rlim)));
        let sighand: u64 = get(task, off!(task_sighand));
        copy((&raw mut p.actions).cast(), size_of_val(&p.actions) as u32, at(sighand, off!(sighand_action)));
    }
}

/// # Safety
/// As [`fill_thread`].
#[inline(always)]
unsafe fn fill_mm(to: *mut Mm, mm: u64) {
    // SAFETY: as said above.
    unsafe {
        let m = &mut *to;
        m.mm = mm;
        m.start_code = get(mm, off!(mm_start_code));
        m.end_code = get(mm, off!(mm_end_code));
        m.start_data = get(mm, off!(mm_start_data));
        m.end_data = get(mm, off!(mm_end_data));
        m.start_brk = get(mm, off!(mm_start_brk));
        m.brk = get(mm, off!(mm_brk));
        m.start_stack = get(mm, off!(mm_start_stack));
        m.arg_start = get(mm, off!(mm_arg_start));
        m.arg_end = get(mm, off!(mm_arg_end));
        m.env_start = get(mm, off!(mm_env_start));
        m.env_end = get(mm, off!(mm_env_end));
        m.def_flags = get(mm, off!(mm_def_flags));
        m.flags = get(mm, off!(mm_flags));
        m.areas = get(mm, off!(mm_map_count));
        m.users = get(mm, off!(mm_users));
        if off!(mm_membarrier_state) != ABSENT {
            m.membarrier_state = get(mm, off!(mm_membarrier_state));
        }
        if off!(mm_vdso) != ABSENT {
            m.vdso = get(mm, off!(mm_vdso));
        }
        if off!(mm_lock_seq) != ABSENT {
            m.map_sequence = get(mm, off!(mm_lock_seq));
        }
        m.exe_file = get(mm, off!(mm_exe_file));
        m.exe_inode = get(m.exe_file, off!(file_inode));
        m.exe_ino = get(m.exe_inode, off!(inode_ino));
        m.exe_dev = get(get(m.exe_inode, off!(inode_sb)), off!(sb_dev));
        copy((&raw mut m.auxv).cast(), (AUXV_WORDS * 8) as u32, at(mm, off!(mm_saved_auxv)));
    }
}

/// Whether a descriptor is closed on exec: its bit in the bitmap of its table (`struct files_struct`).
///
/// # Safety
/// None of its own: the helper checks the addresses.
#[inline(always)]
pub(crate) unsafe fn closes_on_exec(table: u64, fd: u32) -> u8 {
    // SAFETY: as said above.
    unsafe {
        let bitmap: u64 = get(get(table, off!(files_fdt)), off!(fdt_close_on_exec));
        let word: u64 = read(bitmap + u64::from(fd / 64) * 8);
        (word >> (fd % 64) & 1) as u8
    }
}

/// The id of a thread in the reader's pid namespace.
///
/// # Safety
/// `task` must be a typed kernel pointer.
#[inline(always)]
pub(crate) unsafe fn own_id(task: *const c_void) -> u32 {
    // SAFETY: as said above.
    unsafe { id_at(get(task as u64, off!(task_thread_pid)), reader_level()) }
}

#[inline(always)]
unsafe fn field(base: *const c_void, offset: u32) -> *const c_void {
    // SAFETY: only an address; whoever reads it checks.
    unsafe { base.cast::<u8>().add(offset as usize).cast() }
}

#[inline(always)]
fn at(base: u64, offset: u32) -> *const c_void {
    (base + u64::from(offset)) as *const c_void
}
