//! How long a dump would hold a tree: an estimate from what the tree looks like, put right by the dumps that were made on
//! this machine since it booted.
//!
//! The model is a sum of what each thing costs. What that is differs from machine to machine, and how far the sum is off
//! from tree to tree, but little from one dump to the next of a tree of the same shape. So every dump leaves its measure
//! behind (in /run/criu-ebpf): all of them put the costs right, and those whose trees were the most alike the sum.

use std::time::Duration;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::copying;
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

/// Microseconds for a freeze at all, and for one of each in the order of [`Shape::counts`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs([f64; 7]);

/// Where the page that is to be written stands in there.
const WRITTEN: usize = 6;

impl Default for Costs {
    /// What they are where nothing is known of a machine (docs/tracking.md tells how they were measured).
    fn default() -> Self {
        Self([1050.0, 500.0, 58.0, 0.44, 9.0, 0.0075, 0.93])
    }
}

impl Costs {
    /// What they are before the first dump of this machine, which has been asked how fast it copies pages.
    pub fn of_this_machine() -> Self {
        /// To write a page of the program's memory into images, in times of writing one of our own into a file.
        const OF_COPYING: f64 = 0.88;
        let Self(mut costs) = Self::default();
        if let Some(copying) = copying::cost() {
            costs[WRITTEN] = OF_COPYING * copying;
        }
        Self(costs)
    }

    /// Microseconds that so many pages take to be written.
    pub fn of_writing(&self, pages: u64) -> f64 {
        self.0[WRITTEN] * pages as f64
    }
}

/// What each thing costs on this machine, by the dumps that were made.
///
/// First, by how much it is faster or slower than `first` says. Then by least squares of the relative errors,
/// held to that where the dumps tell nothing (ridge regression): one cost after the other is set to its best value, until
/// they stay (Gauss-Seidel).
fn costs(&Costs(first): &Costs, known: &[Measured]) -> [f64; 7] {
    /// By how much a dump can be off the best model, and a cost off what it was taken for.
    const NOISE: f64 = 0.2;
    const SPREAD: f64 = 0.12;
    /// No cost is taken for ten times too much.
    const LEAST: f64 = 0.1;
    const ROUNDS: usize = 30;
    let speed = speed(&first, known);
    let share = |measured: &Measured| {
        let counts = measured.shape.counts();
        std::array::from_fn::<f64, 7, _>(|n| speed * first[n] * counts[n] / measured.frozen_us.max(1) as f64)
    };
    let faded = |age: usize| 0.95f64.powi(age.min(100) as i32) / (NOISE * NOISE);
    // One that is far from what it should have taken, for reasons of its own, counts as if it were less far (Huber).
    let credible = |shares: &[f64; 7]| (2.0 * NOISE / (1.0 - shares.iter().sum::<f64>()).abs().max(1e-9)).min(1.0);
    let rows: Vec<([f64; 7], f64)> = known
        .iter()
        .rev()
        .enumerate()
        .map(|(age, measured)| {
            let shares = share(measured);
            (shares, faded(age) * credible(&shares))
        })
        .collect();
    let mut factors = [1.0; 7];
    for _ in 0..ROUNDS {
        for n in 0..factors.len() {
            let mut over = 1.0 / (SPREAD * SPREAD);
            let mut under = over;
            for (shares, weight) in &rows {
                let others: f64 = (0..factors.len()).filter(|&m| m != n).map(|m| shares[m] * factors[m]).sum();
                over += weight * shares[n] * (1.0 - others);
                under += weight * shares[n] * shares[n];
            }
            factors[n] = (over / under).max(LEAST);
        }
    }
    std::array::from_fn(|n| speed * first[n] * factors[n])
}

/// How long dumps take in times of what the first costs say: the median, drawn towards 1 while there are few.
fn speed(first: &[f64; 7], known: &[Measured]) -> f64 {
    /// As many dumps as the first costs stand for.
    const FIRST: f64 = 3.0;
    let ratio = |measured: &Measured| (measured.frozen_us.max(1) as f64 / measured.shape.model(first)).ln();
    let mut ratios: Vec<f64> = known.iter().map(ratio).collect();
    ratios.sort_by(f64::total_cmp);
    let count = ratios.len();
    let median = match count {
        0 => return 1.0,
        odd if odd % 2 == 1 => ratios[odd / 2],
        // The one that says less: the other may be the exception.
        even => [ratios[even / 2 - 1], ratios[even / 2]]
            .into_iter()
            .min_by(|a, b| a.abs().total_cmp(&b.abs()))
            .unwrap_or(0.0),
    };
    (median * count as f64 / (count as f64 + FIRST)).exp()
}

impl Shape {
    /// One freeze, and how much there is of everything.
    fn counts(&self) -> [f64; 7] {
        let Self { processes, threads, areas, descriptors, pages, written } = *self;
        [1, processes, threads, areas, descriptors, pages, written].map(|count| count as f64)
    }

    /// The model alone, in microseconds.
    fn model(&self, costs: &[f64; 7]) -> f64 {
        self.counts().iter().zip(costs).map(|(count, cost)| count * cost).sum()
    }

    /// How unlike the dumps of two trees are: the squared differences of what each thing costs, in parts of the whole. A
    /// hundred thousand pages that are only walked over make no difference; a hundred processes do.
    fn distance(&self, other: &Shape, costs: &[f64; 7]) -> f64 {
        let whole = f64::midpoint(self.model(costs), other.model(costs));
        let counts = self.counts().into_iter().zip(other.counts());
        counts.zip(costs).map(|((a, b), cost)| ((a - b) * cost / whole).powi(2)).sum()
    }
}

/// Estimates the freeze of a dump of such a tree, on a machine where the first dump costs so much.
pub fn predict(shape: &Shape, first: &Costs, known: &[Measured]) -> Duration {
    /// A tree at this squared distance counts half as much as the same tree.
    const NEAR: f64 = 0.2;
    /// What the model itself counts, where nothing alike is known.
    const PRIOR: f64 = 1.0;
    /// Errors count in parts of what a dump then takes, and dumps are held up more often than they are quick: so the best
    /// estimate is a little below the middle.
    const BELOW: f64 = 0.95;
    let costs = costs(first, known);
    // Of ratios, by their logarithms: twice and half are equally wrong.
    let mut ratios = vec![(0.0, PRIOR)];
    ratios.extend(known.iter().rev().enumerate().map(|(age, measured)| {
        // Older dumps fade: what ran beside them does not run any more.
        let weight = NEAR / (NEAR + measured.shape.distance(shape, &costs)) * 0.9f64.powi(age.min(40) as i32);
        ((measured.frozen_us.max(1) as f64 / measured.shape.model(&costs)).ln(), weight)
    }));
    Duration::from_micros((shape.model(&costs) * middle(&mut ratios).exp() * BELOW) as u64)
}

/// The mean of values with weights, of which none counts as further from their median than others mostly are: once in a
/// while a dump takes several times as long as the next one.
fn middle(values: &mut [(f64, f64)]) -> f64 {
    const FAR: f64 = 0.3;
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let whole: f64 = values.iter().map(|(_, weight)| weight).sum();
    let mut below = 0.0;
    let median = values.iter().find_map(|(value, weight)| {
        below += weight;
        (below >= whole / 2.0).then_some(*value)
    });
    let Some(median) = median else { return 0.0 };
    values.iter().map(|(value, weight)| value.clamp(median - FAR, median + FAR) * weight).sum::<f64>() / whole
}

/// Pages that are copied before a freeze in a second, where memory is slow to come by.
const COPIED: u64 = 50_000;

/// Whether pages written since the parent are worth copying before the freeze (head_start.rs), in a tree that writes so
/// many `a_second`: that there are many, and that not half of them are written again meanwhile.
pub fn is_worth_a_head_start(pages: u64, a_second: u64) -> bool {
    /// Fewer are written in the freeze within five milliseconds.
    const MANY: u64 = 2048;
    pages >= MANY && a_second < COPIED / 2
}

/// Of `pages` written since the parent, those that the freeze will have to write.
pub fn left_to_the_freeze(pages: u64, a_second: u64) -> u64 {
    if is_worth_a_head_start(pages, a_second) { a_second * pages / COPIED } else { pages }
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

    /// On a machine of which nothing is known.
    fn predict(shape: &Shape, known: &[Measured]) -> Duration {
        super::predict(shape, &Costs::default(), known)
    }

    const SMALL: Shape = Shape { processes: 1, threads: 1, areas: 30, descriptors: 5, pages: 1000, written: 1000 };

    fn within(estimate: Duration, of: Duration, share: f64) {
        let ratio = estimate.as_secs_f64() / of.as_secs_f64();
        assert!((ratio - 1.0).abs() < share, "{estimate:?} is not within {share} of {of:?}");
    }

    #[test]
    fn little_and_what_is_written_all_the_time_is_left_to_the_freeze() {
        assert_eq!(left_to_the_freeze(2000, 10), 2000);
        assert_eq!(left_to_the_freeze(20_000, 25_000), 20_000);
        assert_eq!(left_to_the_freeze(20_000, 5000), 2000);
        assert_eq!(left_to_the_freeze(20_000, 0), 0);
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
        within(predict(&SMALL, &known), Duration::from_millis(30), 0.2);
        let nearly = Shape { written: 1200, ..SMALL };
        within(predict(&nearly, &known), Duration::from_millis(30), 0.2);
    }

    #[test]
    fn what_a_page_costs_is_learned_from_trees_of_other_sizes() {
        let of = |pages| Shape { pages, written: pages, ..SMALL };
        let slow = |pages: u64| Measured { shape: of(pages), frozen_us: 3000 + pages * 2 };
        let known = [slow(10_000), slow(30_000), slow(100_000), slow(20_000)];
        within(predict(&of(1_000_000), &known), Duration::from_secs(2), 0.2);
        within(predict(&of(1_000_000), &[]), Duration::from_millis(892), 0.05);
    }

    #[test]
    fn one_that_took_long_for_no_reason_is_soon_forgotten() {
        let of = |frozen_us| Measured { shape: SMALL, frozen_us };
        let known = [of(13_000), of(3_100)];
        within(predict(&SMALL, &known), Duration::from_micros(3_100), 0.25);
        let known = [of(3_000), of(3_100), of(13_000)];
        within(predict(&SMALL, &known), Duration::from_micros(3_100), 0.35);
    }

    #[test]
    fn the_middle_is_not_drawn_far_by_one() {
        assert_eq!(middle(&mut [(0.0, 1.0), (0.2, 1.0), (-0.2, 1.0)]), 0.0);
        assert!((middle(&mut [(0.0, 1.0), (0.0, 1.0), (9.0, 1.0)]) - 0.1).abs() < 1e-9);
        assert_eq!(middle(&mut []), 0.0);
    }

    #[test]
    fn dumps_of_other_trees_count_little() {
        let other =
            Shape { processes: 500, threads: 500, areas: 15_000, descriptors: 2500, pages: 500_000, written: 500_000 };
        let known = [Measured { shape: SMALL, frozen_us: 4_000 }, Measured { shape: other, frozen_us: 9_000_000 }];
        within(predict(&SMALL, &known), Duration::from_millis(4), 0.25);
    }
}
