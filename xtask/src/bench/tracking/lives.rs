//! Live dumps: how long the program stands still, and how fast it is while its memory is written.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use e2e::Workload;

use super::{super::sample, Line, Pair, median, milliseconds, slowdown::Redis};

/// Memory of the program in MiB.
const SIZE: &str = "2048";

/// All about live dumps.
pub fn all(pair: &Pair, rounds: usize) -> Result<Vec<Line>> {
    /// Of a few milliseconds the machine's other work is a large part.
    const ROUNDS: usize = 5;
    let mut lines = Vec::new();
    for (kind, title, must) in [("small_pages", "small pages", 0.05), ("huge_pages", "huge pages", 0.005)] {
        let (mut ours, mut all, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=rounds.max(ROUNDS) {
            let (frozen, longest) = frozen(pair, kind)?;
            ours.push(frozen);
            all.push(longest);
            theirs.push(whole(pair, kind)?);
            eprintln!(
                "live, {title} · round {round}: {frozen:.1?}, all in all {longest:.1?}, CRIU {:.1?}",
                theirs.last()
            );
        }
        let (ours, all, theirs) = (median(&ours)?, median(&all)?, median(&theirs)?);
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        lines.push(Line {
            what: format!("`dump --live` of 2 GiB, {title}: frozen"),
            is: format!(
                "{} ({ratio:.3} of CRIU's {}); longest gap until all was on disk: {}",
                milliseconds(ours),
                milliseconds(theirs),
                milliseconds(all)
            ),
            must: format!("≤ {must} of CRIU's"),
            holds: ratio <= must,
        });
    }
    lines.push(redis(pair, rounds)?);
    Ok(lines)
}

/// How long the program saw itself stand still about the time of the freeze, or before, until its memory was tracked; and at
/// any time of the dump: while two gigabytes are brought to disk, any program has to wait now and then.
fn frozen(pair: &Pair, kind: &str) -> Result<(Duration, Duration)> {
    /// From the engine's start to the first line of its log, and what a gap may reach beyond the freeze.
    const LEEWAY: Duration = Duration::from_millis(20);
    pair.ours.guarded(|| {
        let mut program = Workload::new("bench.c", kind).arg(SIZE).start();
        let images = program.file("images");
        let begin = SystemTime::now();
        pair.ours.dump(&program, &images, &["-R", "--live", "-v4"])?;
        program.next();
        let log = fs::read_to_string(images.join("dump.log"))?;
        let (from, to) = (logged(&log, "the tree stands still")?, logged(&log, "the tree runs on")?);
        let mut frozen = sample::gap_within(&program, begin + from, begin + to + LEEWAY)?;
        // It was stopped for a moment as well, if it is not written from a copy.
        if let Ok(tracked) = logged(&log, "the session tells what was written") {
            frozen = frozen.max(sample::gap_within(&program, begin, begin + tracked + LEEWAY).unwrap_or_default());
        }
        let longest = sample::gap(&program)?;
        program.finish();
        Ok((frozen, longest))
    })
}

/// When a dump said something, after its start.
fn logged(log: &str, what: &str) -> Result<Duration> {
    let line = log.lines().find(|line| line.contains(what)).with_context(|| format!("no {what:?} in the log"))?;
    let seconds = line.strip_prefix('(').and_then(|line| line.split(')').next()).and_then(|time| time.parse().ok());
    Ok(Duration::from_secs_f64(seconds.with_context(|| format!("no time in {line:?}"))?))
}

fn whole(pair: &Pair, kind: &str) -> Result<Duration> {
    pair.peer.guarded(|| {
        let mut program = Workload::new("bench.c", kind).arg(SIZE).start();
        pair.peer.dump(&program, &program.file("images"), &["-R"])?;
        program.next();
        let frozen = sample::gap(&program)?;
        program.finish();
        Ok(frozen)
    })
}

/// A redis with a gigabyte, benchmarked while one live dump after the other is made of it, and while none is.
fn redis(pair: &Pair, rounds: usize) -> Result<Line> {
    let redis = Redis::start()?;
    redis.command(&["DEBUG", "POPULATE", "1000000", "key", "900"])?;
    redis.speed(1)?;
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        let without = redis.speed(1)?;
        let done = AtomicBool::new(false);
        let with = std::thread::scope(|scope| {
            let dumps = scope.spawn(|| -> Result<u32> {
                let mut count = 0;
                while !done.load(Ordering::Relaxed) {
                    let images = redis.program.file("live");
                    pair.ours.dump(&redis.program, &images, &["-R", "--live", "--tcp-established"])?;
                    fs::remove_dir_all(&images).context("removing the images")?;
                    count += 1;
                }
                Ok(count)
            });
            let with = redis.speed(1);
            done.store(true, Ordering::Relaxed);
            let count = dumps.join().map_err(|_| anyhow::anyhow!("the dumping thread"))??;
            eprintln!("redis · round {round}: {count} live dumps meanwhile");
            with
        })?;
        ratios.push(with / without);
    }
    let ratio = median(&ratios)?;
    Ok(Line {
        what: "redis-benchmark (SET and GET on 1 GiB) while one live dump after the other is made: speed".into(),
        is: format!("{:.0} % of what it is otherwise", ratio * 100.0),
        must: "≥ 50 %".into(),
        holds: ratio >= 0.5,
    })
}
