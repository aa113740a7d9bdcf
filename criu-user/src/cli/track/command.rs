//! `track -- COMMAND`: a command that is tracked from its first instruction.
//!
//! It is this program first, which waits at a pipe until it is tracked, and then becomes the command: nobody has to trace
//! it. It has a process group of its own and, where there is one, the terminal, as a shell would have it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Read, Write, pipe, stdin};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{SigSet, Signal, kill, killpg, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, tcsetpgrp};
use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

use super::{Outcome, TrackArgs, runtime, socket_failed};
use crate::cli::error::CliError;
use crate::kernel::error::During;
use crate::kernel::fd;
use crate::track::TrackError;
use crate::track::session::Session;

/// As a shell says it.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
/// Added to the number of the signal that a command died of.
const BY_SIGNAL: i32 = 128;

/// Signals that are the command's, not ours.
const FORWARDED: [(SignalKind, Signal); 4] = [
    (SignalKind::interrupt(), Signal::SIGINT),
    (SignalKind::terminate(), Signal::SIGTERM),
    (SignalKind::hangup(), Signal::SIGHUP),
    (SignalKind::quit(), Signal::SIGQUIT),
];

/// Starts the command, and tracks it until it ends.
pub(super) fn run(args: &TrackArgs) -> Outcome {
    let (wait, mut go) = pipe().during("pipe", "the command")?;
    // The only descriptor that it gets besides the standard ones; it closes it when it becomes the command.
    fcntl(&wait, FcntlArg::F_SETFD(FdFlag::empty())).during("fcntl", "the command's pipe")?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["track", "--exec-after"]).arg(wait.as_raw_fd().to_string()).arg("--").args(&args.command);
    let child = command.process_group(0).spawn().during("start", "the command")?;
    drop(wait);
    let child = Pid::from_raw(child.id() as i32);
    let terminal = Terminal::give_to(child);
    let runtime = runtime(child)?;
    let status = runtime.block_on(async {
        let mut signals = Arrivals::new(child)?;
        let session = Session::begin(args.options(child)?)?;
        let mut reports = session.reports();
        go.write_all(&[0]).map_err(|source| socket_failed(child, source))?;
        drop(go);
        let json = args.json;
        let print = async move {
            while reports.changed().await.is_ok() {
                if let Ok(line) = serde_json::to_string(&*reports.borrow_and_update())
                    && json
                {
                    eprintln!("{line}");
                }
            }
        };
        let mut status = None;
        let beside = async {
            tokio::select! {
                ended = wait_for(child, &mut signals, &terminal) => status = Some(ended),
                () = print => {}
            }
        };
        session.run(beside).await?;
        // The session may have been ended by somebody: the command goes on.
        match status {
            Some(status) => Ok(status),
            None => Ok::<_, CliError>(wait_for(child, &mut signals, &terminal).await),
        }
    });
    drop(terminal);
    if status.is_err() {
        // It was not tracked, and has not begun.
        let _ = kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
    }
    status
}

/// Signals that arrive here.
struct Arrivals {
    child: Stream,
    forwarded: Vec<(Stream, Signal)>,
}

impl Arrivals {
    fn new(child: Pid) -> Result<Self, TrackError> {
        let listen = |kind| signal(kind).map_err(|source| socket_failed(child, source));
        let forwarded = FORWARDED.iter().map(|&(kind, number)| Ok((listen(kind)?, number)));
        Ok(Self { child: listen(SignalKind::child())?, forwarded: forwarded.collect::<Result<_, TrackError>>()? })
    }

    /// The next one that is to be passed on; `None` for news of the child.
    async fn next(&mut self) -> Option<Signal> {
        let [(int, a), (term, b), (hup, c), (quit, d)] = &mut self.forwarded[..] else { return None };
        tokio::select! {
            _ = self.child.recv() => None,
            _ = int.recv() => Some(*a),
            _ = term.recv() => Some(*b),
            _ = hup.recv() => Some(*c),
            _ = quit.recv() => Some(*d),
        }
    }
}

/// Waits until the command has ended, and passes on to it what is meant for it.
async fn wait_for(child: Pid, signals: &mut Arrivals, terminal: &Terminal) -> ExitCode {
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Exited(_, code)) => return ExitCode::from(code as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => return ExitCode::from((BY_SIGNAL + signal as i32) as u8),
            Ok(WaitStatus::Stopped(..)) => terminal.stop_with(child),
            Ok(_) => {}
            Err(_) => return ExitCode::FAILURE,
        }
        if let Some(signal) = signals.next().await {
            // It may have ended just now.
            let _ = killpg(child, signal);
        }
    }
}

/// The terminal, lent to the command.
struct Terminal {
    is_lent: bool,
}

impl Terminal {
    fn give_to(group: Pid) -> Self {
        let terminal = Self { is_lent: stdin().is_terminal() };
        terminal.set(group);
        terminal
    }

    fn set(&self, group: Pid) {
        if !self.is_lent {
            return;
        }
        // Whoever is in the background may do this if he blocks the signal that it makes.
        let mut block = SigSet::empty();
        block.add(Signal::SIGTTOU);
        let before = SigSet::thread_get_mask();
        if block.thread_block().is_ok() {
            let _ = tcsetpgrp(stdin(), group);
            let _ = before.and_then(|mask| mask.thread_set_mask());
        }
    }

    /// The command was stopped at the terminal: so are we, that the shell can go on, until both are continued.
    fn stop_with(&self, child: Pid) {
        if !self.is_lent {
            return;
        }
        self.set(getpgrp());
        if raise(Signal::SIGSTOP).is_ok() {
            self.set(child);
            let _ = killpg(child, Signal::SIGCONT);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.set(getpgrp());
    }
}

/// Waits for a byte, then becomes the command.
pub(super) fn exec_after(number: i32, words: &[OsString]) -> Outcome {
    let mut go = File::from(fd::inherited(number)?);
    nix::unistd::close(number).during("close", "the tracker's pipe")?;
    let mut byte = [0];
    if go.read(&mut byte).during("read", "the tracker's pipe")? == 0 {
        // The tracker has said why.
        return Ok(ExitCode::FAILURE);
    }
    let Some((program, arguments)) = words.split_first() else { return Ok(ExitCode::FAILURE) };
    let error = Command::new(program).args(arguments).exec();
    eprintln!("criu-ebpf: {}: {error}", program.display());
    let is_missing = error.raw_os_error() == Some(Errno::ENOENT as i32);
    Ok(ExitCode::from(if is_missing { NOT_FOUND } else { NOT_EXECUTABLE }))
}
