//! `criu-ebpf restore`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Args;
use indicatif::HumanBytes;
use nix::unistd::Pid;

use super::common::Common;
use super::error::CliError;
use super::metrics::CommandMetrics;
use super::progress::Progress;
use super::scripts::Scripts;
use super::status::{PidFile, StatusFd};
use super::watcher::Watcher;
use super::{Outcome, log, say};
use crate::attend::{Attendant, Terminal};
use crate::explain;
use crate::image::ImageDir;
use crate::kernel::root::Root;
use crate::object::cgroup::{Manage, NewRoot};
use crate::object::outside::{External, Inherit};
use crate::object::tcp::NetworkLock;
use crate::outcome;
use crate::restore::{self, RestoreOptions, Summary};

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    common: Common,
    /// End once the tree runs; without it, stay its parent and end as it does
    #[arg(short = 'd', long)]
    restore_detached: bool,
    /// Make the root of the tree a child of the caller (needs --restore-detached)
    #[arg(short = 'S', long, requires = "restore_detached")]
    restore_sibling: bool,
    /// Write the pid of the root to a new file in the work directory
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Become this command, given behind "--", once the tree runs: it is the parent of the root then
    #[arg(long, requires = "command", conflicts_with = "restore_detached")]
    exec_cmd: bool,
    #[arg(last = true, value_name = "COMMAND", requires = "exec_cmd")]
    command: Vec<OsString>,
    /// Directory in which the paths of the images start, and which is the root of the tree
    #[arg(short = 'r', long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Put the tree into the session of the caller
    #[arg(short = 'j', long)]
    shell_job: bool,
    /// Leave the tree stopped (SIGSTOP)
    #[arg(short = 's', long)]
    leave_stopped: bool,
    /// Connect datagram sockets to their named peers outside of the tree again
    #[arg(short = 'x', long)]
    ext_unix_sk: bool,
    /// Restore TCP connections as closed sockets
    #[arg(long)]
    tcp_close: bool,
    /// Keep TCP connections: their peers notice a pause
    #[arg(long, conflicts_with = "tcp_close")]
    tcp_established: bool,
    /// Drop clients that no server had accepted
    #[arg(long)]
    skip_in_flight: bool,
    /// How the packets of connections are held until the tree runs, unless the dump's own lock still holds them
    #[arg(long, value_name = "METHOD", value_enum, default_value = "auto")]
    network_lock: NetworkLock,
    /// Accept files whose size or content has changed since the dump
    #[arg(long)]
    skip_file_validation: bool,
    /// Accept files whose permissions have changed since the dump (always done; taken for compatibility with CRIU)
    #[arg(long)]
    skip_file_rwx_check: bool,
    /// Descriptor N stands for something outside of the tree: pipe:[INODE], file[MOUNT:INODE], or a path
    #[arg(long, value_name = "fd[N]:RESOURCE")]
    inherit_fd: Vec<Inherit>,
    /// What the dump said of something outside of the tree (it is in the images; taken for compatibility with CRIU)
    #[arg(long, value_name = "RESOURCE")]
    external: Vec<External>,
    /// Restore file locks (those of a dump always are; taken for compatibility with CRIU)
    #[arg(short = 'l', long)]
    file_locks: bool,
    /// Follow names that the dump gave (always done; taken for compatibility with CRIU)
    #[arg(long)]
    link_remap: bool,
    /// Which clocks the tree sees: those of the dump, which go on from where they stood, or the host's
    #[arg(long, value_name = "WHICH", value_parser = ["dump", "host"], default_value = "dump")]
    clock: String,
    /// What is done about control groups
    #[arg(long, value_name = "MODE", value_enum, num_args = 0..=1, require_equals = true, default_value = "soft",
          default_missing_value = "soft")]
    manage_cgroups: Manage,
    /// Put the tree into this control group instead of the one that its root was in; may be given for each controller
    #[arg(long, value_name = "[CONTROLLER:]PATH")]
    cgroup_root: Vec<NewRoot>,
    /// Print the plan, as JSON with --json, and restore nothing
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    metrics: CommandMetrics,
}

pub(super) fn run(args: RestoreArgs) -> Outcome {
    log::start(&args.common)?;
    let options = options(&args)?;
    if args.explain {
        return explain(&args.common, &options);
    }
    let told = args.metrics.begin()?;
    let status = StatusFd::take(args.common.status_fd)?;
    let pid_file = args.pidfile.as_ref().map(|name| PidFile::new(options.work_dir.join(name))).transpose()?;
    let watcher = Watcher::new(Scripts::new(&args.common)?, Progress::new("filling memory", &args.common), pid_file);
    let attendant = if args.restore_detached || args.exec_cmd { None } else { Some(Attendant::begin()?) };
    let result = restore::restore(&options, &watcher);
    let root = result.as_ref().ok().map(|summary| Pid::from_raw(summary.pid));
    told.run(root, &outcome::of_restore(&result));
    let summary = result.inspect_err(|_| watcher.give_up())?;
    watcher.finish();
    if let Some(status) = status {
        status.report();
    }
    report(&args.common, &summary)?;
    if let Some((command, rest)) = args.command.split_first() {
        let source = Command::new(command).args(rest).exec();
        return Err(CliError::Exec { pid: summary.pid, command: command.clone(), source });
    }
    let Some(attendant) = attendant else { return Ok(ExitCode::SUCCESS) };
    let terminal = if args.shell_job { Terminal::Shared } else { Terminal::Other };
    Ok(ExitCode::from(attendant.attend(Pid::from_raw(summary.pid), terminal)?))
}

fn options(args: &RestoreArgs) -> Result<RestoreOptions, CliError> {
    Ok(RestoreOptions {
        work_dir: args.common.work_dir(),
        images_dir: args.common.images_dir.clone(),
        root: args.root.as_deref().map(Root::at).transpose()?.unwrap_or_default(),
        shell_job: args.shell_job,
        ext_unix_sk: args.ext_unix_sk,
        tcp_close: args.tcp_close,
        tcp_established: args.tcp_established,
        skip_in_flight: args.skip_in_flight,
        network_lock: args.network_lock,
        sibling: args.restore_sibling,
        detached: args.restore_detached || args.exec_cmd,
        leave_stopped: args.leave_stopped,
        skip_file_validation: args.skip_file_validation,
        host_clock: args.clock == "host",
        inherit: args.inherit_fd.clone(),
        manage_cgroups: args.manage_cgroups,
        cgroup_root: args.cgroup_root.clone(),
    })
}

/// Prints the plan.
fn explain(common: &Common, options: &RestoreOptions) -> Outcome {
    let plan = restore::plan(&ImageDir::open(&options.images_dir)?, options)?;
    if common.json {
        say(serde_json::to_string(&explain::Explained::new(&plan))?);
    } else {
        say(explain::text(&plan).trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what it came to.
fn report(common: &Common, summary: &Summary) -> Result<(), CliError> {
    if common.json {
        say(serde_json::to_string(summary)?);
    } else if !common.quiet {
        say(format_args!(
            "restored {} tasks as pid {} by {} system calls, {} of memory in {:.1} ms",
            summary.tasks,
            summary.pid,
            summary.calls,
            HumanBytes(summary.bytes_filled),
            summary.total.as_secs_f64() * 1e3,
        ));
    }
    if common.display_stats && !common.json {
        say(format_args!("planning:      {} us", summary.planning.as_micros()));
        say(format_args!("restoring:     {} us", summary.total.as_micros()));
        say(format_args!("bytes filled:  {}", summary.bytes_filled));
    }
    Ok(())
}
