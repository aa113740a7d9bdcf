//! What eBPF tells of where connections stand, against what the same sockets tell in repair mode. Needs root; `cargo xtask
//! test` runs it.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;

use criu_common::numbers::Numbers;
use criu_user::kernel::ebpf::numbers::Reader;
use criu_user::kernel::tcp;
use criu_user::object::tcp::{self as connection, State};

fn numbers(socket: &impl AsFd) -> Numbers {
    let inode = nix::sys::stat::fstat(socket).expect("fstat").st_ino;
    let all = Reader::new().expect("the program").read().expect("an answer");
    *all.get(&inode).expect("a socket of this process")
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn numbers_are_those_of_repair_mode() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut client = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let (server, _) = listener.accept().expect("accepted");
    client.write_all(b"waits").expect("written");
    while tcp::lengths(&server).expect("lengths").received < 5
        || tcp::lengths(&client).expect("lengths").unacknowledged > 0
    {
        std::thread::yield_now();
    }
    for (end, waiting) in [(&server, 5), (&client, 0)] {
        let told = numbers(end);
        let read = connection::read(end).expect("repair mode").stream;
        assert_eq!(told.state, State::Established as u8);
        assert_eq!(told.rcv_nxt.wrapping_sub(told.copied_seq), waiting);
        assert_eq!((told.snd_una, told.write_seq), (read.outq_seq, read.outq_seq));
        assert_eq!((told.rcv_nxt, u32::from(told.mss)), (read.inq_seq, read.mss_clamp));
        let windows = [told.snd_wl1, told.snd_wnd, told.max_window, told.rcv_wnd, told.rcv_wup];
        assert_eq!(windows.map(Some), [read.snd_wl1, read.snd_wnd, read.max_window, read.rcv_wnd, read.rcv_wup]);
        // Milliseconds, of which some may have gone by.
        let later = read.timestamp.expect("timestamps").wrapping_sub(told.ts_offset);
        assert!(u64::from(later).abs_diff((told.now / 1_000_000) & 0xffff_ffff) < 1000, "{told:?} {read:?}");
        assert_eq!(told.torn, 0);
    }
}
