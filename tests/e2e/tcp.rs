//! TCP connections: the program is moved, its peer outside of the tree goes on and must not notice.
//!
//! `E2E_CYCLES` says how often a stream is moved (5 times if it does not).

use std::{
    env,
    ffi::OsString,
    fs,
    io::{ErrorKind, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use e2e::{Options, Program, Row, Workload, engine::adopt, rows, workload_rows};

use crate::net::Network;

/// How often a stream is moved.
pub(crate) fn cycles() -> u32 {
    env::var("E2E_CYCLES").map_or(5, |text| text.parse().expect("E2E_CYCLES is a number"))
}

/// A program that listens, and a peer that has connected to it: both are ready for the second time.
pub(crate) struct Pair {
    pub(crate) program: Program,
    pub(crate) peer: Program,
}

impl Pair {
    /// The peer is in another network; each of both has an environment of its own.
    pub(crate) fn across(
        network: &Network,
        [file, case]: [&str; 2],
        family: &str,
        rounds: u32,
        [own, peers]: [&[(&str, &str)]; 2],
    ) -> Self {
        let workload = |case: &str, environment: &[(&str, &str)]| {
            let workload = Workload::new(file, case)
                .env("E2E_FAMILY", family)
                .env("E2E_ROUNDS", &rounds.to_string())
                .env("E2E_ADDRESS", &network.address(family));
            environment.iter().fold(workload, |workload, (name, value)| workload.env(name, value))
        };
        let mut program = workload(case, own).start();
        let peer = workload(&format!("{case}_peer"), peers).arg(number(&program, "port").to_string());
        let peer = network.inside(peer).start();
        program.next();
        Self { program, peer }
    }

    fn start(case: &str, family: &str, rounds: u32) -> Self {
        Self::of("tcp.py", case, &[("E2E_FAMILY", family), ("E2E_ROUNDS", &rounds.to_string())])
    }

    /// A case of a file and its peer, both with this environment.
    pub(crate) fn of(file: &str, case: &str, environment: &[(&str, &str)]) -> Self {
        let workload = |case: &str| {
            environment.iter().fold(Workload::new(file, case), |workload, (name, value)| workload.env(name, value))
        };
        let mut program = workload(case).start();
        let peer = workload(&format!("{case}_peer")).arg(number(&program, "port").to_string()).start();
        program.next();
        Self { program, peer }
    }

    /// Both end at about the same time, and are still there to be asked.
    pub(crate) fn end_both(&mut self) {
        self.program.go();
        self.peer.go();
        self.peer.wait_for_word("ok");
        self.program.wait_for_word("ok");
    }

    /// Both check what they have, and end: each may need the other for that.
    pub(crate) fn finish(mut self) {
        self.program.go();
        // First the program looks at the state that it is in, which the peer may change.
        sleep(Duration::from_millis(50));
        self.peer.go();
        self.peer.wait_for_word("ok");
        self.program.wait_for_word("ok");
    }

    /// What the program could write is what the peer has read.
    fn finish_and_compare(mut self) {
        let sent = number(&self.program, "port");
        let received = self.peer.file("received");
        self.program.go();
        sleep(Duration::from_millis(50));
        self.peer.go();
        self.peer.wait_for_word("ok");
        self.program.wait_for_word("ok");
        let received = fs::read_to_string(received).expect("what the peer has received");
        assert_eq!(received, sent.to_string(), "bytes that the peer has received");
    }
}

/// A number that a program has written into a file.
pub(crate) fn number(program: &Program, name: &str) -> u64 {
    let text = fs::read_to_string(program.file(name)).unwrap_or_else(|error| panic!("the file {name}: {error}"));
    text.parse().unwrap_or_else(|error| panic!("the file {name} says {text:?}: {error}"))
}

pub(crate) fn kept(row: &Row) -> Row {
    // CRIU reads nothing before the freeze.
    let dump: &[&str] =
        if row.dumper.is_peer() { &["--tcp-established"] } else { &["--tcp-established", "--verify-cache"] };
    also(row, dump, &["--tcp-established"])
}

/// The same with further words for the dump and for the restore.
pub(crate) fn also(row: &Row, dump: &[&str], restore: &[&str]) -> Row {
    let mut options = row.options.clone();
    options.dump.extend(dump.iter().map(OsString::from));
    options.restore.extend(restore.iter().map(OsString::from));
    row.with(options)
}

/// Dumps and restores, and sees to it that no gate is left.
pub(crate) fn move_once(row: &Row, program: &Program) {
    let images = row.dump(program);
    row.restore(program, &images);
    assert_eq!(gates_of(row, program, &images), [""; 0], "gates are left");
}

/// What `gate list` prints.
pub(crate) fn gates(row: &Row, images: &Path) -> String {
    row.restorer.call(&["gate".into(), "list".into()], images, "gate").expect_success().printed
}

/// Gates of this program's that are closed.
pub(crate) fn gates_of(row: &Row, program: &Program, images: &Path) -> Vec<String> {
    let own = format!("{}-", program.pid());
    let listed = gates(row, images);
    let names = listed.lines().filter(|line| line.starts_with(&own)).filter_map(|line| line.split(' ').next());
    names.map(str::to_owned).collect()
}

/// A script that is called at every moment of a dump or restore.
pub(crate) fn script(program: &Program, text: &str) -> PathBuf {
    let path = program.file("script");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("writing the script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    path
}

fn streams(row: &Row, family: &str) {
    let row = kept(row);
    let mut pair = Pair::start("stream", family, cycles());
    for _ in 0..cycles() {
        move_once(&row, &pair.program);
        pair.program.next();
    }
    pair.finish();
}

/// One state, whatever the family.
fn state(row: &Row, case: &str, family: &str) {
    let pair = Pair::start(case, family, 1);
    move_once(&kept(row), &pair.program);
    pair.finish();
}

fn unsent_end(row: &Row, case: &str, family: &str) {
    let pair = Pair::start(case, family, 1);
    move_once(&kept(row), &pair.program);
    pair.finish_and_compare();
}

/// Both ends close at the same time: the peer does when the program has something to say still.
fn closing(row: &Row, family: &str) {
    let mut pair = Pair::start("closing", family, 1);
    pair.peer.next();
    pair.program.next();
    move_once(&kept(row), &pair.program);
    pair.finish_and_compare();
}

/// A thousand at once.
fn many(row: &Row) {
    let mut pair = Pair::start("many", "v4", 1);
    pair.program.next();
    move_once(&kept(row), &pair.program);
    pair.finish();
}

/// An engine whose limit of open files is lower than what the tree has. The tree keeps its own.
fn many_with_few_files(row: &Row) {
    const SCRIPT: &str = "ulimit -Sn 64; exec \"$@\"";
    let row = kept(row);
    let mut pair = Pair::of("tcp.py", "many", &[("E2E_FAMILY", "v4"), ("E2E_CONNECTIONS", "200")]);
    pair.program.next();
    let limits = || fs::read_to_string(format!("/proc/{}/limits", pair.program.pid())).expect("the program's limits");
    let before = limits();
    let (images, tree) = (row.next_images(&pair.program), pair.program.tree());
    fs::create_dir_all(&images).expect("creating a directory");
    let words = row.dumper.dump_words(&pair.program, &images, &row.options);
    row.dumper.call_by(SCRIPT, &words, &images, "dump").expect_success();
    pair.program.expect_gone(&tree);
    let words = row.restorer.restore_words(&images, &row.options);
    adopt(&pair.program, &images, row.restorer.call_by(SCRIPT, &words, &images, "restore"));
    assert_eq!(limits(), before, "the restored program's limits");
    pair.finish();
}

fn syn_sent(row: &Row) {
    let mut peer = Workload::new("tcp.py", "full").start();
    let workload = Workload::new("tcp.py", "syn_sent");
    let port = number(&peer, "port");
    let mut program = Program::start_with(&workload, "setsid", |command, dir| {
        fs::write(dir.join("peer"), port.to_string()).expect("writing the peer's port");
        let out = fs::File::create(dir.join("out")).expect("creating the output file");
        command.stdin(std::process::Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
    });
    move_once(&kept(row), &program);
    peer.go();
    program.finish();
    peer.wait_for_word("ok");
}

/// Who asks for a connection while the program is away is not told that nobody listens, but asks again.
fn late_client(row: &Row) {
    let mut program = Workload::new("tcp.py", "late_client").start();
    let port = number(&program, "port") as u16;
    let images = also(row, &["--lock-listeners"], &[]).dump(&program);
    // Any address of 127/8 is its own.
    let client = std::thread::spawn(move || TcpStream::connect(("127.0.0.5", port)));
    sleep(Duration::from_millis(300));
    assert!(!client.is_finished(), "the client was answered: {:?}", client.join());
    let listed = gates(row, &images);
    assert!(listed.contains(&format!("new clients of 127.0.0.1:{port}  held")), "{listed}");
    row.restore(&program, &images);
    let mut stream = client.join().expect("the client").expect("a connection");
    stream.write_all(b"at last").expect("writing to the program");
    program.finish();
    let listed = gates(row, &images);
    assert!(!listed.contains(&format!(":{port} ")), "the gate is left: {listed}");
}

/// Whoever clears a gate has those told that nobody is there whom it held; the images are as good as before.
fn cleared(row: &Row) {
    let mut program = Workload::new("tcp.py", "late_client").start();
    let port = number(&program, "port") as u16;
    let images = also(row, &["--lock-listeners"], &[]).dump(&program);
    let client = std::thread::spawn(move || TcpStream::connect(("127.0.0.1", port)));
    sleep(Duration::from_millis(100));
    for gate in gates_of(row, &program, &images) {
        row.dumper.call(&["gate".into(), "clear".into(), gate.into()], &images, "gate").expect_success();
    }
    let refused = client.join().expect("the client").expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
    assert_eq!(gates_of(row, &program, &images), [""; 0], "the gate is left");
    row.restore(&program, &images);
    TcpStream::connect(("127.0.0.1", port)).expect("a connection").write_all(b"at last").expect("writing");
    program.finish();
}

/// A restore that fails leaves the gate closed, and the next one can work.
fn second_restore(row: &Row) {
    let row = kept(row);
    let pair = Pair::start("quiet", "v4", 1);
    let images = row.dump(&pair.program);
    let script = script(&pair.program, "[ $CRTOOLS_SCRIPT_ACTION != post-restore ]");
    let failing = also(&row, &[], &["--action-script", script.to_str().expect("a path")]);
    row.restorer.restore(&images, &failing.options).expect_refusal("gate");
    assert_eq!(gates_of(&row, &pair.program, &images).len(), 1, "the gate is open");
    row.restore(&pair.program, &images);
    assert_eq!(gates_of(&row, &pair.program, &images), [""; 0], "gates are left");
    pair.finish();
}

/// What `criu-ebpf tcp` says of a tree and of its images.
fn shown(row: &Row) {
    look_at_both(row, Pair::start("close_wait", "v4", 1), |said| {
        let parts = [r#""state":"CloseWait""#, r#""received":15"#, "\"timestamps\",\"sack\"", r#""refused":null"#];
        parts.iter().for_each(|part| assert!(said.contains(part), "no {part} in {said}"));
    });
}

/// Looks at what `criu-ebpf tcp` says of a program and of its images.
pub(crate) fn look_at_both(row: &Row, pair: Pair, look: impl Fn(&str)) {
    let row = kept(row);
    let images = row.next_images(&pair.program);
    fs::create_dir_all(&images).expect("creating a directory");
    let of = |of: OsString| {
        look(&row.dumper.call(&["tcp".into(), "--json".into(), of], &images, "tcp").expect_success().printed);
    };
    of(pair.program.pid().to_string().into());
    row.dumper.dump(&pair.program, &images, &row.options).expect_success();
    pair.program.expect_gone(&[pair.program.pid()].into());
    of(images.clone().into());
    row.restore(&pair.program, &images);
    pair.finish();
}

fn refused(row: &Row, case: &str, reason: &str) {
    let pair = Pair::start(case, "v4", 1);
    let images = row.next_images(&pair.program);
    row.dumper.dump(&pair.program, &images, &kept(row).options).expect_refusal(reason);
    pair.finish();
}

workload_rows! { "tcp.py", ["--tcp-established"];
    pair
    pair_half_closed
    never_connected
}

rows! {
    stream_v4 => |row| streams(row, "v4");
    stream_v6 => |row| streams(row, "v6");
    stream_mapped => |row| streams(row, "mapped");

    idle_v4 => |row| state(row, "idle", "v4");
    idle_v6 => |row| state(row, "idle", "v6");
    idle_mapped => |row| state(row, "idle", "mapped");
    stuffed_v4 => |row| state(row, "stuffed", "v4");
    stuffed_v6 => |row| state(row, "stuffed", "v6");

    close_wait_v4 => |row| state(row, "close_wait", "v4");
    close_wait_v6 => |row| state(row, "close_wait", "v6");
    close_wait_mapped => |row| state(row, "close_wait", "mapped");
    fin_wait2_v4 => |row| state(row, "fin_wait2", "v4");
    fin_wait2_v6 => |row| state(row, "fin_wait2", "v6");
    fin_wait2_mapped => |row| state(row, "fin_wait2", "mapped");
    fin_wait1_v4 => |row| unsent_end(row, "fin_wait1", "v4");
    fin_wait1_v6 => |row| unsent_end(row, "fin_wait1", "v6");
    last_ack_v4 => |row| unsent_end(row, "last_ack", "v4");
    last_ack_v6 => |row| unsent_end(row, "last_ack", "v6");
    closing_v4 => |row| closing(row, "v4");
    closing_v6 => |row| closing(row, "v6");
    closed_v4 => |row| state(row, "closed", "v4");
    closed_v6 => |row| state(row, "closed", "v6");
    closed_mapped => |row| state(row, "closed", "mapped");
    reset_v4 => |row| state(row, "reset", "v4");
    reset_v6 => |row| state(row, "reset", "v6");
    many_connections => many;
    many_connections_and_few_files => many_with_few_files;
    many_that_have_ended => |row| state(row, "many_ended", "v4");
    request_sent => syn_sent;
    client_asks_later => late_client;
    gate_is_cleared => cleared;
    restore_that_fails => second_restore;

    table => shown;
    urgent_data => |row| refused(row, "urgent", "urgent");
    signed_packets => |row| kept(row).refused(&Workload::new("tcp.py", "signed"), "MD5");
}

/// The peer is in a network namespace of its own, at the other end of a cable: its address is none of ours.
mod remote {
    use super::*;
    use crate::net::Network;

    fn pair(network: &Network, case: &str, family: &str, rounds: u32) -> Pair {
        Pair::across(network, ["tcp.py", case], family, rounds, [&[], &[]])
    }

    fn moved(number: u8, case: &str, family: &str) {
        let network = Network::new(number);
        let row = kept(&Row::ours(e2e::Survey::Proc));
        let mut pair = pair(&network, case, family, cycles());
        for _ in 0..cycles() {
            move_once(&row, &pair.program);
            pair.program.next();
        }
        pair.finish();
    }

    #[test]
    fn mptcp_client_v4() {
        moved(8, "mptcp_client", "v4");
    }

    #[test]
    fn mptcp_client_v6() {
        moved(9, "mptcp_client", "v6");
    }

    /// The gate stands at an interface as well that comes up while the engine is at work.
    #[test]
    fn interface_during_the_dump() {
        let network = Network::new(7);
        let pair = pair(&network, "quiet", "v4", 1);
        let name = format!("e{}-7x", std::process::id());
        let text = format!(
            "[ $CRTOOLS_SCRIPT_ACTION = post-dump ] || exit 0\nip link add {name} type veth peer name {name}p && ip link set {name} up"
        );
        let script = script(&pair.program, &text);
        let words = vec!["--tcp-established".into(), "--action-script".into(), script.into_os_string()];
        let row = kept(&Row::ours(e2e::Survey::Proc));
        let images = row.with(Options { dump: words, ..Options::default() }).dump(&pair.program);
        let index = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).expect("the new interface");
        let own = format!("{}-", pair.program.pid());
        let gates = fs::read_dir("/sys/fs/bpf/criu-ebpf").expect("the gates").flatten();
        let gate = gates
            .map(|gate| gate.path())
            .find(|gate| gate.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&own)));
        let pinned = gate.expect("the gate").join(format!("{}-in", index.trim())).exists();
        network.remove(&name);
        assert!(pinned, "the gate does not stand at {name}");
        row.restore(&pair.program, &images);
        pair.finish();
    }

    /// An interface that goes and comes back while nobody looks has no gate: the peer may have been told anything.
    #[test]
    fn interface_that_came_late() {
        let network = Network::new(6);
        let row = kept(&Row::ours(e2e::Survey::Proc));
        let pair = pair(&network, "quiet", "v4", 1);
        let images = row.dump(&pair.program);
        network.replace_cable();
        row.restorer.restore(&images, &row.options).expect_refusal("came up after the dump");
        let words = ["--tcp-established", "--network-lock", "skip"].map(Into::into).to_vec();
        let skipping = row.with(Options { restore: words, ..Options::default() });
        skipping.restore(&pair.program, &images);
        pair.finish();
    }

    fn states(number: u8, family: &str) {
        let network = Network::new(number);
        for case in ["close_wait", "fin_wait2", "closed", "reset", "stuffed"] {
            let pair = pair(&network, case, family, 1);
            move_once(&kept(&Row::ours(e2e::Survey::Proc)), &pair.program);
            pair.finish();
        }
    }

    #[test]
    fn stream_v4() {
        moved(1, "stream", "v4");
    }

    #[test]
    fn stream_v6() {
        moved(2, "stream", "v6");
    }

    #[test]
    fn stream_mapped() {
        moved(3, "stream", "mapped");
    }

    #[test]
    fn states_v4() {
        states(4, "v4");
    }

    #[test]
    fn states_v6() {
        states(5, "v6");
    }
}

mod clsact;
mod killed;
mod locks;
mod nftables;
mod tls;

/// Images are exchanged with CRIU. Its own lock needs netfilter rules that only it takes away again, so neither engine
/// locks anything, and the peers are silent meanwhile.
mod interop {
    use e2e::{Engine, Survey, interop_rows};

    use super::*;

    fn exchange(case: &str, family: &str, dumper: Engine, restorer: Engine) {
        let row = Row::between(dumper, restorer).with(Options::both(&["--tcp-established", "--network-lock", "skip"]));
        let pair = Pair::start(case, family, 1);
        let images = row.dump(&pair.program);
        row.restore(&pair.program, &images);
        pair.finish();
    }

    interop_rows! { "tcp.py", ["--tcp-established", "--network-lock", "skip"];
        pair
        pair_half_closed
    }

    macro_rules! exchanged {
        ($($name:ident, $case:literal, $family:literal;)*) => {$(
            mod $name {
                use super::*;

                #[test]
                fn ours_to_criu() {
                    exchange($case, $family, Engine::Ours(Survey::Ebpf), Engine::Peer);
                }

                #[test]
                fn criu_to_ours() {
                    exchange($case, $family, Engine::Peer, Engine::Ours(Survey::Ebpf));
                }
            }
        )*};
    }

    exchanged! {
        established_v4, "quiet", "v4";
        established_v6, "quiet", "v6";
        established_mapped, "quiet", "mapped";
        close_wait_v4, "close_wait", "v4";
        close_wait_v6, "close_wait", "v6";
        fin_wait2_v4, "fin_wait2", "v4";
        fin_wait2_v6, "fin_wait2", "v6";
    }
}
