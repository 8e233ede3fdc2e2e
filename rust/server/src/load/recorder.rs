//! What came of a load, written down as it comes: a load may run for days.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::client::Outcome;
use super::report::{Report, Window};
use super::{ChurnReport, Latency, LoadConfig, Progress};

/// Length of a window at first; windows become longer, not more.
const WINDOW_S: f64 = 0.25;
const MAX_WINDOWS: usize = 120;

/// Counts everything that happens.
pub(super) struct Recorder {
    pub started: Instant,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    sent: u64,
    ended: u64,
    completed: u64,
    good: u64,
    left: u64,
    broken: u64,
    tokens: u64,
    statuses: BTreeMap<u16, u64>,
    first_error: Option<String>,
    time_to_first_token: Latency,
    inter_token: Latency,
    end_to_end: Latency,
    refusals: Latency,
    windows: Windows,
}

impl Recorder {
    pub fn new() -> Self {
        Self { started: Instant::now(), counts: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn elapsed_s(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    pub fn sent(&self) {
        self.lock().sent += 1;
    }

    pub fn first_token(&self, at: Instant, time: Duration) {
        let mut counts = self.lock();
        counts.time_to_first_token.add(time);
        counts.windows.at(at - self.started).first.add(time);
    }

    pub fn next_token(&self, at: Instant, gap: Duration) {
        let mut counts = self.lock();
        counts.inter_token.add(gap);
        counts.windows.at(at - self.started).inter_token.add(gap);
    }

    pub fn ended(&self, outcome: Outcome, config: &LoadConfig) {
        let at = self.started.elapsed();
        let mut counts = self.lock();
        counts.ended += 1;
        *counts.statuses.entry(outcome.status).or_default() += 1;
        if outcome.has_left {
            counts.left += 1;
        } else if outcome.is_whole {
            let tokens = u64::from(outcome.tokens);
            counts.completed += 1;
            counts.tokens += tokens;
            counts.good += u64::from(is_good(&outcome, config));
            counts.end_to_end.add(outcome.total);
            let window = counts.windows.at(at);
            (window.completed, window.tokens) = (window.completed + 1, window.tokens + tokens);
        } else if outcome.status >= 400 {
            counts.refusals.add(outcome.total);
        } else {
            counts.broken += 1;
        }
        if let Some(error) = outcome.error {
            counts.first_error.get_or_insert(error);
        }
    }

    pub fn progress(&self) -> Progress {
        let (elapsed_s, counts) = (self.elapsed_s(), self.lock());
        let tokens = counts.time_to_first_token.count() + counts.inter_token.count();
        Progress { elapsed_s, sent: counts.sent, ended: counts.ended, tokens }
    }

    /// Time that whole answers take, on average.
    pub fn mean_answer(&self) -> Option<Duration> {
        self.lock().end_to_end.mean()
    }

    pub fn report(&self, config: &LoadConfig, churn: Option<ChurnReport>) -> Report {
        let (elapsed_s, counts) = (self.elapsed_s(), self.lock());
        Report {
            config: config.clone(),
            elapsed_s,
            sent: counts.sent,
            completed: counts.completed,
            left: counts.left,
            broken: counts.broken,
            unfinished: counts.sent - counts.ended,
            statuses: counts.statuses.clone(),
            first_error: counts.first_error.clone(),
            requests_per_s: counts.completed as f64 / elapsed_s,
            tokens_per_s: counts.tokens as f64 / elapsed_s,
            goodput_per_s: counts.good as f64 / elapsed_s,
            time_to_first_token: counts.time_to_first_token.summary(),
            inter_token: counts.inter_token.summary(),
            end_to_end: counts.end_to_end.summary(),
            refusals: counts.refusals.summary(),
            churn,
            windows: counts.windows.report(),
            cumulative_time_to_first_token: counts.time_to_first_token.cumulative(),
            cumulative_inter_token: counts.inter_token.cumulative(),
        }
    }
}

/// Whether an answer meets the objectives. Where it does not stream, all of it had the time that its tokens would have had.
fn is_good(outcome: &Outcome, config: &LoadConfig) -> bool {
    let gaps = f64::from(outcome.tokens.saturating_sub(1));
    let total_s = outcome.total.as_secs_f64();
    match outcome.first.map(|first| first.as_secs_f64()) {
        Some(first_s) => first_s <= config.slo_ttft_s && total_s - first_s <= config.slo_itl_s * gaps.max(1.0),
        None => total_s <= config.slo_ttft_s + config.slo_itl_s * gaps,
    }
}

/// A span of time and what happened in it.
#[derive(Clone, Default)]
struct Counted {
    completed: u64,
    tokens: u64,
    first: Latency,
    inter_token: Latency,
}

impl Counted {
    fn merge(mut self, other: &Self) -> Self {
        self.completed += other.completed;
        self.tokens += other.tokens;
        self.first.merge(&other.first);
        self.inter_token.merge(&other.inter_token);
        self
    }
}

struct Windows {
    window_s: f64,
    windows: Vec<Counted>,
}

impl Default for Windows {
    fn default() -> Self {
        Self { window_s: WINDOW_S, windows: Vec::new() }
    }
}

impl Windows {
    fn at(&mut self, elapsed: Duration) -> &mut Counted {
        loop {
            let index = (elapsed.as_secs_f64() / self.window_s) as usize;
            if index < MAX_WINDOWS {
                if index >= self.windows.len() {
                    self.windows.resize_with(index + 1, Counted::default);
                }
                return &mut self.windows[index];
            }
            let merged = self.windows.chunks(2).map(|pair| {
                let first = pair[0].clone();
                pair.get(1).map_or(first.clone(), |second| first.merge(second))
            });
            self.windows = merged.collect();
            self.window_s *= 2.0;
        }
    }

    fn report(&self) -> Vec<Window> {
        let window = |(index, counted): (usize, &Counted)| Window {
            start_s: index as f64 * self.window_s,
            requests_per_s: counted.completed as f64 / self.window_s,
            tokens_per_s: counted.tokens as f64 / self.window_s,
            time_to_first_token: counted.first.summary(),
            inter_token: counted.inter_token.summary(),
        };
        self.windows.iter().enumerate().map(window).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_become_longer_and_lose_nothing() {
        let mut windows = Windows::default();
        for second in 0..1000 {
            windows.at(Duration::from_secs(second)).completed += 1;
        }
        let report = windows.report();
        assert!(report.len() <= MAX_WINDOWS);
        assert_eq!(windows.window_s, 16.0);
        assert_eq!(windows.windows.iter().map(|window| window.completed).sum::<u64>(), 1000);
        assert!(report[..report.len() - 1].iter().all(|window| window.requests_per_s == 1.0));
    }

    #[test]
    fn objectives_are_for_the_first_token_and_for_the_gaps() {
        let config = LoadConfig { slo_ttft_s: 1.0, slo_itl_s: 0.1, ..LoadConfig::default() };
        let outcome = |first: Option<f64>, total: f64| Outcome {
            first: first.map(Duration::from_secs_f64),
            total: Duration::from_secs_f64(total),
            tokens: 11,
            ..Outcome::default()
        };
        assert!(is_good(&outcome(Some(0.9), 1.85), &config));
        assert!(!is_good(&outcome(Some(1.1), 1.2), &config), "the first token was late");
        assert!(!is_good(&outcome(Some(0.5), 1.6), &config), "the others were slow");
        assert!(is_good(&outcome(None, 1.9), &config));
        assert!(!is_good(&outcome(None, 2.1), &config));
    }
}
