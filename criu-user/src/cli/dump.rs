//! `criu-ebpf dump`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::HumanBytes;
use nix::unistd::Pid;

use super::common::Common;
use super::error::CliError;
use super::metrics::CommandMetrics;
use super::progress::Progress;
use super::scripts::Scripts;
use super::status::StatusFd;
use super::watcher::Watcher;
use super::{Outcome, log, say};
use crate::dump::{self, DumpOptions, Summary};
use crate::freeze::Release;
use crate::head_start;
use crate::image::{self, ImageDir, Lasting};
use crate::kernel::survey::PAGE;
use crate::kernel::survey_cache::Caching;
use crate::kernel::surveyor::Source;
use crate::lineage::Tracking;
use crate::live::Manner;
use crate::live::round::Round;
use crate::object::cgroup::Manage;
use crate::object::outside::{External, Inherit};
use crate::object::tcp::NetworkLock;
use crate::outcome;
use crate::predump::{self, PreDumpError, PreDumpOptions, PreDumpSummary};
use crate::rounds::{self, Rounds, Until};
use crate::track::method::Method;

#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    #[command(flatten)]
    common: Common,
    /// Root of the process tree
    #[arg(short = 't', long = "tree", value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Let the tree run on after the dump
    #[arg(short = 'R', long)]
    leave_running: bool,
    /// Freeze the tree only for its small state: its memory, as it is then, is written from copies while it runs on, or in
    /// rounds (into pre-dumps/ below --images-dir) of which the last is in the freeze
    #[arg(long, value_name = "MANNER", value_enum, num_args = 0..=1, require_equals = true,
          default_missing_value = "auto", requires = "leave_running")]
    live: Option<Manner>,
    /// Leave the tree stopped (SIGSTOP) after the dump
    #[arg(short = 's', long, conflicts_with = "leave_running")]
    leave_stopped: bool,
    /// The tree may belong to a session outside of it, such as that of the shell that started it
    #[arg(short = 'j', long)]
    shell_job: bool,
    /// Seconds after which a tree that does not come to rest is let go
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Something that belongs to somebody outside of the tree: pipe:[INODE], file[MOUNT:INODE], tty[RDEV:DEV], unix[INODE]
    #[arg(long, value_name = "RESOURCE")]
    external: Vec<External>,
    /// Something that will be given at the restore; says the same as --external
    #[arg(long, value_name = "fd[N]:RESOURCE")]
    inherit_fd: Vec<Inherit>,
    /// Dump file locks (flock, POSIX, open file description, leases); nobody outside may depend on them
    #[arg(short = 'l', long)]
    file_locks: bool,
    /// Give open files that have lost their name, but have another, one more name until the restore
    #[arg(long)]
    link_remap: bool,
    /// Largest deleted file whose content is kept, on disk; K, M and G may follow
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1M")]
    ghost_limit: u64,
    /// Leave out the holes of deleted files (always done; taken for compatibility with CRIU)
    #[arg(long)]
    ghost_fiemap: bool,
    /// Sockets may be connected to named datagram sockets outside of the tree
    #[arg(short = 'x', long)]
    ext_unix_sk: bool,
    /// Give TCP connections up: they are restored as closed sockets
    #[arg(long)]
    tcp_close: bool,
    /// Keep TCP connections: their peers notice a pause
    #[arg(long, conflicts_with = "tcp_close")]
    tcp_established: bool,
    /// Drop clients that no server has accepted yet
    #[arg(long)]
    skip_in_flight: bool,
    /// Drop requests for connections with listening sockets until the restore: clients try again later, instead of being
    /// told that nobody listens
    #[arg(long)]
    lock_listeners: bool,
    /// How the packets of connections are held until the restore
    #[arg(long, value_name = "METHOD", value_enum, default_value = "auto")]
    network_lock: NetworkLock,
    /// Where the list of areas and descriptors comes from
    #[arg(long, value_name = "SOURCE", value_enum, default_value = "auto")]
    survey: Survey,
    /// Read everything again in the freeze that was read before it, and fail if anything differs
    #[arg(long)]
    verify_cache: bool,
    /// What is done about control groups: any but ignore saves them
    #[arg(long, value_name = "MODE", value_enum, num_args = 0..=1, require_equals = true, default_value = "soft",
          default_missing_value = "soft")]
    manage_cgroups: Manage,
    /// Stop the tree by the freezer of this control group (its directory), of which the tree must be a part
    #[arg(long, value_name = "DIR")]
    freeze_cgroup: Option<PathBuf>,
    /// Bring the images to disk before the tree is killed, so that they outlast a crash of the machine; it stands still for
    /// that. Images of trees that run on, or that build on others, are brought to disk in any case
    #[arg(long)]
    sync: bool,
    #[command(flatten)]
    tracking: TrackingArgs,
    #[command(flatten)]
    moment: MomentArgs,
    #[command(flatten)]
    metrics: CommandMetrics,
}

/// When to dump.
#[derive(Debug, Args)]
struct MomentArgs {
    /// Wait for a moment in which the dump is expected to be shorter than it mostly was of late, for SECONDS at most
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "30",
          value_parser = clap::value_parser!(u64).range(1..))]
    when_quiet: Option<u64>,
    /// Pre-dump (into pre-dumps/1, 2, 3… below --images-dir) until the dump is expected to hold the tree no longer than
    /// TIME, such as 50ms; if that cannot be, do not dump
    #[arg(long, value_name = "TIME", value_parser = milliseconds)]
    max_freeze: Option<Duration>,
}

impl MomentArgs {
    /// Waits for a quiet moment, if one is asked for.
    fn await_quiet(&self, pid: Pid, method: Method) -> Result<(), CliError> {
        if let Some(seconds) = self.when_quiet
            && !rounds::wait_until_quiet(pid, method, Duration::from_secs(seconds))?
        {
            tracing::warn!(seconds, "there was no quiet moment: going on now");
        }
        Ok(())
    }

    /// Waits, and pre-dumps, as asked.
    fn await_it(&self, options: &mut DumpOptions, watcher: &Watcher) -> Result<(), CliError> {
        self.await_quiet(options.pid, options.tracking.method)?;
        let Some(limit) = self.max_freeze else { return Ok(()) };
        let base = options.images_dir.join("pre-dumps");
        std::fs::create_dir_all(&base).map_err(|source| CliError::WorkDirMake { path: base.clone(), source })?;
        options.tracking.track_mem = true;
        let mut tracking = options.tracking.clone();
        // `base` is one directory deeper than the images, from which the user's path starts.
        tracking.prev_images_dir = tracking.prev_images_dir.map(|parent| Path::new("..").join(parent));
        let pre_dumps = PreDumpOptions {
            pid: options.pid,
            work_dir: options.work_dir.clone(),
            images_dir: base,
            tracking,
            lasting: Lasting::OnDisk,
        };
        let rounds = rounds::pre_dumps(&pre_dumps, Until::Freeze(limit), watcher, &|_| {})?;
        if let Some(number) = rounds.last.as_deref().and_then(Path::file_name) {
            options.tracking.prev_images_dir = Some(Path::new("pre-dumps").join(number));
        }
        Ok(())
    }
}

/// A time in milliseconds, with a unit or none.
fn milliseconds(text: &str) -> Result<Duration, String> {
    let (digits, unit) = match text.strip_suffix("ms") {
        Some(digits) => (digits, 1),
        None => text.strip_suffix('s').map_or((text, 1), |digits| (digits, 1000)),
    };
    let number: u64 = digits.trim().parse().map_err(|e| format!("{e}; times look like 50ms or 2s"))?;
    Ok(Duration::from_millis(number.saturating_mul(unit)))
}

/// What dumps and pre-dumps are asked about memory tracking.
#[derive(Debug, Args)]
pub(super) struct TrackingArgs {
    /// Have a session track which pages are written from here on, so that the next dump can build on this one; METHOD is
    /// auto, uffd or soft-dirty
    #[arg(long, value_name = "METHOD", value_enum, num_args = 0..=1, require_equals = true,
          default_missing_value = "auto")]
    track_mem: Option<Method>,
    /// Images of the last pre-dump or dump, on which these build; a path that is not absolute starts in --images-dir
    #[arg(long, value_name = "DIR")]
    prev_images_dir: Option<PathBuf>,
    /// Free the room of pages in earlier images that these replace; those serve only later images then
    #[arg(long)]
    auto_dedup: bool,
}

impl TrackingArgs {
    /// What the engine is told; a pre-dump tracks in any case.
    fn wanted(self, always: bool) -> Tracking {
        Tracking {
            track_mem: always || self.track_mem.is_some(),
            method: self.track_mem.unwrap_or_default(),
            prev_images_dir: self.prev_images_dir,
            auto_dedup: self.auto_dedup,
        }
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Survey {
    /// eBPF where that pays
    Auto,
    /// eBPF iterators
    Ebpf,
    /// /proc
    Proc,
}

/// A number of bytes, with a unit of CRIU's behind it or none.
fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['K', 'k', 'M', 'm', 'G', 'g']) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text, ""),
    };
    let shift = match unit {
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        _ => 0,
    };
    let number: u64 = digits.parse().map_err(|e| format!("{e}; sizes look like 4096, 64K or 1M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "no file is that large".to_owned())
}

pub(super) fn run(args: DumpArgs) -> Outcome {
    args.common.make_images_dir();
    log::start(&args.common)?;
    let told = args.metrics.begin()?;
    let status = StatusFd::take(args.common.status_fd)?;
    let watcher = Watcher::new(Scripts::new(&args.common)?, Progress::new("writing memory", &args.common), None);
    let common = args.common;
    let mut options = DumpOptions {
        pid: Pid::from_raw(args.pid),
        work_dir: common.work_dir(),
        images_dir: common.images_dir.clone(),
        release: match (args.leave_running, args.leave_stopped) {
            (true, _) => Release::Resume,
            (_, true) => Release::Stop,
            _ => Release::Kill,
        },
        live: args.live,
        timeout: Duration::from_secs(args.timeout),
        shell_job: args.shell_job,
        ext_unix_sk: args.ext_unix_sk,
        tcp_close: args.tcp_close,
        tcp_established: args.tcp_established,
        skip_in_flight: args.skip_in_flight,
        lock_listeners: args.lock_listeners,
        network_lock: args.network_lock,
        manage_cgroups: args.manage_cgroups,
        freeze_cgroup: args.freeze_cgroup,
        survey: match args.survey {
            Survey::Auto => Source::Auto,
            Survey::Ebpf => Source::Ebpf,
            Survey::Proc => Source::Proc,
        },
        caching: if args.verify_cache { Caching::Verified } else { Caching::Used },
        external: args.external,
        inherit: args.inherit_fd,
        file_locks: args.file_locks,
        link_remap: args.link_remap,
        ghost_limit: args.ghost_limit,
        tracking: args.tracking.wanted(false),
        sync: args.sync,
    };
    args.moment.await_it(&mut options, &watcher).inspect_err(|_| watcher.give_up())?;
    let mut round = Round::make(&mut options, &watcher).inspect_err(|_| watcher.give_up())?;
    let result = dump::dump(&options, &watcher);
    told.run(Some(options.pid), &outcome::of_dump(&result));
    let mut summary = result.inspect_err(|_| watcher.give_up())?;
    if let Some(round) = &mut round {
        round.keep();
        summary.stopped_before = summary.stopped_before.max(round.stopped);
    }
    watcher.finish();
    if options.tracking.auto_dedup {
        if summary.pages_ahead > 0 {
            dedup(&options.images_dir.join(head_start::PLACE))?;
        }
        dedup(&options.images_dir)?;
    }
    if let Some(status) = status {
        status.report();
    }
    report(&common, &summary)?;
    Ok(ExitCode::SUCCESS)
}

/// Options of a pre-dump: those of a dump, so that whoever does both can say the same; most have a meaning only there.
#[derive(Debug, Args)]
#[command(mut_arg("max_freeze", |arg| arg.hide(true).conflicts_with("pid")))]
#[command(mut_arg("live", |arg| arg.hide(true).conflicts_with("pid")))]
pub(super) struct PreDumpArgs {
    #[command(flatten)]
    dump: DumpArgs,
    /// How pages are copied out of the running tree; both are the same here: pages are read while it runs
    #[arg(long, value_name = "MODE", value_enum, default_value = "read")]
    pre_dump_mode: PreDumpMode,
    /// Pre-dump again and again, into the directories 1, 2, 3… below --images-dir, until another round would not make the
    /// dump any shorter
    #[arg(long)]
    until_converged: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PreDumpMode {
    Read,
    Splice,
}

/// `criu-ebpf pre-dump`.
pub(super) fn pre_dump(args: PreDumpArgs) -> Outcome {
    let PreDumpArgs { dump: args, pre_dump_mode: PreDumpMode::Read | PreDumpMode::Splice, until_converged } = args;
    args.common.make_images_dir();
    log::start(&args.common)?;
    let told = args.metrics.begin()?;
    let status = StatusFd::take(args.common.status_fd)?;
    let watcher = Watcher::new(Scripts::new(&args.common)?, Progress::new("copying memory", &args.common), None);
    let options = PreDumpOptions {
        pid: Pid::from_raw(args.pid),
        work_dir: args.common.work_dir(),
        images_dir: args.common.images_dir.clone(),
        tracking: args.tracking.wanted(true),
        lasting: Lasting::OnDisk,
    };
    args.moment.await_quiet(options.pid, options.tracking.method)?;
    let tell = |result: &Result<PreDumpSummary, PreDumpError>| {
        told.run(Some(options.pid), &outcome::of_pre_dump(result));
    };
    let rounds = if until_converged {
        rounds::pre_dumps(&options, Until::Converged, &watcher, &tell).inspect_err(|_| watcher.give_up())?
    } else {
        let result = predump::pre_dump(&options, &watcher);
        tell(&result);
        Rounds::only(result.inspect_err(|_| watcher.give_up())?, &options.images_dir)
    };
    watcher.finish();
    if let Some(last) = rounds.last.as_deref().filter(|_| options.tracking.auto_dedup) {
        dedup(last)?;
    }
    if let Some(status) = status {
        status.report();
    }
    match until_converged {
        true => report_rounds(&args.common, &options, &rounds)?,
        false => report_pre_dump(&args.common, &rounds)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what a single pre-dump came to.
fn report_pre_dump(common: &Common, rounds: &Rounds) -> Result<(), CliError> {
    let Some(summary) = rounds.summaries.first() else { return Ok(()) };
    if common.json {
        say(serde_json::to_string(summary)?);
    } else if !common.quiet {
        say(format_args!(
            "pre-dumped {} processes, {} pages ({}), {} in the parent, {} left for the next; frozen for {:.1} ms, {:.1} ms in all",
            summary.processes,
            summary.pages_written,
            HumanBytes(summary.bytes_written),
            summary.pages_in_parent,
            summary.pages_skipped,
            summary.frozen.as_secs_f64() * 1e3,
            summary.total.as_secs_f64() * 1e3,
        ));
    }
    if common.display_stats && !common.json {
        say(format_args!("frozen:        {} us", summary.frozen.as_micros()));
        say(format_args!("pages scanned: {}", summary.pages_scanned));
        say(format_args!("pages written: {}", summary.pages_written));
    }
    Ok(())
}

/// Prints what rounds of pre-dumps came to.
fn report_rounds(common: &Common, options: &PreDumpOptions, rounds: &Rounds) -> Result<(), CliError> {
    let last = rounds.last.as_deref().unwrap_or(&options.images_dir);
    if common.json {
        say(serde_json::json!({
            "rounds": rounds.summaries,
            "last": last,
            "predicted_freeze_us": rounds.predicted.as_micros() as u64,
        }));
    } else if !common.quiet {
        for (n, round) in rounds.summaries.iter().enumerate() {
            let took = round.total.as_secs_f64() * 1e3;
            say(format_args!("round {}: {} written in {took:.1} ms", n + 1, HumanBytes(round.bytes_written)));
        }
        say(format_args!(
            "a dump now would freeze for {:.1} ms; go on with: criu-ebpf dump -t {} --track-mem --prev-images-dir {} -D …",
            rounds.predicted.as_secs_f64() * 1e3,
            options.pid,
            std::path::absolute(last).unwrap_or_else(|_| last.to_owned()).display(),
        ));
    }
    Ok(())
}

/// `criu-ebpf dedup`.
pub(super) fn dedup_command(common: Common) -> Outcome {
    log::start(&common)?;
    let freed = dedup(&common.images_dir)?;
    if common.json {
        say(format_args!("{{\"bytes_freed\":{freed}}}"));
    } else if !common.quiet {
        say(format_args!("{} of the parent images are freed", HumanBytes(freed)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Frees what the images in a directory have taken the place of.
fn dedup(dir: &Path) -> Result<u64, CliError> {
    let freed = image::dedup(&ImageDir::open(dir)?)?;
    tracing::info!(bytes = freed, "parents are freed of what is newer here");
    Ok(freed)
}

/// Prints what it came to.
fn report(common: &Common, summary: &Summary) -> Result<(), CliError> {
    if common.json {
        say(serde_json::to_string(summary)?);
    } else if !common.quiet {
        say(format_args!(
            "dumped {} processes, {} threads, {} pages ({}, {}/s); frozen for {:.1} ms, {:.1} ms in all",
            summary.processes,
            summary.threads,
            summary.pages_written,
            HumanBytes(summary.bytes_written),
            HumanBytes(summary.bytes_per_second),
            summary.frozen.as_secs_f64() * 1e3,
            summary.total.as_secs_f64() * 1e3,
        ));
    }
    if summary.pages_ahead > 0 && !common.json && !common.quiet {
        let bytes = HumanBytes(summary.pages_ahead * PAGE);
        say(format_args!("{} pages ({bytes}) were copied beforehand, into {}", summary.pages_ahead, head_start::PLACE));
    }
    for process in summary.not_copied.iter().filter(|_| !common.json && !common.quiet) {
        say(format_args!("not live: {process}"));
    }
    if common.display_stats && !common.json {
        say(format_args!("freezing:      {} us", summary.freezing.as_micros()));
        say(format_args!("frozen:        {} us", summary.frozen.as_micros()));
        say(format_args!("writing:       {} us", summary.writing.as_micros()));
        say(format_args!("pages scanned: {}", summary.pages_scanned));
        say(format_args!("pages written: {}", summary.pages_written));
    }
    Ok(())
}
