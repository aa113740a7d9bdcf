//! What UDP sockets have gathered for a datagram that is not sent yet: the record of `criu-ebpf/src/gathered.rs`.

use crate::offsets::offsets;

/// The datagram of a socket; its bytes follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gathered {
    /// Inode of the socket.
    pub socket: u64,
    /// Where it comes from, and where it goes; of IPv4 only the first four bytes.
    pub source: [u8; 16],
    /// See `source`.
    pub destination: [u8; 16],
    /// How long it is, with the header of UDP.
    pub length: u32,
    /// The interface that it leaves by, as far as the socket has chosen one.
    pub interface: u32,
    /// AF_INET or AF_INET6: of the datagram, not of the socket.
    pub family: u16,
    /// The port that it goes to, the high byte first.
    pub port: [u8; 2],
    /// Type of service or traffic class; -1 where the socket's is taken.
    pub class: i16,
    /// Its pieces' size, if it is to be sent in pieces (UDP_SEGMENT); else 0.
    pub segment: u16,
    /// Time to live or hop limit; 0 where the socket's is taken.
    pub ttl: u32,
    /// None.
    pub padding: u32,
}

offsets! {
    task_files: needed "task_struct" "files";
    files_fdt: needed "files_struct" "fdt";
    fdt_fd: needed "fdtable" "fd";
    file_private_data: needed "file" "private_data";
    file_inode: needed "file" "f_inode";
    inode_ino: needed "inode" "i_ino";
    inode_mode: needed "inode" "i_mode";
    pipe_bufs: needed "pipe_inode_info" "bufs";
    pipe_buffer_page: needed "pipe_buffer" "page";
    page_size: needed "page" "";

    socket_sk: needed "socket" "sk";
    sock_family: needed "sock" "__sk_common.skc_family";
    sock_type: needed "sock" "sk_type";
    sock_protocol: needed "sock" "sk_protocol";
    sock_queue: needed "sock" "sk_write_queue";
    udp_pending: needed "udp_sock" "pending";
    cork_length: needed "inet_sock" "cork.base.length";
    cork_ttl: needed "inet_sock" "cork.base.ttl";
    cork_tos: needed "inet_sock" "cork.base.tos";
    cork_segment: needed "inet_sock" "cork.base.gso_size";
    flow_interface: needed "inet_sock" "cork.fl.u.__fl_common.flowic_oif";
    flow4_source: needed "inet_sock" "cork.fl.u.ip4.saddr";
    flow4_destination: needed "inet_sock" "cork.fl.u.ip4.daddr";
    flow4_port: needed "inet_sock" "cork.fl.u.ip4.uli.ports.dport";
    flow6_source: needed "inet_sock" "cork.fl.u.ip6.saddr";
    flow6_destination: needed "inet_sock" "cork.fl.u.ip6.daddr";
    flow6_port: needed "inet_sock" "cork.fl.u.ip6.uli.ports.dport";
    inet6: optional "inet_sock" "pinet6";
    cork6_hops: optional "ipv6_pinfo" "cork.hop_limit";
    cork6_class: optional "ipv6_pinfo" "cork.tclass";

    skb_next: needed "sk_buff" "next";
    skb_data: needed "sk_buff" "data";
    skb_length: needed "sk_buff" "len";
    skb_paged: needed "sk_buff" "data_len";
    skb_transport: needed "sk_buff" "transport_header";
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
