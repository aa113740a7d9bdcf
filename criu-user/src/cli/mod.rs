//! The command line: parses, calls the engine, prints. Names and meanings are those that users of CRIU type.

mod check;
mod common;
mod documents;
mod dump;
mod error;
mod gate;
mod log;
mod metrics;
mod order;
mod peer;
mod progress;
mod restore;
mod scripts;
mod status;
mod tcp;
mod track;
mod verify;
mod watcher;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use error::CliError;

/// Checkpoint and restore process trees.
#[derive(Debug, Parser)]
#[command(name = "criu-ebpf", version, propagate_version = true, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a process tree to images, and kill it unless told otherwise
    Dump(Box<dump::DumpArgs>),
    /// Write the memory of a tree that runs on; a later dump takes only what was written since
    PreDump(Box<dump::PreDumpArgs>),
    /// Free the room of pages in parent images that newer ones have
    Dedup(Box<common::Common>),
    /// Watch a process tree: which memory it writes, and what a dump of it would cost
    Track(track::TrackArgs),
    /// Bring a process tree back from its images
    Restore(Box<restore::RestoreArgs>),
    /// Say what this kernel can, and what that means
    Check(check::CheckArgs),
    /// Show or open the gates that hold connections of dumped trees
    Gate(gate::GateArgs),
    /// Show the TCP connections of a tree or of images, and whether they would be carried over
    Tcp(tcp::TcpArgs),
    /// Check images without restoring anything: each file by itself, and what they say of each other
    Verify(verify::VerifyArgs),
    /// Write shell completions and manual pages into DIR/completions and DIR/man
    #[command(hide = true)]
    Documents(documents::DocumentsArgs),
}

/// How a command ends.
type Outcome = Result<ExitCode, CliError>;

/// Exit status of wrong usage.
const USAGE: u8 = 2;

/// Runs the command line; what it says and how it ends.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(order::words()) {
        Ok(cli) => cli,
        Err(err) => {
            let Some(refusal) = peer::refusal(&err) else { err.exit() };
            eprintln!("criu-ebpf: {refusal}");
            return ExitCode::from(USAGE);
        }
    };
    let outcome = match cli.command {
        Command::Dump(args) => dump::run(*args),
        Command::PreDump(args) => dump::pre_dump(*args),
        Command::Dedup(args) => dump::dedup_command(*args),
        Command::Track(args) => track::run(args),
        Command::Restore(args) => restore::run(*args),
        Command::Check(args) => check::run(args),
        Command::Gate(args) => gate::run(args),
        Command::Tcp(args) => tcp::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Documents(args) => documents::run(&args),
    };
    outcome.unwrap_or_else(|err| {
        let text = err.to_string();
        for line in text.lines() {
            tracing::error!(target: log::OUTCOME, "{line}");
        }
        eprintln!("criu-ebpf: {text}");
        ExitCode::FAILURE
    })
}

/// Prints a line for the user. Whoever reads only the head of it closes the pipe, which is no failure.
fn say(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
