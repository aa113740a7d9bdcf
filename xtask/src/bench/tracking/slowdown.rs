//! What tracking costs the tracked program, others, and the machine.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    process::Command,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result};
use e2e::{Program, Workload, proc};

use super::{Line, Pair, median};

/// A program that can be asked how fast it is.
type Speed<'a> = &'a mut dyn FnMut() -> Result<f64>;

/// All comparisons of speed.
pub fn all(pair: &Pair, rounds: usize) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut writer = Workload::new("speed.c", "writes").start();
    let pid = writer.pid();
    let ratio = compare(pair, rounds, pid, &mut || rate(&mut writer))?;
    end(&mut writer)?;
    lines.push(line("writes pages at random over 256 MiB as fast as it can, tracked", ratio, 0.85));

    let other = Workload::new("bench.c", "memory").arg("64").start();
    let mut caller = Workload::new("speed.c", "calls").start();
    let ratio = compare(pair, rounds, other.pid(), &mut || rate(&mut caller))?;
    end(&mut caller)?;
    lines.push(line("makes system calls only, while another program is tracked", ratio, 0.99));
    drop(other);

    for (pipeline, title) in [(1, "redis-benchmark, SET and GET, -r 100000"), (16, "the same with 16 in a pipeline")] {
        let redis = Redis::start()?;
        let ratio = compare(pair, rounds, redis.program.pid(), &mut || redis.speed(pipeline))?;
        lines.push(line(&format!("{title}, tracked"), ratio, 0.95));
    }
    Ok(lines)
}

fn line(what: &str, ratio: f64, must: f64) -> Line {
    Line {
        what: format!("{what}: speed"),
        is: format!("{:.1} % of untracked", ratio * 100.0),
        must: format!("≥ {:.0} %", must * 100.0),
        holds: ratio >= must,
    }
}

/// The median of the ratios of pairs: untracked and tracked, by turns.
fn compare(pair: &Pair, rounds: usize, tracked: i32, speed: Speed<'_>) -> Result<f64> {
    let mut ratios = Vec::new();
    // Of the first nothing is taken: it warms up.
    speed()?;
    for round in 1..=2 * rounds {
        let without = speed()?;
        pair.ours.track(tracked)?;
        sleep(Duration::from_millis(200));
        let with = speed();
        pair.ours.untrack(tracked)?;
        let with = with?;
        eprintln!("round {round}: {without:.0} a second untracked, {with:.0} tracked");
        ratios.push(with / without);
    }
    median(&ratios)
}

/// Has a program of speed.c work for a while.
fn rate(program: &mut Program) -> Result<f64> {
    program.next();
    let log = program.log();
    let last = log.lines().rev().find_map(|line| line.strip_prefix("rate ")).context("no rate in the log")?;
    Ok(last.parse()?)
}

fn end(program: &mut Program) -> Result<()> {
    fs::write(program.file("end"), "").context("telling the program to end")?;
    program.finish();
    Ok(())
}

/// A redis server on a port that was free.
pub struct Redis {
    /// The server.
    pub program: Program,
    port: String,
}

impl Redis {
    /// Starts one without any data.
    pub fn start() -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
        let options = ["--port", &port, "--save", "", "--appendonly", "no", "--enable-debug-command", "local"];
        let program = Workload::program(&[&["redis-server"][..], &options].concat()).start();
        for _ in 0..500 {
            if TcpStream::connect(format!("127.0.0.1:{port}")).is_ok() {
                break;
            }
            sleep(Duration::from_millis(10));
        }
        Ok(Self { program, port })
    }

    /// Has it do something.
    pub fn command(&self, words: &[&str]) -> Result<()> {
        let out = Command::new("redis-cli").args(["-p", &self.port]).args(words).output().context("redis-cli")?;
        anyhow::ensure!(out.status.success(), "redis-cli {words:?}: {}", String::from_utf8_lossy(&out.stdout));
        Ok(())
    }

    /// Requests in a second, SET and GET together, over seconds: what the first look costs is little of that.
    pub fn speed(&self, pipeline: u32) -> Result<f64> {
        let requests = 100_000 * (1 + pipeline);
        let out = Command::new("redis-benchmark")
            .args(["-p", &self.port, "-r", "100000", "-t", "set,get", "--csv"])
            .args(["-n", &requests.to_string(), "-P", &pipeline.to_string()])
            .output()
            .context("starting redis-benchmark")?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let rates: Vec<f64> = text
            .lines()
            .filter(|line| line.contains("SET") || line.contains("GET"))
            .filter_map(|line| line.split(',').nth(1)?.trim_matches('"').parse().ok())
            .collect();
        anyhow::ensure!(rates.len() == 2, "redis-benchmark says {text:?}");
        // For as many of each: the harmonic mean.
        Ok(2.0 / rates.iter().map(|rate| 1.0 / rate).sum::<f64>())
    }
}

/// What the session itself takes: of a processor for an idle tree, and of memory for 8 GiB.
pub fn own_cost(pair: &Pair) -> Result<Vec<Line>> {
    let idle = Sleeper::start()?;
    let program = &idle.program;
    pair.ours.track(program.pid())?;
    let session = pair.ours.report(program)?["session"].as_i64().context("the session's pid")?;
    const SECONDS: u64 = 10;
    let before = ticks(session)?;
    sleep(Duration::from_secs(SECONDS));
    let share = (ticks(session)? - before) as f64 / 100.0 / SECONDS as f64;
    pair.ours.untrack(program.pid())?;

    let large = Workload::new("bench.c", "dirtying").arg("8192").start();
    pair.ours.track(large.pid())?;
    sleep(Duration::from_secs(SECONDS));
    let session = pair.ours.report(&large)?["session"].as_i64().context("the session's pid")?;
    let status = proc::status(i32::try_from(session)?);
    let peak = status.get("VmHWM").and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok());
    let mib = peak.context("VmHWM")? / 1024.0;
    pair.ours.untrack(large.pid())?;
    Ok(vec![
        Line {
            what: "the session's own time for an idle tree of ten processes".into(),
            is: format!("{:.2} % of a processor", share * 100.0),
            must: "< 2 %".into(),
            holds: share < 0.02,
        },
        Line {
            what: "the session's peak memory for 8 GiB, 5000 pages/s written".into(),
            is: format!("{mib:.0} MiB"),
            must: "< 100 MiB".into(),
            holds: mib < 100.0,
        },
    ])
}

/// A tree that does nothing.
struct Sleeper {
    program: Program,
}

impl Sleeper {
    fn start() -> Result<Self> {
        let script = "for n in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; wait";
        let program = Workload::program(&["sh", "-c", script]).start();
        sleep(Duration::from_millis(300));
        Ok(Self { program })
    }
}

/// Processor time of a process in hundredths of a second (USER_HZ).
fn ticks(pid: i64) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = text.rsplit_once(')').context("a stat line")?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    Ok(words[11].parse::<u64>()? + words[12].parse::<u64>()?)
}
