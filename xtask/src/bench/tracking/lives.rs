//! Live dumps: how long the program stands still, and how fast it is while its memory is written.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result};
use e2e::Workload;

use super::{super::sample, Line, Pair, median, milliseconds, slowdown::Redis};

/// Memory of the program in MiB.
const SIZE: &str = "2048";

/// All about live dumps.
pub fn all(pair: &Pair, rounds: usize) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for (kind, title, must) in [("small_pages", "small pages", 0.05), ("huge_pages", "huge pages", 0.005)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 1..=rounds {
            ours.push(frozen(pair, kind, &["-R", "--live"])?);
            theirs.push(whole(pair, kind)?);
            eprintln!("live, {title} · round {round}: {:.1?}, CRIU {:.1?}", ours.last(), theirs.last());
        }
        let (ours, theirs) = (median(&ours)?, median(&theirs)?);
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        lines.push(Line {
            what: format!("`dump --live` of 2 GiB, {title}: frozen"),
            is: format!("{} ({ratio:.3} of CRIU's {})", milliseconds(ours), milliseconds(theirs)),
            must: format!("≤ {must} of CRIU's"),
            holds: ratio <= must,
        });
    }
    lines.push(redis(pair, rounds)?);
    Ok(lines)
}

fn frozen(pair: &Pair, kind: &str, words: &[&str]) -> Result<Duration> {
    pair.ours.guarded(|| {
        let mut program = Workload::new("bench.c", kind).arg(SIZE).start();
        pair.ours.dump(&program, &program.file("images"), words)?;
        program.next();
        let frozen = sample::gap(&program)?;
        program.finish();
        Ok(frozen)
    })
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
    redis.speed("1")?;
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        let without = redis.speed("1")?;
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
            let with = redis.speed("1");
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
