//! Servers that are moved under load: no client sees an error.
//!
//! `E2E_CYCLES` says how often each is moved (3 times if it does not).

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use e2e::{Claim, Options, Program, Row, Workload, rows};

use crate::tcp::kept;

pub(crate) fn cycles() -> u32 {
    env::var("E2E_CYCLES").map_or(3, |text| text.parse().expect("E2E_CYCLES is a number"))
}

pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("binding a port");
    listener.local_addr().expect("its address").port()
}

/// Connects as soon as the server listens.
fn connect(port: u16) -> TcpStream {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(30))).expect("setting a timeout");
                return stream;
            }
            Err(error) => assert!(Instant::now() < end, "nobody listens on port {port}: {error}"),
        }
        sleep(Duration::from_millis(10));
    }
}

/// A client that runs by itself, outside of every tree.
pub(crate) struct Client {
    child: Child,
    name: &'static str,
}

impl Client {
    pub(crate) fn start(words: &[&str], name: &'static str, out: &Path) -> Self {
        let out = File::create(out).expect("creating the client's output");
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stderr(out.try_clone().expect("dup")).stdout(out);
        let child = command.process_group(0).spawn().unwrap_or_else(|error| panic!("starting {name}: {error}"));
        Self { child, name }
    }

    pub(crate) fn expect_alive(&mut self) {
        let status = self.child.try_wait().expect("waiting for the client");
        assert!(status.is_none(), "{} has given up: {status:?}", self.name);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn move_once(row: &Row, program: &Program) {
    let images = row.dump(program);
    row.restore(program, &images);
}

/// 50 clients ask as fast as they can, and one that was there from the beginning sees how much was done.
fn redis(row: &Row) {
    let row = kept(row);
    let port = free_port().to_string();
    let words = ["/usr/bin/redis-server", "--port", &port, "--bind", "127.0.0.1", "--save", "", "--dir", "."];
    let program = Workload::program(&words).with(Claim::Ports).start();
    let mut observer = BufReader::new(connect(port.parse().expect("a port")));
    let mut processed = || -> u64 {
        observer.get_mut().write_all(b"INFO stats\r\n").expect("asking redis");
        let mut head = String::new();
        observer.read_line(&mut head).expect("what redis says");
        let length: usize = head.trim().trim_start_matches('$').parse().expect("a length");
        let mut text = vec![0; length + 2];
        observer.read_exact(&mut text).expect("what redis says");
        let text = String::from_utf8(text).expect("text");
        let line = text.lines().find_map(|line| line.strip_prefix("total_commands_processed:"));
        line.and_then(|number| number.parse().ok()).expect("a number")
    };
    let out = program.file("benchmark");
    let words = ["/usr/bin/redis-benchmark", "-p", &port, "-c", "50", "-l", "-q", "-t", "set,get"];
    let mut load = Client::start(&words, "redis-benchmark", &out);
    sleep(Duration::from_millis(300));
    for _ in 0..cycles() {
        let before = processed();
        move_once(&row, &program);
        load.expect_alive();
        let end = Instant::now() + Duration::from_secs(20);
        while processed() < before + 1000 {
            assert!(Instant::now() < end, "the clients do nothing any more");
            sleep(Duration::from_millis(10));
        }
    }
    load.expect_alive();
    let said = fs::read_to_string(&out).unwrap_or_default();
    assert!(!said.contains("Error") && !said.contains("rror:"), "redis-benchmark: {said}");
}

/// A request on a connection that stays, and its answer.
fn ask(stream: &mut BufReader<TcpStream>, path: &str) -> String {
    write!(stream.get_mut(), "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("asking nginx");
    let length = read_head(stream);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("the answer's body");
    String::from_utf8(body).expect("text")
}

/// The head of an answer; how long its body is.
fn read_head(stream: &mut BufReader<TcpStream>) -> usize {
    let mut length = 0;
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).expect("the answer's head") > 0, "nginx has closed the connection");
        if let Some(number) = line.strip_prefix("Content-Length: ") {
            length = number.trim().parse().expect("a length");
        }
        if line == "\r\n" {
            return length;
        }
    }
}

const DOWNLOAD: usize = 32 << 20;

fn start_nginx(port: u16) -> Program {
    let start = |command: &mut Command, dir: &Path| {
        let conf = format!(
            "user nobody nogroup;\nworker_processes 2;\ndaemon off;\npid {0}/nginx.pid;\nerror_log {0}/error.log;\n\
             events {{ worker_connections 64; }}\nhttp {{\n access_log off;\n client_body_temp_path {0}/body;\n\
             proxy_temp_path {0}/proxy;\n fastcgi_temp_path {0}/fastcgi;\n uwsgi_temp_path {0}/uwsgi;\n\
             scgi_temp_path {0}/scgi;\n sendfile on;\n server {{ listen 127.0.0.1:{port}; keepalive_timeout 600;\n\
             keepalive_requests 100000;\n root {0}/www;\n location = / {{ return 200 \"hello\"; }} }}\n}}\n",
            dir.display()
        );
        fs::write(dir.join("nginx.conf"), conf).expect("writing nginx.conf");
        fs::create_dir(dir.join("www")).expect("mkdir");
        let bytes: Vec<u8> = (0..DOWNLOAD / 4).flat_map(|n| (n as u32).to_le_bytes()).collect();
        fs::write(dir.join("www/large"), bytes).expect("writing the download");
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("chmod");
        let out = File::create(dir.join("out")).expect("creating the output file");
        command.arg(dir.join("nginx.conf"));
        command.stdin(Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
    };
    Program::start_with(&Workload::program(&["/usr/sbin/nginx", "-c"]).with(Claim::Ports), "setsid", start)
}

/// Clients that keep their connections, and one that downloads over all moves.
fn nginx(row: &Row) {
    let row = kept(row);
    let port = free_port();
    let program = start_nginx(port);
    let mut clients: Vec<_> = (0..10).map(|_| BufReader::new(connect(port))).collect();
    clients.iter_mut().for_each(|client| assert_eq!(ask(client, "/"), "hello"));
    let mut download = BufReader::new(connect(port));
    download.get_mut().write_all(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("asking nginx");
    assert_eq!(read_head(&mut download), DOWNLOAD);
    let (mut got, step) = (0, DOWNLOAD / 2 / cycles() as usize / 4 * 4);
    let mut fetch = |length: usize| {
        let mut bytes = vec![0; length];
        download.read_exact(&mut bytes).expect("the download");
        let expected = |n: usize| ((got / 4 + n) as u32).to_le_bytes();
        for (n, word) in bytes.chunks_exact(4).enumerate() {
            assert_eq!(word, expected(n), "the download is broken at byte {}", got + n * 4);
        }
        got += length;
    };
    for _ in 0..cycles() {
        fetch(step);
        move_once(&row, &program);
        clients.iter_mut().for_each(|client| assert_eq!(ask(client, "/"), "hello"));
    }
    fetch(DOWNLOAD - step * cycles() as usize);
}

/// Clients that ask and are answered all the time, each in a thread of its own.
struct Clients {
    answered: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// `talk` is what each does over and over; it is told how often it has been done.
    fn start(count: usize, port: u16, greet: fn(&mut Line), talk: fn(&mut Line, u64)) -> Self {
        let (answered, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = |_| {
            let (answered, stop) = (Arc::clone(&answered), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut line = BufReader::new(connect(port));
                greet(&mut line);
                for n in 1.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    talk(&mut line, n);
                    answered.fetch_add(1, Ordering::SeqCst);
                    sleep(Duration::from_millis(1));
                }
            })
        };
        let threads = (0..count).map(thread).collect();
        let clients = Self { answered, stop, threads };
        clients.wait_for_more(10 * count as u64);
        clients
    }

    /// Waits until so much more was answered. No client may have given up.
    fn wait_for_more(&self, more: u64) {
        let (before, end) = (self.answered.load(Ordering::SeqCst), Instant::now() + Duration::from_secs(30));
        while self.answered.load(Ordering::SeqCst) < before + more {
            assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a client has given up");
            assert!(Instant::now() < end, "the clients are not answered any more");
            sleep(Duration::from_millis(5));
        }
    }

    /// Moves the program while they go on.
    fn under_moves(self, row: &Row, program: &Program) {
        for _ in 0..cycles() {
            move_once(row, program);
            self.wait_for_more(5 * self.threads.len() as u64);
        }
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a client"));
    }
}

/// Clients that connect anew for each question: some wait to be accepted when the server is moved, and those that come
/// while it is away ask again.
fn nginx_with_new_clients(row: &Row) {
    let row = row.with(Options {
        dump: ["--tcp-established", "--lock-listeners"].map(Into::into).into(),
        restore: vec!["--tcp-established".into()],
        ..Options::default()
    });
    let port = free_port();
    let program = start_nginx(port);
    let talk = |line: &mut Line, _| {
        let server = line.get_ref().peer_addr().expect("its address");
        let stream = TcpStream::connect(server).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("setting a timeout");
        *line = BufReader::new(stream);
        assert_eq!(ask(line, "/"), "hello");
    };
    Clients::start(20, port, |_| {}, talk).under_moves(&row, &program);
}

type Line = BufReader<TcpStream>;

fn tell(line: &mut Line, text: &str) {
    line.get_mut().write_all(text.as_bytes()).expect("asking");
}

fn hear(line: &mut Line) -> String {
    let mut text = String::new();
    line.read_line(&mut text).expect("an answer");
    text
}

fn port_of(program: &Program) -> u16 {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match fs::read_to_string(program.file("port")) {
            Ok(port) => return port.parse().expect("a port"),
            Err(error) => assert!(Instant::now() < end, "no port: {error}"),
        }
        sleep(Duration::from_millis(5));
    }
}

/// Each line comes back, with its number before it.
fn counted(line: &mut Line, n: u64) {
    tell(line, &format!("line {n}\n"));
    assert_eq!(hear(line), format!("{n} line {n}\n"));
}

/// A process for each connection.
fn forking(row: &Row) {
    let program = Workload::new("servers.py", "forking").with(Claim::Ports).start();
    Clients::start(8, port_of(&program), |_| {}, counted).under_moves(&kept(row), &program);
}

/// A shell at a terminal for each connection: what is typed comes back, then what it is answered with.
fn terminal(row: &Row) {
    let workload = Workload::new("servers.py", "terminal").with(Claim::Ports).with(Claim::Terminals);
    let program = workload.start();
    let talk = |line: &mut Line, n: u64| {
        tell(line, &format!("{n}\n"));
        assert_eq!(hear(line), format!("{n}\r\n"));
        assert_eq!(hear(line), format!("square {} of {n}\r\n", n * n));
    };
    Clients::start(4, port_of(&program), |_| {}, talk).under_moves(&kept(row), &program);
}

/// Upgraded connections, and others by keep-alive.
fn node(row: &Row) {
    let script = e2e::workload::workloads().join("live.js");
    let words = ["/usr/bin/node", script.to_str().expect("a path"), "port"];
    let program = Workload::program(&words).with(Claim::Ports).start();
    let port = port_of(&program);
    let mut asking = BufReader::new(connect(port));
    assert_eq!(ask(&mut asking, "/"), "1 0");
    let upgrade = |line: &mut Line| {
        tell(line, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: lines\r\n\r\n");
        assert!(hear(line).contains("101"), "the connection was not upgraded");
        while hear(line) != "\r\n" {}
    };
    Clients::start(20, port, upgrade, counted).under_moves(&kept(row), &program);
    assert!(ask(&mut asking, "/").starts_with("2 "), "the connection that was there from the beginning");
}

rows! {
    redis_under_load => redis;
    nginx_with_keepalive => nginx;
    nginx_under_new_clients => nginx_with_new_clients;
    process_for_each_client => forking;
    terminal_for_each_client => terminal;
    node_with_live_clients => node;
}
