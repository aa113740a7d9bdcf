//! Times, counted by how long they were.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Upper bounds in seconds: from the look at a small process to the dump of hundreds of gigabytes.
const BOUNDS: [f64; 14] = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0];

/// Times, counted by how long they were.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// All of them together.
    sum: Duration,
    /// How many did not fit below the bound before, but below this; the last one has no bound.
    counts: [u64; BOUNDS.len() + 1],
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.sum += time;
        let place = BOUNDS.iter().position(|&bound| seconds <= bound).unwrap_or(BOUNDS.len());
        self.counts[place] += 1;
    }

    /// All of them together, in seconds.
    pub fn sum(&self) -> f64 {
        self.sum.as_secs_f64()
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Bounds, and how many are below each and above the one before.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        BOUNDS.iter().copied().chain([f64::INFINITY]).zip(self.counts.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_between_their_bounds() {
        let mut times = Histogram::default();
        for micros in [50, 100, 101, 2_000_000, 1_000_000_000] {
            times.add(Duration::from_micros(micros));
        }
        let filled: Vec<(f64, u64)> = times.buckets().into_iter().filter(|&(_, count)| count > 0).collect();
        assert_eq!(filled, [(0.0001, 2), (0.0003, 1), (3.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(times.count(), 5);
        assert!((times.sum() - 1_002.000_251).abs() < 1e-6);
    }

    #[test]
    fn bounds_rise() {
        assert!(BOUNDS.is_sorted());
    }
}
