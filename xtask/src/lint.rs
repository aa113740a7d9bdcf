//! `cargo xtask lint`: what a reviewer need not look for.

use anyhow::{Result, ensure};

use crate::process::{cargo, find, run as run_command};

/// One line for the list of tasks.
pub const ABOUT: &str = "formatting, clippy, licences and sources of dependencies";

/// Runs every check; the first that fails ends it.
pub fn run(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "takes no arguments");
    run_command(cargo().args(["fmt", "--all", "--check"]))?;
    run_command(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    ensure!(find("cargo-deny").is_some(), "cargo-deny is missing: run `cargo xtask setup`");
    // Not `advisories`: their database is a git repository elsewhere, and this has to work without reaching one.
    run_command(cargo().args(["deny", "--all-features", "check", "licenses", "bans", "sources"]))
}
