//! Where the fields of the kernel's structures are.
//!
//! Rust has no CO-RE: a program does not learn from its loader where a field is. So the engine looks every field of
//! this table up in the running kernel's BTF and hands the table to the programs as a frozen global. The verifier
//! knows the values of a frozen global, takes `pointer + offset` for a typed access to that very field, and refuses the
//! program if the types do not fit: a wrong offset is an error at load, not a wrong value.

/// The offset of a field that this kernel does not have. The verifier drops what depends on it.
pub const ABSENT: u32 = u32::MAX;

/// Where one entry of the table comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Name of the struct.
    pub of: &'static str,
    /// Field, with dots for a field of a field; members of anonymous structs and unions by their own names. Empty: the
    /// size of the struct. With `#bit` behind a bit field: which bit it is in the byte at its offset.
    pub field: &'static str,
    /// Whether the survey cannot do without it.
    pub needed: bool,
}

macro_rules! offsets {
    (@needed needed) => { true };
    (@needed optional) => { false };
    ($($name:ident: $need:ident $of:literal $field:literal;)*) => {
        /// Byte offsets, in the order of `SOURCES`.
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct Offsets {
            $(#[doc = concat!("`", $of, "`.`", $field, "`")] pub $name: u32,)*
        }

        /// Where each field of [`Offsets`] is found in BTF.
        pub const SOURCES: &[$crate::offsets::Source] = &[
            $($crate::offsets::Source { of: $of, field: $field, needed: $crate::offsets::offsets!(@needed $need) },)*
        ];

        impl Offsets {
            /// What the programs are compiled with, until the engine puts the kernel's own in.
            pub const UNKNOWN: Self = Self { $($name: 0,)* };

            /// The table from one value for each of [`SOURCES`], in that order.
            pub fn from_values(values: &[u32]) -> Option<Self> {
                let mut values = values.iter().copied();
                let table = Self { $($name: values.next()?,)* };
                values.next().is_none().then_some(table)
            }
        }
    };
}

pub(crate) use offsets;

offsets! {
    vma_start: needed "vm_area_struct" "vm_start";
    vma_end: needed "vm_area_struct" "vm_end";
    vma_flags: needed "vm_area_struct" "vm_flags";
    vma_pgoff: needed "vm_area_struct" "vm_pgoff";
    vma_file: needed "vm_area_struct" "vm_file";
    vma_ops: needed "vm_area_struct" "vm_ops";
    vma_private_data: needed "vm_area_struct" "vm_private_data";
    vma_anon_vma: needed "vm_area_struct" "anon_vma";
    vma_anon_name: optional "vm_area_struct" "anon_name";
    anon_name_name: optional "anon_vma_name" "name";
    special_mapping_name: needed "vm_special_mapping" "name";

    file_op: needed "file" "f_op";
    file_inode: needed "file" "f_inode";
    file_flags: needed "file" "f_flags";
    file_mode: needed "file" "f_mode";
    file_pos: needed "file" "f_pos";
    file_path: needed "file" "f_path";
    file_path_mnt: optional "file" "f_path.mnt";
    mount_mnt: optional "mount" "mnt";
    mount_id: optional "mount" "mnt_id";
    file_private_data: needed "file" "private_data";
    file_owner: needed "file" "f_owner";
    file_owner_inside: optional "file" "f_owner.pid";
    file_ep: optional "file" "f_ep";

    inode_ino: needed "inode" "i_ino";
    inode_mode: needed "inode" "i_mode";
    inode_sb: needed "inode" "i_sb";
    inode_rdev: needed "inode" "i_rdev";
    inode_size: needed "inode" "i_size";
    inode_nlink: needed "inode" "i_nlink";
    inode_flctx: optional "inode" "i_flctx";
    sb_dev: needed "super_block" "s_dev";

    files_fdt: needed "files_struct" "fdt";
    fdt_close_on_exec: needed "fdtable" "close_on_exec";

    task_thread_pid: needed "task_struct" "thread_pid";
    task_group_leader: needed "task_struct" "group_leader";
    task_real_parent: needed "task_struct" "real_parent";
    task_signal: needed "task_struct" "signal";
    task_sighand: needed "task_struct" "sighand";
    task_mm: needed "task_struct" "mm";
    task_files: needed "task_struct" "files";
    task_fs: needed "task_struct" "fs";
    task_nsproxy: needed "task_struct" "nsproxy";
    task_cgroups: optional "task_struct" "cgroups";
    task_cred: needed "task_struct" "real_cred";
    task_comm: needed "task_struct" "comm";
    task_flags: needed "task_struct" "flags";
    task_atomic_flags: needed "task_struct" "atomic_flags";
    task_exit_state: needed "task_struct" "exit_state";
    task_exit_code: needed "task_struct" "exit_code";
    task_exit_signal: needed "task_struct" "exit_signal";
    task_pdeath_signal: needed "task_struct" "pdeath_signal";
    task_personality: needed "task_struct" "personality";
    task_restart_block: needed "task_struct" "restart_block";
    task_set_child_tid: needed "task_struct" "set_child_tid";
    task_clear_child_tid: needed "task_struct" "clear_child_tid";
    task_robust_list: optional "task_struct" "robust_list";
    task_rseq: optional "task_struct" "rseq";
    task_rseq_usrptr: optional "task_struct" "rseq.usrptr";
    task_rseq_len: optional "task_struct" "rseq_len";
    task_rseq_len_nested: optional "task_struct" "rseq.len";
    task_rseq_sig: optional "task_struct" "rseq_sig";
    task_rseq_sig_nested: optional "task_struct" "rseq.sig";
    task_sas_ss_sp: needed "task_struct" "sas_ss_sp";
    task_sas_ss_size: needed "task_struct" "sas_ss_size";
    task_sas_ss_flags: needed "task_struct" "sas_ss_flags";
    task_blocked: needed "task_struct" "blocked";
    task_pending: needed "task_struct" "pending.signal";
    task_seccomp_mode: optional "task_struct" "seccomp.mode";
    task_timer_slack: needed "task_struct" "timer_slack_ns";
    task_start_boottime: optional "task_struct" "start_boottime";
    task_policy: needed "task_struct" "policy";
    task_static_prio: needed "task_struct" "static_prio";
    task_rt_priority: needed "task_struct" "rt_priority";

    cred_securebits: needed "cred" "securebits";

    pid_level: needed "pid" "level";
    pid_numbers: needed "pid" "numbers";
    upid_nr: needed "upid" "nr";
    upid_size: needed "upid" "";

    restart_fn: needed "restart_block" "fn";
    restart_size: needed "restart_block" "";
    restart_nanosleep_clockid: needed "restart_block" "nanosleep.clockid";
    restart_nanosleep_rmtp: needed "restart_block" "nanosleep.rmtp";
    restart_nanosleep_expires: needed "restart_block" "nanosleep.expires";
    restart_poll_ufds: needed "restart_block" "poll.ufds";
    restart_poll_nfds: needed "restart_block" "poll.nfds";
    restart_poll_has_timeout: needed "restart_block" "poll.has_timeout";
    restart_poll_sec: optional "restart_block" "poll.tv_sec";
    restart_poll_nsec: optional "restart_block" "poll.tv_nsec";
    restart_poll_end: optional "restart_block" "poll.end_time";
    restart_futex_uaddr: needed "restart_block" "futex.uaddr";
    restart_futex_val: needed "restart_block" "futex.val";
    restart_futex_flags: needed "restart_block" "futex.flags";
    restart_futex_bitset: needed "restart_block" "futex.bitset";
    restart_futex_time: needed "restart_block" "futex.time";

    signal_pids: needed "signal_struct" "pids";
    signal_flags: needed "signal_struct" "flags";
    signal_shared_pending: needed "signal_struct" "shared_pending.signal";
    signal_rlim: needed "signal_struct" "rlim";
    signal_oom_score_adj: needed "signal_struct" "oom_score_adj";
    signal_oom_score_adj_min: needed "signal_struct" "oom_score_adj_min";
    signal_leader: needed "signal_struct" "leader";
    signal_tty: optional "signal_struct" "tty";
    signal_posix_timers: optional "signal_struct" "posix_timers";
    signal_it_real_incr: optional "signal_struct" "it_real_incr";
    signal_is_child_subreaper: needed "signal_struct" "is_child_subreaper";
    signal_is_child_subreaper_bit: needed "signal_struct" "is_child_subreaper#bit";

    sighand_action: needed "sighand_struct" "action";
    k_sigaction_size: needed "k_sigaction" "";
    sigaction_handler: needed "sigaction" "sa_handler";
    sigaction_flags: needed "sigaction" "sa_flags";
    sigaction_restorer: needed "sigaction" "sa_restorer";
    sigaction_mask: needed "sigaction" "sa_mask";

    mm_start_code: needed "mm_struct" "start_code";
    mm_end_code: needed "mm_struct" "end_code";
    mm_start_data: needed "mm_struct" "start_data";
    mm_end_data: needed "mm_struct" "end_data";
    mm_start_brk: needed "mm_struct" "start_brk";
    mm_brk: needed "mm_struct" "brk";
    mm_start_stack: needed "mm_struct" "start_stack";
    mm_arg_start: needed "mm_struct" "arg_start";
    mm_arg_end: needed "mm_struct" "arg_end";
    mm_env_start: needed "mm_struct" "env_start";
    mm_env_end: needed "mm_struct" "env_end";
    mm_saved_auxv: needed "mm_struct" "saved_auxv";
    mm_exe_file: needed "mm_struct" "exe_file";
    mm_def_flags: needed "mm_struct" "def_flags";
    mm_flags: needed "mm_struct" "flags";
    mm_map_count: needed "mm_struct" "map_count";
    mm_users: needed "mm_struct" "mm_users";
    mm_membarrier_state: optional "mm_struct" "membarrier_state";
    mm_lock_seq: optional "mm_struct" "mm_lock_seq.sequence";
    task_self_exec_id: optional "task_struct" "self_exec_id";
    mm_vdso: optional "mm_struct" "context.vdso";
}
