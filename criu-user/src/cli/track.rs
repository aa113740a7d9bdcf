//! `criu-ebpf track`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::HumanBytes;
use nix::unistd::{Pid, setsid};

use super::metrics::TrackMetrics;
use super::{Outcome, say};
use crate::kernel::fd;
use crate::track::TrackError;
use crate::track::client::{self, Client};
use crate::track::report::Report;
use crate::track::session::{Session, SessionOptions};
use crate::track::wire;

#[derive(Debug, Args)]
pub(super) struct TrackArgs {
    /// Root of the process tree
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..),
          required_unless_present_any = ["list", "stop"])]
    pid: Option<i32>,
    /// Go on in the background
    #[arg(short = 'd', long)]
    detach: bool,
    /// Milliseconds between looks at the memory; more where looking would cost the program too much
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=10_000))]
    interval: u64,
    /// Print a line of JSON each interval
    #[arg(long)]
    json: bool,
    /// List the trees that are tracked
    #[arg(long, conflicts_with_all = ["pid", "stop"])]
    list: bool,
    /// End the session that tracks this tree
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..), conflicts_with = "pid")]
    stop: Option<i32>,
    /// Do without eBPF programs
    #[arg(long)]
    no_ebpf: bool,
    #[command(flatten)]
    metrics: TrackMetrics,
    /// Be the session in the background
    #[arg(long, hide = true)]
    serve: bool,
}

pub(super) fn run(args: TrackArgs) -> Outcome {
    if args.list {
        return list(args.json);
    }
    if let Some(pid) = args.stop {
        return stop(Pid::from_raw(pid));
    }
    let root = Pid::from_raw(args.pid.unwrap_or_default());
    let failed = |source| TrackError::Socket { path: wire::socket_path(root), source };
    if args.detach {
        if Client::connect(root)?.is_some() {
            args.metrics.refuse_for(root)?;
        } else {
            let mut words = vec!["--interval".into(), args.interval.to_string().into()];
            words.extend(args.no_ebpf.then(|| "--no-ebpf".into()));
            words.extend(args.metrics.words().map_err(failed)?);
            client::start(root, &words)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !args.serve
        && let Some(client) = Client::connect(root)?
    {
        args.metrics.refuse_for(root)?;
        return attach(client, args.json);
    }
    let metrics = args.metrics.options().map_err(failed)?;
    let options = SessionOptions { root, interval: Duration::from_millis(args.interval), ebpf: !args.no_ebpf, metrics };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let session = Session::begin(options)?;
        if args.serve {
            go_to_the_background().map_err(failed)?;
            return session.run(std::future::pending()).await;
        }
        let mut reports = session.reports();
        let json = args.json;
        session
            .run(async move {
                while reports.changed().await.is_ok() {
                    print(&reports.borrow_and_update(), json);
                }
            })
            .await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Tells whoever started the session that it is there, and lets go of what is his.
fn go_to_the_background() -> std::io::Result<()> {
    // Fails where the session is a group leader already: then it is on its own as well.
    let _ = setsid();
    std::env::set_current_dir("/")?;
    let mut out = std::io::stdout();
    out.write_all(client::READY.as_bytes())?;
    out.flush()?;
    fd::close_standard().map_err(|err| err.errno.into())
}

/// Shows the reports of a session that somebody else has started.
fn attach(mut client: Client, json: bool) -> Outcome {
    client.follow()?;
    while let Some(report) = client.next_report()? {
        print(&report, json);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(report: &Report, json: bool) {
    if json {
        if let Ok(line) = serde_json::to_string(report) {
            say(line);
        }
        return;
    }
    say(format_args!(
        "{} processes, {} of memory; written {}/s, {} since the last image; working set {}; a dump now would freeze for {:.1} ms",
        report.processes.len(),
        HumanBytes(report.memory_bytes),
        HumanBytes(report.written_bytes_per_second),
        HumanBytes(report.pending_bytes),
        HumanBytes(report.working_set_bytes),
        report.predicted_freeze_us as f64 / 1e3,
    ));
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
    let mut client = Client::connect(root)?.ok_or(TrackError::NoSession { pid: root.as_raw() })?;
    client.stop()?;
    // Its connections end with it.
    while let Ok(Some(_)) = client.next_report() {}
    Ok(ExitCode::SUCCESS)
}
