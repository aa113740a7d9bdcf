//! A gate that has to hold more connections than it was made for. Needs root; `cargo xtask test` runs it.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use criu_common::gate::{Connection, mapped};
use criu_user::kernel::ebpf::Gate;

/// Connections of nobody's, each with a port of its own.
fn others(count: u16) -> Vec<Connection> {
    let end = mapped([192, 0, 2, 1]);
    let of = |port: u16| Connection { local: end, remote: end, local_port: port.to_be_bytes(), remote_port: [0, 9] };
    (1..=count).map(of).collect()
}

fn between(local: SocketAddr, remote: SocketAddr) -> Connection {
    let address = |end: SocketAddr| match end {
        SocketAddr::V4(v4) => mapped(v4.ip().octets()),
        SocketAddr::V6(v6) => v6.ip().octets(),
    };
    Connection {
        local: address(local),
        remote: address(remote),
        local_port: local.port().to_be_bytes(),
        remote_port: remote.port().to_be_bytes(),
    }
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn a_gate_of_links_grows_and_stays_closed() {
    grows(Gate::new(0).expect("a gate"));
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn a_gate_of_filters_grows_and_stays_closed() {
    grows(Gate::by_filters(0).expect("a gate"));
}

fn grows(mut gate: Gate) {
    const MANY: u16 = 20_000;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut client = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let (mut server, peer) = listener.accept().expect("accepted");
    server.set_read_timeout(Some(Duration::from_millis(300))).expect("a time");
    let held = between(server.local_addr().expect("an address"), peer);

    gate.lock(&[held]).expect("room for one");
    gate.lock(&others(MANY)).expect("room for more");
    let all = gate.connections().expect("what it holds");
    assert_eq!(all.len(), usize::from(MANY) + 1);

    let mut byte = [0];
    client.write_all(b"x").expect("written");
    let read = server.read(&mut byte).expect_err("nothing passes");
    assert!(matches!(read.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{read}");
    let all = gate.connections().expect("what it holds");
    let of_ours = all.iter().find(|(connection, _)| *connection == held).expect("ours");
    assert!(of_ours.1.from_peer + of_ours.1.to_peer > 0, "{of_ours:?}");

    gate.unlock().expect("open");
    assert!(gate.connections().expect("what it holds").is_empty());
    server.set_read_timeout(Some(Duration::from_secs(30))).expect("a time");
    server.read_exact(&mut byte).expect("what was held comes again");
    assert_eq!(byte, *b"x");

    gate.lock(&[held]).expect("locked again");
    assert!(gate.connections().expect("what it holds").iter().any(|(connection, _)| *connection == held));
    server.set_read_timeout(Some(Duration::from_millis(300))).expect("a time");
    client.write_all(b"y").expect("written");
    server.read(&mut byte).expect_err("nothing passes any more");
}
