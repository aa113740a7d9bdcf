//! How long a dump would hold a tree: an estimate from what the tree looks like, put right by the dumps that were made on
//! this machine since it booted.
//!
//! The model is a sum of what each thing costs. How far it is off differs from machine to machine and from tree to tree,
//! but little from one dump to the next of a tree of the same shape: so every dump leaves its measure behind (in
//! /run/criu-ebpf), and the estimate is corrected by those whose trees were the most alike.

use std::time::Duration;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::kernel::{kept, proc, survey};

/// What a tree is made of, as far as it costs time in a freeze.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Processes.
    pub processes: u64,
    /// Threads of all of them.
    pub threads: u64,
    /// Areas of memory.
    pub areas: u64,
    /// Descriptors.
    pub descriptors: u64,
    /// Pages of private memory, which have to be walked over.
    pub pages: u64,
    /// Of these, pages that have to be written.
    pub written: u64,
}

impl Shape {
    /// Looks a process over from outside: everything but what would have to be written.
    pub fn of(pid: Pid) -> Self {
        let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        Self {
            processes: 1,
            threads: proc::threads(pid).map_or(0, |threads| threads.len() as u64),
            areas: maps.iter().filter(|&&byte| byte == b'\n').count() as u64,
            descriptors: proc::descriptors(pid).map_or(0, |fds| fds.len() as u64),
            pages: crate::object::memory::estimate(pid) / survey::PAGE,
            written: 0,
        }
    }

    /// The same of all processes of a tree.
    pub fn of_tree(root: Pid) -> Self {
        proc::tree(root).into_iter().map(Self::of).fold(Self::default(), Self::and)
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            processes: self.processes + other.processes,
            threads: self.threads + other.threads,
            areas: self.areas + other.areas,
            descriptors: self.descriptors + other.descriptors,
            pages: self.pages + other.pages,
            written: self.written + other.written,
        }
    }
}

/// What a dump of a tree came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What the tree was like.
    pub shape: Shape,
    /// How long it stood still, in microseconds.
    pub frozen_us: u64,
}

/// Microseconds for one of each, and for a freeze at all (docs/tracking.md tells how they were measured).
const FREEZE: f64 = 3000.0;
const PROCESS: f64 = 1500.0;
const THREAD: f64 = 100.0;
const AREA: f64 = 4.0;
const DESCRIPTOR: f64 = 20.0;
const PAGE: f64 = 0.012;
const WRITTEN: f64 = 1.5;

impl Shape {
    /// The model alone.
    fn model(&self) -> f64 {
        let cost = |count: u64, each: f64| count as f64 * each;
        FREEZE
            + cost(self.processes, PROCESS)
            + cost(self.threads, THREAD)
            + cost(self.areas, AREA)
            + cost(self.descriptors, DESCRIPTOR)
            + cost(self.pages, PAGE)
            + cost(self.written, WRITTEN)
    }

    /// How unlike two trees are: the squared distance of the logarithms of their counts.
    fn distance(&self, other: &Shape) -> f64 {
        let parts = |shape: &Shape| {
            [shape.processes, shape.threads, shape.areas, shape.descriptors, shape.pages, shape.written]
                .map(|count| ((count + 8) as f64).ln())
        };
        parts(self).iter().zip(parts(other)).map(|(a, b)| (a - b) * (a - b)).sum()
    }
}

/// Estimates the freeze of a dump of such a tree.
pub fn predict(shape: &Shape, known: &[Measured]) -> Duration {
    /// A tree at this squared distance counts half as much as the same tree.
    const NEAR: f64 = 0.05;
    /// What the model itself counts, where nothing alike is known.
    const PRIOR: f64 = 0.05;
    let mut weights = PRIOR;
    // Of ratios, the geometric mean: twice and half are equally wrong.
    let mut sum = 0.0;
    for (age, measured) in known.iter().rev().enumerate() {
        // Older dumps fade: what ran beside them does not run any more.
        let weight = NEAR / (NEAR + measured.shape.distance(shape)) * 0.8f64.powi(age.min(40) as i32);
        weights += weight;
        sum += weight * (measured.frozen_us.max(1) as f64 / measured.shape.model()).ln();
    }
    Duration::from_micros((shape.model() * (sum / weights).exp()) as u64)
}

/// How many dumps are remembered.
const REMEMBERED: usize = 64;

/// The dumps that were made since the machine booted, the latest last.
pub fn known() -> Vec<Measured> {
    let text = file().and_then(|name| kept::read(&name)).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Remembers a dump.
pub fn remember(measured: &Measured) {
    let Some(name) = file() else { return };
    let mut all = known();
    all.push(*measured);
    let from = all.len().saturating_sub(REMEMBERED);
    let lines: Vec<String> = all[from..].iter().filter_map(|one| serde_json::to_string(one).ok()).collect();
    if let Err(err) = kept::write(&name, &(lines.join("\n") + "\n")) {
        tracing::debug!(%err, "predictions will not learn from this dump");
    }
}

fn file() -> Option<String> {
    kept::name("freezes", [])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Shape = Shape { processes: 1, threads: 1, areas: 30, descriptors: 5, pages: 1000, written: 1000 };

    fn within(estimate: Duration, of: Duration, share: f64) {
        let ratio = estimate.as_secs_f64() / of.as_secs_f64();
        assert!((ratio - 1.0).abs() < share, "{estimate:?} is not within {share} of {of:?}");
    }

    #[test]
    fn more_of_anything_takes_longer() {
        let alone = predict(&SMALL, &[]);
        for larger in [
            Shape { processes: 9, ..SMALL },
            Shape { threads: 99, ..SMALL },
            Shape { areas: 9999, ..SMALL },
            Shape { descriptors: 999, ..SMALL },
            Shape { pages: 999_999, ..SMALL },
            Shape { written: 99_999, ..SMALL },
        ] {
            assert!(predict(&larger, &[]) > alone, "{larger:?}");
        }
    }

    #[test]
    fn dumps_of_the_same_tree_put_it_right() {
        let known = [Measured { shape: SMALL, frozen_us: 30_000 }, Measured { shape: SMALL, frozen_us: 30_000 }];
        within(predict(&SMALL, &known), Duration::from_millis(30), 0.1);
        let nearly = Shape { written: 1200, ..SMALL };
        within(predict(&nearly, &known), Duration::from_millis(30), 0.2);
    }

    #[test]
    fn dumps_of_other_trees_count_little() {
        let other =
            Shape { processes: 500, threads: 500, areas: 15_000, descriptors: 2500, pages: 500_000, written: 500_000 };
        let known = [Measured { shape: SMALL, frozen_us: 12_000 }, Measured { shape: other, frozen_us: 9_000_000 }];
        within(predict(&SMALL, &known), Duration::from_millis(12), 0.25);
    }
}
