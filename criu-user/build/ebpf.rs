//! Compiles the eBPF programs of `criu-ebpf/` and hands them to the engine, which carries them inside its binary.
//!
//! They need a compiler that has a `core` for BPF, and `bpf-linker`. Where one of the two is missing the programs are
//! left out: the engine still builds, says at run time that it was built without them, and surveys through /proc.
//! `cargo xtask setup` installs both; `cargo xtask build` refuses to deliver a binary without the programs.
//!
//! A compiler is looked for in this order:
//!
//! 1. rustup's toolchain `bpf`: Debian's rustc with its prebuilt BPF `core`, linked by `cargo xtask setup`;
//! 2. rustup's `nightly` with `rust-src`, which builds `core` itself (`-Z build-std`), the usual way with Aya;
//! 3. without rustup: the compiler on `PATH`, if it has a prebuilt BPF `core`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aya_build::{Package, Toolchain};

/// Set for the second run of this build script, to the toolchain that the first one chose.
const STAGE: &str = "CRIU_EBPF_BUILD_WITH";
/// The crate with the programs, and where it is, seen from this package.
const PROGRAMS: (&str, &str) = ("criu-ebpf-programs", "../criu-ebpf");
const TARGET: &str = "bpfel-unknown-none";

/// What compiles the programs.
enum Compiler {
    /// A rustup toolchain with a prebuilt `core`.
    Linked(&'static str),
    /// rustup's nightly, with the sources of `core`.
    Nightly,
    /// Whatever `rustc` is on `PATH`; there is no rustup.
    OnPath,
}

/// Builds the programs into `OUT_DIR` and sets `cfg(ebpf_programs)`, or says in a warning why it does not.
pub fn build() {
    println!("cargo:rustc-check-cfg=cfg(ebpf_programs)");
    println!("cargo:rerun-if-changed=build/ebpf.rs");
    println!("cargo:rerun-if-env-changed=AYA_BUILD_SKIP");
    if let Some(toolchain) = env::var_os(STAGE) {
        compile(&toolchain.to_string_lossy());
    }
    if env::var("AYA_BUILD_SKIP").is_ok_and(|v| v == "1" || v.eq_ignore_ascii_case("true")) {
        return;
    }
    match find() {
        Ok((compiler, path)) => {
            println!("cargo:rerun-if-changed={}", PROGRAMS.1);
            println!("cargo:rerun-if-changed=../criu-common");
            compile_in_child(&compiler, &path);
            println!("cargo:rustc-cfg=ebpf_programs");
        }
        Err(missing) => {
            println!("cargo:warning=eBPF programs left out: {missing}; `cargo xtask setup` installs it");
            // bpf-linker is the last thing that setup installs: when it appears, look again.
            if let Some(bin) = cargo_bin().filter(|bin| bin.is_dir()) {
                println!("cargo:rerun-if-changed={}", bin.display());
            }
        }
    }
}

/// Runs this build script again with the environment that aya-build reads: it looks at `RUSTC_BOOTSTRAP` and `PATH`
/// of its own process, and changing those in a running process is not safe.
fn compile_in_child(compiler: &Compiler, path: &std::ffi::OsStr) {
    let mut stage = Command::new(env::current_exe().expect("the build script's own path"));
    stage.env("PATH", path);
    match compiler {
        Compiler::Linked(name) => stage.env(STAGE, name),
        Compiler::Nightly => stage.env(STAGE, "nightly"),
        Compiler::OnPath => stage.env(STAGE, "stable"),
    };
    if !matches!(compiler, Compiler::Nightly) {
        // Crates' names, not "1": aya-ebpf and the watch (inline assembly) may use unstable features on a stable
        // compiler, and aya-build does not ask for `-Z build-std`, which the prebuilt `core` makes needless.
        stage.env("RUSTC_BOOTSTRAP", "aya_ebpf,watch");
    }
    let output = stage.stderr(Stdio::inherit()).output().expect("the build script can run itself");
    // aya-build passes all that the inner cargo says on as warnings. Its progress is not one, nor is that there is no
    // rustup, which was seen above.
    let progress = [
        "Compiling",
        "Finished",
        "Downloading",
        "Downloaded",
        "Locking",
        "Updating",
        "Blocking",
        "Adding",
        "which(rustup)",
    ];
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let text = line.strip_prefix("cargo:warning=").map(str::trim_start);
        if text.is_none_or(|text| !progress.iter().any(|word| text.starts_with(word))) {
            println!("{line}");
        }
    }
    assert!(output.status.success(), "the eBPF programs do not compile: see the warnings");
}

/// The second run: aya-build does the work, and nothing else is to be done.
fn compile(toolchain: &str) -> ! {
    let package = Package { name: PROGRAMS.0, root_dir: PROGRAMS.1, ..Package::default() };
    match aya_build::build_ebpf([package], Toolchain::Custom(toolchain)) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            println!("cargo:warning={error:#}");
            std::process::exit(1);
        }
    }
}

/// The compiler, and the `PATH` on which the linker is found as well; or what is missing.
fn find() -> Result<(Compiler, std::ffi::OsString), String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = env::split_paths(&path).collect();
    let in_path = |dirs: &[PathBuf], name: &str| dirs.iter().any(|dir| dir.join(name).is_file());
    if !in_path(&dirs, "bpf-linker") {
        dirs.extend(cargo_bin());
        if !in_path(&dirs, "bpf-linker") {
            return Err("there is no bpf-linker".into());
        }
    }
    let path = env::join_paths(&dirs).map_err(|error| error.to_string())?;
    let compiler = if in_path(&dirs, "rustup") {
        if sysroot(&["rustup", "run", "bpf", "rustc"]).is_some_and(|root| has_prebuilt_core(&root)) {
            Compiler::Linked("bpf")
        } else if sysroot(&["rustup", "run", "nightly", "rustc"])
            .is_some_and(|root| root.join("lib/rustlib/src/rust/library/core").is_dir())
        {
            Compiler::Nightly
        } else {
            return Err("rustup has neither a toolchain `bpf` nor a nightly with rust-src".into());
        }
    } else if sysroot(&["rustc"]).is_some_and(|root| has_prebuilt_core(&root)) {
        Compiler::OnPath
    } else {
        return Err("the compiler on PATH has no `core` for BPF".into());
    };
    Ok((compiler, path))
}

/// Where cargo installs programs: not on everybody's `PATH`.
fn cargo_bin() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| env::home_dir().map(|home| home.join(".cargo"))).map(|home| home.join("bin"))
}

fn sysroot(rustc: &[&str]) -> Option<PathBuf> {
    let mut command = Command::new(rustc[0]);
    // cargo points these at its own toolchain; the question is about another one.
    command.args(&rustc[1..]).args(["--print", "sysroot"]).env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN");
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

fn has_prebuilt_core(sysroot: &Path) -> bool {
    let Ok(entries) = sysroot.join("lib/rustlib").join(TARGET).join("lib").read_dir() else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}
