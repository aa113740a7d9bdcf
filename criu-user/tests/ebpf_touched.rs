//! What eBPF tells of connections, and of those that somebody changes, against what was done to them. Needs root; `cargo
//! xtask test` runs it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use criu_common::touched::MOST_TOLD;
use criu_user::kernel::ebpf::touched::{Lookout, Touched, Watchful};
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{Backlog, Shutdown, SockaddrIn, bind, listen, shutdown};
use nix::unistd::Pid;

fn inode(socket: &impl AsFd) -> u64 {
    nix::sys::stat::fstat(socket).expect("fstat").st_ino
}

fn these(sockets: &[u64]) -> Touched {
    Touched::These(sockets.iter().copied().collect())
}

fn watchful(inodes: &[u64]) -> Watchful {
    Lookout::new(inodes.len()).expect("the programs").begin(inodes).expect("looking after them")
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn connections_are_found_and_nothing_else() {
    let listener = TcpListener::bind("[::1]:0").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let client = TcpStream::connect(address).expect("a connection");
    let (accepted, _) = listener.accept().expect("accepted");
    let half = TcpStream::connect(address).expect("a connection");
    half.shutdown(std::net::Shutdown::Write).expect("shut");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    udp.connect("127.0.0.1:9").expect("connected");
    let _pair = std::os::unix::net::UnixStream::pair().expect("a pair");
    let found = Lookout::new(1).expect("the programs").connections(Pid::this()).expect("an answer");
    let found: BTreeSet<(u64, i32)> = found.iter().map(|it| (it.inode, it.fd as i32)).collect();
    let there = [&client, &accepted, &half].map(|stream| (inode(stream), stream.as_raw_fd()));
    // Other tests of this process have some of their own.
    for connection in there {
        assert!(found.contains(&connection), "{connection:?} is not among {found:?}");
    }
    let inodes: BTreeSet<u64> = found.iter().map(|(inode, _)| *inode).collect();
    for other in [inode(&listener), inode(&udp), inode(&_pair.0)] {
        assert!(!inodes.contains(&other), "{other} is no connection");
    }
}

/// More than are told of in one go.
#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn many_connections_are_found_each_once() {
    let many = MOST_TOLD as usize + 100;
    setrlimit(Resource::RLIMIT_NOFILE, 8192, 8192).expect("room for descriptors");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let pairs: Vec<_> = (0..many.div_ceil(2))
        .map(|_| (TcpStream::connect(address).expect("a connection"), listener.accept().expect("accepted").0))
        .collect();
    let lookout = Lookout::new(many).expect("the programs");
    for _ in 0..2 {
        let found: Vec<u64> =
            lookout.connections(Pid::this()).expect("an answer").iter().map(|found| found.inode).collect();
        let once: BTreeSet<u64> = found.iter().copied().collect();
        assert_eq!(found.len(), once.len(), "some were told of twice");
        let all = pairs.iter().flat_map(|(one, other)| [inode(one), inode(other)]);
        assert!(all.into_iter().all(|inode| once.contains(&inode)), "only {} were found", once.len());
    }
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn calls_that_change_a_socket_are_seen_and_others_are_not() {
    let sockets: Vec<UdpSocket> = (0..8).map(|_| UdpSocket::bind("127.0.0.1:0").expect("a socket")).collect();
    let inodes: Vec<u64> = sockets.iter().map(inode).collect();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let asked: Vec<u64> = inodes.iter().copied().chain([inode(&listener)]).collect();
    let watchful = watchful(&asked);
    let told = || watchful.touched().expect("an answer");

    // Reading, sending, accepting, asking, closing change nothing that was asked.
    let (mut accepted, _) = listener.accept().expect("accepted");
    stream.write_all(b"hello").expect("sent");
    accepted.read_exact(&mut [0; 5]).expect("received");
    drop(accepted);
    sockets[0].send_to(b"x", sockets[1].local_addr().expect("an address")).expect("sent");
    sockets[1].recv(&mut [0; 8]).expect("received");
    sockets[0].ttl().expect("an option");
    // One that nobody asked about.
    UdpSocket::bind("127.0.0.1:0").expect("a socket").set_ttl(3).expect("set");
    stream.set_nodelay(true).expect("set");
    // No socket at all.
    assert_eq!(shutdown(i32::MAX, Shutdown::Both), Err(Errno::EBADF));
    assert_eq!(told(), these(&[]));

    sockets[2].set_ttl(3).expect("set");
    assert_eq!(told(), these(&[inodes[2]]));
    // By another descriptor, by another thread.
    let other = sockets[3].try_clone().expect("dup");
    std::thread::spawn(move || other.set_broadcast(true)).join().expect("the thread").expect("set");
    sockets[4].connect("127.0.0.1:9").expect("connected");
    listen(&listener, Backlog::new(3).expect("a backlog")).expect("listening");
    // By another process, which has it from us, and has another number for it.
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", "import socket; socket.socket(fileno=0).shutdown(socket.SHUT_RD)"]);
    sockets[5].connect("127.0.0.1:9").expect("connected");
    let same = OwnedFd::from(sockets[5].try_clone().expect("dup"));
    assert!(python.stdin(Stdio::from(same)).status().expect("python").success());
    // In vain: it is bound already.
    assert!(bind(sockets[6].as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).is_err());
    let changed = [inodes[2], inodes[3], inodes[4], inode(&listener), inodes[5], inodes[6]];
    assert_eq!(told(), these(&changed));
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn one_that_is_gone_leaves_nothing_behind() {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for _ in 0..3 {
        let watchful = watchful(&[inode(&socket)]);
        socket.set_ttl(7).expect("set");
        assert!(watchful.touched().expect("an answer").has(inode(&socket)));
    }
    assert_eq!(watchful(&[inode(&socket)]).touched().expect("an answer"), these(&[]));
}
