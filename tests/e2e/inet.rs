//! Internet sockets: listening TCP, and UDP.

use e2e::{Options, Workload, rows, workload_rows};

workload_rows! { "inet.py";
    tcp_listening
    tcp_keepalive
    tcp6_listening
    tcp_any_address
    tcp_port_shared
    tcp_shared_by_workers
    tcp_unbound
    udp_sockets
    udp6_sockets
    udp_unbound
    udp_queue
    udp_multicast
}

rows! {
    /// A connection is not given up unasked.
    established_unasked => |row| row.refused(&Workload::new("inet.py", "tcp_established"), "tcp-established");

    corked_datagram => |row| row.refused(&Workload::new("inet.py", "udp_corked"), "corked");

    closed_when_asked => |row| row
        .with(Options::both(&["--tcp-close"]))
        .check(&Workload::new("inet.py", "tcp_closed_by_restore"));
}
