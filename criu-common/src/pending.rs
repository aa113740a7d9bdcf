//! Clients of TCP servers that nobody has accepted yet: the records of `criu-ebpf/src/pending.rs` and `admit.rs`.

use crate::offsets::offsets;

/// Most listening sockets that are looked at.
pub const MOST_LISTENERS: u32 = 4096;
/// Most clients that one restore brings back.
pub const MOST_CLIENTS: u32 = 1 << 16;
/// A connection that was made and not accepted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// Inode of the listening socket.
    pub listener: u64,
    /// What CLOCK_MONOTONIC said, in nanoseconds: timestamps are counted by it.
    pub now: u64,
    /// Not zero where packets are signed: TCP MD5 and TCP-AO.
    pub keys: [u64; 2],
    /// Our address and the peer's; of IPv4 only the first four bytes.
    pub local: [u8; 16],
    /// See `local`.
    pub remote: [u8; 16],
    /// Our port and the peer's, the high byte first.
    pub ports: [[u8; 2]; 2],
    /// AF_INET or AF_INET6.
    pub family: u16,
    /// As in `TCP_ESTABLISHED`; `TCP_NEW_SYN_RECV` where the handshake is not over.
    pub state: u8,
    /// `TCP_ECN_OK` and others.
    pub ecn: u8,
    /// The interface that it is at alone, or 0.
    pub interface: u32,
    /// The first byte that nobody has read.
    pub copied_seq: u32,
    /// The byte that comes next.
    pub rcv_nxt: u32,
    /// What we send next.
    pub snd_nxt: u32,
    /// What was not acknowledged of it.
    pub snd_una: u32,
    /// The window that the peer offers, in bytes.
    pub snd_wnd: u32,
    /// The one that we have offered, in bytes from `rcv_wup` on.
    pub rcv_wnd: u32,
    /// What we have acknowledged last.
    pub rcv_wup: u32,
    /// Size of the receive buffer.
    pub rcvbuf: u32,
    /// The peer's last timestamp.
    pub ts_recent: u32,
    /// What is added to the clock for ours.
    pub ts_offset: u32,
    /// The largest segment that the peer takes.
    pub mss: u16,
    /// Not zero: urgent data.
    pub urgent: u16,
    /// Whether timestamps were agreed on: 0 or 1.
    pub timestamps: u8,
    /// Whether they are in microseconds.
    pub microseconds: u8,
    /// Whether window scales were agreed on, and which.
    pub scaled: u8,
    /// Of the windows that the peer offers.
    pub snd_wscale: u8,
    /// Of ours.
    pub rcv_wscale: u8,
    /// Whether selective acknowledgements were.
    pub sack: u8,
    /// Whether it has asked for MPTCP.
    pub mptcp: u8,
    /// None.
    pub padding: u8,
    /// The largest segment that we take, without what timestamps need.
    pub advmss: u16,
    /// None.
    pub padding2: u16,
}

/// What the kernel is told of a client whose handshake is said to be over: `struct bpf_tcp_req_attrs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The peer's last timestamp.
    pub rcv_tsval: u32,
    /// The last one of ours.
    pub rcv_tsecr: u32,
    /// See [`Client::mss`].
    pub mss: u16,
    /// See [`Client::rcv_wscale`].
    pub rcv_wscale: u8,
    /// See [`Client::snd_wscale`].
    pub snd_wscale: u8,
    /// Explicit congestion notification.
    pub ecn_ok: u8,
    /// See [`Client::scaled`].
    pub wscale_ok: u8,
    /// See [`Client::sack`].
    pub sack_ok: u8,
    /// See [`Client::timestamps`].
    pub tstamp_ok: u8,
    /// See [`Client::microseconds`].
    pub usec_ts_ok: u8,
    /// Zeros.
    pub reserved: [u8; 3],
}

/// A client that is about to be there again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// What was agreed on.
    pub attributes: Attributes,
    /// How often it was tried.
    pub tries: u32,
    /// What the kernel said the last time: 0, or an error's number, negative.
    pub outcome: i32,
}

impl Admission {
    /// The bytes of a record, as a map of the kernel's has them.
    pub fn bytes(&self) -> [u8; 28] {
        let a = &self.attributes;
        let mut out = [0; 28];
        out[..4].copy_from_slice(&a.rcv_tsval.to_ne_bytes());
        out[4..8].copy_from_slice(&a.rcv_tsecr.to_ne_bytes());
        out[8..10].copy_from_slice(&a.mss.to_ne_bytes());
        let small = [a.rcv_wscale, a.snd_wscale, a.ecn_ok, a.wscale_ok, a.sack_ok, a.tstamp_ok, a.usec_ts_ok];
        out[10..17].copy_from_slice(&small);
        out[20..24].copy_from_slice(&self.tries.to_ne_bytes());
        out[24..].copy_from_slice(&self.outcome.to_ne_bytes());
        out
    }
}

offsets! {
    task_files: needed "task_struct" "files";
    files_fdt: needed "files_struct" "fdt";
    fdt_fd: needed "fdtable" "fd";
    file_private_data: needed "file" "private_data";
    file_inode: needed "file" "f_inode";
    pipe_bufs: needed "pipe_inode_info" "bufs";
    pipe_buffer_page: needed "pipe_buffer" "page";
    page_size: needed "page" "";

    skc_state: needed "sock_common" "skc_state";
    skc_family: needed "sock_common" "skc_family";
    skc_interface: needed "sock_common" "skc_bound_dev_if";
    skc_dport: needed "sock_common" "skc_dport";
    skc_daddr: needed "sock_common" "skc_daddr";
    skc_rcv_saddr: needed "sock_common" "skc_rcv_saddr";
    skc_v6_daddr: optional "sock_common" "skc_v6_daddr";
    skc_v6_rcv_saddr: optional "sock_common" "skc_v6_rcv_saddr";
    skc_num: needed "sock_common" "skc_num";
    skc_listener: needed "sock_common" "skc_listener";
    sock_socket: needed "sock" "sk_socket";
    socket_inode: needed "socket_alloc" "vfs_inode";
    sock_queue: needed "sock" "sk_receive_queue";
    sock_rcvbuf: needed "sock" "sk_rcvbuf";
    socket_sk: needed "socket" "sk";
    inode_ino: needed "inode" "i_ino";
    inode_mode: needed "inode" "i_mode";
    inet_sport: needed "inet_sock" "inet_sport";
    accept_head: needed "inet_connection_sock" "icsk_accept_queue.rskq_accept_head";
    accept_requests: needed "inet_connection_sock" "icsk_accept_queue.qlen";
    request_next: needed "request_sock" "dl_next";
    request_sk: needed "request_sock" "sk";
    request_mss: needed "request_sock" "mss";
    request_ts_recent: needed "request_sock" "ts_recent";
    asked_timestamps: needed "inet_request_sock" "tstamp_ok";
    asked_timestamps_bit: needed "inet_request_sock" "tstamp_ok#bit";
    asked_scaled: needed "inet_request_sock" "wscale_ok";
    asked_scaled_bit: needed "inet_request_sock" "wscale_ok#bit";
    asked_sack: needed "inet_request_sock" "sack_ok";
    asked_sack_bit: needed "inet_request_sock" "sack_ok#bit";
    asked_ecn: needed "inet_request_sock" "ecn_ok";
    asked_ecn_bit: needed "inet_request_sock" "ecn_ok#bit";
    asked_snd_wscale: needed "inet_request_sock" "snd_wscale";
    asked_snd_wscale_bit: needed "inet_request_sock" "snd_wscale#bit";
    asked_rcv_wscale: needed "inet_request_sock" "rcv_wscale";
    asked_rcv_wscale_bit: needed "inet_request_sock" "rcv_wscale#bit";
    asked_rcv_isn: needed "tcp_request_sock" "rcv_isn";
    asked_snt_isn: needed "tcp_request_sock" "snt_isn";
    asked_ts_offset: needed "tcp_request_sock" "ts_off";
    asked_microseconds: optional "tcp_request_sock" "req_usec_ts";
    asked_mptcp: optional "tcp_request_sock" "is_mptcp";

    tcp_copied_seq: needed "tcp_sock" "copied_seq";
    tcp_rcv_nxt: needed "tcp_sock" "rcv_nxt";
    tcp_snd_nxt: needed "tcp_sock" "snd_nxt";
    tcp_snd_una: needed "tcp_sock" "snd_una";
    tcp_snd_wnd: needed "tcp_sock" "snd_wnd";
    tcp_rcv_wnd: needed "tcp_sock" "rcv_wnd";
    tcp_rcv_wup: needed "tcp_sock" "rcv_wup";
    tcp_ts_offset: needed "tcp_sock" "tsoffset";
    tcp_microseconds: optional "tcp_sock" "tcp_usec_ts";
    tcp_microseconds_bit: optional "tcp_sock" "tcp_usec_ts#bit";
    tcp_ecn: optional "tcp_sock" "ecn_flags";
    tcp_urgent: needed "tcp_sock" "urg_data";
    tcp_md5: optional "tcp_sock" "md5sig_info";
    tcp_ao: optional "tcp_sock" "ao_info";
    tcp_advmss: needed "tcp_sock" "advmss";
    tcp_ts_recent: needed "tcp_sock" "rx_opt.ts_recent";
    tcp_mss: needed "tcp_sock" "rx_opt.mss_clamp";
    tcp_timestamps: needed "tcp_sock" "rx_opt.tstamp_ok";
    tcp_timestamps_bit: needed "tcp_sock" "rx_opt.tstamp_ok#bit";
    tcp_scaled: needed "tcp_sock" "rx_opt.wscale_ok";
    tcp_scaled_bit: needed "tcp_sock" "rx_opt.wscale_ok#bit";
    tcp_sack: needed "tcp_sock" "rx_opt.sack_ok";
    tcp_sack_bit: needed "tcp_sock" "rx_opt.sack_ok#bit";
    tcp_snd_wscale: needed "tcp_sock" "rx_opt.snd_wscale";
    tcp_snd_wscale_bit: needed "tcp_sock" "rx_opt.snd_wscale#bit";
    tcp_rcv_wscale: needed "tcp_sock" "rx_opt.rcv_wscale";
    tcp_rcv_wscale_bit: needed "tcp_sock" "rx_opt.rcv_wscale#bit";

    skb_next: needed "sk_buff" "next";
    skb_head: needed "sk_buff" "head";
    skb_end: needed "sk_buff" "end";
    skb_data: needed "sk_buff" "data";
    skb_length: needed "sk_buff" "len";
    skb_paged: needed "sk_buff" "data_len";
    skb_cb: needed "sk_buff" "cb";
    cb_seq: needed "tcp_skb_cb" "seq";
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
