//! `cargo xtask bench tracking [PART…] [--rounds N]`: what tracking costs a program, and what it spares in the freeze.
//!
//! Whatever is compared is measured in turns in one run: a program tracked and not tracked, our engine and CRIU. The report
//! goes to docs/bench-tracking.md, if all parts were measured.

mod freezes;
mod lives;
mod slowdown;

use std::{fmt::Write as _, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use e2e::Program;

use super::{report, sample::Contender};
use crate::peer;

/// The engine and CRIU.
struct Pair {
    ours: Contender,
    peer: Contender,
}

/// One line of the report.
struct Line {
    what: String,
    is: String,
    must: String,
    holds: bool,
}

/// What can be measured by itself, in this order.
const PARTS: [&str; 5] = ["pre-dumps", "live", "predictions", "slowdown", "session"];

/// Measures everything and writes the report.
pub fn run(args: &[String]) -> Result<()> {
    let (names, rounds) = parse(args)?;
    let pair = Pair { ours: Contender::ours()?, peer: Contender::peer(peer::ensure_peer()?)? };
    let mut lines = Vec::new();
    for name in &names {
        lines.extend(match *name {
            "pre-dumps" => freezes::after_pre_dumps(&pair, rounds)?,
            "live" => lives::all(&pair, rounds)?,
            "predictions" => vec![freezes::predictions(&pair)?],
            "slowdown" => slowdown::all(&pair, rounds)?,
            _ => slowdown::own_cost(&pair)?,
        });
    }
    let text = write(&lines, rounds);
    print!("{text}");
    if names != PARTS {
        return Ok(());
    }
    let out = peer::workspace_root()?.join("docs/bench-tracking.md");
    fs::write(&out, text).with_context(|| format!("writing {}", out.display()))?;
    eprintln!("written to {}", out.display());
    Ok(())
}

/// Which parts, all if none is named, and how many rounds.
fn parse(args: &[String]) -> Result<(Vec<&'static str>, usize)> {
    let (mut names, mut rounds) = (Vec::new(), 3);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--rounds" {
            rounds = args.next().context("--rounds needs a number")?.parse().context("--rounds needs a number")?;
            continue;
        }
        let known = PARTS.iter().find(|name| *name == arg);
        names.push(
            *known.with_context(|| format!("bench tracking knows {} and --rounds, not {arg}", PARTS.join(", ")))?,
        );
    }
    Ok(if names.is_empty() { (PARTS.to_vec(), rounds) } else { (names, rounds) })
}

fn write(lines: &[Line], rounds: usize) -> String {
    let mut text = format!(
        "# Bench of tracking\n\nMade by `cargo xtask bench tracking` on {}. Medians of {rounds} rounds; what is compared took \
         turns in the same run.\n\nMachine: {}.\n\n| what | measured | must reach | |\n| --- | --- | --- | --- |\n",
        report::today(),
        report::machine()
    );
    for Line { what, is, must, holds } in lines {
        let mark = if *holds { "holds" } else { "**missed**" };
        let _ = writeln!(text, "| {what} | {is} | {must} | {mark} |");
    }
    text
}

impl Contender {
    /// Runs a command of the engine that is no dump and no restore, and gives what it prints.
    fn ask(&self, words: &[&str]) -> Result<String> {
        let out = Command::new(self.binary()).args(words).output().with_context(|| format!("starting {words:?}"))?;
        ensure!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr).trim());
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Begins to track a program, in the background.
    fn track(&self, pid: i32) -> Result<()> {
        self.ask(&["track", "-d", &pid.to_string()]).map(drop)
    }

    /// Ends that.
    fn untrack(&self, pid: i32) -> Result<()> {
        self.ask(&["track", "--stop", &pid.to_string()]).map(drop)
    }

    /// What the session of a program reports.
    fn report(&self, program: &Program) -> Result<serde_json::Value> {
        let all: serde_json::Value = serde_json::from_str(&self.ask(&["track", "--list", "--json"])?)?;
        let list = all.as_array().context("a list of reports")?;
        let found = list.iter().find(|report| report["pid"] == program.pid());
        Ok(found.with_context(|| format!("no session of {}", program.pid()))?.clone())
    }

    /// Pre-dumps a program.
    fn pre_dump(&self, program: &Program, images: &Path, parent: Option<&Path>) -> Result<()> {
        let pid = program.pid().to_string();
        let (images, parent) = (images.to_string_lossy(), parent.map(|path| path.to_string_lossy().into_owned()));
        let mut words = vec!["pre-dump", "-t", &pid, "-D", &images, "--quiet"];
        if let Some(parent) = &parent {
            words.extend(["--prev-images-dir", parent]);
        }
        self.ask(&words).map(drop)
    }
}

/// The middle one.
fn median<T: PartialOrd + Copy>(values: &[T]) -> Result<T> {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    sorted.get(sorted.len() / 2).copied().context("no round worked")
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
