//! `cargo xtask bench tcp [--rounds N] [--connections N]`: a server with many live connections, by our engine and by CRIU.
//!
//! The clients are outside of the tree and silent. Each engine locks their connections in its own way: ours by the gate,
//! CRIU by netfilter rules (`--network-lock nftables`). The rest is as for the other rows, see the module above.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use e2e::{Program, Workload, proc};

use super::sample::{Contender, gap};
use crate::peer;

/// How many connections, and how often.
struct Plan {
    connections: String,
    rounds: usize,
}

/// What one engine needed in one round.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// For how long the server stood still in a dump that left it running.
    frozen: Duration,
    dump: Duration,
    restore: Duration,
}

/// One of the times.
type Value = fn(&Times) -> Duration;

/// Measures both engines and prints a table.
pub fn run(args: &[String]) -> Result<()> {
    let plan = parse(args)?;
    let contenders = [Contender::ours()?, Contender::peer(peer::ensure_peer()?)?];
    let locks: [&[&str]; 2] = [&["--tcp-established"], &["--tcp-established", "--network-lock", "nftables"]];
    let mut times = [Vec::new(), Vec::new()];
    for round in 1..=plan.rounds {
        for ((contender, words), times) in contenders.iter().zip(locks).zip(&mut times) {
            let measured = contender.guarded(|| measure(contender, words, &plan.connections))?;
            eprintln!("{} · round {round} of {}: {measured:.1?}", contender.name, plan.rounds);
            times.push(measured);
        }
    }
    let [ours, theirs] = &times;
    println!("| {} connections | {} | {} | ratio |", plan.connections, contenders[0].name, contenders[1].name);
    println!("| --- | ---: | ---: | ---: |");
    let rows: [(&str, Value); 3] = [("frozen", |t| t.frozen), ("dump", |t| t.dump), ("restore", |t| t.restore)];
    for (title, value) in rows {
        let (ours, theirs) = (median(ours, value), median(theirs, value));
        println!("| {title} | {ours:.1?} | {theirs:.1?} | {:.2} |", ours.as_secs_f64() / theirs.as_secs_f64());
    }
    Ok(())
}

fn parse(args: &[String]) -> Result<Plan> {
    let mut plan = Plan { connections: "1000".into(), rounds: 3 };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg} needs a value"))?;
        match arg.as_str() {
            "--rounds" => plan.rounds = value.parse().context("--rounds needs a number")?,
            "--connections" => plan.connections = value.parse::<u32>().context("a number")?.to_string(),
            other => bail!("bench tcp knows --rounds and --connections, not {other}"),
        }
    }
    Ok(plan)
}

/// One round: a dump that leaves the server running, then one that ends it, then a restore.
fn measure(contender: &Contender, words: &[&str], connections: &str) -> Result<Times> {
    let workload = |case: &str| Workload::new("tcp.py", case).env("E2E_CONNECTIONS", connections);
    let mut program = workload("many").start();
    let port = fs::read_to_string(program.file("port")).context("the server's port")?;
    let mut peer: Program = workload("many_peer").arg(port).start();
    program.next();
    let running = [words, &["-R"]].concat();
    contender.dump(&program, &program.file("left-running"), &running)?;
    program.next();
    let frozen = gap(&program)?;
    let tree = program.tree();
    let images = program.file("images");
    let dump = contender.dump(&program, &images, words)?.took;
    program.expect_gone(&tree);
    let restore = contender.restore(&images, words)?.took;
    ensure!(proc::exists(program.pid()), "restored, but pid {} is not there", program.pid());
    program.go();
    peer.finish();
    program.wait_for_word("ok");
    Ok(Times { frozen, dump, restore })
}

fn median(times: &[Times], value: Value) -> Duration {
    let mut values: Vec<Duration> = times.iter().map(value).collect();
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}
