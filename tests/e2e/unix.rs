//! Unix sockets.

use std::{
    io::{Read, Write},
    os::unix::net::UnixListener,
};

use e2e::{Engine, Program, Row, Survey, Workload, rows, workload_rows};

workload_rows! { "unix.py";
    stream_pair
    dgram_pair
    dgram_empty
    seqpacket_pair
    stream_data
    descriptors_in_flight
    named_server
    abstract_server
    relative_name
    name_unlinked
    connected
    peer_names
    backlog
    peer_credentials
    half_closed
    peer_gone
    options
    dgram_server
    unconnected
    blocked_in_accept
    shared_socket
}

/// Carried over by eBPF; by /proc refused, and still there.
fn unaccepted(row: &Row, case: &str) {
    let workload = Workload::new("unix.py", case);
    match row.dumper {
        Engine::Ours(Survey::Proc) => row.refused(&workload, "not accepted"),
        _ => row.check(&workload),
    }
}

rows! {
    /// What waits in a connection that nobody has accepted can be read by eBPF only.
    backlog_with_data => |row| unaccepted(row, "backlog_with_data");
    backlog_with_packets => |row| unaccepted(row, "backlog_with_packets");
    backlog_with_pages => |row| unaccepted(row, "backlog_with_pages");

    /// What cannot be carried over: refused, and it is still there.
    backlog_with_descriptors => |row| row.refused(&Workload::new("unix.py", "backlog_with_descriptors"), "not accepted");

    /// The other side belongs to somebody else: refused, and the connection goes on.
    peer_outside => |row| {
        let mut listener = None;
        let workload = Workload::new("unix.py", "peer_outside");
        let mut program = Program::start_with(&workload, "setsid", |command, dir| {
            listener = Some(UnixListener::bind(dir.join("outside")).expect("binding"));
            let out = std::fs::File::create(dir.join("out")).expect("creating the output file");
            command.stdin(std::process::Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
        });
        let (mut session, _) = listener.expect("bound").accept().expect("accepting");
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_refusal("ext-unix-sk");
        program.go();
        let mut said = [0; 11];
        session.read_exact(&mut said).expect("reading");
        assert_eq!(&said, b"still there");
        session.write_all(b"yes").expect("writing");
        program.wait_for_word("ok");
    };
}

mod interop {
    e2e::interop_rows! { "unix.py"; stream_pair dgram_pair stream_data named_server connected descriptors_in_flight }
}
