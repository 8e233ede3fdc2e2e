//! How long things took and how they were spread, for metrics.

use std::collections::BTreeMap;
use std::time::Duration;

/// A histogram.
#[derive(Clone, Debug)]
pub struct Distribution {
    /// Upper ends of the buckets, which include them.
    pub bounds: &'static [f64],
    /// Observations in each bucket; one more than bounds: above the last.
    pub counts: Vec<u64>,
    /// Sum of what was observed.
    pub sum: f64,
}

impl Distribution {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    pub(crate) fn observe(&mut self, value: f64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += 1;
        self.sum += value;
    }
}

const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
const ROWS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0];

/// Where an adapter's weights were when a request for it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lookups {
    /// On the device.
    pub device: u64,
    /// In the host tier.
    pub host: u64,
    /// On disk, or on the way from there.
    pub disk: u64,
}

/// What the runtime has measured since it began.
#[derive(Clone, Debug)]
pub struct Timings {
    /// Token rows of each step.
    pub step_rows: Distribution,
    /// Loads of an adapter from disk to the host tier, in seconds.
    pub disk_loads: Distribution,
    /// Copies of a step's adapters from the host tier to the device, in seconds.
    pub host_loads: Distribution,
    /// Where adapters were that requests asked for.
    pub lookups: Lookups,
    /// Failed loads by their code.
    pub load_failures: BTreeMap<&'static str, u64>,
}

impl Default for Timings {
    fn default() -> Self {
        let seconds = || Distribution::new(SECONDS);
        Self {
            step_rows: Distribution::new(ROWS),
            disk_loads: seconds(),
            host_loads: seconds(),
            lookups: Lookups::default(),
            load_failures: BTreeMap::new(),
        }
    }
}

impl Timings {
    pub(crate) fn observe_disk_load(&mut self, took: Duration, failure: Option<&'static str>) {
        match failure {
            None => self.disk_loads.observe(took.as_secs_f64()),
            // Nobody wanted it any more.
            Some("cancelled") => {}
            Some(code) => *self.load_failures.entry(code).or_default() += 1,
        }
    }
}
