//! `cargo xtask peer`: CRIU 4.2.1 beside the system, to measure against and to exchange images with.
//!
//! Debian 12's own CRIU does not start on recent kernels. The one in Debian's `sid` does, with the libraries it was
//! built for, so both are unpacked into `target/peer/root`; nothing is installed. `target/peer/criu` is a script that
//! starts it with those libraries.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::debian;
use crate::process::run as run_command;

/// Where CRIU is unpacked to and started from, below the workspace root.
const PEER_DIR: &str = "target/peer";

/// `cargo xtask peer`: fetches the peer if it is not there and prints how to start it.
pub fn run(args: &[String]) -> Result<()> {
    ensure!(args.is_empty(), "peer takes no arguments, got {args:?}");
    println!("{}", ensure_peer()?.display());
    Ok(())
}

/// Makes sure that the peer is there and starts, and returns the path of its start script.
pub fn ensure_peer() -> Result<PathBuf> {
    let dir = workspace_root()?.join(PEER_DIR);
    let script = dir.join("criu");
    if version(&script).is_ok() {
        return Ok(script);
    }
    eprintln!("fetching CRIU of Debian sid into {} (about 8 MB, nothing is installed)", dir.display());
    let packages = debian::fetch(&dir, "sid", "criu")?;
    let root = dir.join("root");
    for package in packages {
        run_command(Command::new("dpkg").arg("-x").arg(&package).arg(&root))?;
    }
    write_script(&script, &root)?;
    let version = version(&script).context("CRIU was unpacked but does not start")?;
    eprintln!("{version}");
    Ok(script)
}

/// What the script says of itself, e.g. `Version: 4.2.1`.
pub fn version(script: &Path) -> Result<String> {
    let out =
        Command::new(script).arg("--version").output().with_context(|| format!("starting {}", script.display()))?;
    ensure!(out.status.success(), "{} --version: {}", script.display(), String::from_utf8_lossy(&out.stderr).trim());
    Ok(String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or_default().to_owned())
}

/// The root of the workspace that this xtask was built from.
pub fn workspace_root() -> Result<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).context("xtask has no parent directory")
}

/// The start script. CRIU finds its page-transfer and plugin directories by itself; all it needs is its own loader and libraries.
fn write_script(script: &Path, root: &Path) -> Result<()> {
    let text = format!(
        "#!/bin/sh\n# CRIU of Debian sid with the libraries it was built for; made by `cargo xtask peer`.\nroot='{}'\n\
         exec \"$root/usr/lib64/ld-linux-x86-64.so.2\" --library-path \"$root/usr/lib/x86_64-linux-gnu\" \
         \"$root/usr/sbin/criu\" \"$@\"\n",
        root.display()
    );
    fs::write(script, text).with_context(|| format!("writing {}", script.display()))?;
    run_command(Command::new("chmod").arg("755").arg(script))
}
