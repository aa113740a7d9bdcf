//! Internet sockets: listening TCP, and UDP.

use e2e::{Options, Workload, rows, workload_rows};

workload_rows! { "inet.py";
    tcp_listening
    tcp_keepalive
    tcp6_listening
    tcp_any_address
    tcp_port_shared
    tcp_shared_by_workers
    mptcp_listening
    tcp_unbound
    udp_sockets
    udp6_sockets
    udp_unbound
    udp_queue
    udplite_queue
    udp_options
    udp_multicast
    udp_more_to_come
    udp_corked
    udp_corked_later
    udp_gathered
}

rows! {
    /// A connection is not given up unasked.
    established_unasked => |row| row.refused(&Workload::new("inet.py", "tcp_established"), "tcp-established");

    mptcp_connection => |row| row
        .with(Options::both(&["--tcp-established"]))
        .refused(&Workload::new("inet.py", "mptcp_established"), "MPTCP");

    mptcp_client => |row| row
        .with(Options::both(&["--tcp-established"]))
        .check(&Workload::new("inet.py", "mptcp_client"));

    mptcp_closed_when_asked => |row| row
        .with(Options::both(&["--tcp-close"]))
        .check(&Workload::new("inet.py", "mptcp_closed_by_restore"));

    mptcp_fallen_back => |row| row
        .with(Options::both(&["--tcp-established"]))
        .check(&Workload::new("inet.py", "mptcp_fallen_back"));

    closed_when_asked => |row| row
        .with(Options::both(&["--tcp-close"]))
        .check(&Workload::new("inet.py", "tcp_closed_by_restore"));
}
