//! `cargo xtask bench [ROW…] [--vs PATH] [--rounds N] [--out FILE]`: our engine and CRIU, on the same work in the same run.
//!
//! Each row is a program of `tests/workloads/bench.c`. In every round both engines take their turns: a dump that leaves
//! the program running tells for how long it stood still, as it saw it itself; then a dump that ends it and a restore
//! are timed, and the restored program checks all that it had. The figures are medians of the rounds.
//!
//! The run happens in a mount namespace of its own with a tmpfs on `/run`, and one of huge pages in it
//! ([`sample::touch_memory`]). CRIU keeps the results of its kernel probes only there, and only on a tmpfs; without it, it
//! is 40 ms slower a call. The programs are in the same namespace:
//! otherwise CRIU would take theirs for a container's and dump all mounts.

mod report;
mod sample;
mod tcp;
mod tracking;

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail, ensure};

use crate::peer;
use sample::{Contender, Sample};

/// Set in the process that runs inside the namespace.
const INSIDE: &str = "XTASK_BENCH_INSIDE";

/// How often each engine does each row, unless `--rounds` says otherwise.
const ROUNDS: usize = 5;

/// One program to dump.
#[derive(Debug)]
pub struct Row {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it is called in the report.
    pub title: &'static str,
    kind: &'static str,
    count: &'static str,
}

/// All rows, in the order of the report.
const ROWS: &[Row] = &[
    Row { name: "small", title: "small", kind: "small", count: "0" },
    Row { name: "64m", title: "64 MiB", kind: "memory", count: "64" },
    Row { name: "512m", title: "512 MiB", kind: "memory", count: "512" },
    Row { name: "2g", title: "2 GiB", kind: "memory", count: "2048" },
    Row { name: "vmas", title: "20 000 VMAs", kind: "areas", count: "20000" },
    Row { name: "threads", title: "1000 threads", kind: "threads", count: "1000" },
    Row { name: "100procs", title: "100 processes", kind: "processes", count: "100" },
    Row { name: "500procs", title: "500 processes", kind: "processes", count: "500" },
    Row { name: "descriptors", title: "5000 descriptors", kind: "descriptors", count: "5000" },
];

/// What all rounds of one engine on one row came to.
#[derive(Debug)]
pub struct Outcome {
    /// The rounds that worked.
    pub samples: Vec<Sample>,
    /// Why the first that did not work failed.
    pub failure: Option<String>,
}

/// What the command line asks for.
struct Plan {
    rows: Vec<&'static Row>,
    rounds: usize,
    peer: Option<PathBuf>,
    out: PathBuf,
}

/// `cargo xtask bench`.
pub fn run(args: &[String]) -> Result<()> {
    let special = args.first().map(String::as_str).filter(|name| ["tcp", "tracking"].contains(name));
    let plan = Plan::parse(if special.is_some() { &[] } else { args })?;
    if env::var_os(INSIDE).is_none() {
        return enter_namespace(args);
    }
    match special {
        Some("tcp") => return tcp::run(&args[1..]),
        Some(_) => return tracking::run(&args[1..]),
        None => {}
    }
    let peer = match &plan.peer {
        Some(path) => path.clone(),
        None => peer::ensure_peer()?,
    };
    let contenders = [Contender::ours()?, Contender::peer(peer)?];
    let measured: Vec<_> = plan.rows.iter().map(|&row| (row, measure(row, &contenders, plan.rounds))).collect();
    let text = report::write(&contenders, &measured, plan.rounds);
    print!("{text}");
    std::fs::write(&plan.out, text).with_context(|| format!("writing {}", plan.out.display()))?;
    eprintln!("written to {}", plan.out.display());
    Ok(())
}

impl Plan {
    fn parse(args: &[String]) -> Result<Self> {
        let out = peer::workspace_root()?.join("docs/bench.md");
        let mut plan = Self { rows: Vec::new(), rounds: ROUNDS, peer: None, out };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--vs" => plan.peer = Some(value()?.into()),
                "--rounds" => plan.rounds = value()?.parse().context("--rounds needs a number")?,
                "--out" => plan.out = value()?.into(),
                name => {
                    let names = || ROWS.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
                    let row = ROWS.iter().find(|row| row.name == name);
                    plan.rows.push(row.with_context(|| format!("no row {name}; there are {}", names()))?);
                }
            }
        }
        ensure!(plan.rounds > 0, "--rounds 0 would measure nothing");
        if plan.rows.is_empty() {
            plan.rows = ROWS.iter().collect();
        }
        Ok(plan)
    }
}

/// Starts this program again in a mount namespace of its own, with a tmpfs on `/run` and one of huge pages in it.
fn enter_namespace(args: &[String]) -> Result<()> {
    let huge = sample::HUGE_PAGES;
    let mounts = format!(
        "mount -t tmpfs tmpfs /run && mkdir {huge} && mount -t tmpfs -o huge=always tmpfs {huge} && exec \"$0\" \"$@\""
    );
    let program = env::current_exe().context("finding this program")?;
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &mounts])
        .arg(program)
        .arg("bench")
        .args(args)
        .env(INSIDE, "1")
        .status()
        .context("starting unshare (of util-linux)")?;
    if !status.success() {
        bail!("the bench in its namespace: {status}");
    }
    Ok(())
}

/// All rounds of one row. The engines take turns in going first, after a round that is not counted: the first to write
/// so much has the disk find room for it.
fn measure(row: &Row, contenders: &[Contender; 2], rounds: usize) -> [Outcome; 2] {
    let mut outcomes = [(); 2].map(|()| Outcome { samples: Vec::new(), failure: None });
    let [_, peer] = contenders;
    let bytes = match peer.measure(row, 0) {
        Ok(sample) => sample.image_bytes,
        Err(error) => {
            eprintln!("{} · {} · warming up: {error:#}", row.title, peer.name);
            0
        }
    };
    for round in 0..rounds {
        let mut turns = [0, 1];
        if round % 2 == 1 {
            turns.reverse();
        }
        for turn in turns {
            let (contender, outcome) = (&contenders[turn], &mut outcomes[turn]);
            if outcome.failure.is_some() {
                continue;
            }
            eprint!("{} · {} · round {} of {rounds}: ", row.title, contender.name, round + 1);
            match contender.measure(row, bytes) {
                Ok(sample) => {
                    eprintln!("{sample}");
                    outcome.samples.push(sample);
                }
                Err(error) => {
                    eprintln!("{error:#}");
                    outcome.failure = Some(format!("{error:#}"));
                }
            }
        }
    }
    outcomes
}
