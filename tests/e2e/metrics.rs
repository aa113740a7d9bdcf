//! Metrics of a session and of commands, as their readers see them: Prometheus, promtool, node_exporter's files.

mod dashboard;
mod documents;
mod files;
mod prometheus;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use e2e::{Engine, Outcome, Program, Survey, Workload, reaper};

const ENGINE: Engine = Engine::Ours(Survey::Ebpf);

/// How long something may take to show on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A port that nobody has, below those that the kernel gives to whoever connects: programs of other tests need theirs
/// back.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 20_000 + (std::process::id() % 10_000) as u16;
    loop {
        let port = start + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// Calls `criu-ebpf track PID WORDS…`.
fn track(program: &Program, words: &[&str]) -> Outcome {
    let mut call = vec!["track".into(), program.pid().to_string().into()];
    call.extend(words.iter().map(Into::into));
    ENGINE.call(&call, program.dir(), "track")
}

/// A session in the background, which is ended and reaped.
struct Session<'p> {
    program: &'p Program,
    pid: i32,
}

impl<'p> Session<'p> {
    fn start(program: &'p Program, words: &[&str]) -> Self {
        track(program, &[&["-d", "--interval", "200"][..], words].concat()).expect_success();
        let list = ENGINE.call(&["track".into(), "--list".into(), "--json".into()], program.dir(), "list");
        let list: serde_json::Value = serde_json::from_str(&list.expect_success().printed).expect("JSON");
        let of_program = |session: &&serde_json::Value| session["pid"] == program.pid();
        let session = list.as_array().expect("a list").iter().find(of_program).expect("the session");
        Self { program, pid: session["session"].as_i64().expect("a pid") as i32 }
    }

    fn stop(&self) {
        let words = ["track".into(), "--stop".into(), self.program.pid().to_string().into()];
        ENGINE.call(&words, self.program.dir(), "stop").expect_success();
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        reaper::kill_trees([self.pid]);
    }
}

/// What is answered to one question: status line and headers, and the body.
fn ask(port: u16, method: &str, path: &str, accept: &str) -> (String, String) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("connecting to the session");
    write!(stream, "{method} {path} HTTP/1.0\r\nAccept: {accept}\r\n\r\n").expect("asking");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an end of the headers");
    (head.to_lowercase(), body.to_owned())
}

/// The exposition in the format that promtool reads.
fn exposition(port: u16) -> String {
    let (head, body) = ask(port, "GET", "/metrics", "text/plain");
    assert!(head.starts_with("http/1.0 200"), "{head}");
    body
}

/// The value of the one series whose line begins so.
fn value(exposition: &str, series: &str) -> f64 {
    let line = exposition.lines().find(|line| line.starts_with(series));
    let number =
        line.and_then(|line| line.rsplit(' ').next()).unwrap_or_else(|| panic!("no {series} in\n{exposition}"));
    number.parse().unwrap_or_else(|_| panic!("{number} is no number"))
}

/// Waits until something holds.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Has promtool look at something, and fails if it has anything to say.
fn promtool(words: &[&str], input: &str) {
    let mut command = Command::new("promtool");
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("starting promtool (install prometheus)");
    child.stdin.take().expect("its input").write_all(input.as_bytes()).expect("giving it the input");
    let output = child.wait_with_output().expect("waiting for promtool");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "promtool {words:?}: {said}\n{input}");
    if words.starts_with(&["check", "metrics"]) {
        assert_eq!(said, "", "promtool {words:?}\n{input}");
    }
}

/// A file of docs/.
fn document(name: &str) -> PathBuf {
    e2e::workload::workspace().join("docs").join(name)
}

fn sleeper() -> Program {
    Workload::new("threads.c", "many").start()
}

/// Everybody gets the format that he reads, at /metrics and nowhere else.
#[test]
fn served() {
    let mut program = sleeper();
    let port = free_port();
    let session = Session::start(&program, &["--metrics", &port.to_string()]);
    let (head, body) = ask(port, "GET", "/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    assert!(body.ends_with("# EOF\n") && body.contains("# UNIT criu_ebpf_memory_bytes bytes\n"), "{body}");
    let (head, body) = ask(port, "GET", "/metrics", "*/*");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    promtool(&["check", "metrics"], &body);
    let tree =
        format!("criu_ebpf_tree_info{{tree=\"{}\",comm=\"threads\",session=\"{}\"}}", program.pid(), session.pid);
    assert_eq!(value(&body, &tree), 1.0);
    let (head, body) = ask(port, "HEAD", "/metrics", "*/*");
    assert!(head.starts_with("http/1.0 200") && body.is_empty(), "{head}\n{body}");
    assert!(ask(port, "GET", "/", "*/*").1.contains("/metrics"));
    assert!(ask(port, "GET", "/metric", "*/*").0.starts_with("http/1.0 404"));
    let (head, _) = ask(port, "POST", "/metrics", "*/*");
    assert!(head.starts_with("http/1.0 405") && head.contains("allow: get, head"), "{head}");
    session.stop();
    eventually("the port is closed", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    drop(session);
    program.finish();
}

/// A bare port is that of the loopback interface.
#[test]
fn on_loopback_unless_said() {
    let mut program = sleeper();
    let listens = |port: u16, address: &str| {
        let table = std::fs::read_to_string("/proc/net/tcp").expect("/proc/net/tcp");
        table.lines().any(|line| line.split_whitespace().nth(1) == Some(&format!("{address}:{port:04X}")))
    };
    for words in ["", ":"] {
        let port = free_port();
        let session = Session::start(&program, &["--metrics", &format!("{words}{port}")]);
        assert!(listens(port, "0100007F"), "not on loopback");
        session.stop();
    }
    let port = free_port();
    let session = Session::start(&program, &["--metrics", &format!("0.0.0.0:{port}")]);
    assert!(listens(port, "00000000"), "not on all interfaces");
    session.stop();
    drop(session);
    program.finish();
}

/// What cannot be had is said before there is a session, and what a running session cannot be told any more as well.
#[test]
fn refused() {
    let mut program = sleeper();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let port = taken.local_addr().expect("its address").port().to_string();
    track(&program, &["-d", "--metrics", &port]).expect_refusal("metrics cannot be served at 127.0.0.1:");
    track(&program, &["-d", "--metrics", "somewhere"]).expect_refusal("give a port");
    track(&program, &["-d", "--metrics-file", "/nowhere/tree.prom"]).expect_refusal("/nowhere/tree.prom");
    let notes = program.file("notes.prom");
    std::fs::write(&notes, "mine\n").expect("a file");
    track(&program, &["-d", "--metrics-file", &notes.to_string_lossy()]).expect_refusal("exists already");
    assert_eq!(std::fs::read_to_string(&notes).expect("the file"), "mine\n");
    let stop = ["track".into(), "--stop".into(), program.pid().to_string().into()];
    ENGINE.call(&stop, program.dir(), "stop").expect_refusal("is not tracked");
    let session = Session::start(&program, &[]);
    track(&program, &["-d", "--metrics", &free_port().to_string()]).expect_refusal("is tracked already");
    track(&program, &["--metrics-file", "/tmp/tree.prom"]).expect_refusal("is tracked already");
    session.stop();
    drop(session);
    program.finish();
}

/// A tree of any size has a bounded number of series.
#[test]
fn five_hundred_processes() {
    let script = "i=0; while [ $i -lt 499 ]; do sleep 1000 & i=$((i + 1)); done; wait";
    let program = Workload::program(&["sh", "-c", script]).start();
    eventually("500 processes", || program.tree().len() == 500);
    let port = free_port();
    let session = Session::start(&program, &["--metrics", &port.to_string()]);
    eventually("all of them are tracked", || value(&exposition(port), "criu_ebpf_processes{") == 500.0);
    let text = exposition(port);
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    assert!((100..2000).contains(&series), "{series} series");
    let of_processes = text.lines().filter(|line| line.starts_with("criu_ebpf_process_memory_bytes{"));
    let others = |line: &&str| line.contains("process=\"other\"");
    let (rest, own): (Vec<&str>, Vec<&str>) = of_processes.partition(others);
    assert_eq!((rest.len(), own.len()), (1, 20), "{text}");
    let number = |line: &&str| line.rsplit(' ').next().and_then(|word| word.parse::<f64>().ok()).expect("a number");
    let sum: f64 = rest.iter().chain(&own).map(number).sum();
    assert_eq!(sum, value(&text, "criu_ebpf_memory_bytes{"), "some memory belongs to nobody");
    assert!(number(&rest[0]) > 0.0, "479 processes have no memory");
    promtool(&["check", "metrics"], &text);
    session.stop();
}

/// What eBPF programs see of the tree gets through: sockets, system calls, faults.
#[test]
fn watched() {
    let script = format!(
        "import os, socket, time\n\
         s = socket.socket(); s.bind(('127.0.0.1', {})); s.listen()\n\
         while True: os.close(os.open('/dev/null', 0)); m = bytearray(1 << 20); time.sleep(0.01)",
        free_port()
    );
    let program = Workload::program(&["python3", "-c", &script]).start();
    let port = free_port();
    let session = Session::start(&program, &["--metrics", &port.to_string()]);
    let of = |metric: &str, labels: &str| {
        let series = format!("{metric}{{tree=\"{}\",{labels}}}", program.pid());
        value(&exposition(port), &series)
    };
    eventually("its socket listens", || of("criu_ebpf_sockets", "state=\"listen\"") == 1.0);
    for question in ["lifecycle", "memory", "syscalls", "sockets"] {
        let label = format!("question=\"{question}\"");
        // System calls are counted from the first look on at which somebody looks on.
        eventually(&format!("{question} is asked"), || of("criu_ebpf_question_runs", &label) == 1.0);
    }
    let calls = || of("criu_ebpf_calls_total", "state=\"descriptors\"");
    let faults = || of("criu_ebpf_faults_total", "kind=\"missing\"");
    let (calls_before, faults_before) = (calls(), faults());
    eventually("calls are counted", || calls() > calls_before + 10.0);
    eventually("faults are counted", || faults() > faults_before);
    session.stop();
}

/// What would refuse a dump is there before anybody tries.
#[test]
fn refusals() {
    let mut program = Workload::new("refused.py", "everything").start();
    let port = free_port();
    let session = Session::start(&program, &["--metrics", &port.to_string()]);
    eventually("a refusal", || value(&exposition(port), "criu_ebpf_refusals{") > 0.0);
    session.stop();
    drop(session);
    program.finish();
}
