//! Tracking sessions: what they report, commands that are tracked from birth, and that whatever happens to a session the
//! program does not notice and nothing is left.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use e2e::{Bytes, Engine, Look, Options, Program, Row, Survey, Workload, bytes::signal, proc, workload::workspace};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::killed::{Moments, kills, wait_unharmed};

const ENGINE: Engine = Engine::Ours(Survey::Ebpf);
const PATIENCE: Duration = Duration::from_secs(30);

/// A `track` in the foreground that prints JSON. It is killed when this is dropped.
pub(crate) struct Tracker {
    pub child: Child,
    lines: Receiver<String>,
}

impl Tracker {
    fn start(words: &[&str]) -> Self {
        let mut command = Command::new(ENGINE.binary());
        command.args(["track", "--json"]).args(words).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("starting the tracker");
        let out = child.stdout.take().expect("piped");
        Self { child, lines: lines_of(out) }
    }

    /// A `track -- COMMAND`, which prints JSON on its standard error.
    fn command(words: &[&str]) -> Self {
        let mut command = Command::new(ENGINE.binary());
        command.args(["track", "--json", "--interval", "200", "--"]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("starting the tracker");
        let err = child.stderr.take().expect("piped");
        Self { child, lines: lines_of(err) }
    }

    fn of(program: &Program) -> Self {
        Self::start(&["--interval", "200", &program.pid().to_string()])
    }

    /// The next report.
    fn next(&self) -> Value {
        let line = self.lines.recv_timeout(PATIENCE).expect("a report");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// The first report that is as wanted.
    fn until(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let report = self.next();
            if wanted(&report) {
                return report;
            }
            assert!(Instant::now() < end, "no report with {what}, but {report:#}");
        }
    }

    fn kill(&mut self) {
        self.child.kill().expect("killing the tracker");
        self.child.wait().expect("reaping the tracker");
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        let _: std::io::Result<()> = self.child.kill();
        let _: std::io::Result<std::process::ExitStatus> = self.child.wait();
    }
}

fn lines_of(from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

pub(crate) fn track(words: &[&str]) -> Output {
    let mut command = Command::new(ENGINE.binary());
    command.arg("track").args(words).stdin(Stdio::null()).output().expect("starting track")
}

fn succeed(words: &[&str]) -> String {
    let output = track(words);
    assert!(output.status.success(), "track {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A Python program; it waits for the file `now` where the script has it so.
fn python(script: &str) -> Program {
    let wait = "import os, time\ndef wait():\n    while not os.path.exists('now'): time.sleep(0.01)\n";
    Workload::program(&["/usr/bin/python3", "-c", &format!("{wait}{script}")]).start()
}

fn now(program: &Program) {
    File::create(program.file("now")).expect("creating a file");
}

fn processes(report: &Value) -> &[Value] {
    report["processes"].as_array().map_or(&[], Vec::as_slice)
}

fn comms(report: &Value) -> Vec<&str> {
    processes(report).iter().filter_map(|process| process["comm"].as_str()).collect()
}

/// Every field of a report stands in the table of docs/tracking.md, by its path.
fn undocumented(value: &Value, path: &str, documented: &BTreeSet<String>, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                // Maps whose keys are data.
                if documented.contains(&format!("{path}.*")) {
                    continue;
                }
                if !documented.contains(&path) {
                    found.insert(path.clone());
                }
                undocumented(value, &path, documented, found);
            }
        }
        Value::Array(values) => {
            for value in values {
                undocumented(value, &format!("{path}[]"), documented, found);
            }
        }
        _ => {}
    }
}

#[test]
fn reports_are_as_documented() {
    let text = fs::read_to_string(workspace().join("docs/tracking.md")).expect("docs/tracking.md");
    let documented: BTreeSet<String> =
        text.lines().filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned())).collect();
    let script = "
import socket
s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()
a = socket.create_connection(s.getsockname()); b, _ = s.accept()
wait()
fd = os.pidfd_open(os.getpid())
memory = bytearray(1 << 20)
while True:
    memory[:] = bytes(1 << 20)
    a.send(b'x' * 1000); b.recv(1000)
    time.sleep(0.01)
";
    let program = python(script);
    let tracker = Tracker::of(&program);
    tracker.until("counted system calls", |report| report["ebpf"]["questions"][3]["runs"] == true);
    now(&program);
    let report = tracker.until("the call that made a pidfd", |report| {
        let refusals = report["refusals"].as_array().expect("refusals");
        refusals.iter().any(|refusal| refusal["call"]["name"] == "pidfd_open")
    });
    let refusals = report["refusals"].as_array().expect("refusals");
    let refusal = refusals.iter().find(|refusal| refusal["call"]["name"] == "pidfd_open").expect("found before");
    assert_eq!(refusal["pid"], program.pid());
    assert!(refusal["what"].as_str().is_some_and(|what| what.contains("a pidfd")), "{refusal}");
    assert!(refusal["call"]["stack"].as_array().is_some_and(|stack| !stack.is_empty()), "{refusal}");
    assert!(refusals.iter().any(|refusal| refusal["option"] == "--tcp-established"), "{refusals:?}");
    let report = tracker.until("traffic and written memory", |report| {
        report["sockets"]["sent_bytes"].as_u64() > Some(10_000)
            && report["working_set_bytes"].as_u64() >= Some(1 << 20)
            && report["written_bytes_per_second"].as_u64() >= Some(1 << 20)
            && report["faults"]["protected"].as_u64() > Some(100)
            && report["calls"]["descriptors"].as_u64() >= Some(1)
    });
    assert_eq!(report["sockets"]["by_state"]["established"], 2);
    assert_eq!(report["pid"], program.pid());
    let mut missing = BTreeSet::new();
    undocumented(&report, "", &documented, &mut missing);
    assert!(missing.is_empty(), "docs/tracking.md says nothing of {missing:?}");
}

/// Children and what they execute are seen soon, and their memory is tracked.
fn follows(words: &[&str]) {
    let script = "
wait()
if os.fork() == 0:
    os.execv('/bin/sleep', ['sleep', '1000'])
os.waitpid(-1, 0)
print('reaped', flush=True)
time.sleep(1000)
";
    let program = python(script);
    let pid = program.pid().to_string();
    let tracker = Tracker::start(&[&["--interval", "300", &pid], words].concat());
    tracker.next();
    tracker.next();
    now(&program);
    let begin = Instant::now();
    let report = tracker.until("the child", |report| comms(report).contains(&"sleep"));
    // A busy machine delays the look, and the fork as well.
    assert!(begin.elapsed() < Duration::from_secs(5), "seen after {:?}", begin.elapsed());
    let child = processes(&report).iter().find(|process| process["comm"] == "sleep").expect("found before");
    assert_eq!(child["parent"], program.pid());
    let report = tracker.until("its memory", |report| {
        let child = processes(report).iter().find(|process| process["comm"] == "sleep");
        child.is_some_and(|child| child["pending_bytes"].as_u64() > Some(0))
    });
    let child = processes(&report).iter().find(|process| process["comm"] == "sleep").expect("found before");
    assert_eq!(child.get("untracked"), None);
    let child = child["pid"].as_i64().expect("a pid") as i32;
    kill(Pid::from_raw(child), Signal::SIGKILL).expect("killing the child");
    tracker.until("no child", |report| processes(report).len() == 1);
}

#[test]
fn children_are_followed() {
    follows(&[]);
}

#[test]
fn children_are_found_without_ebpf() {
    follows(&["--no-ebpf"]);
}

#[test]
fn without_ebpf_it_says_so() {
    let program = Workload::new("threads.c", "many").start();
    let tracker = Tracker::start(&["--no-ebpf", &program.pid().to_string()]);
    let report = tracker.next();
    let questions = report["ebpf"]["questions"].as_array().expect("questions");
    assert_eq!(questions.len(), 4);
    assert!(questions.iter().all(|q| q["runs"] == false && q["why_not"].is_string()), "{questions:?}");
}

fn status_of(words: &[&str]) -> Option<i32> {
    track(&[&["--interval", "200", "--"], words].concat()).status.code()
}

#[test]
fn a_command_gives_its_status() {
    assert_eq!(status_of(&["sh", "-c", "exit 7"]), Some(7));
    assert_eq!(status_of(&["true"]), Some(0));
    assert_eq!(status_of(&["sh", "-c", "kill -KILL $$"]), Some(128 + 9));
    assert_eq!(status_of(&["/nowhere/at/all"]), Some(127));
    assert_eq!(status_of(&["/etc/passwd"]), Some(126));
}

/// It has the program's output, its arguments as they are, and no descriptor of ours.
#[test]
fn a_command_is_as_without() {
    let script = "echo \"$1|$2\"; ls /proc/self/fd | tr '\\n' ' '";
    let output = track(&["--", "sh", "-c", script, "sh", "--json", "a b"]);
    let said = String::from_utf8(output.stdout).expect("text");
    // 3 is that of ls itself.
    assert_eq!(said, "--json|a b\n0 1 2 3 ", "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_command_gets_signals() {
    let mut tracker = Tracker::command(&["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.1; done"]);
    let report = tracker.until("the shell", |report| comms(report).contains(&"sh"));
    assert_ne!(report["pid"].as_i64(), Some(i64::from(tracker.child.id())));
    // The trap may not be set yet.
    std::thread::sleep(Duration::from_millis(500));
    kill(Pid::from_raw(tracker.child.id() as i32), Signal::SIGTERM).expect("a signal");
    let status = tracker.child.wait().expect("waiting for the tracker");
    assert_eq!(status.code(), Some(5));
}

#[test]
fn a_command_is_tracked_from_birth() {
    let mut tracker = Tracker::command(&["sh", "-c", "sleep 3; exit 3"]);
    let report = tracker.until("its child", |report| comms(report).contains(&"sleep"));
    let root = processes(&report).iter().find(|process| process["pid"] == report["pid"]).expect("its root");
    assert_eq!(root["comm"], "sh");
    assert_eq!(root["images"], 1, "it was followed when it became the command");
    assert_eq!(tracker.child.wait().expect("waiting for the tracker").code(), Some(3));
}

fn is_listed(pid: i32) -> bool {
    let list: Value = serde_json::from_str(&succeed(&["--list", "--json"])).expect("JSON");
    list.as_array().expect("a list").iter().any(|report| report["pid"] == pid)
}

#[test]
fn detached_listed_attached_stopped() {
    let mut program = Workload::new("threads.c", "many").start();
    let (number, pid) = (program.pid(), program.pid().to_string());
    assert!(!is_listed(number));
    succeed(&[&pid, "-d", "--interval", "200"]);
    assert!(is_listed(number));
    // Another one is the same.
    succeed(&[&pid, "-d"]);
    let mut attached = Tracker::of(&program);
    let session = attached.next()["session"].clone();
    assert_ne!(session.as_u64(), Some(u64::from(attached.child.id())), "it should have attached to the session");
    // System calls are counted while somebody looks on, and only then.
    attached.until("counted calls", |report| report["ebpf"]["questions"][3]["runs"] == true);
    attached.kill();
    assert!(is_listed(number), "the session ended with one who looked on");
    let second = Tracker::of(&program);
    assert_eq!(second.next()["session"], session);
    succeed(&["--stop", &pid]);
    assert!(!is_listed(number));
    program.finish();
}

/// The sessions in the background of the tree below `root`.
fn servers(root: &str) -> usize {
    let numbers = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.map(proc::cmdline).filter(|line| line.contains(&format!(" track {root} --serve"))).count()
}

/// Of many who begin at once one becomes the session, and the others find it.
#[test]
fn begun_at_once() {
    let mut program = Workload::new("threads.c", "many").start();
    let pid = program.pid().to_string();
    for _ in 0..10 {
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..6).map(|_| scope.spawn(|| succeed(&["-d", "--no-ebpf", &pid]))).collect();
            all.into_iter().for_each(|one| drop(one.join().expect("it begins or finds the other")));
        });
        assert_eq!(servers(&pid), 1);
        succeed(&["--stop", &pid]);
    }
    program.finish();
}

/// Removed when this is dropped; whoever is in it goes back to where the tests are.
struct Group(std::path::PathBuf);

impl Group {
    fn new(name: &str) -> Self {
        let base = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].into_iter().map(Path::new);
        let base =
            base.into_iter().find(|dir| dir.join("cgroup.procs").exists()).expect("a cgroup hierarchy of version 2");
        let dir = base.join(format!("e2e-{name}-{}", std::process::id()));
        fs::create_dir(&dir).expect("making a control group");
        Self(dir)
    }

    fn add(&self, program: &Program) {
        fs::write(self.0.join("cgroup.procs"), program.pid().to_string()).expect("moving into the group");
    }

    fn empty(&self) {
        let procs = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines() {
            let _: std::io::Result<()> = fs::write(self.0.parent().expect("below").join("cgroup.procs"), pid);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.empty();
        let _: std::io::Result<()> = fs::remove_dir(&self.0);
    }
}

#[test]
fn trees_of_a_control_group() {
    let group = Group::new("trees");
    let dir = group.0.to_str().expect("a path");
    let refused = |words: &[&str], reason: &str| {
        let output = track(words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(reason), "{said}");
    };
    refused(&["--cgroup", dir], "there is no process in");
    let (mut one, mut two) = (Workload::new("threads.c", "many").start(), Workload::new("threads.c", "many").start());
    group.add(&one);
    let tracker = Tracker::start(&["--cgroup", dir]);
    assert_eq!(tracker.next()["pid"], one.pid());
    // Whoever comes into the group is tracked as well, and found by dumps.
    group.add(&two);
    tracker.until("the tree that came later", |report| report["pid"] == two.pid());
    assert!(is_listed(one.pid()) && is_listed(two.pid()));
    refused(&["--cgroup", dir, "-d", "--metrics", "9"], "several");
    // Its sessions end with it, however it ends.
    drop(tracker);
    for program in [&mut one, &mut two] {
        wait_until("nobody tracks it", || !is_listed(program.pid()));
        assert_untouched(program);
        program.finish();
    }
}

/// In the background somebody stays for trees that come later, until the last session has ended.
#[test]
fn trees_that_come_into_a_control_group() {
    let group = Group::new("later-trees");
    let dir = group.0.to_str().expect("a path");
    let keepers = || {
        let is_one = |pid: &i32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
            words.contains(&dir.as_bytes()) && words.contains(&b"--keep".as_slice())
        };
        let entries = fs::read_dir("/proc").expect("/proc").flatten();
        entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(is_one).count()
    };
    let mut programs: Vec<Program> = (0..3).map(|_| Workload::new("threads.c", "many").start()).collect();
    group.add(&programs[0]);
    group.add(&programs[1]);
    succeed(&["--cgroup", dir, "-d", "--no-ebpf", "--interval", "200"]);
    assert!(programs[..2].iter().all(|program| is_listed(program.pid())));
    assert_eq!(keepers(), 1);
    group.add(&programs[2]);
    wait_until("the tree that came later is tracked", || is_listed(programs[2].pid()));
    // One that is not wanted any more is not begun with again.
    succeed(&["--stop", &programs[0].pid().to_string()]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(!is_listed(programs[0].pid()));
    for program in &programs[1..] {
        succeed(&["--stop", &program.pid().to_string()]);
    }
    wait_until("nobody stays", || keepers() == 0);
    programs.iter_mut().for_each(|program| {
        assert_untouched(program);
        program.finish();
    });
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// No registration of userfaultfd, no descriptor, no tracer.
fn assert_untouched(program: &Program) {
    for pid in program.tree() {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        let flags = smaps.lines().filter(|line| line.starts_with("VmFlags:"));
        let registered = flags.filter(|line| line.split_whitespace().any(|flag| flag == "uw")).count();
        assert_eq!(registered, 0, "pid {pid}: areas are still registered");
        let own: Vec<_> = proc::descriptors(pid)
            .into_iter()
            .filter(|(_, path)| path.to_string_lossy().contains("userfaultfd"))
            .collect();
        assert!(own.is_empty(), "pid {pid}: {own:?}");
    }
}

const KINDS: [&str; 3] = ["prog", "map", "link"];

/// eBPF objects of sessions that nobody has open.
fn left_over(kind: &str) -> Vec<Value> {
    let output = Command::new("bpftool").args([kind, "-j"]).output().expect("bpftool");
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let is_ours = |object: &&Value| object["name"].as_str().is_some_and(|name| name.starts_with("watch_"));
    all.iter().filter(is_ours).filter(|object| object["pids"].as_array().is_none_or(Vec::is_empty)).cloned().collect()
}

/// All of them, by their numbers.
fn numbers(kind: &str) -> BTreeSet<u64> {
    left_over(kind).iter().filter_map(|object| object["id"].as_u64()).collect()
}

/// Nothing is there that was not there before.
fn assert_clean(before: &[BTreeSet<u64>; 3]) {
    let end = Instant::now() + PATIENCE;
    for (kind, before) in KINDS.iter().zip(before) {
        // The kernel takes its time, and sessions of other tests come and go.
        while !numbers(kind).is_subset(before) {
            assert!(Instant::now() < end, "left over: {:?}", left_over(kind));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Killed again and again, it leaves the program right and the machine clean, and the next one works.
#[test]
fn killed_at_any_moment() {
    let row = Row::ours(Survey::Ebpf);
    let mut program = Workload::new("writes.c", "everything").env("GLIBC_TUNABLES", "glibc.pthread.rseq=0").start();
    let mut moments = Moments::new();
    let objects = KINDS.map(numbers);
    for _ in 0..kills() {
        let mut tracker = Tracker::start(&["--interval", "100", &program.pid().to_string()]);
        std::thread::sleep(moments.within(Duration::from_millis(700)));
        tracker.kill();
        wait_unharmed(&program);
        assert_untouched(&program);
    }
    assert_clean(&objects);
    // The last socket is stale: it is replaced.
    let first = row.next_images(&program);
    row.dumper.pre_dump(&program, &first, None).expect_success();
    let before = Bytes::stop_and_take(&program);
    let tree = program.tree();
    let images = row.next_images(&program);
    let options = ["--track-mem", "--prev-images-dir", first.to_str().expect("a path")];
    row.dumper.dump(&program, &images, &Options::dump(&options)).expect_success();
    program.expect_gone(&tree);
    row.restore(&program, &images);
    before.compare(&Bytes::take(&program));
    signal(&program, Signal::SIGCONT);
    program.finish();
}

/// A process that is killed while it stands still for a moment: its parent is told all the same.
#[test]
fn children_that_are_killed_can_be_waited_for() {
    let script = "
import random, signal
wait()
memory = bytearray(1 << 22)
for n in range(60):
    children = []
    for m in range(8):
        child = os.fork()
        if child == 0:
            while True:
                memory[random.randrange(len(memory))] = 1
        children.append(child)
    time.sleep(0.04 + random.random() * 0.1)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
open('done', 'w').close()
time.sleep(1000)
";
    let program = python(script);
    let tracker = Tracker::start(&["--interval", "100", &program.pid().to_string()]);
    tracker.next();
    now(&program);
    let end = Instant::now() + Duration::from_secs(60);
    while !program.file("done").exists() {
        let states: Vec<_> = program.tree().iter().map(|&pid| proc::stat(pid)).collect();
        assert!(Instant::now() < end, "it still waits for a child: {states:?}");
        tracker.next();
    }
}

/// A program that would notice anything does not notice sessions that come and go.
#[test]
fn comes_and_goes_unnoticed() {
    let mut program = Workload::new("unharmed.c", "everything").start();
    let pid = program.pid().to_string();
    let before = Look::at(&program);
    for _ in 0..5 {
        succeed(&[&pid, "-d", "--interval", "100"]);
        std::thread::sleep(Duration::from_millis(300));
        succeed(&["--stop", &pid]);
        assert_untouched(&program);
    }
    before.compare(&Look::at(&program));
    program.finish();
    assert!(!Path::new(&format!("/run/criu-ebpf/session-{pid}.sock")).exists());
}
