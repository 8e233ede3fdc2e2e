//! Figures of a load.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{LoadConfig, Summary};

/// What came of a load.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was asked for.
    pub config: LoadConfig,
    /// How long it took, to the last answer.
    pub elapsed_s: f64,
    /// Requests sent.
    pub sent: u64,
    /// Requests that were answered whole.
    pub completed: u64,
    /// Clients that left, as they were told to.
    pub left: u64,
    /// Streams that broke, and connections without a whole answer.
    pub broken: u64,
    /// Requests that had not ended when the load was stopped.
    pub unfinished: u64,
    /// Answers by status; 0: there was none.
    pub statuses: BTreeMap<u16, u64>,
    /// The first answer or connection that was not as it should be.
    pub first_error: Option<String>,
    /// Whole answers a second.
    pub requests_per_s: f64,
    /// Their tokens a second.
    pub tokens_per_s: f64,
    /// Whole answers a second within the objectives.
    pub goodput_per_s: f64,
    /// Of streams.
    pub time_to_first_token: Summary,
    /// Between two events with text of one stream.
    pub inter_token: Summary,
    /// To the last byte of whole answers.
    pub end_to_end: Summary,
    /// Time that refusals took.
    pub refusals: Summary,
    /// What came of registering and unloading, if there was any.
    pub churn: Option<ChurnReport>,
    /// How it went over time.
    pub windows: Vec<Window>,
    /// Milliseconds, and the share of first tokens that took no longer.
    pub cumulative_time_to_first_token: Vec<(f64, f64)>,
    /// Milliseconds, and the share of gaps that took no longer.
    pub cumulative_inter_token: Vec<(f64, f64)>,
}

/// A span of time. Answers count where they end, tokens' times where the token came.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs, reason = "the report's names")]
pub struct Window {
    /// When it begins, in seconds since the load did; it ends where the next begins.
    pub start_s: f64,
    pub requests_per_s: f64,
    pub tokens_per_s: f64,
    pub time_to_first_token: Summary,
    pub inter_token: Summary,
}

/// Adapters that were registered and unloaded meanwhile.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ChurnReport {
    /// Copies registered.
    pub registered: u64,
    /// Copies unloaded.
    pub unloaded: u64,
    /// Calls that the server refused, or that broke.
    pub failed: u64,
    /// The first of them.
    pub first_error: Option<String>,
    /// Time that registering took.
    pub registering: Summary,
}
