//! Raw sockets and packet sockets.

use e2e::{Workload, interop_rows, rows, workload_rows};

workload_rows! { "raw.py";
    raw_ping
    raw_connected
    raw_headers
    raw6_ping
    raw6_checksum
    packet_sniffer
    packet_without_headers
    packet_fanout
}

rows! {
    ring => |row| row.refused(&Workload::new("raw.py", "packet_ring"), "ring of packets");
}

/// Images are exchanged with CRIU.
mod interop {
    use super::*;

    interop_rows! { "raw.py";
        packet_without_headers
    }
}
