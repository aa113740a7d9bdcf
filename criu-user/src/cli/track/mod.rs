//! `criu-ebpf track`.

mod command;
mod dumper;
mod group;
mod panels;
mod screen;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::HumanBytes;
use nix::errno::Errno;
use nix::unistd::{Pid, setsid};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::metrics::TrackMetrics;
use super::{Outcome, say};
use crate::kernel::fd;
use crate::kernel::pidfd::PidFd;
use crate::track::TrackError;
use crate::track::client::{self, Client, Started};
use crate::track::method::Method;
use crate::track::report::Report;
use crate::track::session::{End, Session, SessionOptions, Signals};
use crate::track::tree::roots_in;
use crate::track::wire;

#[derive(Debug, Args)]
pub(super) struct TrackArgs {
    /// Root of the process tree
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..),
          required_unless_present_any = ["list", "stop", "command", "cgroup"], conflicts_with = "command")]
    pid: Option<i32>,
    /// Start this command and track it from its first instruction; ends with its status
    #[arg(value_name = "COMMAND", last = true, conflicts_with_all = ["list", "stop", "detach"])]
    command: Vec<OsString>,
    /// Track the trees that are in this control group (its directory), and those that come into it
    #[arg(long, value_name = "DIR", conflicts_with_all = ["pid", "list", "stop", "command"])]
    cgroup: Option<PathBuf>,
    /// Go on in the background
    #[arg(short = 'd', long)]
    detach: bool,
    /// Milliseconds between looks at the memory; more where looking would cost the program too much
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=10_000))]
    interval: u64,
    /// Print a line of JSON each interval; with a command, to standard error
    #[arg(long)]
    json: bool,
    /// Where dumps and pre-dumps go that are asked for on the screen [default: track-PID-N in the working directory]
    #[arg(short = 'D', long, value_name = "DIR")]
    images_dir: Option<PathBuf>,
    /// A further option for dumps that are asked for on the screen, such as --tcp-established
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    dump_option: Vec<OsString>,
    /// List the trees that are tracked
    #[arg(long, conflicts_with_all = ["pid", "stop"])]
    list: bool,
    /// End the session that tracks this tree
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..), conflicts_with = "pid")]
    stop: Option<i32>,
    /// What tells which pages were written; METHOD is auto, uffd or soft-dirty
    #[arg(long, value_name = "METHOD", value_enum, default_value_t = Method::Auto, hide_possible_values = true)]
    track_mem: Method,
    /// Do without eBPF programs
    #[arg(long)]
    no_ebpf: bool,
    #[command(flatten)]
    metrics: TrackMetrics,
    /// Be the session in the background
    #[arg(long, hide = true)]
    serve: bool,
    /// Stay in the background for trees that come into the control group
    #[arg(long, hide = true, requires = "cgroup")]
    keep: bool,
    /// End with this process
    #[arg(long, hide = true, value_name = "PID", requires = "serve")]
    with: Option<i32>,
    /// Wait for a byte at this descriptor, then become the command
    #[arg(long, hide = true, value_name = "FD", requires = "command")]
    exec_after: Option<i32>,
}

pub(super) fn run(args: TrackArgs) -> Outcome {
    if let Some(number) = args.exec_after {
        return command::exec_after(number, &args.command);
    }
    if args.list {
        return list(args.json);
    }
    if let Some(pid) = args.stop {
        return stop(Pid::from_raw(pid));
    }
    if !args.command.is_empty() {
        return command::run(&args);
    }
    let root = match &args.cgroup {
        Some(dir) if args.keep => return group::keep(dir, &args),
        Some(dir) if args.detach => return group::detach(dir, &args),
        Some(dir) => match roots_in(dir)?[..] {
            // The screen has room for one.
            [root] if is_on_screen(&args) => root,
            _ => return group::run(dir, &args),
        },
        None => Pid::from_raw(args.pid.unwrap_or_default()),
    };
    if args.detach {
        begin_in_background(root, &args, &[])?;
        return Ok(ExitCode::SUCCESS);
    }
    if !args.serve
        && let Some(client) = Client::connect(root)?
    {
        args.metrics.refuse_for(root)?;
        return attach(client, root, &args);
    }
    let end = runtime(root)?.block_on(async {
        if args.serve {
            return serve(root, &args).await;
        }
        let session = Session::begin(args.options(root)?)?;
        let reports = session.reports();
        session.run(show(reports, root, &args)).await
    })?;
    if end == End::Tree && is_on_screen(&args) {
        say(format_args!("the tree of process {root} has ended"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Is the session in the background, if there is none yet, and tells whoever has started it.
async fn serve(root: Pid, args: &TrackArgs) -> Result<End, TrackError> {
    let failed = |source| socket_failed(root, source);
    let other = match args.with.map(|pid| PidFd::open(Pid::from_raw(pid))).transpose() {
        Ok(other) => other.map(PidFd::into_async).transpose().map_err(failed)?,
        // Nobody waits for it any more.
        Err(err) if err.errno == Errno::ESRCH => return Ok(End::Stopped),
        Err(err) => return Err(failed(err.errno.into())),
    };
    let session = match Session::begin(args.options(root)?) {
        Err(TrackError::Tracked { .. }) => {
            answer(client::TRACKED).map_err(failed)?;
            return Ok(End::Stopped);
        }
        begun => begun?,
    };
    go_to_the_background().map_err(failed)?;
    match other {
        Some(other) => session.run(async { drop(other.readable().await) }).await,
        None => session.run(std::future::pending()).await,
    }
}

/// Starts a session in the background, unless there is one; `None` then.
fn begin_in_background(root: Pid, args: &TrackArgs, further: &[OsString]) -> Result<Option<Started>, TrackError> {
    if Client::connect(root)?.is_some() {
        args.metrics.refuse_for(root)?;
        return Ok(None);
    }
    let started = client::start(root, &[&session_words(args)?, further].concat())?;
    if started == Started::Other {
        args.metrics.refuse_for(root)?;
    }
    Ok(Some(started))
}

/// The options of a session that is started by another process.
fn session_words(args: &TrackArgs) -> Result<Vec<OsString>, TrackError> {
    let mut words: Vec<OsString> = vec!["--interval".into(), args.interval.to_string().into()];
    words.extend(args.no_ebpf.then(|| "--no-ebpf".into()));
    words.extend(args.track_mem.words());
    words.extend(args.metrics.words().map_err(|source| socket_failed(Pid::this(), source))?);
    Ok(words)
}

impl TrackArgs {
    fn options(&self, root: Pid) -> Result<SessionOptions, TrackError> {
        Ok(SessionOptions {
            root,
            interval: Duration::from_millis(self.interval),
            method: self.track_mem,
            ebpf: !self.no_ebpf,
            signals: if self.command.is_empty() { Signals::End } else { Signals::Elsewhere },
            ends_with: self.with,
            metrics: self.metrics.options().map_err(|source| socket_failed(root, source))?,
        })
    }
}

fn socket_failed(root: Pid, source: std::io::Error) -> TrackError {
    TrackError::Socket { path: wire::socket_path(root), source }
}

fn runtime(root: Pid) -> Result<Runtime, TrackError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|source| socket_failed(root, source))
}

fn is_on_screen(args: &TrackArgs) -> bool {
    !args.json && !args.serve && std::io::stdout().is_terminal() && std::io::stdin().is_terminal()
}

/// Shows reports until there are no more, or the user has seen enough.
async fn show(mut reports: watch::Receiver<Report>, root: Pid, args: &TrackArgs) {
    if is_on_screen(args) {
        let dumper = dumper::Dumper::new(root, args.images_dir.clone(), args.dump_option.clone());
        if let Err(err) = screen::run(&mut reports, dumper).await {
            eprintln!("criu-ebpf: no screen ({err}); lines instead");
        } else {
            return;
        }
    }
    while reports.changed().await.is_ok() {
        print(&reports.borrow_and_update(), args.json);
    }
}

/// Lets go of all that is of whoever started the session, when he knows that it is there.
fn go_to_the_background() -> std::io::Result<()> {
    // Fails where the session is a group leader already: then it is on its own as well.
    let _ = setsid();
    std::env::set_current_dir("/")?;
    answer(client::READY)?;
    fd::close_standard().map_err(|err| err.errno.into())
}

/// Tells whoever started the session what came of it.
fn answer(word: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    out.write_all(word.as_bytes())?;
    out.flush()
}

/// Shows the reports of a session that somebody else has started.
fn attach(mut client: Client, root: Pid, args: &TrackArgs) -> Outcome {
    client.follow()?;
    let (sender, reports) = watch::channel(Report::default());
    // The client blocks; it ends with the session, or with this process.
    let reader = std::thread::spawn(move || -> Result<(), TrackError> {
        while let Some(report) = client.next_report()? {
            if sender.send(report).is_err() {
                break;
            }
        }
        Ok(())
    });
    runtime(root)?.block_on(show(reports, root, args));
    if !reader.is_finished() {
        return Ok(ExitCode::SUCCESS);
    }
    if let Ok(outcome) = reader.join() {
        outcome?;
    }
    if is_on_screen(args) {
        say(format_args!("the session of process {root} has ended"));
    }
    Ok(ExitCode::SUCCESS)
}

fn line(report: &Report) -> String {
    let refusals = report.refusals.iter().filter(|refusal| refusal.option.is_none()).count();
    format!(
        "{} processes, {} of memory; written {}/s, {} since the last image; working set {}; a dump now would freeze for {:.1} ms{}",
        report.processes.len(),
        HumanBytes(report.memory_bytes),
        HumanBytes(report.written_bytes_per_second),
        HumanBytes(report.pending_bytes),
        HumanBytes(report.working_set_bytes),
        report.predicted_freeze_us as f64 / 1e3,
        if refusals == 0 { String::new() } else { format!(", and be refused for {refusals} reasons") },
    )
}

fn print(report: &Report, json: bool) {
    if json {
        if let Ok(line) = serde_json::to_string(report) {
            say(line);
        }
        return;
    }
    say(line(report));
}

fn list(json: bool) -> Outcome {
    let reports: Vec<Report> = wire::roots()
        .into_iter()
        // A session that was killed leaves its socket.
        .filter_map(|root| Client::connect(root).ok().flatten()?.report().ok())
        .collect();
    if json {
        say(serde_json::to_string(&reports)?);
        return Ok(ExitCode::SUCCESS);
    }
    for report in reports {
        let comm = report.processes.first().map_or("", |process| process.comm.as_str());
        say(format_args!(
            "{} ({comm}): {} processes, {} of memory, tracked by process {} with {} looks",
            report.pid,
            report.processes.len(),
            HumanBytes(report.memory_bytes),
            report.session,
            report.looks,
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn stop(root: Pid) -> Outcome {
    Client::connect(root)?.ok_or(TrackError::NoSession { pid: root.as_raw() })?.stop()?;
    Ok(ExitCode::SUCCESS)
}
