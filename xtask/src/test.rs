//! `cargo xtask test`: the unit tests, then the end-to-end tests on real programs.

use anyhow::Result;

use crate::process::{cargo, engine, run as run_command};

/// One line for the list of tasks.
pub const ABOUT: &str = "unit tests, then end-to-end tests (as root), some on other kernels; arguments go to the latter's runner, here alone";

/// Installs what is missing, and builds the release engine first: the end-to-end tests drive that binary.
pub fn run(args: &[String]) -> Result<()> {
    crate::setup::for_tests()?;
    crate::build::run(&[])?;
    // Images are exchanged with CRIU, both ways.
    crate::peer::ensure_peer()?;
    run_command(cargo().arg("test"))?;
    // Those that are left out where there is no root, or no eBPF.
    for test in ["ebpf_survey", "ebpf_watch", "ebpf_pending", "ebpf_touched", "ebpf_numbers", "ebpf_gate"] {
        run_command(cargo().args(["test", "--package", "criu-user", "--test", test, "--", "--ignored"]))?;
    }
    if args.is_empty() {
        crate::kernel::on_all()?;
    }
    // Two at a time: they measure times and fill memory. Last, so that the runner's summary ends the output; `--tests`
    // because an empty run of documentation tests would end it otherwise.
    let mut e2e = cargo();
    e2e.env("CRIU_EBPF_BIN", engine()).args(["test", "--package", "e2e", "--tests", "--", "--test-threads=2"]);
    run_command(e2e.args(args))
}
