//! The records of the survey iterators (`criu-ebpf/src/survey.rs`).
//!
//! An iterator's output is a sequence of [`Header`]s, each followed by the rest of its record and by `tail` bytes of
//! text (a path or a name), without padding between records. Kernel pointers serve as identities only: two
//! descriptors with equal `file` share one open file description.

/// Longest path that the kernel hands out, its NUL included (`PATH_MAX`).
pub const PATH_MAX: usize = 4096;
/// Longest name in a [`Vma`]'s tail: `ANON_VMA_NAME_MAX_LEN` is 80, names of special mappings are shorter.
pub const NAME_MAX: usize = 128;
/// Signals of Linux on all architectures that have eBPF and this engine.
pub const SIGNALS: usize = 64;
/// Kinds of resource limits (`RLIM_NLIMITS`).
pub const LIMITS: usize = 16;
/// Room for `struct restart_block` as it is in the kernel.
pub const RESTART_MAX: usize = 64;
/// Words copied of the auxiliary vector (`mm_struct.saved_auxv`), more than any architecture fills.
pub const AUXV_WORDS: usize = 64;

/// Which record follows.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Vma`]
    Vma = 1,
    /// [`File`]
    File = 2,
    /// [`Thread`]
    Thread = 3,
    /// [`Process`]
    Process = 4,
    /// [`Mm`]
    Mm = 5,
}

/// What the text after a record is.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// There is none.
    None = 0,
    /// Path of the file, as readlink on /proc/PID/fd gives it. A [`Vma`] repeats the path of the record before it where
    /// that has the same file and this has no tail.
    Path = 1,
    /// Name given with `PR_SET_VMA_ANON_NAME`.
    AnonName = 2,
    /// Name of a mapping that the kernel made, such as `[vdso]`.
    Special = 3,
}

/// What every record starts with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// A [`Kind`].
    pub kind: u32,
    /// A [`Tail`].
    pub tail_kind: u32,
    /// Bytes of text after the record.
    pub tail: u32,
    /// Process, in the pid namespace of the reader; 0 in [`Vma`] and [`File`], whose iterators are run for one process.
    pub tgid: u32,
}

/// One area of an address space.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vma {
    /// Kind, owner, tail.
    pub header: Header,
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `VM_*` bits of include/linux/mm.h.
    pub flags: u64,
    /// Offset in the file, in pages.
    pub pgoff: u64,
    /// `struct file`, or 0.
    pub file: u64,
    /// `struct inode` of the file.
    pub inode: u64,
    /// Inode number.
    pub ino: u64,
    /// `s_dev` of the file's superblock, in the kernel's encoding (major << 20 | minor).
    pub dev: u32,
    /// `i_mode`.
    pub mode: u32,
    /// `f_mode` of the file.
    pub f_mode: u32,
    /// 1: pages of its own may exist (it has an anon_vma).
    pub has_anon: u32,
}

/// One file descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// Kind, owner, tail.
    pub header: Header,
    /// The thread whose table it is in; 0: the leader's, which most threads share.
    pub tid: u32,
    /// The number.
    pub fd: u32,
    /// `struct file`: equal where a description is shared.
    pub file: u64,
    /// `struct file_operations`: tells kinds of anonymous inodes apart.
    pub f_op: u64,
    /// What the kind keeps for itself (`struct socket`, `struct eventpoll`, …).
    pub private_data: u64,
    /// `struct inode`.
    pub inode: u64,
    /// Inode number.
    pub ino: u64,
    /// Size of the inode.
    pub size: u64,
    /// Position.
    pub pos: u64,
    /// `s_dev`, in the kernel's encoding.
    pub dev: u32,
    /// `i_rdev`, in the kernel's encoding.
    pub rdev: u32,
    /// `i_mode`.
    pub mode: u32,
    /// Links of the inode; 0 where it is deleted.
    pub nlink: u32,
    /// `O_*` flags as kept in the description.
    pub flags: u32,
    /// `FMODE_*` bits.
    pub f_mode: u32,
    /// 1: closed on exec.
    pub cloexec: u8,
    /// 1: may have an owner for signals (`F_SETOWN`, `F_SETSIG`, leases).
    pub has_owner: u8,
    /// 1: locks or leases are or were on the inode.
    pub has_locks: u8,
    /// 1: an epoll instance watches it or did.
    pub in_epoll: u8,
    /// Number of the mount that it was opened by; 0 where that is not known.
    pub mount: u32,
    /// `struct files_struct`: the table that it is in.
    pub table: u64,
}

/// One thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Kind and owner; no tail.
    pub header: Header,
    /// Thread id, in the pid namespace of the reader.
    pub tid: u32,
    /// Process id of the real parent, 0 where that is outside the reader's pid namespace.
    pub ppid: u32,
    /// Name, NUL-padded.
    pub comm: [u8; 16],
    /// `PF_*`.
    pub flags: u32,
    /// `EXIT_ZOMBIE` and the like; 0 for the living.
    pub exit_state: u32,
    /// As wait gives it, once dead.
    pub exit_code: u32,
    /// Signal that the parent gets; −1 for a thread that is not the leader.
    pub exit_signal: i32,
    /// `PR_SET_PDEATHSIG`.
    pub pdeath_signal: u32,
    /// `personality(2)`.
    pub personality: u32,
    /// 1: `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: u32,
    /// `PR_SET_SECUREBITS`.
    pub securebits: u32,
    /// 0, or 1 strict, or 2 filter.
    pub seccomp_mode: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// 120 + nice.
    pub static_prio: u32,
    /// Real-time priority.
    pub rt_priority: u32,
    /// `PR_SET_TIMERSLACK`, in nanoseconds.
    pub timer_slack_ns: u64,
    /// When it was started, in nanoseconds of CLOCK_BOOTTIME.
    pub start_boottime_ns: u64,
    /// Blocked signals.
    pub blocked: u64,
    /// Signals pending for this thread.
    pub pending: u64,
    /// `sigaltstack`: address.
    pub sas_ss_sp: u64,
    /// `sigaltstack`: size.
    pub sas_ss_size: u64,
    /// `sigaltstack`: flags.
    pub sas_ss_flags: u32,
    /// Length of the rseq area as registered.
    pub rseq_len: u32,
    /// Address of the rseq area, or 0.
    pub rseq: u64,
    /// rseq signature.
    pub rseq_sig: u32,
    /// Bytes of `restart_block` that are filled in.
    pub restart_len: u32,
    /// `set_child_tid` of clone.
    pub set_child_tid: u64,
    /// `set_tid_address`.
    pub clear_child_tid: u64,
    /// `set_robust_list`.
    pub robust_list: u64,
    /// `struct mm_struct`; 0 for the dead.
    pub mm: u64,
    /// `struct files_struct`: equal where the table is shared.
    pub files: u64,
    /// `struct fs_struct`: equal where cwd, root and umask are shared.
    pub fs: u64,
    /// `struct signal_struct`.
    pub signal: u64,
    /// `struct sighand_struct`.
    pub sighand: u64,
    /// `struct cred`: equal credentials where equal.
    pub cred: u64,
    /// `struct nsproxy`: equal namespaces where equal (but for the user namespace).
    pub nsproxy: u64,
    /// `struct css_set`: equal cgroups where equal.
    pub cgroups: u64,
    /// `struct restart_block`, as it is in the kernel.
    pub restart: [u8; RESTART_MAX],
}

/// What all threads of a process share, but for its memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Kind and owner; no tail.
    pub header: Header,
    /// Process group, 0 where it is outside the reader's pid namespace.
    pub pgid: u32,
    /// Session, likewise.
    pub sid: u32,
    /// `SIGNAL_*` of include/linux/sched/signal.h.
    pub flags: u32,
    /// 1: leads its session.
    pub session_leader: u32,
    /// 1: `PR_SET_CHILD_SUBREAPER`.
    pub is_child_subreaper: u32,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// Lowest value that it may be set to without CAP_SYS_RESOURCE.
    pub oom_score_adj_min: i32,
    /// 1: there are POSIX timers.
    pub has_posix_timers: u32,
    /// `struct tty_struct` of the controlling terminal, or 0.
    pub tty: u64,
    /// Interval of ITIMER_REAL, in nanoseconds.
    pub it_real_interval_ns: u64,
    /// Signals pending for the process.
    pub pending: u64,
    /// `getrlimit`: soft, hard.
    pub limits: [[u64; 2]; LIMITS],
    /// `struct k_sigaction`s as they are in the kernel.
    pub actions: [[u64; 4]; SIGNALS],
}

/// Facts about an address space.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mm {
    /// Kind, owner; the tail is the path of the executable.
    pub header: Header,
    /// `struct mm_struct`: equal where memory is shared (CLONE_VM).
    pub mm: u64,
    /// As in `PR_SET_MM_MAP`.
    pub start_code: u64,
    /// As in `PR_SET_MM_MAP`.
    pub end_code: u64,
    /// As in `PR_SET_MM_MAP`.
    pub start_data: u64,
    /// As in `PR_SET_MM_MAP`.
    pub end_data: u64,
    /// As in `PR_SET_MM_MAP`.
    pub start_brk: u64,
    /// As in `PR_SET_MM_MAP`.
    pub brk: u64,
    /// As in `PR_SET_MM_MAP`.
    pub start_stack: u64,
    /// As in `PR_SET_MM_MAP`.
    pub arg_start: u64,
    /// As in `PR_SET_MM_MAP`.
    pub arg_end: u64,
    /// As in `PR_SET_MM_MAP`.
    pub env_start: u64,
    /// As in `PR_SET_MM_MAP`.
    pub env_end: u64,
    /// Flags that new areas get (`mlockall(MCL_FUTURE)`).
    pub def_flags: u64,
    /// `MMF_*`: the lowest two bits are `PR_SET_DUMPABLE`.
    pub flags: u64,
    /// `struct file` of the executable.
    pub exe_file: u64,
    /// `struct inode` of the executable.
    pub exe_inode: u64,
    /// Inode number of the executable.
    pub exe_ino: u64,
    /// `s_dev` of the executable, in the kernel's encoding.
    pub exe_dev: u32,
    /// Number of areas.
    pub areas: u32,
    /// Tasks that use it, and others that hold it for a while.
    pub users: u32,
    /// `MEMBARRIER_STATE_*` (kernel/sched/membarrier.c).
    pub membarrier_state: u32,
    /// Where the vDSO is, or 0.
    pub vdso: u64,
    /// Sequence number of the writers of the memory map (`mm_lock_seq`), odd while one is at it; 0 where the kernel keeps
    /// none (CONFIG_PER_VMA_LOCK, since Linux 6.13).
    pub map_sequence: u32,
    /// Counts programs of the thread (`self_exec_id`); 0 where the kernel has none.
    pub exec_id: u32,
    /// Auxiliary vector, to its AT_NULL.
    pub auxv: [u64; AUXV_WORDS],
}
