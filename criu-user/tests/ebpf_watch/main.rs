//! The watching programs, each question by itself, on programs that do what it asks about.
//!
//! Needs root and an engine with the eBPF programs inside: `cargo xtask test` runs it.

mod cost;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use criu_user::kernel::ebpf::watch::{Connection, Event, Generations, Kind, Questions, Watch, What};
use nix::unistd::Pid;

/// A Python that does what it is told, a line at a time.
struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

const LISTEN: &str = "
import ctypes, fcntl, mmap, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
print('ready', flush=True)
for line in sys.stdin:
    exec(line)
    print('done', flush=True)
";

impl Program {
    /// Debian's Python: a version manager's brings wrapper processes with it.
    fn new() -> Self {
        let mut python = Command::new("/usr/bin/python3");
        let mut child =
            python.args(["-c", LISTEN]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start python3");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut program = Self { child, input, output };
        program.hear("ready\n");
        program
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn hear(&mut self, wanted: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("read its line");
        assert_eq!(line, wanted);
    }

    /// One line of Python. When this is back, it is done.
    fn run(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("write to it");
        self.hear("done\n");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().expect("kill the program");
        self.child.wait().expect("reap the program");
    }
}

fn wait_for(watch: &mut Watch, what: &str, mut wanted: impl FnMut(&Event) -> bool) -> Event {
    let begin = Instant::now();
    let mut seen = Vec::new();
    while begin.elapsed() < Duration::from_secs(10) {
        while let Some(event) = watch.try_next() {
            if wanted(&event) {
                return event;
            }
            seen.push(event);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no {what}, only {seen:#?}");
}

fn pids(watch: &Watch) -> Vec<Pid> {
    watch.tracked().expect("the set").iter().map(|process| process.pid).collect()
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn lifecycle_follows_children_from_their_first_instruction() {
    let mut program = Program::new();
    let mut other = Program::new();
    let mut watch = Watch::start(Questions::LIFECYCLE).expect("load lifecycle alone");
    watch.follow(program.pid()).expect("follow");
    assert_eq!(pids(&watch), [program.pid()]);
    other.run("subprocess.run(['true'])");
    program.run("child = subprocess.Popen(['/bin/sh', '-c', 'sleep 1000 & exec sleep 1001'])");
    let shell = match wait_for(&mut watch, "fork", |e| matches!(e.what, What::Fork { .. })) {
        Event { pid, tid, what: What::Fork { child }, .. } => {
            assert_eq!((pid, tid), (program.pid(), program.pid()));
            child
        }
        _ => unreachable!("asked for"),
    };
    wait_for(&mut watch, "exec of sh", |e| e.pid == shell && e.what == What::Exec { name: "sh".into() });
    wait_for(&mut watch, "exec of sleep", |e| e.pid == shell && e.what == What::Exec { name: "sleep".into() });
    let tracked = watch.tracked().expect("the set");
    assert_eq!(tracked.len(), 3, "{tracked:?}");
    let grandchild = tracked.iter().find(|p| p.parent == Some(shell)).expect("the background sleep").pid;
    nix::sys::signal::kill(grandchild, nix::sys::signal::Signal::SIGTERM).expect("kill it");
    wait_for(&mut watch, "exit", |e| e.pid == grandchild && e.what == What::Exit { code: 15 });
    program.run("child.kill(); child.wait()");
    wait_for(&mut watch, "exit", |e| e.pid == shell && e.what == What::Exit { code: 9 });
    program.run("t = threading.Thread(target=lambda: None); t.start(); t.join()");
    let tid = match wait_for(&mut watch, "thread", |e| matches!(e.what, What::Thread { .. })).what {
        What::Thread { tid } => tid,
        _ => unreachable!("asked for"),
    };
    wait_for(&mut watch, "its end", |e| e.tid == tid && e.what == What::ThreadExit { code: 0 });
    program.run("subprocess.run(['/bin/sh', '-c', 'exit 3'])");
    wait_for(&mut watch, "exit", |e| e.what == What::Exit { code: 3 << 8 });
    assert_eq!(pids(&watch), [program.pid()]);
    watch.forget(program.pid()).expect("forget");
    assert_eq!(pids(&watch), []);
    assert_eq!(watch.lost().expect("losses"), Default::default());
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn a_tree_is_followed_whole_though_it_forks_all_the_time() {
    let mut program = Program::new();
    // Each forks another every few milliseconds and lives on for a while.
    program.run("code = 'import os,time\\nfor _ in range(40):\\n  if os.fork()==0:\\n    time.sleep(2); os._exit(0)\\n  time.sleep(0.002)\\ntime.sleep(2)'");
    program
        .run("trees = [subprocess.Popen(['/usr/bin/python3', '-c', code], start_new_session=True) for _ in range(3)]");
    std::thread::sleep(Duration::from_millis(100));
    let mut watch = Watch::start(Questions::LIFECYCLE).expect("load");
    watch.follow_tree(program.pid()).expect("follow");
    std::thread::sleep(Duration::from_millis(700));
    let set = pids(&watch);
    let listed = descendants(program.pid());
    assert!(listed.len() > 100, "{} processes", listed.len());
    for pid in &listed {
        assert!(set.contains(pid), "{pid} is not in the set of {}", set.len());
    }
    program.run("[tree.wait() for tree in trees]");
}

fn descendants(root: Pid) -> Vec<Pid> {
    let mut all = vec![root];
    let mut next = 0;
    while let Some(parent) = all.get(next).copied() {
        next += 1;
        let text = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
        all.extend(text.split_whitespace().map(|word| Pid::from_raw(word.parse().expect("a pid"))));
    }
    // Zombies are not followed any more.
    all.retain(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok());
    all
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn memory_counts_write_faults_by_block() {
    let mut program = Program::new();
    let mut other = Program::new();
    let mut watch = Watch::start(Questions::MEMORY).expect("load memory alone");
    watch.follow(program.pid()).expect("follow");
    let write = "m = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m.madvise(mmap.MADV_NOHUGEPAGE)";
    for program in [&mut program, &mut other] {
        program.run(write);
        program.run("for at in range(0, 16 << 20, 4096): m[at] = 1");
    }
    let blocks = watch.faults(program.pid()).expect("faults");
    let missing: u64 = blocks.iter().map(|block| block.missing).sum();
    assert!((4096..4400).contains(&missing), "{missing} faults on missing pages");
    assert!(blocks.iter().filter(|block| block.missing == 512).count() >= 7, "{blocks:?}");
    assert!(blocks.iter().all(|block| block.last > Duration::ZERO));
    assert_eq!(watch.faults(other.pid()).expect("faults"), []);
    let firsts = std::iter::from_fn(|| watch.try_next()).filter(|e| matches!(e.what, What::FirstWrite { .. })).count();
    assert!((8..blocks.len() + 1).contains(&firsts), "{firsts} first writes of {} blocks", blocks.len());
    // Read without being written: a page of zeros is there, which the next write replaces.
    program.run("sum(m[at] for at in range(32 << 20, 34 << 20, 4096))");
    program.run("for at in range(32 << 20, 34 << 20, 4096): m[at] = 1");
    let (pid, totals) = watch.fault_totals().expect("totals")[0];
    assert_eq!(pid, program.pid());
    assert!((512..800).contains(&totals.protected), "{totals:?}");
    assert_eq!(watch.lost().expect("losses"), Default::default());
}

fn generations(watch: &mut Watch, program: &Program) -> Generations {
    watch.generations(program.pid()).expect("the map").expect("followed")
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn syscalls_move_the_kinds_that_they_touch_and_no_others() {
    let mut program = Program::new();
    let mut watch = Watch::start(Questions::SYSCALLS | Questions::LIFECYCLE).expect("load");
    watch.follow(program.pid()).expect("follow");
    // Until nothing moves that Python does by itself.
    for _ in 0..3 {
        program.run("time.sleep(0.001)");
    }
    let cases: &[(&str, &[Kind])] = &[
        ("fd = os.dup(0)", &[Kind::Descriptors]),
        ("os.close(fd)", &[Kind::Descriptors]),
        ("os.umask(0o22)", &[Kind::Directories]),
        ("os.chdir('/tmp')", &[Kind::Directories]),
        ("signal.signal(signal.SIGUSR1, signal.SIG_IGN)", &[Kind::Actions]),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])", &[Kind::Masks]),
        ("signal.setitimer(signal.ITIMER_REAL, 1000)", &[Kind::Timers]),
        ("resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", &[Kind::Limits]),
        ("os.sched_setaffinity(0, os.sched_getaffinity(0))", &[Kind::Scheduling]),
        ("libc.prctl(38, 1, 0, 0, 0)", &[Kind::Credentials]),
        ("libc.prctl(15, b'name', 0, 0, 0)", &[Kind::Settings]),
        ("fcntl.fcntl(0, fcntl.F_GETFL)", &[]),
        ("a, b = os.openpty()", &[Kind::Descriptors, Kind::Sessions]),
        ("assert fcntl.ioctl(a, 0x5441, os.O_RDWR | os.O_NOCTTY) > 0", &[Kind::Descriptors]),
        // landlock_create_ruleset(2), and clone(2) with CLONE_PIDFD and SIGCHLD.
        ("libc.syscall(444, (ctypes.c_uint64 * 1)(1), 8, 0)", &[Kind::Descriptors]),
        (
            "p = ctypes.c_int(); n = libc.syscall(56, 0x1011, 0, ctypes.byref(p), 0, 0); n or os._exit(0)",
            &[Kind::Descriptors, Kind::Children],
        ),
        ("os.waitpid(n, 0)", &[Kind::Children]),
        ("fcntl.fcntl(0, fcntl.F_SETFD, 0)", &[Kind::Descriptors]),
        ("os.getppid(); os.read(os.open('/dev/null', 0), 1)", &[Kind::Descriptors]),
        ("a, b = socket.socketpair(); a.setsockopt(1, 2, 1)", &[Kind::Descriptors, Kind::Sockets]),
    ];
    for (line, kinds) in cases {
        let before = generations(&mut watch, &program);
        program.run(line);
        let after = generations(&mut watch, &program);
        for kind in Kind::ALL {
            // Python's own: its allocator maps and unmaps as it likes.
            if kind != Kind::Memory {
                assert_eq!(after.is_unchanged_since(&before, kind), !kinds.contains(&kind), "{line}: {kind:?}");
            }
        }
    }
    let before = generations(&mut watch, &program);
    program.run("m = mmap.mmap(-1, 4096)");
    assert!(!generations(&mut watch, &program).is_unchanged_since(&before, Kind::Memory));
    // A child of vfork has its parent's memory until it executes something.
    let before = generations(&mut watch, &program);
    program.run("subprocess.run(['true'])");
    assert!(!generations(&mut watch, &program).is_unchanged_since(&before, Kind::Actions), "after vfork");
    // Whoever has the same descriptors changes them by calls of his own.
    let before = generations(&mut watch, &program);
    program.run("n = libc.syscall(56, 0x400 | 17, 0, 0, 0, 0); n or os._exit(0)");
    program.run("os.waitpid(n, 0)");
    assert!(generations(&mut watch, &program).is_unchanged_since(&before, Kind::Actions));
    let before = generations(&mut watch, &program);
    assert!(!before.is_unchanged_since(&before, Kind::Descriptors), "its descriptors were shared");
    // Nobody looked for a while: nothing is known.
    let before = generations(&mut watch, &program);
    watch.ask(Questions::LIFECYCLE).expect("stop looking");
    assert_eq!(watch.generations(program.pid()).expect("the map"), None);
    watch.ask(Questions::SYSCALLS | Questions::LIFECYCLE).expect("look again");
    assert!(!generations(&mut watch, &program).is_unchanged_since(&before, Kind::Actions), "over a gap");
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn calls_that_make_a_dump_impossible_are_reported() {
    let mut program = Program::new();
    let mut watch = Watch::start(Questions::SYSCALLS).expect("load syscalls alone");
    watch.follow(program.pid()).expect("follow");
    let cases: &[(&str, &str, bool)] = &[
        ("ring = ctypes.create_string_buffer(120); libc.syscall(425, 4, ring)", "io_uring_setup", true),
        ("libc.syscall(425, 0, 0)", "io_uring_setup", false),
        ("u = libc.syscall(323, 1)", "userfaultfd", true),
        ("s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)", "socket", true),
        ("s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "socket", true),
        ("s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)", "socket", false),
        ("s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)", "socket", false),
        ("s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)", "socket", false),
        ("p = os.pidfd_open(os.getpid())", "pidfd_open", true),
        ("libc.unshare(0x04000000)", "unshare", true),
        ("q = libc.syscall(240, f'e2e-{os.getpid()}'.encode(), 0o102, 0o600, 0)", "mq_open", true),
        ("libc.syscall(241, f'e2e-{os.getpid()}'.encode())", "mq_unlink", false),
        ("f = os.memfd_create('x')", "memfd_create", false),
    ];
    for (line, name, reported) in cases {
        program.run(line);
        let calls: Vec<_> = std::iter::from_fn(|| watch.try_next())
            .filter_map(|event| match event.what {
                What::Call(call) => Some((event.pid, event.tid, call)),
                _ => None,
            })
            .collect();
        let names: Vec<_> = calls.iter().map(|(_, _, call)| criu_user::kernel::syscall_name(call.number)).collect();
        assert_eq!(names, if *reported { vec![*name] } else { vec![] }, "{line}");
        for (pid, tid, call) in calls {
            assert_eq!((pid, tid), (program.pid(), program.pid()));
            assert!(call.result >= 0 && !call.stack.is_empty(), "{line}: {call:?}");
            if line.contains("AF_PACKET") {
                assert_eq!(call.arguments[..2], [17, 3 | 0o2000000], "{call:?}");
            }
        }
    }
}

/// A connection of the program with a server of the test, and both their ends.
const CONNECT: &str =
    "l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); s, _ = l.accept()";

fn cookie(program: &mut Program, socket: &str) -> u64 {
    const SO_COOKIE: u32 = 57;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().display();
    program.run(&format!(
        "open('{path}', 'w').write(str(int.from_bytes({socket}.getsockopt(1, {SO_COOKIE}, 8), sys.byteorder)))"
    ));
    std::fs::read_to_string(file.path()).expect("read it").parse().expect("a number")
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn sockets_are_followed_through_their_states_and_queues() {
    const ESTABLISHED: u32 = 1;
    const FIN_WAIT1: u32 = 4;
    const CLOSE_WAIT: u32 = 8;
    const LISTEN: u32 = 10;
    let mut program = Program::new();
    let mut other = Program::new();
    let mut watch = Watch::start(Questions::SOCKETS).expect("load sockets alone");
    assert_eq!(watch.missing(), [""; 0]);
    watch.follow(program.pid()).expect("follow");
    other.run(CONNECT);
    program.run(CONNECT);
    let states: Vec<_> = std::iter::from_fn(|| watch.try_next())
        .filter_map(|event| match event.what {
            What::Socket { cookie, from, to } => Some((event.pid, cookie, from, to)),
            _ => None,
        })
        .collect();
    let (listener, client, server) = (cookie(&mut program, "l"), cookie(&mut program, "c"), cookie(&mut program, "s"));
    let pid = program.pid();
    let expected = [(pid, listener, 7, LISTEN), (pid, client, 7, 2), (pid, client, 2, 1), (pid, server, 3, 1)];
    assert!(states.len() == 4 && expected.iter().all(|state| states.contains(state)), "{states:?}");
    program.run("c.send(b'x' * 1000); time.sleep(0.01); s.recv(300)");
    let find = |all: &[Connection], cookie| *all.iter().find(|c| c.cookie == Some(cookie)).expect("a connection");
    let all = watch.connections().expect("the sockets");
    assert_eq!(all.len(), 3, "{all:?}");
    let (listener_now, client_now, server_now) = (find(&all, listener), find(&all, client), find(&all, server));
    assert_eq!((listener_now.state, listener_now.unread), (LISTEN, 0));
    assert_eq!((client_now.state, client_now.pid), (ESTABLISHED, pid));
    assert_eq!((client_now.remote, server_now.remote), (listener_now.local, client_now.local));
    assert_eq!((client_now.sent, client_now.received, client_now.unacknowledged), (1000, 0, 0));
    assert_eq!((server_now.sent, server_now.received, server_now.unread), (0, 1000, 700));
    // Nobody accepts it.
    program.run("d = socket.create_connection(l.getsockname()); time.sleep(0.01)");
    assert_eq!(find(&watch.connections().expect("the sockets"), listener).unread, 1);
    program.run("s.recv(5000); c.close()");
    wait_for(&mut watch, "state", |e| e.what == What::Socket { cookie: client, from: ESTABLISHED, to: FIN_WAIT1 });
    program.run("s.close(); l.close(); d.close()");
    assert_eq!(watch.connections().expect("the sockets"), []);
    // Those that were there before are known as soon as somebody looks.
    watch.follow(other.pid()).expect("follow");
    let all = watch.connections().expect("the sockets");
    assert_eq!(all.len(), 3, "{all:?}");
    let old = cookie(&mut other, "s");
    while watch.try_next().is_some() {}
    other.run("c.shutdown(socket.SHUT_WR); time.sleep(0.01)");
    let wanted = What::Socket { cookie: old, from: ESTABLISHED, to: CLOSE_WAIT };
    assert_eq!(wait_for(&mut watch, "state", |e| e.what == wanted).pid, other.pid());
    other.run("e = socket.create_connection(l.getsockname()); f, _ = l.accept()");
    let accepted = cookie(&mut other, "f");
    let wanted = What::Socket { cookie: accepted, from: 3, to: ESTABLISHED };
    assert_eq!(wait_for(&mut watch, "state", |e| e.what == wanted).pid, other.pid());
    assert_eq!(watch.lost().expect("losses"), Default::default());
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn the_memory_map_has_a_witness_that_sees_all_writers() {
    let mut program = Program::new();
    let mut watch = Watch::start(Questions::empty()).expect("load the iterator alone");
    let Some(first) = watch.map_sequence(program.pid()).expect("ask") else {
        eprintln!("this kernel keeps no such number");
        return;
    };
    assert_eq!(watch.map_sequence(program.pid()).expect("ask"), Some(first), "nobody did anything");
    program.run("m = mmap.mmap(-1, 1 << 20)");
    let second = watch.map_sequence(program.pid()).expect("ask").expect("a number");
    assert!(second != first && second.is_multiple_of(2), "{first} {second}");
    assert_eq!(watch.map_sequence(Pid::from_raw(0x3f_fff0)).expect("ask"), None);
}

/// A control group of the test's own, in the hierarchy of version 2.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn new() -> Self {
        let text = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let mount = text.lines().find(|line| line.contains(" - cgroup2 ")).expect("a mount of version 2");
        let mount = mount.split(' ').nth(4).expect("where it is");
        let dir = std::path::Path::new(mount).join(format!("criu-ebpf-watch-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("below")).expect("make a group");
        Self(dir)
    }

    fn enter(&self, below: &str, pid: Pid) {
        std::fs::write(self.0.join(below).join("cgroup.procs"), pid.to_string()).expect("move a process");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for dir in [self.0.join("below"), self.0.clone()] {
            // A program that was in it may not be gone entirely.
            let left = (0..500).find(|_| {
                std::thread::sleep(Duration::from_millis(2));
                std::fs::remove_dir(&dir).is_ok()
            });
            assert!(left.is_some() || std::thread::panicking(), "cannot remove {}", dir.display());
        }
    }
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn a_control_group_is_followed_with_those_who_come_and_go() {
    let group = Cgroup::new();
    let mut inside = Program::new();
    let outside = Program::new();
    inside.run("child = subprocess.Popen(['sleep', '1000'])");
    group.enter("", inside.pid());
    let mut watch = Watch::start(Questions::LIFECYCLE).expect("load");
    assert_eq!(watch.follow_cgroup(&group.0).expect("follow"), [inside.pid()]);
    assert_eq!(pids(&watch), [inside.pid()], "the child was not moved");
    group.enter("below", outside.pid());
    let moved = |is_in| move |e: &Event| e.what == What::Moved { is_in };
    assert_eq!(wait_for(&mut watch, "move", moved(true)).pid, outside.pid());
    inside.run("second = subprocess.Popen(['sleep', '1000'])");
    assert_eq!(pids(&watch).len(), 3);
    // Up to the root of the hierarchy.
    std::fs::write(group.0.parent().expect("the mount").join("cgroup.procs"), outside.pid().to_string()).expect("move");
    assert_eq!(wait_for(&mut watch, "move", moved(false)).pid, outside.pid());
    assert_eq!(pids(&watch).len(), 2);
    inside.run("[(p.kill(), p.wait()) for p in (child, second)]");
    assert_eq!(pids(&watch), [inside.pid()]);
    drop((inside, outside));
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn what_does_not_fit_is_counted_and_the_set_stays_right() {
    let mut program = Program::new();
    let mut watch = Watch::start(Questions::LIFECYCLE).expect("load");
    watch.follow(program.pid()).expect("follow");
    // Two records each, of which nobody reads any.
    program.run("for _ in range(9000): t = threading.Thread(target=int); t.start(); t.join()");
    program.run("child = subprocess.Popen(['sleep', '1000'])");
    let lost = watch.lost().expect("losses");
    assert!(lost.lifecycle > 1000 && lost.processes == 0, "{lost:?}");
    assert_eq!(pids(&watch).len(), 2);
    let read = std::iter::from_fn(|| watch.try_next()).count() as u64;
    assert!((18_000..18_100).contains(&(read + lost.lifecycle)), "{read} read, {lost:?}");
    program.run("child.kill(); child.wait()");
    wait_for(&mut watch, "exit", |e| e.what == What::Exit { code: 9 });
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn events_wake_who_waits_for_them() {
    let mut program = Program::new();
    let mut watch = Watch::start(Questions::LIFECYCLE | Questions::MEMORY).expect("load");
    watch.follow(program.pid()).expect("follow");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        for round in 0..50 {
            writeln!(program.input, "subprocess.run(['/bin/sh', '-c', 'exit {round}'])").expect("write to it");
            let exit = async {
                loop {
                    let event = watch.next().await.expect("an event");
                    if event.what == (What::Exit { code: round << 8 }) {
                        return event;
                    }
                }
            };
            let event = tokio::time::timeout(Duration::from_secs(10), exit).await.expect("woken");
            assert_ne!(event.pid, program.pid());
            program.hear("done\n");
        }
        // Nothing happens, and the one who waits gives up.
        while watch.try_next().is_some() {}
        let nothing = tokio::time::timeout(Duration::from_millis(50), watch.next()).await;
        assert!(nothing.is_err(), "{nothing:?}");
    });
}

/// Numbers of all programs, links and maps of the watch in the kernel.
fn in_kernel() -> std::collections::BTreeSet<(&'static str, u32)> {
    let programs = aya::programs::loaded_programs().flatten().filter(|program| program.name().starts_with(b"watch_"));
    let programs: Vec<u32> = programs.map(|program| program.id()).collect();
    let links = aya::programs::loaded_links().flatten().filter(|link| programs.contains(&link.program_id()));
    let links: Vec<u32> = links.map(|link| link.id()).collect();
    let names: [&[u8]; 5] = [b"PROCESSES", b"RECORDS", b"FAULTS", b"OWNERS", b"LISTENERS"];
    let maps = aya::maps::loaded_maps().flatten().filter(|map| names.contains(&map.name()));
    let maps: Vec<u32> = maps.map(|map| map.id()).collect();
    let all = [("program", programs), ("link", links), ("map", maps)];
    all.into_iter().flat_map(|(kind, ids)| ids.into_iter().map(move |id| (kind, id))).collect()
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn nothing_is_left_in_the_kernel() {
    // Other tests have programs of theirs: only what comes with this watch has to go with it.
    let before = in_kernel();
    let watch = Watch::start(Questions::all()).expect("load");
    let own: Vec<_> = in_kernel().difference(&before).copied().collect();
    for kind in ["program", "link", "map"] {
        assert!(own.iter().filter(|(of, _)| *of == kind).count() >= 5, "{own:?}");
    }
    drop(watch);
    let begin = Instant::now();
    while own.iter().any(|id| in_kernel().contains(id)) {
        assert!(begin.elapsed() < Duration::from_secs(10), "still there: {:?}", in_kernel());
        std::thread::sleep(Duration::from_millis(20));
    }
}
