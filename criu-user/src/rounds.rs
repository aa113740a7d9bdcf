//! Pre-dumps one after the other, each building on the one before: until more of them would not help, or until a dump is
//! expected to hold the tree no longer than somebody wants.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use tracing::info;

use crate::observer::Observer;
use crate::predump::{PreDumpError, PreDumpOptions, PreDumpSummary, pre_dump};
use crate::track::TrackError;
use crate::track::client::Client;
use crate::track::method::Method;
use crate::track::report::Report;

/// More rounds than ever helped.
const MOST: usize = 16;
/// A round that leaves more than this share of what the one before left does not help any more.
const HELPS: f64 = 0.9;

/// Why rounds ended without what was wanted.
#[derive(Debug, thiserror::Error)]
pub enum RoundsError {
    /// A round failed.
    #[error(transparent)]
    PreDump(#[from] PreDumpError),
    /// The session cannot be asked.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// The tree writes too fast, or is too large.
    #[error(
        "a dump would hold the tree for about {} ms, more than the {} ms of --max-freeze, and after {rounds} pre-dump(s) \
         another would not help: it writes {} MiB a second; allow more, or dump it when it writes less (--when-quiet)",
        predicted.as_millis(), limit.as_millis(), written >> 20
    )]
    TooLong {
        /// What is expected.
        predicted: Duration,
        /// What was wanted.
        limit: Duration,
        /// Pre-dumps that were made.
        rounds: usize,
        /// Bytes that the tree writes in a second.
        written: u64,
    },
}

/// What rounds came to.
#[derive(Debug)]
pub struct Rounds {
    /// Where the last pre-dump is; `None` if none was needed.
    pub last: Option<PathBuf>,
    /// The pre-dumps.
    pub summaries: Vec<PreDumpSummary>,
    /// What is expected of a dump now.
    pub predicted: Duration,
}

impl Rounds {
    /// A single pre-dump.
    pub fn only(summary: PreDumpSummary, images_dir: &Path) -> Self {
        Self { last: Some(images_dir.to_owned()), summaries: vec![summary], predicted: Duration::ZERO }
    }
}

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// Another round would not make the dump any shorter.
    Converged,
    /// A dump is expected to hold the tree no longer than this.
    Freeze(Duration),
}

/// Pre-dumps a tree as `options` say, into the directories 1, 2, 3… below their `images_dir`, in which a parent that is no
/// absolute path starts. `tell` hears of each.
pub fn pre_dumps(
    options: &PreDumpOptions,
    until: Until,
    observer: &dyn Observer,
    tell: &dyn Fn(&Result<PreDumpSummary, PreDumpError>),
) -> Result<Rounds, RoundsError> {
    let mut rounds = Rounds { last: None, summaries: Vec::new(), predicted: Duration::ZERO };
    let mut client = Client::connect_or_start(options.pid, options.tracking.method)?;
    let mut report = client.report()?;
    let mut tracking = options.tracking.clone();
    // A path that is not absolute starts in the directory of the images, and theirs is one deeper.
    tracking.prev_images_dir = tracking.prev_images_dir.map(|parent| Path::new("..").join(parent));
    loop {
        rounds.predicted = Duration::from_micros(report.predicted_freeze_us);
        info!(round = rounds.summaries.len(), left = report.pending_bytes, predicted = ?rounds.predicted, "a dump now");
        if let Until::Freeze(limit) = until
            && rounds.predicted <= limit
            && (rounds.last.is_some() || tracking.prev_images_dir.is_some() || !report.has_image)
        {
            return Ok(rounds);
        }
        let before = report.pending_bytes;
        let number = rounds.summaries.len() + 1;
        let images_dir = options.images_dir.join(number.to_string());
        let round = PreDumpOptions { images_dir: images_dir.clone(), tracking: tracking.clone(), ..options.clone() };
        let first = rounds.last.is_none();
        let result = pre_dump(&round, observer);
        tell(&result);
        rounds.summaries.push(result?);
        rounds.last = Some(images_dir);
        tracking.prev_images_dir = Some(PathBuf::from(format!("../{number}")));
        report = client.report()?;
        let helps = first || (report.pending_bytes as f64) < before as f64 * HELPS;
        if helps && number < MOST {
            continue;
        }
        rounds.predicted = Duration::from_micros(report.predicted_freeze_us);
        return match until {
            Until::Freeze(limit) if rounds.predicted > limit => Err(too_long(&rounds, &report, limit)),
            _ => Ok(rounds),
        };
    }
}

fn too_long(rounds: &Rounds, report: &Report, limit: Duration) -> RoundsError {
    RoundsError::TooLong {
        predicted: rounds.predicted,
        limit,
        rounds: rounds.summaries.len(),
        written: report.written_bytes_per_second,
    }
}

/// Waits for a moment in which a dump is expected to be shorter than it mostly was of late, but no longer than `deadline`.
/// Tells whether there was one.
pub fn wait_until_quiet(pid: Pid, method: Method, deadline: Duration) -> Result<bool, TrackError> {
    /// Reports that make a median.
    const ENOUGH: usize = 5;
    /// Reports that are still of late.
    const LATE: usize = 30;
    let begin = Instant::now();
    let mut client = Client::connect_or_start(pid, method)?;
    client.follow()?;
    let mut seen: Vec<u64> = Vec::new();
    while begin.elapsed() < deadline {
        client.patience(deadline.saturating_sub(begin.elapsed()))?;
        let report = match client.next_report() {
            Ok(Some(report)) => report,
            Ok(None) => return Err(TrackError::NoSession { pid: pid.as_raw() }),
            Err(err) if err.is_timeout() => break,
            Err(err) => return Err(err),
        };
        let now = report.predicted_freeze_us;
        if seen.len() >= ENOUGH {
            let mut sorted = seen.clone();
            sorted.sort_unstable();
            let median = sorted[sorted.len() / 2];
            info!(predicted_us = now, median_us = median, "waiting for a quiet moment");
            if now <= median {
                return Ok(true);
            }
        }
        seen.push(now);
        if seen.len() > LATE {
            seen.remove(0);
        }
    }
    Ok(false)
}
