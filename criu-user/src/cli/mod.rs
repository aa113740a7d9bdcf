//! The command line: parses, calls the engine, prints. Names and meanings are those that users of CRIU type.

mod dump;
mod gate;
mod log;
mod restore;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Checkpoint and restore process trees.
#[derive(Debug, Parser)]
#[command(name = "criu-ebpf", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a process tree to images, and kill it unless told otherwise
    Dump(dump::DumpArgs),
    /// Bring a process tree back from its images
    Restore(restore::RestoreArgs),
    /// Show or open the gates that hold connections of dumped trees
    Gate(gate::GateArgs),
}

/// Options of every command that works on images.
#[derive(Debug, Args)]
pub struct Common {
    /// Directory of the images
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Directory of log files, pid files and statistics [default: the images directory]
    #[arg(short = 'W', long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Write the log to a file in the work directory instead of to standard error
    #[arg(short = 'o', long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// How much to log: 0 nothing, 1 errors, 2 warnings, 3 the story, 4 everything
    #[arg(short = 'v', long, value_name = "LEVEL", num_args = 0..=1, default_value_t = 2, default_missing_value = "3")]
    verbosity: u8,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// Print nothing but errors
    #[arg(long)]
    quiet: bool,
    /// Ignore configuration files (there are none; taken for compatibility with CRIU)
    #[arg(long)]
    no_default_config: bool,
}

impl Common {
    fn work_dir(&self) -> PathBuf {
        self.work_dir.clone().unwrap_or_else(|| self.images_dir.clone())
    }
}

/// Runs the command line; what it says and how it ends.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Dump(args) => dump::run(args),
        Command::Restore(args) => restore::run(args),
        Command::Gate(args) => gate::run(args),
    };
    match outcome {
        Ok(code) => code,
        Err(err) => {
            tracing::error!("{err}");
            eprintln!("criu-ebpf: {err}");
            ExitCode::from(1)
        }
    }
}

/// The outcome of a command.
type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;
