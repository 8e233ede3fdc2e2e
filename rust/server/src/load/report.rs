//! What came of a load.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::{Latency, LoadConfig, Summary};

/// What came of one request.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// When it was sent, since the run's start.
    pub begun: Duration,
    /// The answer's status; 0: there was none.
    pub status: u16,
    /// To the first token, or to the whole answer where it does not stream.
    pub first: Duration,
    /// To the last byte.
    pub total: Duration,
    /// Tokens received.
    pub tokens: u32,
    /// Between events of a stream.
    pub gaps: Vec<Duration>,
    /// The client left, as it was told to.
    pub has_left: bool,
    /// The stream ended with an error, or without its end.
    pub is_broken: bool,
}

impl Outcome {
    fn is_whole(&self) -> bool {
        self.status == 200 && !self.has_left && !self.is_broken
    }

    fn is_good(&self, config: &LoadConfig) -> bool {
        let after_first = self.total.saturating_sub(self.first).as_secs_f64();
        let per_token = after_first / f64::from(self.tokens.saturating_sub(1).max(1));
        self.is_whole() && self.first.as_secs_f64() <= config.slo_first_token_s && per_token <= config.slo_per_token_s
    }
}

/// Figures of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was asked for.
    pub config: LoadConfig,
    /// How long it took.
    pub elapsed_s: f64,
    /// Requests sent.
    pub sent: u64,
    /// Requests that were answered whole.
    pub completed: u64,
    /// Streams that broke, and connections without an answer.
    pub broken: u64,
    /// Clients that left.
    pub left: u64,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Whole answers a second.
    pub requests_per_s: f64,
    /// Their tokens a second.
    pub tokens_per_s: f64,
    /// Whole answers a second within the objectives.
    pub goodput_per_s: f64,
    /// To the first token.
    pub first_token: Summary,
    /// Between two events.
    pub between_tokens: Summary,
    /// To the last byte.
    pub total: Summary,
    /// Time that refusals took.
    pub refusals: Summary,
}

impl Report {
    pub(super) fn new(config: &LoadConfig, outcomes: &[Outcome], elapsed: Duration) -> Self {
        let (mut first, mut between, mut total, mut refusals) =
            (Latency::default(), Latency::default(), Latency::default(), Latency::default());
        let mut statuses = BTreeMap::new();
        let (mut completed, mut tokens, mut good, mut broken, mut left) = (0, 0, 0, 0, 0);
        for outcome in outcomes {
            *statuses.entry(outcome.status).or_default() += 1;
            broken += u64::from(!outcome.has_left && (outcome.is_broken || outcome.status == 0));
            left += u64::from(outcome.has_left);
            if outcome.is_whole() {
                completed += 1;
                tokens += u64::from(outcome.tokens);
                good += u64::from(outcome.is_good(config));
                first.add(outcome.first);
                total.add(outcome.total);
                outcome.gaps.iter().for_each(|gap| between.add(*gap));
            } else if outcome.status >= 400 {
                refusals.add(outcome.total);
            }
        }
        let elapsed_s = elapsed.as_secs_f64();
        Self {
            config: config.clone(),
            elapsed_s,
            sent: outcomes.len() as u64,
            completed,
            broken,
            left,
            statuses,
            requests_per_s: completed as f64 / elapsed_s,
            tokens_per_s: tokens as f64 / elapsed_s,
            goodput_per_s: good as f64 / elapsed_s,
            first_token: first.summary(),
            between_tokens: between.summary(),
            total: total.summary(),
            refusals: refusals.summary(),
        }
    }
}
