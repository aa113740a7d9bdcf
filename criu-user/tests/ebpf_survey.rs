//! The survey by eBPF against the kernel's other voice, /proc, on programs that stand still.
//!
//! Needs root and an engine with the eBPF programs inside: `cargo xtask test` runs it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use criu_user::kernel::ebpf::EbpfSurvey;
use criu_user::kernel::ebpf::restart::{Restart, RestartFunctions};
use criu_user::kernel::proc::Shown;
use criu_user::kernel::survey::{self, Vma};
use nix::sys::{ptrace, wait};
use nix::unistd::Pid;

/// A child that says when it is ready, and ends with the test.
struct Program(Child);

impl Program {
    /// Debian's Python: a version manager's brings wrapper processes with it.
    fn python(code: &str) -> Self {
        let mut python = Command::new("/usr/bin/python3");
        let child = python.args(["-c", code]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("start /usr/bin/python3");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read its line");
        assert_eq!(line, "ready\n");
        // What says `ready` is a moment away from its sleep.
        std::thread::sleep(Duration::from_millis(50));
        Self(child)
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().expect("kill the program");
        self.0.wait().expect("reap the program");
    }
}

/// Areas of all sorts, descriptors of all sorts.
const BUSY: &str = r#"
import ctypes, mmap, os, select, signal, socket, tempfile, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def area(pages=4, prot=3, flags=0x22, fd=-1):
    return libc.mmap(None, pages * 4096, prot, flags, fd, 0)
name = ctypes.create_string_buffer(b"some name")
libc.prctl(0x53564d41, 0, area(), 4 * 4096, ctypes.addressof(name))
shared = area(flags=0x21)
libc.prctl(0x53564d41, 0, shared, 4 * 4096, ctypes.addressof(name))
libc.mlock(ctypes.c_void_p(area()), 4096)
for advice in 10, 12, 14, 15, 16, 18, 1, 2:
    libc.madvise(area(512), 512 * 4096, advice)
area(prot=0)
area(flags=0x4022)
gone = tempfile.NamedTemporaryFile(prefix="with space and\nline feed ")
gone.write(b"x" * 20000); gone.flush()
area(prot=1, flags=2, fd=gone.fileno())
keep = os.dup(gone.fileno()); gone.close()
memfd = os.memfd_create("a memfd"); os.ftruncate(memfd, 8192)
area(2, flags=1, fd=memfd)
shm = libc.shmget(0, 8192, 0o1600); libc.shmat.restype = ctypes.c_void_p
libc.shmat(shm, None, 0); libc.shmctl(shm, 0, None)
pipes = [os.pipe() for _ in range(20)]
pair = socket.socketpair(); again = os.dup(pair[0].fileno())
epoll = select.epoll(); epoll.register(pipes[0][0])
tcp = socket.socket(); tcp.bind(("127.0.0.1", 0)); tcp.listen()
os.set_inheritable(pipes[3][1], True)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
libc.prctl(36, 1, 0, 0, 0)
libc.prctl(29, 77777, 0, 0, 0)
for _ in range(10):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("ready", flush=True)
time.sleep(1000)
"#;

/// include/uapi/asm-generic/signal-defs.h
const SA_RESTORER: u64 = 0x0400_0000;

/// The engine has no use for the kernel's own page outside the address space, which only /proc shows.
fn without_vsyscall(mut areas: Vec<Vma>) -> Vec<Vma> {
    areas.retain(|area| area.special() != Some("[vsyscall]"));
    areas
}

fn status(pid: Pid, tid: u32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).expect("read status");
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
    line.unwrap_or_else(|| panic!("{key} in status")).to_owned()
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn areas_and_descriptors_are_what_proc_says() {
    let mut ebpf = EbpfSurvey::new().expect("the eBPF survey");
    let program = Program::python(BUSY);
    let areas = ebpf.areas(program.pid()).expect("survey").expect("memory");
    let expected = without_vsyscall(survey::vmas_of(program.pid()).expect("smaps"));
    for (ours, theirs) in areas.iter().zip(&expected) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(areas.len(), expected.len());
    assert!(areas.len() > 30, "only {} areas", areas.len());
    let shown = Shown { pid: program.pid(), by: program.pid() };
    let descriptors = ebpf.descriptors(&[shown]).expect("survey");
    let pairs = |all: &[survey::Descriptor]| all.iter().map(|d| (d.fd, d.description)).collect::<Vec<_>>();
    let by_proc = survey::descriptors_of(&[program.pid()]).expect("kcmp");
    assert_eq!(pairs(&descriptors[&program.pid()]), pairs(&by_proc[&program.pid()]));
    assert!(descriptors[&program.pid()].len() > 45);
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn descriptors_carry_what_readlink_and_fdinfo_say() {
    let mut ebpf = EbpfSurvey::new().expect("the eBPF survey");
    let program = Program::python(BUSY);
    let pid = program.pid();
    let files = ebpf.files_of(pid).expect("survey");
    for file in &files {
        let fd = file.record.fd;
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).expect("readlink");
        assert_eq!(link.as_os_str().as_encoded_bytes(), &*file.text, "fd {fd}");
        let stat = nix::sys::stat::stat(format!("/proc/{pid}/fd/{fd}").as_str()).expect("stat");
        let device = nix::sys::stat::makedev(u64::from(file.record.dev >> 20), u64::from(file.record.dev & 0xfffff));
        assert_eq!((stat.st_ino, stat.st_dev), (file.record.ino, device), "fd {fd}");
        assert_eq!((stat.st_mode, stat.st_size as u64), (file.record.mode, file.record.size), "fd {fd}");
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).expect("fdinfo");
        let field = |key: &str| info.lines().find_map(|line| line.strip_prefix(key)).map(str::trim).expect("a field");
        let flags = u32::from_str_radix(field("flags:"), 8).expect("octal");
        let cloexec = if file.record.cloexec == 1 { 0o2000000 } else { 0 };
        assert_eq!(flags, file.record.flags & !0o2000000 | cloexec, "fd {fd}");
        assert_eq!(field("pos:"), file.record.pos.to_string(), "fd {fd}");
        assert_eq!(field("mnt_id:"), file.record.mount.to_string(), "fd {fd}");
    }
    assert!(files.iter().any(|file| file.record.cloexec == 0 && file.record.fd > 2), "none that exec inherits");
    assert!(files.iter().any(|file| file.record.in_epoll == 1), "none that epoll watches");
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn threads_are_what_proc_says() {
    let mut ebpf = EbpfSurvey::new().expect("the eBPF survey");
    let program = Program::python(BUSY);
    let pid = program.pid();
    let tasks = ebpf.tasks_of(pid).expect("survey").expect("a process");
    assert_eq!(tasks.threads.len(), 11);
    for thread in &tasks.threads {
        let says = |key| status(pid, thread.tid, key);
        assert_eq!(thread.header.tgid, pid.as_raw() as u32);
        assert_eq!(says("PPid"), thread.ppid.to_string());
        assert_eq!(says("SigBlk"), format!("{:016x}", thread.blocked));
        assert_eq!(says("NoNewPrivs"), thread.no_new_privs.to_string());
        assert_eq!(says("Name").as_bytes(), thread.comm.split(|byte| *byte == 0).next().expect("a name"));
        let slack = std::fs::read_to_string(format!("/proc/{}/timerslack_ns", thread.tid)).expect("timer slack");
        assert_eq!(slack.trim(), thread.timer_slack_ns.to_string());
    }
    // glibc registers an rseq area and a robust list for every thread.
    assert!(tasks.threads.iter().all(|thread| thread.rseq != 0 && thread.rseq_len >= 32 && thread.robust_list != 0));
    assert!(tasks.threads.iter().all(|thread| thread.rseq_sig == 0x5305_3053));
    let process = &tasks.process;
    assert_eq!(process.is_child_subreaper, 1);
    assert_eq!(process.pgid, nix::unistd::getpgid(Some(pid)).expect("getpgid").as_raw() as u32);
    assert_eq!(process.sid, nix::unistd::getsid(Some(pid)).expect("getsid").as_raw() as u32);
    let (handled, ignored) = (status(pid, pid.as_raw() as u32, "SigCgt"), status(pid, pid.as_raw() as u32, "SigIgn"));
    let actions = ebpf.actions(process).expect("four words each");
    let usr1 = actions[libc::SIGUSR1 as usize - 1];
    assert!(usr1.handler > 1 && usr1.restorer != 0 && usr1.flags & SA_RESTORER != 0, "{usr1:?}");
    let set = |wanted: fn(u64) -> bool| {
        let signals = actions.iter().zip(0..).filter(|(action, _)| wanted(action.handler));
        format!("{:016x}", signals.fold(0u64, |set, (_, bit)| set | 1 << bit))
    };
    assert_eq!((set(|handler| handler > 1), set(|handler| handler == 1)), (handled, ignored));
    let mm = tasks.mm.expect("memory");
    let auxv = std::fs::read(format!("/proc/{pid}/auxv")).expect("auxv");
    let ours: Vec<u8> = mm.auxv.iter().flat_map(|word| word.to_ne_bytes()).collect();
    assert!(ours.starts_with(&auxv) || auxv.starts_with(&ours), "auxiliary vector");
    let areas = survey::vmas_of(pid).expect("smaps");
    let vdso = areas.iter().find(|area| area.special() == Some("[vdso]")).expect("vdso");
    assert_eq!(mm.vdso, vdso.start);
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn a_dead_leader_and_a_process_that_is_none() {
    let mut ebpf = EbpfSurvey::new().expect("the eBPF survey");
    let program = Program::python(
        "
import ctypes, threading, time
def wait():
    print('ready', flush=True)
    time.sleep(1000)
for n in range(3):
    threading.Thread(target=wait if n == 2 else time.sleep, args=() if n == 2 else (1000,)).start()
ctypes.CDLL(None).syscall(60, 0)
",
    );
    let tasks = ebpf.tasks_of(program.pid()).expect("survey").expect("a process");
    assert_eq!(tasks.threads.iter().filter(|thread| thread.exit_state == 0).count(), 3);
    assert_eq!(tasks.threads.iter().filter(|thread| thread.exit_state != 0).count(), 1);
    assert!(tasks.mm.is_some(), "its threads have memory");
    let areas = ebpf.vmas_of(program.pid()).expect("survey");
    assert!(areas.len() > 10 && areas.windows(2).all(|two| two[0].record.end <= two[1].record.start));
    let files = ebpf.files_of(program.pid()).expect("survey");
    let mut numbers: Vec<_> = files.iter().map(|file| file.record.fd).collect();
    assert!(numbers.starts_with(&[0, 1, 2]), "{numbers:?}");
    numbers.dedup();
    assert_eq!(numbers.len(), files.len(), "the one table was taken more than once");
    // No pid is that high (PID_MAX_LIMIT is 2²²).
    assert!(ebpf.tasks_of(Pid::from_raw(1 << 23)).expect("survey").is_none());
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn what_remains_of_a_sleep_and_of_a_poll_is_known() {
    let mut ebpf = EbpfSurvey::new().expect("the eBPF survey");
    let functions = RestartFunctions::of_this_kernel().expect("kallsyms");
    // sleep(1) is relative; Python's is absolute, and simply made again.
    let sleep = "import os; print('ready', flush=True); os.execv('/bin/sleep', ['sleep', '1000'])";
    let poll = "import select; print('ready', flush=True); select.poll().poll(1000_000)";
    for code in [sleep, poll] {
        let program = Program::python(code);
        ptrace::seize(program.pid(), ptrace::Options::empty()).expect("seize");
        ptrace::interrupt(program.pid()).expect("interrupt");
        wait::waitpid(program.pid(), None).expect("wait for the stop");
        let tasks = ebpf.tasks_of(program.pid()).expect("survey").expect("a process");
        let restart = functions.decode(&tasks.threads[0], ebpf.offsets()).expect("a restart");
        let clock = nix::time::ClockId::CLOCK_MONOTONIC.now().expect("the clock");
        let (until_ns, is_sleep) = match restart {
            Restart::Sleep { clock, until_ns, .. } => {
                // On whatever clock it was asked for: a relative sleep counts on this one (kernel/time/hrtimer.c).
                assert_eq!(clock, libc::CLOCK_MONOTONIC);
                (until_ns, true)
            }
            Restart::Poll { until_ns, count, .. } => {
                assert_eq!(count, 0);
                (until_ns.expect("it has an end"), false)
            }
            Restart::Futex { .. } => panic!("nobody waits for a futex"),
        };
        assert_eq!(is_sleep, code == sleep);
        let remaining = until_ns as f64 / 1e9 - clock.tv_sec() as f64;
        assert!((990.0..1001.0).contains(&remaining), "{remaining} seconds remain of {restart:?}");
        ptrace::detach(program.pid(), None).expect("detach");
    }
}

#[test]
#[ignore = "needs root and the eBPF programs: cargo xtask test"]
fn large_processes_are_surveyed_faster_than_through_proc() {
    let mut ebpf = EbpfSurvey::new().expect("the eBPF survey");
    ebpf.load_all().expect("load");
    let program = Program::python(
        "
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
for n in range(20000):
    libc.mmap(None, 4096, 1 if n % 2 else 3, 0x22, -1, 0)
import resource
for n in range(4000 if resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 4100 else 900):
    os.open('/dev/null', 0)
print('ready', flush=True)
time.sleep(1000)
",
    );
    let pid = program.pid();
    let timed = |what: &str, run: &mut dyn FnMut() -> usize| {
        let start = Instant::now();
        let found = run();
        let took = start.elapsed();
        println!("{what}: {found} in {took:?}");
        (found, took)
    };
    let ours = timed("areas by eBPF", &mut || ebpf.areas(pid).expect("survey").expect("memory").len());
    let theirs = timed("areas by /proc", &mut || without_vsyscall(survey::vmas_of(pid).expect("smaps")).len());
    assert_eq!(ours.0, theirs.0);
    assert!(ours.0 > 20_000 && ours.1 < theirs.1);
    let many = Program::python(
        "
import threading, time
threading.stack_size(65536)
for n in range(999):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print('ready', flush=True)
time.sleep(1000)
",
    );
    let threads =
        timed("threads by eBPF", &mut || ebpf.tasks_of(many.pid()).expect("survey").expect("a process").threads.len());
    assert_eq!(threads.0, 1000);
    let ours = timed("descriptors by eBPF", &mut || ebpf.files_of(pid).expect("survey").len());
    let theirs = timed("descriptors by /proc", &mut || {
        let dir = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("list");
        let links = dir.map(|entry| std::fs::read_link(entry.expect("entry").path()).expect("readlink"));
        links.collect::<Vec<_>>().len()
    });
    assert_eq!(ours.0, theirs.0);
    assert!(ours.1 < theirs.1);
}
