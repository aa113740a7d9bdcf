//! `criu-ebpf verify`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::{Outcome, say};
use crate::image::{ImageDir, references};

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// Directory of the images
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// What was found to be whole.
#[derive(Debug, Serialize)]
struct Verified {
    /// Image files, without those of parents.
    files: usize,
    /// Dumps that this one builds on.
    parents: usize,
}

pub(super) fn run(args: VerifyArgs) -> Outcome {
    let dir = ImageDir::open(&args.images_dir)?;
    let found = Verified { files: references::dump(&dir)?, parents: dir.parents()?.len() };
    if args.json {
        say(serde_json::to_string(&found)?);
    } else {
        say(format_args!("{} files, on top of {} parents: whole", found.files, found.parents));
    }
    Ok(ExitCode::SUCCESS)
}
