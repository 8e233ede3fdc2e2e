//! Times in buckets of at most 3 % width: millions of them in a few kilobytes.

use serde::Serialize;

/// Buckets for each doubling.
const STEPS: u64 = 32;

/// A distribution of times.
#[derive(Clone)]
pub struct Latency {
    counts: Vec<u64>,
    total: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { counts: vec![0; 64 * STEPS as usize], total: 0, sum_ns: 0, max_ns: 0 }
    }
}

/// What is told of a distribution, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Summary {
    pub count: u64,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return ns as usize;
    }
    let doublings = u64::from(ns.ilog2() - STEPS.ilog2());
    (doublings * STEPS + (ns >> doublings)) as usize
}

fn upper_ns(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * STEPS {
        return bucket;
    }
    let doublings = bucket / STEPS - 1;
    ((bucket % STEPS + STEPS + 1) << doublings) - 1
}

impl Latency {
    /// Counts one.
    pub fn add(&mut self, time: std::time::Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let index = bucket(ns).min(self.counts.len() - 1);
        self.counts[index] += 1;
        self.total += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// Counts all of another.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.total += other.total;
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    fn quantile_ms(&self, share: f64) -> f64 {
        let wanted = (self.total as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper_ns(index).min(self.max_ns) as f64 / 1e6;
            }
        }
        self.max_ns as f64 / 1e6
    }

    /// The figures.
    pub fn summary(&self) -> Summary {
        if self.total == 0 {
            return Summary::default();
        }
        Summary {
            count: self.total,
            mean_ms: self.sum_ns as f64 / self.total as f64 / 1e6,
            p50_ms: self.quantile_ms(0.5),
            p90_ms: self.quantile_ms(0.9),
            p99_ms: self.quantile_ms(0.99),
            max_ms: self.max_ns as f64 / 1e6,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn buckets_hold_their_own_bounds() {
        for ns in (0..5000).chain([1 << 20, (1 << 20) + 12345, u64::MAX >> 8]) {
            let upper = upper_ns(bucket(ns));
            assert!(upper >= ns && upper as f64 <= ns as f64 * 1.04 + 1.0, "{ns} {upper}");
        }
    }

    #[test]
    fn quantiles_are_near_the_truth() {
        let mut latency = Latency::default();
        (1..=1000).for_each(|ms| latency.add(Duration::from_millis(ms)));
        let mut both = Latency::default();
        both.merge(&latency);
        let summary = both.summary();
        assert!((summary.p50_ms - 500.0).abs() < 20.0 && (summary.p99_ms - 990.0).abs() < 35.0, "{summary:?}");
        assert_eq!((summary.count, summary.max_ms), (1000, 1000.0));
        assert_eq!(Latency::default().summary(), Summary::default());
    }
}
