//! `cargo xtask build`: the release engine, with the eBPF programs inside it, its shell completions and manual pages.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::process::{cargo, engine, run as run_program, target_dir};

/// One line for the list of tasks.
pub const ABOUT: &str = "build target/release/criu-ebpf with the eBPF programs inside";

/// Builds, and refuses a binary from which the programs were left out.
pub fn run(args: &[String]) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--release", "--package", "criu-user", "--message-format=json-render-diagnostics"]);
    let output = build.args(args).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the engine does not compile");
    // cargo tells what build scripts have set, also when nothing had to be built again.
    let messages = String::from_utf8_lossy(&output.stdout);
    if !messages.lines().any(|line| line.contains("build-script-executed") && line.contains("\"ebpf_programs\"")) {
        bail!("the eBPF programs were left out (see cargo's warning above): run `cargo xtask setup`");
    }
    let beside = target_dir().join("release");
    run_program(Command::new(engine()).arg("documents").arg(&beside))?;
    eprintln!("built {}, and completions/ and man/ beside it", engine().display());
    Ok(())
}
