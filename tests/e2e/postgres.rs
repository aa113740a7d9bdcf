//! PostgreSQL is moved under load: a process for each client, shared memory of three kinds, and what is written must be
//! there.
//!
//! `E2E_CYCLES` says how often it is moved (3 times if it does not).

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use e2e::{Claim, Program, Row, Workload, rows};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::WaitStatus,
    },
    unistd::Pid,
};

use crate::tcp::kept;
use crate::tcp_programs::{Client, cycles, free_port, move_once};

/// Its programs, which Debian keeps by their version.
fn binary(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL").flatten();
    let place = versions.map(|entry| entry.path()).max().expect("a version of PostgreSQL");
    place.join("bin").join(name)
}

/// A cluster of its own in the program's directory, by a user of its own: it does not run as root.
fn start(port: &str) -> Program {
    let script = "as='setpriv --reuid postgres --regid postgres --clear-groups'; chown postgres . && chmod 755 . && \
                  $as \"$0/initdb\" -D data -A trust -U postgres && \
                  exec $as \"$0/postgres\" -D data -p \"$1\" -c listen_addresses=127.0.0.1 \
                  -c unix_socket_directories= -c shared_buffers=16MB";
    let place = binary("");
    let words = ["/bin/sh", "-c", script, place.to_str().expect("a path"), port];
    let workload = Workload { name: "postgres".into(), ..Workload::program(&words) };
    Program::start_with(&workload.with(Claim::Ports), "setsid", |command: &mut Command, dir: &Path| {
        let out = File::create(dir.join("out")).expect("creating the output file");
        command.stdin(Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
    })
}

/// `psql` and its options.
fn psql(port: &str) -> Command {
    let mut psql = Command::new(binary("psql"));
    psql.args(["-X", "-q", "-A", "-t", "-h", "127.0.0.1", "-U", "postgres", "-p", port, "-v", "ON_ERROR_STOP=1"]);
    psql
}

/// What a client that comes now is answered.
fn ask(port: &str, question: &str) -> Option<String> {
    let output = psql(port).args(["-c", question]).output().expect("starting psql");
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn number(port: &str, question: &str) -> u64 {
    let said = ask(port, question).expect("an answer");
    said.parse().unwrap_or_else(|error| panic!("{question}: {error}: {said}"))
}

/// A client that stays.
struct Session {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Session {
    fn start(port: &str) -> Self {
        let mut child = psql(port).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("starting psql");
        let (to, from) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        Self { child, to, from: BufReader::new(from) }
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.to, "{question}").expect("asking");
        let mut line = String::new();
        self.from.read_line(&mut line).expect("an answer");
        line.trim().to_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn under_load(row: &Row) {
    let row = kept(row);
    let port = free_port().to_string();
    let program = start(&port);
    let end = Instant::now() + Duration::from_secs(60);
    while ask(&port, "select 1").as_deref() != Some("1") {
        let out = fs::read_to_string(program.file("out")).unwrap_or_default();
        assert!(Instant::now() < end, "it does not come up: {out}");
        sleep(Duration::from_millis(50));
    }
    let bench = binary("pgbench");
    let common = [bench.to_str().expect("a path"), "-h", "127.0.0.1", "-U", "postgres", "-p", &port];
    let made = Command::new(common[0]).args(&common[1..]).args(["-q", "-i", "postgres"]).output().expect("pgbench");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // A transaction that is open all the while, with what only this client sees.
    let mut session = Session::start(&port);
    assert_eq!(session.ask("begin; create temp table mine as select generate_series(1, 1000) as n; select 7;"), "7");
    let out = program.file("bench");
    let mut load =
        Client::start(&[&common[..], &["-c", "8", "-j", "2", "-T", "600", "postgres"]].concat(), "pgbench", &out);
    const DONE: &str = "select count(*) from pgbench_history";
    for n in 0..cycles() {
        sleep(Duration::from_millis(300));
        let before = number(&port, DONE);
        move_once(&row, &program);
        load.expect_alive();
        let end = Instant::now() + Duration::from_secs(30);
        while number(&port, DONE) < before + 50 {
            assert!(Instant::now() < end, "the clients do nothing any more");
            sleep(Duration::from_millis(10));
        }
        assert_eq!(session.ask(&format!("update mine set n = n + 1; select sum(n) - {n} * 1000 from mine;")), "501500");
    }
    load.expect_alive();
    let said = fs::read_to_string(&out).unwrap_or_default();
    assert!(!said.contains("rror"), "pgbench: {said}");
    drop(load);
    assert_eq!(session.ask("commit; select count(*) from mine;"), "1000");
    const AGREE: &str = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
                         and (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history)";
    assert_eq!(ask(&port, AGREE).as_deref(), Some("t"), "the books are wrong");
    // It ends well, with all that belongs to it.
    kill(Pid::from_raw(program.pid()), Signal::SIGINT).expect("SIGINT");
    assert!(matches!(program.wait_exit(), WaitStatus::Exited(_, 0)), "it does not end well");
    let log = fs::read_to_string(program.file("out")).expect("its log");
    assert!(log.trim_end().ends_with("database system is shut down"), "{log}");
    for word in ["PANIC", "FATAL:  could", "ERROR:  could", "terminated by signal"] {
        assert!(!log.contains(word), "{log}");
    }
}

rows! {
    under_load => under_load;
}
