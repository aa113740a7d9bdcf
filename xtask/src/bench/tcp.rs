//! `cargo xtask bench tcp [--rounds N] [--connections N]`: a server with many live connections, by our engine and by CRIU.
//!
//! The clients are outside of the tree and silent. Each engine locks their connections in its own way: ours by the gate,
//! CRIU by netfilter rules (`--network-lock nftables`). The same server with no connection tells what of the times is due
//! to these. A further program gives back what its client sends; the client says how long it waited while the program was
//! dumped and restored. The rest is as for the other rows, see the module above.
//!
//! Below all that no restore can be, whoever makes it: a program makes as many sockets as there are connections, by the
//! calls that each of them needs, and nothing else. With our restore that has no connection it is the last row.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use e2e::{Claim, Program, Workload, proc};

use super::sample::{Contender, gap};
use crate::peer;

/// How many connections, and how often.
struct Plan {
    connections: String,
    rounds: usize,
}

/// What one engine needed in one round.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    /// For how long the server stood still in a dump that left it running.
    frozen: Duration,
    dump: Duration,
    restore: Duration,
    /// For how long the client of a small program got no answer while that was dumped and restored.
    pause: Duration,
    /// The restore of the same server without any connection.
    bare: Duration,
    /// For how long the server stood still from the beginning of the dump that ends it to the end of its restore.
    away: Duration,
    /// The calls alone that as many connections need.
    calls: Duration,
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
    let rows: [(&str, Value); 7] = [
        ("frozen", |t| t.frozen),
        ("moved: standing still", |t| t.away),
        ("dump", |t| t.dump),
        ("restore", |t| t.restore),
        ("restore without connections", |t| t.bare),
        ("restore, what connections add", |t| t.restore.saturating_sub(t.bare)),
        ("pause of a client", |t| t.pause),
    ];
    for (title, value) in rows {
        let (ours, theirs) = (median(ours, value), median(theirs, value));
        println!("| {title} | {ours:.1?} | {theirs:.1?} | {:.2} |", ours.as_secs_f64() / theirs.as_secs_f64());
    }
    let least = median(ours, |t| t.bare + t.calls);
    let theirs = median(theirs, |t| t.restore);
    let ratio = least.as_secs_f64() / theirs.as_secs_f64();
    println!("| nothing but the calls, and that | {least:.1?} | {theirs:.1?} | {ratio:.2} |");
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

/// One round.
fn measure(contender: &Contender, words: &[&str], connections: &str) -> Result<Times> {
    let times = server(contender, words, connections)?;
    let bare = server(contender, words, "0")?.restore;
    Ok(Times { pause: pause(contender, words)?, bare, calls: calls(connections)?, ..times })
}

/// What the kernel needs for as many sockets.
fn calls(connections: &str) -> Result<Duration> {
    let program = workload("calls", connections).start();
    program.wait_for_word("ok");
    gap(&program)
}

fn workload(case: &str, connections: &str) -> Workload {
    Workload::new("connections.c", case).env("E2E_CONNECTIONS", connections).with(Claim::Ports)
}

fn peer_of(program: &Program, workload: Workload) -> Result<Program> {
    let port = fs::read_to_string(program.file("port")).context("the program's port")?;
    Ok(Workload { claims: Vec::new(), ..workload }.env("E2E_PORT", &port).start())
}

/// A dump that leaves the server running, then one that ends it, then a restore.
fn server(contender: &Contender, words: &[&str], connections: &str) -> Result<Times> {
    let mut program = workload("many", connections).start();
    let mut peer = peer_of(&program, workload("many_peer", connections))?;
    program.next();
    let running = [words, &["-R"]].concat();
    contender.dump(&program, &program.file("left-running"), &running)?;
    program.next();
    let frozen = gap(&program)?;
    let (tree, images) = (program.tree(), program.file("images"));
    let dump = contender.dump(&program, &images, words)?.took;
    program.expect_gone(&tree);
    let restore = contender.restore(&images, words)?.took;
    ensure!(proc::exists(program.pid()), "restored, but pid {} is not there", program.pid());
    program.go();
    peer.finish();
    program.wait_for_word("ok");
    Ok(Times { frozen, dump, restore, away: gap(&program)?, ..Times::default() })
}

/// A dump and a restore, one right after the other, as the program's client sees them.
fn pause(contender: &Contender, words: &[&str]) -> Result<Duration> {
    let mut program = workload("echo", "1").start();
    let mut peer = peer_of(&program, workload("echo_peer", "1"))?;
    program.next();
    let (tree, images) = (program.tree(), program.file("images"));
    contender.dump(&program, &images, words)?;
    program.expect_gone(&tree);
    contender.restore(&images, words)?;
    std::thread::sleep(Duration::from_millis(100));
    peer.finish();
    program.wait_for_word("ok");
    gap(&peer)
}

fn median(times: &[Times], value: Value) -> Duration {
    let mut values: Vec<Duration> = times.iter().map(value).collect();
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}
