//! The programs that tests run: Python scripts and C sources below `tests/workloads/`.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::SystemTime,
};

use crate::{Program, claim::Claim};

/// A program that is still to be started: a file of `tests/workloads/` and the case in it.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What is executed, with its arguments.
    pub command: Vec<OsString>,
    /// What its files are called by, and what failures are reported under.
    pub name: String,
    /// Added to its environment.
    pub environment: Vec<(String, String)>,
    /// Whether it takes part in the protocol of `lib.py` and `e2e.h`; other programs are ready when started.
    pub speaks: bool,
    /// What it has that there is one of for all.
    pub claims: Vec<Claim>,
}

impl Workload {
    /// One case of a file in `tests/workloads/`, by its extension a Python script or a C program, which is compiled.
    pub fn new(file: &str, case: &str) -> Self {
        let source = workloads().join(file);
        let mut command = if file.ends_with(".py") {
            vec!["/usr/bin/python3".into(), source.into_os_string()]
        } else {
            vec![compile(&source).into_os_string()]
        };
        command.push(case.into());
        let known = [("terminals", Claim::Terminals), ("tcp", Claim::Ports), ("inet", Claim::Ports)];
        let claims = known.iter().filter(|(start, _)| file.starts_with(start)).map(|&(_, claim)| claim).collect();
        Self { command, name: format!("{file} {case}"), environment: Vec::new(), speaks: true, claims }
    }

    /// Any other program of the system.
    pub fn program(command: &[&str]) -> Self {
        Self {
            command: command.iter().map(OsString::from).collect(),
            name: command.join(" "),
            environment: Vec::new(),
            speaks: false,
            claims: Vec::new(),
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.command.push(arg.into());
        self
    }

    /// Adds an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Says that it lays claim to something.
    pub fn with(mut self, claim: Claim) -> Self {
        self.claims.push(claim);
        self
    }

    /// Starts it, and waits until it is ready.
    pub fn start(&self) -> Program {
        Program::start(self)
    }
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace").to_owned()
}

/// Where the workloads are.
pub fn workloads() -> PathBuf {
    workspace().join("tests/workloads")
}

/// Compiles a C workload into `target/workloads/` unless it is there and newer than its sources.
fn compile(source: &Path) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let out_dir = workspace().join("target/workloads");
    fs::create_dir_all(&out_dir).unwrap_or_else(|error| panic!("creating {}: {error}", out_dir.display()));
    let program = out_dir.join(source.file_stem().expect("a source has a name"));
    let changed = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    if changed(&program) <= changed(source).max(changed(&workloads().join("e2e.h"))) {
        let out = Command::new("gcc")
            .args(["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-pthread", "-o"])
            .arg(&program)
            .arg(source)
            .arg("-lm")
            .output()
            .unwrap_or_else(|error| panic!("starting gcc: {error} (install gcc and libc6-dev)"));
        assert!(out.status.success(), "gcc {}:\n{}", source.display(), String::from_utf8_lossy(&out.stderr));
    }
    program
}
