//! Raw sockets, ping sockets and packet sockets.

use e2e::{Row, Survey, Workload, engine::adopt, interop_rows, rows, workload_rows};

use crate::net::Network;

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

/// In a network where they are allowed; a restore says so where they are not, and works when they are.
#[test]
fn ping_sockets() {
    const ALL: &str = "0\t2147483647";
    const NOBODY: &str = "1\t0";
    let network = Network::new(41);
    network.loopback();
    let allow = |groups| network.set("net.ipv4.ping_group_range", groups);
    let entrance = network.entrance();
    let mut workload = Workload::new("raw.py", "ping_sockets");
    workload.command.splice(0..0, entrance.clone().map(Into::into));
    allow(ALL);
    let mut program = workload.start();
    let row = Row::ours(Survey::Proc);
    let (tree, images) = (program.tree(), row.next_images(&program));
    std::fs::create_dir(&images).expect("a directory");
    let call =
        |words: &[_], verb| row.dumper.call_by(&format!("exec {} \"$@\"", entrance.join(" ")), words, &images, verb);
    call(&row.dumper.dump_words(&program, &images, &row.options), "dump").expect_success();
    program.expect_gone(&tree);
    let restore = || call(&row.restorer.restore_words(&images, &row.options), "restore");
    allow(NOBODY);
    restore().expect_refusal("ping_group_range");
    allow(ALL);
    adopt(&program, &images, restore());
    program.finish();
}

/// Images are exchanged with CRIU.
mod interop {
    use super::*;

    interop_rows! { "raw.py";
        packet_without_headers
    }
}
