//! Histograms and text of the Prometheus exposition.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// A histogram whose observations lock nothing.
pub(crate) struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds: above the last.
    counts: Vec<AtomicU64>,
    /// Sum in millionths.
    sum_micros: AtomicU64,
}

/// Bounds of times, in seconds.
pub(crate) const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0,
];
/// Bounds of numbers of tokens.
pub(crate) const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];
/// Bounds of small numbers.
pub(crate) const SMALL: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0];

impl Histogram {
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_micros: AtomicU64::new(0) }
    }

    pub fn observe(&self, value: f64) {
        self.observe_many(value, 1);
    }

    /// The same value several times.
    pub fn observe_many(&self, value: f64, times: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(times, Ordering::Relaxed);
        self.sum_micros.fetch_add((value * 1e6) as u64 * times, Ordering::Relaxed);
    }

    pub fn write(&self, out: &mut String, name: &str, help: &str, labels: &str) {
        header(out, name, "histogram", help);
        self.write_samples(out, name, labels);
    }

    /// Without the header, which a family has once.
    pub fn write_samples(&self, out: &mut String, name: &str, labels: &str) {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let sum = self.sum_micros.load(Ordering::Relaxed) as f64 / 1e6;
        write_histogram(out, name, labels, self.bounds, counts, sum);
    }
}

/// The samples of a histogram.
pub(crate) fn write_histogram(
    out: &mut String,
    name: &str,
    labels: &str,
    bounds: &[f64],
    counts: impl Iterator<Item = u64>,
    sum: f64,
) {
    let comma = if labels.is_empty() { "" } else { "," };
    let mut total = 0;
    for (index, count) in counts.enumerate() {
        total += count;
        let bound = bounds.get(index).map_or("+Inf".to_owned(), |bound| bound.to_string());
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}");
    }
    let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}");
    let _ = writeln!(out, "{name}_count{{{labels}}} {total}");
}

/// The two lines before a family's samples.
pub(crate) fn header(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// A label's value, escaped.
pub(crate) fn label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_include_their_bound() {
        let histogram = Histogram::new(SMALL);
        histogram.observe(1.0);
        histogram.observe_many(1.5, 2);
        histogram.observe(1e9);
        let mut out = String::new();
        histogram.write(&mut out, "x", "help", "a=\"b\"");
        assert!(out.contains("x_bucket{a=\"b\",le=\"1\"} 1\n"), "{out}");
        assert!(out.contains("x_bucket{a=\"b\",le=\"2\"} 3\n"), "{out}");
        assert!(out.contains("x_bucket{a=\"b\",le=\"+Inf\"} 4\n"), "{out}");
        assert!(out.contains("x_count{a=\"b\"} 4\n"), "{out}");
    }
}
