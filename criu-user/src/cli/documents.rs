//! Shell completions and manual pages, made from the options themselves. `cargo xtask build` puts them beside the
//! binary.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell;

use super::error::CliError;
use super::{Cli, Outcome};

#[derive(Debug, Args)]
pub(super) struct DocumentsArgs {
    /// Where to
    dir: PathBuf,
}

pub(super) fn run(args: &DocumentsArgs) -> Outcome {
    write(&args.dir.join("completions"), |dir| {
        Shell::value_variants()
            .iter()
            .try_for_each(|&shell| clap_complete::generate_to(shell, &mut Cli::command(), "criu-ebpf", dir).map(drop))
    })?;
    write(&args.dir.join("man"), |dir| clap_mangen::generate_to(Cli::command(), dir))?;
    Ok(ExitCode::SUCCESS)
}

fn write(dir: &Path, work: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<(), CliError> {
    std::fs::create_dir_all(dir)
        .and_then(|()| work(dir))
        .map_err(|source| CliError::Documents { path: dir.to_owned(), source })
}
