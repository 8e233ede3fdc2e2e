//! Distributions of times: millions of them in a few kilobytes.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest time that is told apart, in microseconds: an hour.
const MAX_US: u64 = 3_600_000_000;

/// A distribution of times, to two digits.
#[derive(Clone)]
pub struct Latency(Histogram<u64>);

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

impl Default for Latency {
    fn default() -> Self {
        let Ok(histogram) = Histogram::new(2) else { unreachable!("two digits can be told apart") };
        Self(histogram)
    }
}

impl Latency {
    /// Counts one.
    pub fn add(&mut self, time: Duration) {
        // It grows as it must, and nothing lies beyond its largest bound.
        let _ = self.0.record(u64::try_from(time.as_micros()).map_or(MAX_US, |us| us.min(MAX_US)));
    }

    /// Counts all of another.
    pub fn merge(&mut self, other: &Self) {
        // It grows as it must.
        let _ = self.0.add(&other.0);
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The mean, if there is one.
    pub fn mean(&self) -> Option<Duration> {
        (!self.0.is_empty()).then(|| Duration::from_secs_f64(self.0.mean() / 1e6))
    }

    /// The figures.
    pub fn summary(&self) -> Summary {
        let ms = |us: f64| us / 1e3;
        let quantile = |share| ms(self.0.value_at_quantile(share) as f64);
        if self.0.is_empty() {
            return Summary::default();
        }
        Summary {
            count: self.0.len(),
            mean_ms: ms(self.0.mean()),
            p50_ms: quantile(0.5),
            p90_ms: quantile(0.9),
            p99_ms: quantile(0.99),
            max_ms: quantile(1.0),
        }
    }

    /// The cumulative distribution: milliseconds, and the share of times that took no longer.
    pub fn cumulative(&self) -> Vec<(f64, f64)> {
        let mut seen = 0;
        let step = |value: hdrhistogram::iterators::IterationValue<u64>| {
            seen += value.count_at_value();
            (value.value_iterated_to() as f64 / 1e3, seen as f64 / self.0.len() as f64)
        };
        self.0.iter_recorded().map(step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_near_the_truth() {
        let mut half = Latency::default();
        (1..=500).for_each(|ms| half.add(Duration::from_millis(ms)));
        let mut latency = Latency::default();
        (501..=1000).for_each(|ms| latency.add(Duration::from_millis(ms)));
        latency.merge(&half);
        let summary = latency.summary();
        let is_near = |found: f64, truth: f64| (found / truth - 1.0).abs() < 0.011;
        assert!(is_near(summary.p50_ms, 500.0) && is_near(summary.p99_ms, 990.0), "{summary:?}");
        assert!(is_near(summary.mean_ms, 500.5) && is_near(summary.max_ms, 1000.0), "{summary:?}");
        assert_eq!(summary.count, 1000);
        assert_eq!(Latency::default().summary(), Summary::default());
    }

    #[test]
    fn the_cumulative_distribution_rises_to_one() {
        let mut latency = Latency::default();
        [1, 1, 2, 8].map(Duration::from_millis).into_iter().for_each(|time| latency.add(time));
        let shares: Vec<f64> = latency.cumulative().into_iter().map(|(_, share)| share).collect();
        assert_eq!(shares, [0.5, 0.75, 1.0]);
        assert!(Latency::default().cumulative().is_empty());
    }
}
