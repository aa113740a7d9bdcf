//! `criu-ebpf restore`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::{Common, Outcome, log};
use crate::object::cgroup::{Manage, NewRoot};
use crate::object::outside::{External, Inherit};
use crate::object::tcp::NetworkLock;
use crate::restore::{self, RestoreOptions};

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
    /// Write the pid of the root to a file
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
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
    /// How the packets of connections are held until the tree runs, unless the dump's own lock still holds them
    #[arg(long, value_name = "METHOD", value_enum, default_value = "ebpf")]
    network_lock: NetworkLock,
    /// Accept files whose size or content has changed since the dump
    #[arg(long)]
    skip_file_validation: bool,
    /// Descriptor N stands for something outside of the tree: pipe:[INODE], file[MOUNT:INODE], or a path
    #[arg(long, value_name = "fd[N]:RESOURCE")]
    inherit_fd: Vec<Inherit>,
    /// What the dump said of something outside of the tree (it is in the images; taken for compatibility with CRIU)
    #[arg(long, value_name = "RESOURCE")]
    external: Vec<External>,
    /// Restore file locks (those of a dump always are; taken for compatibility with CRIU)
    #[arg(long)]
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
    /// Print the plan, and restore nothing
    #[arg(long)]
    explain: bool,
}

pub(super) fn run(args: RestoreArgs) -> Outcome {
    log::start(&args.common)?;
    let options = RestoreOptions {
        work_dir: args.common.work_dir(),
        images_dir: args.common.images_dir.clone(),
        shell_job: args.shell_job,
        ext_unix_sk: args.ext_unix_sk,
        tcp_close: args.tcp_close,
        tcp_established: args.tcp_established,
        network_lock: args.network_lock,
        sibling: args.restore_sibling,
        leave_stopped: args.leave_stopped,
        skip_file_validation: args.skip_file_validation,
        host_clock: args.clock == "host",
        inherit: args.inherit_fd.clone(),
        manage_cgroups: args.manage_cgroups,
        cgroup_root: args.cgroup_root,
    };
    if args.explain {
        let dir = crate::image::ImageDir::open(&options.images_dir)?;
        print!("{}", crate::explain::text(&restore::plan(&dir, &options)?));
        return Ok(ExitCode::SUCCESS);
    }
    let summary = restore::restore(&options)?;
    if let Some(pidfile) = &args.pidfile {
        let path = options.work_dir.join(pidfile);
        std::fs::write(&path, summary.pid.to_string())
            .map_err(|e| format!("pid file {}: {e}; the tree runs as pid {}", path.display(), summary.pid))?;
    }
    if args.common.json {
        println!("{}", serde_json::to_string(&summary)?);
    } else if !args.common.quiet {
        println!(
            "restored {} tasks as pid {} by {} system calls in {:.1} ms",
            summary.tasks,
            summary.pid,
            summary.calls,
            summary.total.as_secs_f64() * 1e3,
        );
    }
    if args.restore_detached {
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::from(restore::attend(summary.pid)?))
}
