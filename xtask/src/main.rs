//! The one entry point: `cargo xtask setup | build | lint | test | kernel | soak | demo | …`.

mod bench;
mod build;
mod debian;
mod demo;
mod kernel;
mod lint;
mod peer;
mod process;
mod setup;
mod soak;
mod test;

use anyhow::Result;

/// A command: its name, what it does, and the function that gets the arguments after the name.
struct Task {
    name: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Result<()>,
}

const TASKS: &[Task] = &[
    Task { name: "setup", about: setup::ABOUT, run: setup::run },
    Task { name: "build", about: build::ABOUT, run: build::run },
    Task { name: "lint", about: lint::ABOUT, run: lint::run },
    Task { name: "test", about: test::ABOUT, run: test::run },
    Task { name: "kernel", about: kernel::ABOUT, run: kernel::run },
    Task { name: "soak", about: soak::ABOUT, run: soak::run },
    Task { name: "demo", about: demo::ABOUT, run: demo::run },
    Task { name: "peer", about: "unpack CRIU beside the system, for comparison", run: peer::run },
    Task { name: "bench", about: "measure against CRIU on the same work in the same run", run: bench::run },
];

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(task) = args.first().and_then(|name| TASKS.iter().find(|task| task.name == name)) else {
        eprintln!("usage: cargo xtask TASK\n");
        for task in TASKS {
            eprintln!("  {:<8} {}", task.name, task.about);
        }
        return std::process::ExitCode::from(2);
    };
    match (task.run)(&args[1..]) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask {}: {error:#}", task.name);
            std::process::ExitCode::FAILURE
        }
    }
}
