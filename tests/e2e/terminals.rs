//! Pseudo-terminals.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Write},
    os::fd::OwnedFd,
    thread::sleep,
    time::{Duration, Instant},
};

use e2e::{Claim, Options, Program, Row, Workload, proc, reaper::POLL, rows, workload_rows};
use nix::{
    pty::{OpenptyResult, openpty},
    sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
};

workload_rows! { "terminals.py";
    pair
    buffered
    buffered_lines
    several
    only_master
    session
    hang_up
    packet_mode
    between_processes
    controlling
    restricted
    never_opened
    hung_up
    full
    no_terminal
}

/// A program on a terminal of ours, as a shell has one. Both ends are given back: with the slave open here, the pair
/// outlives the program.
fn on_terminal(workload: &Workload) -> (Program, File, OwnedFd) {
    let OpenptyResult { master, slave } = openpty(None, None).expect("openpty");
    let mut mode = tcgetattr(&slave).expect("tcgetattr");
    cfmakeraw(&mut mode);
    tcsetattr(&slave, SetArg::TCSANOW, &mode).expect("tcsetattr");
    let program = Program::start_with(workload, "setsid -c", |command, _| {
        let end = || slave.try_clone().expect("dup");
        command.stdin(end()).stdout(end()).stderr(end());
    });
    (program, File::from(master), slave)
}

/// What people do: a job in an interactive shell is dumped from outside, and the shell is told to restore it.
fn job_of_a_shell(row: &Row) {
    let shell = Workload::program(&["/bin/bash", "--norc", "--noediting", "-i"]).with(Claim::Terminals);
    let (shell, mut terminal, _slave) = on_terminal(&shell);
    let job = Workload::new("terminals.py", "from_shell").command.join(OsStr::new(" "));
    writeln!(terminal, "{}", job.display()).expect("typing");
    shell.wait_for_word("ready 1");
    let pid = proc::children(shell.pid())[0];
    let mut job = shell.part(pid);

    let row = row.with(Options::both(&["--shell-job"]));
    let images = row.next_images(&shell);
    row.dumper.dump(&job, &images, &row.options).expect_success();
    let reaped_by_shell = Instant::now();
    while proc::exists(pid) {
        assert!(reaped_by_shell.elapsed() < Duration::from_secs(10), "still there after the dump: {pid}");
        sleep(POLL);
    }

    let words = row.restorer.restore_words(&images, &row.options).join(OsStr::new(" "));
    writeln!(terminal, "{} {}; echo status $?", row.restorer.binary().display(), words.display()).expect("typing");
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("status ") {
        let mut part = [0; 1000];
        let length = terminal.read(&mut part).expect("reading from the terminal");
        said.extend(&part[..length]);
    }
    let said = String::from_utf8_lossy(&said).into_owned();
    let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    assert!(said.contains("status 0"), "{said}\n{log}");
    assert_eq!(proc::stat(pid).map(|(_, numbers)| numbers[2]), Some(i64::from(shell.pid())), "not the shell's session");
    job.finish();
}

rows! {
    /// One of its jobs starts a new process all the time.
    shell => |row| row.check_from_inside(&Workload::new("terminals.py", "shell"));
    /// Started from a shell, whose terminal's master is outside of the tree: refused unless `--shell-job` is given.
    shell_job_unasked => |row| {
        let workload = Workload::new("terminals.py", "from_shell");
        let (mut program, mut master, _slave) = on_terminal(&workload);
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_refusal("shell-job");
        program.finish();
        master.write_all(b"x").expect("the terminal still works");
    };

    with_shell_job => job_of_a_shell;

    /// The machine's console is nobody's to take along.
    console => |row| row.refused(&Workload::new("terminals.py", "console"), "terminal of this machine");
}

mod interop {
    e2e::interop_rows! { "terminals.py"; pair buffered between_processes }
}
