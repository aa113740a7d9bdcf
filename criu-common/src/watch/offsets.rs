//! Where the fields are that the watching programs read; see [`crate::offsets`].

crate::offsets::offsets! {
    task_pid: needed "task_struct" "pid";
    task_tgid: needed "task_struct" "tgid";
    task_thread_pid: needed "task_struct" "thread_pid";
    task_group_leader: needed "task_struct" "group_leader";
    task_signal: needed "task_struct" "signal";
    task_files: needed "task_struct" "files";
    task_mm: needed "task_struct" "mm";
    task_comm: needed "task_struct" "comm";
    task_exit_code: needed "task_struct" "exit_code";
    task_start_boottime: optional "task_struct" "start_boottime";
    task_status: needed "task_struct" "thread_info.status";
    files_count: needed "files_struct" "count";
    signal_threads: needed "signal_struct" "nr_threads";
    signal_live: needed "signal_struct" "live";
    signal_group_exit_code: needed "signal_struct" "group_exit_code";

    pid_level: needed "pid" "level";
    pid_numbers: needed "pid" "numbers";
    upid_nr: needed "upid" "nr";
    upid_size: needed "upid" "";

    regs_nr: needed "pt_regs" "orig_ax";
    regs_arg0: needed "pt_regs" "di";
    regs_arg1: needed "pt_regs" "si";
    regs_arg2: needed "pt_regs" "dx";
    regs_arg3: needed "pt_regs" "r10";
    regs_arg4: needed "pt_regs" "r8";
    regs_arg5: needed "pt_regs" "r9";

    sock_cookie: needed "sock" "__sk_common.skc_cookie";
    sock_family: needed "sock" "__sk_common.skc_family";
    sock_state: needed "sock" "__sk_common.skc_state";
    sock_port: needed "sock" "__sk_common.skc_num";
    sock_peer_port: needed "sock" "__sk_common.skc_dport";
    sock_address: needed "sock" "__sk_common.skc_rcv_saddr";
    sock_peer_address: needed "sock" "__sk_common.skc_daddr";
    sock_address6: optional "sock" "__sk_common.skc_v6_rcv_saddr";
    sock_peer_address6: optional "sock" "__sk_common.skc_v6_daddr";
    sock_protocol: needed "sock" "sk_protocol";
    tcp_rcv_nxt: needed "tcp_sock" "rcv_nxt";
    tcp_copied_seq: needed "tcp_sock" "copied_seq";
    tcp_write_seq: needed "tcp_sock" "write_seq";
    tcp_snd_una: needed "tcp_sock" "snd_una";
    tcp_bytes_sent: needed "tcp_sock" "bytes_sent";
    tcp_bytes_received: needed "tcp_sock" "bytes_received";
    tcp_total_retrans: needed "tcp_sock" "total_retrans";
    sock_net: needed "sock" "__sk_common.skc_net.net";
    sock_backlog: needed "sock" "sk_ack_backlog";
    socket_sk: needed "socket" "sk";

    file_inode: needed "file" "f_inode";
    file_private_data: needed "file" "private_data";
    inode_mode: needed "inode" "i_mode";
    inode_ino: needed "inode" "i_ino";

    cgroup_root: needed "cgroup" "root";
    cgroup_kn: needed "cgroup" "kn";
    cgroup_level: needed "cgroup" "level";
    cgroup_ancestors: optional "cgroup" "ancestors";
    root_hierarchy: needed "cgroup_root" "hierarchy_id";
    kn_id: needed "kernfs_node" "id";

    mm_lock_seq: optional "mm_struct" "mm_lock_seq.sequence";
}
