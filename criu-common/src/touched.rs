//! Which connections a process has, and which of them somebody may have changed: `criu-ebpf/src/touched.rs`.

/// Entry for calls of which it could not be told which socket they were about: no socket has this inode.
pub const UNKNOWN: u64 = 0;

/// How many sockets at most are looked after.
pub const MOST_SOCKETS: u32 = 1 << 20;

/// How many connections are told of in one go: what an iterator tells of one task has 32 KiB (`bpf_seq_read` of
/// kernel/bpf/bpf_iter.c).
pub const MOST_TOLD: u32 = 1024;

/// A descriptor that is a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// Its inode.
    pub inode: u64,
    /// The descriptor's number.
    pub fd: u32,
    /// None.
    pub padding: u32,
}

impl Connection {
    /// What comes behind the last one.
    pub const END: Self = Self { inode: 0, fd: u32::MAX, padding: 0 };

    /// What comes behind those that are told of in one go, if there may be more.
    pub const MORE: Self = Self { fd: u32::MAX - 1, ..Self::END };

    /// One from bytes as they stand in memory.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *bytes;
        let inode = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        Self { inode, fd: u32::from_ne_bytes([i, j, k, l]), padding: 0 }
    }
}

crate::offsets::offsets! {
    task_status: needed "task_struct" "thread_info.status";
    task_files: needed "task_struct" "files";
    task_group_leader: needed "task_struct" "group_leader";
    files_fdt: needed "files_struct" "fdt";
    fdt_max_fds: needed "fdtable" "max_fds";
    fdt_fd: needed "fdtable" "fd";
    file_inode: needed "file" "f_inode";
    file_private_data: needed "file" "private_data";
    inode_ino: needed "inode" "i_ino";
    inode_mode: needed "inode" "i_mode";
    socket_sk: needed "socket" "sk";
    sock_family: needed "sock" "__sk_common.skc_family";
    sock_state: needed "sock" "__sk_common.skc_state";
    sock_protocol: needed "sock" "sk_protocol";
    regs_nr: needed "pt_regs" "orig_ax";
    regs_arg0: needed "pt_regs" "di";
}
