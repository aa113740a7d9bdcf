//! How long a tracked program stands still, and how well that is foretold.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use e2e::{Program, Workload};

use super::super::{ROWS, sample};
use super::{Line, Pair, median, milliseconds};

/// Memory of the program, in MiB; it writes 5000 pages a second.
const SIZES: [u64; 3] = [512, 2048, 8192];

/// The last dump after two pre-dumps, against CRIU's whole dump of the same program.
pub fn after_pre_dumps(pair: &Pair, rounds: usize) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut smallest: Option<(Duration, Duration)> = None;
    for size in SIZES {
        let (mut ours, mut scans, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=rounds {
            let (frozen, scan) = pair.ours.guarded(|| incremental(pair, size))?;
            eprintln!("{size} MiB after pre-dumps · round {round}: frozen {frozen:.1?}, of it scanning {scan:.1?}");
            ours.push(frozen);
            scans.push(scan);
            // CRIU's freeze grows with the memory: its largest would only take long.
            if size <= 2048 {
                let frozen = pair.peer.guarded(|| whole(pair, size))?;
                eprintln!("{size} MiB whole, CRIU · round {round}: frozen {frozen:.1?}");
                theirs.push(frozen);
            }
        }
        let (ours, scan) = (median(&ours)?, median(&scans)?);
        let what = format!("last dump after two pre-dumps, {size} MiB, 5000 pages/s written: frozen");
        match median(&theirs) {
            Ok(theirs) => {
                let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
                let is = format!("{} ({ratio:.3} of CRIU's {})", milliseconds(ours), milliseconds(theirs));
                let must = if size == 2048 { "≤ 0.05 of CRIU's" } else { "–" };
                lines.push(Line { what, is, must: must.into(), holds: size != 2048 || ratio <= 0.05 });
            }
            Err(_) => {
                let (small, small_scan) = smallest.unwrap_or_default();
                let (grown, allowed) = (ours.saturating_sub(small), 2 * scan.saturating_sub(small_scan));
                let is = format!(
                    "{}: {} more than with {} MiB, where the page map takes {} more",
                    milliseconds(ours),
                    milliseconds(grown),
                    SIZES[0],
                    milliseconds(scan.saturating_sub(small_scan))
                );
                lines.push(Line { what, is, must: "at most twice that".into(), holds: grown <= allowed });
            }
        }
        smallest = smallest.or(Some((ours, scan)));
    }
    Ok(lines)
}

fn dirtying(size: u64) -> Program {
    Workload::new("bench.c", "dirtying").arg(size.to_string()).start()
}

/// Two pre-dumps, then a dump that leaves the program running: how long that stood still, and how much of it was the walk
/// over its page map.
fn incremental(pair: &Pair, size: u64) -> Result<(Duration, Duration)> {
    let mut program = dirtying(size);
    let [first, second, last] = [1, 2, 3].map(|n| program.file(&format!("images-{n}")));
    pair.ours.pre_dump(&program, &first, None)?;
    pair.ours.pre_dump(&program, &second, Some(&first))?;
    // What happens from here on is the last dump's.
    program.next();
    let parent = second.to_string_lossy();
    pair.ours.dump(&program, &last, &["-R", "-v4", "--track-mem", "--prev-images-dir", &parent])?;
    let scan = scanning(&last)?;
    // The session ends with it.
    program.finish();
    Ok((sample::gap(&program)?, scan))
}

/// What the log says of the walk over the page map.
fn scanning(images: &Path) -> Result<Duration> {
    let log = fs::read_to_string(images.join("dump.log"))?;
    let micros = log.split("scanning_us=").nth(1).and_then(|rest| rest.split_whitespace().next());
    Ok(Duration::from_micros(micros.context("no scanning_us in the log")?.parse()?))
}

fn whole(pair: &Pair, size: u64) -> Result<Duration> {
    let mut program = dirtying(size);
    pair.peer.dump(&program, &program.file("images"), &["-R"])?;
    program.next();
    let frozen = sample::gap(&program)?;
    program.finish();
    Ok(frozen)
}

/// Dumps of all rows of the bench: each once whole and twice on top of the one before.
pub fn predictions(pair: &Pair) -> Result<Line> {
    let (mut all, mut close, mut worst) = (0, 0, 1.0f64);
    for row in ROWS {
        let program = Workload::new("bench.c", row.kind).arg(row.count).start();
        let outcome = pair.ours.guarded(|| foretold(pair, &program));
        for (predicted, frozen) in outcome.with_context(|| format!("predictions: {}", row.title))? {
            let ratio = predicted.as_secs_f64() / frozen.as_secs_f64();
            eprintln!("{} · predicted {predicted:.1?}, frozen {frozen:.1?}", row.title);
            all += 1;
            close += u32::from((0.75..=1.25).contains(&ratio));
            worst = worst.max(ratio.max(1.0 / ratio));
        }
    }
    Ok(Line {
        what: "predicted freeze against the measured one, all rows of the bench".into(),
        is: format!("{close} of {all} within 25 %, the worst wrong by a factor of {worst:.1}"),
        must: "9 of 10".into(),
        holds: close * 10 >= all * 9,
    })
}

fn foretold(pair: &Pair, program: &Program) -> Result<Vec<(Duration, Duration)>> {
    pair.ours.track(program.pid())?;
    let mut found = Vec::new();
    let mut parent: Option<String> = None;
    for n in 1..=3 {
        // Some looks make the shape known, and what was written since.
        std::thread::sleep(Duration::from_millis(2500));
        let predicted = pair.ours.report(program)?["predicted_freeze_us"].as_u64().context("a prediction")?;
        let images = program.file(&format!("images-{n}"));
        let mut words = vec!["-R", "--track-mem"];
        if let Some(parent) = &parent {
            words.extend(["--prev-images-dir", parent]);
        }
        pair.ours.dump(program, &images, &words)?;
        found.push((Duration::from_micros(predicted), last_frozen()?));
        parent = Some(images.to_string_lossy().into_owned());
    }
    pair.ours.untrack(program.pid())?;
    Ok(found)
}

/// How long the last dump held its tree, as the engine remembers it.
fn last_frozen() -> Result<Duration> {
    let entries = fs::read_dir("/run/criu-ebpf")?.flatten();
    let file = entries.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("/freezes-"));
    let text = fs::read_to_string(file.context("nothing is remembered of dumps")?)?;
    let last: serde_json::Value = serde_json::from_str(text.lines().last().context("an empty memory")?)?;
    Ok(Duration::from_micros(last["frozen_us"].as_u64().context("frozen_us")?))
}
