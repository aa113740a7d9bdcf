//! What eBPF tells of TCP clients that nobody has accepted, against what they have done. Needs root; `cargo xtask test`
//! runs it.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use criu_user::kernel::ebpf::pending::{Reader, Waiting, Which};

fn inode(listener: &TcpListener) -> u64 {
    nix::sys::stat::fstat(listener).unwrap_or_else(|e| panic!("fstat of {}: {e}", listener.as_raw_fd())).st_ino
}

/// Sends until nothing more goes out; what was sent.
fn stuff(stream: &mut TcpStream) -> Vec<u8> {
    stream.set_nonblocking(true).expect("non-blocking");
    let mut sent = Vec::new();
    for n in 0u32.. {
        let block: Vec<u8> = (0..2500u32).flat_map(|word| (n * 10_000 + word).to_le_bytes()).collect();
        match stream.write(&block) {
            Ok(written) => sent.extend_from_slice(&block[..written]),
            Err(_) => break,
        }
    }
    sent
}

fn port_of(waiting: &Waiting) -> u16 {
    u16::from_be_bytes(waiting.client.ports[1])
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn clients_are_told_in_order_with_all_that_they_have_sent() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address.parse::<SocketAddr>().expect("an address")).expect("a listener");
        let to = listener.local_addr().expect("an address");
        let other = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let _not_asked_about = TcpStream::connect(other.local_addr().expect("an address")).expect("a connection");
        let mut clients: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(to).expect("a connection")).collect();
        clients[1].write_all(b"hello").expect("sent");
        clients[1].shutdown(Shutdown::Write).expect("shut");
        let stuffed = stuff(&mut clients[2]);
        for word in [b"a", b"b", b"c"] {
            clients[3].write_all(word).expect("sent");
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        let _another_descriptor = listener.try_clone().expect("dup");
        let mut reader = Reader::new(&[inode(&listener)], 1, Which::All).expect("a reader");
        let found = reader.read().expect("read");
        let ports: Vec<u16> = clients.iter().map(|c| c.local_addr().expect("an address").port()).collect();
        assert_eq!(found.iter().map(port_of).collect::<Vec<_>>(), ports);
        assert_eq!(found.iter().map(Waiting::is_whole).collect::<Vec<_>>(), [true; 4], "{:?}", found[2].client);
        assert_eq!(found.iter().map(Waiting::has_ended).collect::<Vec<_>>(), [false, true, false, false]);
        assert_eq!(
            (found[0].data.len(), found[1].data.as_slice(), found[3].data.as_slice()),
            (0, &b"hello"[..], &b"abc"[..])
        );
        let received = &found[2].data;
        assert!(received.len() > 60_000, "only {} bytes wait", received.len());
        assert!(stuffed.starts_with(received), "{} bytes of {} are not those", received.len(), stuffed.len());
        let again = reader.read().expect("read again");
        let data = |found: &[Waiting]| found.iter().map(|w| w.data.clone()).collect::<Vec<_>>();
        assert!(data(&again) == data(&found), "looking has changed something");
    }
}
