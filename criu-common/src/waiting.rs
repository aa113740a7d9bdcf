//! What waits in connections of unix sockets that nobody has accepted yet: the records of `criu-ebpf/src/waiting.rs`.

use crate::offsets::offsets;

/// Longest data of a packet that a record brings along: what the kernel allocates in one piece is shorter.
pub const DATA_MAX: usize = 16 << 10;
/// Most records for one socket, and most bytes of data in them: the kernel's buffer of 32 KiB must hold them all.
pub const PACKETS_MAX: u32 = 64;
/// See [`PACKETS_MAX`].
pub const BYTES_MAX: u32 = 24 << 10;

/// One packet; its data follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Inode of the client's socket, which has sent it.
    pub client: u64,
    /// How many packets wait in this connection. Where there are fewer records, the others did not fit.
    pub of: u32,
    /// Its bytes.
    pub length: u32,
    /// How many of them follow: all or none. None where they are in pages, which have no address for a program.
    pub tail: u32,
    /// Whether descriptors come with it: 0 or 1.
    pub files: u32,
    /// Who has sent it, as the reader's pid namespace calls it; 0 where it does not.
    pub pid: u32,
    /// The sender's user, as the kernel counts.
    pub uid: u32,
    /// The sender's group.
    pub gid: u32,
    /// Whether it is the socket's urgent byte (`MSG_OOB`): 0 or 1.
    pub urgent: u32,
}

offsets! {
    task_thread_pid: needed "task_struct" "thread_pid";
    pid_level: needed "pid" "level";
    pid_numbers: needed "pid" "numbers";
    upid_nr: needed "upid" "nr";
    upid_size: needed "upid" "";

    unix_peer: needed "unix_sock" "peer";
    unix_urgent: optional "unix_sock" "oob_skb";
    sock_socket: needed "sock" "sk_socket";
    sock_queue: needed "sock" "sk_receive_queue";
    queue_length: needed "sk_buff_head" "qlen";
    skb_next: needed "sk_buff" "next";
    skb_data: needed "sk_buff" "data";
    skb_length: needed "sk_buff" "len";
    skb_paged: needed "sk_buff" "data_len";
    skb_cb: needed "sk_buff" "cb";
    parms_pid: needed "unix_skb_parms" "pid";
    parms_uid: needed "unix_skb_parms" "uid";
    parms_gid: needed "unix_skb_parms" "gid";
    parms_files: needed "unix_skb_parms" "fp";
    socket_inode: needed "socket_alloc" "vfs_inode";
    inode_ino: needed "inode" "i_ino";
}
