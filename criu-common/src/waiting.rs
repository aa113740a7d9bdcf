//! What waits in connections of unix sockets that nobody has accepted yet: the records of `criu-ebpf/src/waiting.rs`.

use crate::offsets::offsets;

/// One packet; its data follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Inode of the client's socket, which has sent it.
    pub client: u64,
    /// How many packets wait in this connection.
    pub of: u32,
    /// Its bytes.
    pub length: u32,
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
    /// None.
    pub padding: u32,
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

    task_files: needed "task_struct" "files";
    files_fdt: needed "files_struct" "fdt";
    fdt_fd: needed "fdtable" "fd";
    file_private_data: needed "file" "private_data";
    pipe_bufs: needed "pipe_inode_info" "bufs";
    pipe_buffer_page: needed "pipe_buffer" "page";
    page_size: needed "page" "";
    skb_head: needed "sk_buff" "head";
    skb_end: needed "sk_buff" "end";
    shared_frags: needed "skb_shared_info" "frags";
    shared_count: needed "skb_shared_info" "nr_frags";
    shared_list: needed "skb_shared_info" "frag_list";
    frag_size: optional "skb_frag" "";
    frag_netmem: optional "skb_frag" "netmem";
    frag_length: optional "skb_frag" "len";
    frag_offset: optional "skb_frag" "offset";
    vec_size: needed "bio_vec" "";
    vec_page: needed "bio_vec" "bv_page";
    vec_length: needed "bio_vec" "bv_len";
    vec_offset: needed "bio_vec" "bv_offset";
}
