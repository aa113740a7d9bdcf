//! `cargo xtask setup`: installs what is missing, says why, and does nothing the second time.
//!
//! The eBPF programs need a compiler that has a `core` for BPF. Debian ships one prebuilt (the `-web` packages, kept
//! current in its security suite for the sake of browsers); rustup is told of it as toolchain `bpf`, and without rustup
//! it is the compiler on `PATH` anyway. Elsewhere rustup's nightly with `rust-src` builds `core` itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{cargo, find, output, run as run_command};

/// One line for the list of tasks.
pub const ABOUT: &str = "install what is missing; `setup build`: only what `build` and `demo` need";

const BPF_LINKER: &str = "0.13.0";
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const CARGO_DENY: &str = "0.20.2";
/// The oldest rustc-web that compiles the workspace: 1.95, see `rust-version` in Cargo.toml.
const RUSTC_MINOR: u32 = 95;

/// Debian packages and why they are needed.
const FOR_BUILD: &[(&str, &str)] = &[
    ("ca-certificates", "cargo fetches crates over https"),
    ("cargo-web", "cargo for the BPF toolchain"),
    ("rustc-web", "the compiler for the eBPF programs"),
    ("libstd-rust-web-dev-bpf", "`core` for BPF, prebuilt"),
    ("llvm-22-dev", "bpf-linker is built against this LLVM"),
    ("gcc", "links programs of the host"),
    ("libc6-dev", "links programs of the host"),
    ("python3", "the program that `demo` dumps"),
];
const FOR_LINT: &[(&str, &str)] = &[
    ("rustfmt-web", "there is no rustup to bring rustfmt"),
    ("rust-web-clippy", "there is no rustup to bring clippy"),
];
const FOR_TESTS: &[(&str, &str)] = &[
    ("bpftool", "tests look for eBPF objects left over"),
    ("criu", "its `crit` decodes our images"),
    ("e2fsprogs", "its `filefrag` tells what of an image is on disk"),
    ("iproute2", "tests look at sockets and make namespaces"),
    ("nginx-light", "a program that is dumped"),
    ("nodejs", "a program that is dumped"),
    ("postgresql", "a program that is dumped; its service is neither started nor enabled"),
    ("procps", "tests look at processes"),
    ("prometheus", "scrapes a session in a test; its service is neither started nor enabled"),
    ("redis-server", "a program that is dumped"),
    ("redis-tools", "its client"),
    ("socat", "peers for pipes, ptys and sockets"),
    ("tmux", "a program that is dumped, and the terminal of the screen"),
];

const FOR_KERNELS: &[(&str, &str)] = &[
    ("busybox-static", "begins in a virtual machine"),
    ("cpio", "packs what a virtual machine begins with"),
    ("kmod", "finds the modules that a kernel needs"),
    ("qemu-system-x86", "is a virtual machine"),
];

/// Those that bring a service which would start at the next boot, and which only a test needs.
const SERVICES: &[&str] = &["postgresql", "prometheus"];

/// Installs packages and programs. `build` as argument leaves out what only lint and the tests need.
pub fn run(args: &[String]) -> Result<()> {
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => install(&[FOR_BUILD, if has_rustup() { &[] } else { FOR_LINT }, FOR_TESTS].concat())?,
        ["build"] => return build_only(),
        _ => bail!("takes nothing, or `build`"),
    }
    bpf_toolchain()?;
    bpf_linker()?;
    cargo_deny()?;
    eprintln!("setup: everything is there");
    Ok(())
}

/// What `cargo xtask build` and `demo` need.
pub fn build_only() -> Result<()> {
    install(FOR_BUILD)?;
    bpf_toolchain()?;
    bpf_linker()
}

/// What `cargo xtask kernel` needs besides.
pub fn for_kernels() -> Result<()> {
    install(FOR_KERNELS)
}

/// What `cargo xtask test` needs.
pub fn for_tests() -> Result<()> {
    install(&[FOR_BUILD, FOR_TESTS].concat())?;
    bpf_toolchain()?;
    bpf_linker()
}

fn has_rustup() -> bool {
    find("rustup").is_some()
}

fn has_apt() -> bool {
    find("apt-get").is_some()
}

/// Installs those of the packages that are missing, without starting any service.
fn install(packages: &[(&str, &str)]) -> Result<()> {
    if !has_apt() {
        let names: Vec<_> = packages.iter().map(|(name, _)| *name).collect();
        eprintln!("setup: no apt-get here; what these Debian packages hold has to be there: {}", names.join(" "));
        return Ok(());
    }
    let missing: Vec<_> = packages.iter().filter(|(name, _)| !is_installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: Debian packages");
    for (name, why) in &missing {
        eprintln!("  {name:<24} {why}");
    }
    let names = missing.iter().map(|(name, _)| *name);
    let mut install = apt();
    install.args(["install", "-y", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]).args(names);
    ensure!(is_root(), "only root can install packages: {:?}", install.get_args().collect::<Vec<_>>());
    // A source that cannot be reached matters only if a package comes from it: install will tell.
    if let Err(error) = run_command(apt().args(["update", "-q"])) {
        eprintln!("setup: {error:#}; going on with the package lists that are there");
    }
    let _policy = NoServices::new()?;
    run_command(&mut install)?;
    // Of those only that were not here before: somebody may use his own.
    for (name, _) in missing.iter().filter(|(name, _)| SERVICES.contains(name) && find("systemctl").is_some()) {
        eprintln!("setup: the service {name} is disabled; `systemctl enable {name}` changes that");
        run_command(Command::new("systemctl").args(["--quiet", "disable", name]))?;
    }
    Ok(())
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=600"]);
    apt
}

fn is_installed(package: &str) -> bool {
    let format = "${db:Status-Status} ${Version}";
    let Some(line) = output(Command::new("dpkg-query").args(["-W", "-f", format, package])) else { return false };
    let Some(version) = line.strip_prefix("installed ") else { return false };
    // An older rustc-web would be there, and would not do.
    let too_old = package.ends_with("c-web")
        && version.split('.').nth(1).and_then(|minor| minor.parse().ok()).is_some_and(|minor: u32| minor < RUSTC_MINOR);
    !too_old
}

fn is_root() -> bool {
    output(Command::new("id").arg("-u")).is_some_and(|id| id.trim() == "0")
}

/// While it lives, packages that bring a service do not start it (invoke-rc.d asks this script).
struct NoServices {
    ours: bool,
}

impl NoServices {
    const SCRIPT: &str = "/usr/sbin/policy-rc.d";

    fn new() -> Result<Self> {
        let ours = !Path::new(Self::SCRIPT).exists();
        if ours {
            let write = || {
                fs::write(Self::SCRIPT, "#!/bin/sh\nexit 101\n")?;
                fs::set_permissions(Self::SCRIPT, fs::Permissions::from_mode(0o755))
            };
            write().with_context(|| format!("cannot write {}, which keeps services from starting", Self::SCRIPT))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(Self::SCRIPT)
        {
            eprintln!("setup: cannot remove {}: {error}", Self::SCRIPT);
        }
    }
}

/// Tells rustup of Debian's compiler; where there is no apt-get, gets the nightly that can build `core`.
fn bpf_toolchain() -> Result<()> {
    if !has_rustup() {
        return Ok(());
    }
    if !has_apt() {
        eprintln!("setup: rustup's nightly with rust-src, to compile `core` for BPF");
        return run_command(Command::new("rustup").args([
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src",
        ]));
    }
    let sysroot = output(Command::new("rustup").args(["run", "bpf", "rustc", "--print", "sysroot"]));
    if sysroot.is_some_and(|path| path.trim() == "/usr") {
        return Ok(());
    }
    eprintln!("setup: rustup toolchain `bpf`: Debian's compiler, which has a `core` for BPF");
    run_command(Command::new("rustup").args(["toolchain", "link", "bpf", "/usr"]))
}

fn bpf_linker() -> Result<()> {
    if installed_version("bpf-linker").is_some_and(|version| version == BPF_LINKER) {
        return Ok(());
    }
    eprintln!("setup: bpf-linker, which makes one object of the eBPF programs (one to three minutes)");
    let mut install = cargo();
    install.args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"]);
    if has_apt() {
        install.env("LLVM_PREFIX", LLVM_PREFIX).args(["--no-default-features", "--features", "llvm-22"]);
    }
    run_command(&mut install)
}

fn cargo_deny() -> Result<()> {
    if installed_version("cargo-deny").is_some() {
        return Ok(());
    }
    eprintln!("setup: cargo-deny, which checks licences and sources of the dependencies (several minutes)");
    run_command(cargo().args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked"]))
}

/// The version that a program says it has, in words such as `bpf-linker 0.13.0`.
fn installed_version(program: &str) -> Option<String> {
    let text = output(Command::new(find(program)?).arg("--version"))?;
    Some(text.split_whitespace().nth(1)?.to_owned())
}
