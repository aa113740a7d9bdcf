//! Real, unmodified programs, each driven by a client before and after, over and over.
//!
//! `E2E_CYCLES` says how often each is dumped and restored (3 times if it does not, and what has a gigabyte once).

use std::{
    env, fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use e2e::{Claim, Program, Row, Workload, proc, reaper, rows, workload_rows};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

workload_rows! { "pools.py";
    processes
    threads
    subprocesses
    event_loop
    semaphores
}

/// How often each program is dumped and restored.
fn cycles() -> u32 {
    cycles_or(3)
}

fn cycles_or(unsaid: u32) -> u32 {
    env::var("E2E_CYCLES").map_or(unsaid, |text| text.parse().expect("E2E_CYCLES is a number"))
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("binding a port");
    listener.local_addr().expect("its address").port()
}

/// Asks until there is an answer.
fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a request and gives back all that comes until the server closes.
fn ask(port: u16, request: &str) -> Option<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("setting a timeout");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// The body of what an HTTP server answers.
fn http(port: u16, path: &str) -> Option<String> {
    let answer = ask(port, &format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n"))?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.contains(" 200 ").then(|| body.to_owned())
}

/// One command to redis, and what it says.
fn redis(port: u16, command: &str) -> Option<String> {
    let answer = ask(port, &format!("{command}\r\nQUIT\r\n"))?;
    Some(answer.trim_end_matches("+OK\r\n").trim().to_owned())
}

/// Waits until a server has taken note that its clients are gone: a connection would be dumped as well.
fn without_connections(program: &Program) {
    eventually("the connections to be closed", || {
        let tcp = fs::read_to_string("/proc/net/tcp").ok()?;
        let of_program = |inode: &str| {
            let wanted = format!("socket:[{inode}]");
            program.tree().iter().any(|&pid| proc::descriptors(pid).values().any(|link| *link == Path::new(&wanted)))
        };
        let words = tcp.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        let mut open = words.filter(|words| words[3] != "0A" && words[9] != "0");
        (!open.any(|words| of_program(words[9]))).then_some(())
    });
}

/// redis with so many keys of so many bytes.
fn start_redis(keys: u32, size: u32) -> (Program, u16) {
    let port = free_port();
    let port_word = port.to_string();
    // An empty `--save` switches snapshots off.
    let options =
        ["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--enable-debug-command", "yes", "--dir", "."];
    let words = [&["/usr/bin/redis-server", "--port", &port_word][..], &options].concat();
    let program = Workload::program(&words).with(Claim::Ports).start();
    eventually("redis", || redis(port, "PING").filter(|answer| answer == "+PONG"));
    redis(port, &format!("DEBUG POPULATE {keys} key {size}")).expect("filling redis");
    (program, port)
}

/// Has redis start a child that writes a snapshot, with so many microseconds for each key.
fn start_saving(program: &Program, port: u16, delay: u32) {
    redis(port, &format!("CONFIG SET rdb-key-save-delay {delay}")).expect("slowing the child down");
    // It is started by a timer: one that a client asked for would have that client's connection open.
    redis(port, "CONFIG SET save \"1 1\"").expect("asking for snapshots");
    redis(port, "SET one more").expect("changing something");
    eventually("the child", || (program.tree().len() == 2).then_some(()));
}

/// A gigabyte, while it appends to its log, and while a child writes a snapshot for longer than all of this takes.
fn redis_keeps_its_data(row: &Row) {
    let (program, port) = start_redis(256 << 10, 4096);
    start_saving(&program, port, 10_000);
    let digest = redis(port, "DEBUG DIGEST").expect("a digest");
    for number in 0..cycles_or(1) {
        without_connections(&program);
        let images = row.dump(&program);
        row.restore(&program, &images);
        // Two gigabytes each.
        fs::remove_dir_all(images).expect("removing images");
        assert_eq!(redis(port, "DEBUG DIGEST").as_deref(), Some(&*digest), "the data changed");
        redis(port, &format!("SET extra {number}")).expect("writing");
        assert_eq!(redis(port, "GET extra"), Some(format!("${}\r\n{number}", number.to_string().len())));
        redis(port, "DEL extra").expect("deleting");
        let (tree, log) = (program.tree(), fs::read_to_string(program.file("out")).unwrap_or_default());
        assert_eq!(tree.len(), 2, "its child is gone in round {number}: {tree:?}\n{log}");
    }
    // Else it would write another snapshot before it ends.
    redis(port, "CONFIG SET save \"\"").expect("no more snapshots");
    kill(Pid::from_raw(program.pid()), Signal::SIGTERM).expect("SIGTERM");
    assert!(matches!(program.wait_exit(), nix::sys::wait::WaitStatus::Exited(_, 0)), "it does not end well");
}

/// While a child of redis writes a snapshot: it goes on writing, and its parent hears of its end.
fn redis_while_saving(row: &Row) {
    let (program, port) = start_redis(20_000, 200);
    // Four seconds in all.
    start_saving(&program, port, 200);
    without_connections(&program);
    row.cycle(&program);
    let info = eventually("the child's end", || {
        redis(port, "INFO persistence").filter(|info| info.contains("rdb_bgsave_in_progress:0"))
    });
    assert!(info.contains("rdb_last_bgsave_status:ok"), "{info}");
    assert!(fs::metadata(program.file("dump.rdb")).is_ok_and(|meta| meta.len() > 100_000), "no snapshot");
}

/// Master and workers of another user; its logs are rotated afterwards.
fn nginx(row: &Row) {
    let port = free_port();
    let start = |command: &mut std::process::Command, dir: &Path| {
        let conf = format!(
            "user nobody nogroup;\nworker_processes 4;\ndaemon off;\npid {0}/nginx.pid;\nerror_log {0}/error.log;\n\
             events {{ worker_connections 64; }}\nhttp {{\n access_log {0}/access.log;\n client_body_temp_path {0}/body;\n\
             proxy_temp_path {0}/proxy;\n fastcgi_temp_path {0}/fastcgi;\n uwsgi_temp_path {0}/uwsgi;\n\
             scgi_temp_path {0}/scgi;\n server {{ listen 127.0.0.1:{port}; keepalive_timeout 0;\n\
             location / {{ return 200 \"hello\"; }} }}\n}}\n",
            dir.display()
        );
        fs::write(dir.join("nginx.conf"), conf).expect("writing nginx.conf");
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("chmod");
        let out = fs::File::create(dir.join("out")).expect("creating the output file");
        command.arg(dir.join("nginx.conf"));
        command.stdin(std::process::Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
    };
    let program =
        Program::start_with(&Workload::program(&["/usr/sbin/nginx", "-c"]).with(Claim::Ports), "setsid", start);
    let lines = |name: &str| fs::read_to_string(program.file(name)).unwrap_or_default().lines().count();
    eventually("nginx", || http(port, "/"));
    eventually("a master and four workers", || (program.tree().len() == 5).then_some(()));
    for _ in 0..cycles() {
        without_connections(&program);
        row.cycle(&program);
        for _ in 0..20 {
            assert_eq!(http(port, "/").as_deref(), Some("hello"));
        }
    }
    let before = eventually("the log", || Some(lines("access.log")).filter(|&lines| lines > 20));
    fs::rename(program.file("access.log"), program.file("access.log.1")).expect("rotating the log");
    kill(Pid::from_raw(program.pid()), Signal::SIGUSR1).expect("SIGUSR1");
    eventually("the new log", || {
        http(port, "/after-rotation");
        (lines("access.log") > 0).then_some(())
    });
    assert!(lines("access.log.1") >= before, "the old log lost lines");
    kill(Pid::from_raw(program.pid()), Signal::SIGQUIT).expect("SIGQUIT");
    assert!(matches!(program.wait_exit(), nix::sys::wait::WaitStatus::Exited(_, 0)), "it does not end well");
}

/// Timers, an HTTP server, a child and a worker thread.
fn node(row: &Row) {
    let script = e2e::workload::workloads().join("server.js");
    let program =
        Workload::program(&["/usr/bin/node", script.to_str().expect("a path"), "port"]).with(Claim::Ports).start();
    let port: u16 = eventually("node", || fs::read_to_string(program.file("port")).ok()?.parse().ok());
    let number = |answer: &str, name: &str| -> u64 {
        let (_, rest) = answer.split_once(&format!("\"{name}\":")).unwrap_or_else(|| panic!("no {name} in {answer}"));
        rest.split([',', '}']).next().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{name} in {answer}"))
    };
    let mut last = eventually("an answer", || http(port, "/"));
    for _ in 0..cycles() {
        without_connections(&program);
        let images = row.dump(&program);
        row.restore(&program, &images);
        let answer = http(port, "/").expect("an answer after the restore");
        let requests = number(&last, "requests") + 1;
        assert_eq!(number(&answer, "requests"), requests, "{answer}");
        assert_eq!(number(&answer, "square"), requests * requests, "the worker thread: {answer}");
        assert!(answer.contains(&format!("\"echo\":\"echo {requests}\"")), "the child: {answer}");
        assert!(number(&answer, "ticks") > number(&last, "ticks"), "the timer stands still: {answer}");
        last = answer;
    }
}

/// One tree over and over: what it has after each restore is what it had before, and nothing else is left over.
fn over_and_over(row: &Row) {
    let rounds = cycles().max(2);
    let mut workload = Workload::new("mixture.py", "everything").env("E2E_ROUNDS", &rounds.to_string());
    workload.claims.push(Claim::Terminals);
    let mut program = workload.start();
    for round in 1..=rounds {
        row.cycle(&program);
        if round < rounds {
            program.next();
        }
    }
    program.finish();
    let tree = program.tree();
    assert!(reaper::wait_gone(&tree, Duration::from_secs(5)).is_empty(), "processes are left over");
}

rows! {
    redis_data => redis_keeps_its_data;
    redis_saving => redis_while_saving;
    nginx_with_workers => nginx;
    node_server => node;
    mixture => over_and_over;
}
