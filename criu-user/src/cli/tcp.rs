//! `criu-ebpf tcp`.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use nix::unistd::Pid;

use super::{Outcome, say};
use crate::image::ImageDir;
use crate::object::tcp::table::{self, Row};

#[derive(Debug, Args)]
pub(super) struct TcpArgs {
    /// The root of a process tree, or a directory of images
    #[arg(value_name = "PID|DIR")]
    of: String,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: TcpArgs) -> Outcome {
    let rows = match args.of.parse::<i32>() {
        Ok(pid) if !Path::new(&args.of).is_dir() => table::of_tree(Pid::from_raw(pid))?,
        _ => table::of_images(&ImageDir::open(&args.of)?)?,
    };
    if args.json {
        say(format_args!("{}", serde_json::to_string(&rows)?));
        return Ok(ExitCode::SUCCESS);
    }
    say(format_args!(
        "{:>7} {:>4} {:<12} {:<30} {:<30} {:>9} {:>9} {:>9}  {}",
        "pid", "fd", "state", "local", "remote", "to read", "to ack", "to send", "agreed"
    ));
    for row in &rows {
        print_row(row);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_row(row: &Row) {
    let number = |number: Option<i32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let state = format!("{:?}", row.state);
    say(format_args!(
        "{:>7} {:>4} {state:<12} {:<30} {:<30} {:>9} {:>9} {:>9}  {}",
        number(row.pid),
        number(row.fd),
        row.local,
        row.remote,
        row.received,
        row.unacknowledged,
        row.unsent,
        row.agreed.join(", ")
    ));
    if !row.accepted {
        say(format_args!("{:>12} waits to be accepted", ""));
    }
    if let Some(why) = &row.refused {
        say(format_args!("{:>12} would be refused: it {why}", ""));
    }
}
