//! One request as the access log and the metrics see it; written when the last part of it is gone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::log::Log;
use crate::metrics::Metrics;

/// The status in the log when the client left before its answer was whole.
const CLIENT_LEFT: u16 = 499;

/// What is known of a request.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub handler: &'static str,
    pub tenant: Option<Arc<str>>,
    pub adapter: Option<Arc<str>>,
    pub version: u32,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub is_stream: bool,
    pub first_token: Option<Duration>,
    pub status: u16,
    pub error: Option<&'static str>,
    /// The answer went out whole.
    pub is_done: bool,
}

/// Collects facts and writes them when it is dropped.
pub(crate) struct Record {
    pub id: String,
    method: &'static str,
    pub started: Instant,
    facts: Mutex<Facts>,
    log: Option<Log>,
    metrics: Arc<Metrics>,
}

impl Record {
    /// `log`: where the access line goes, if to any place.
    pub fn new(id: String, method: &'static str, log: Option<Log>, metrics: Arc<Metrics>) -> Self {
        Self { id, method, started: Instant::now(), facts: Mutex::default(), log, metrics }
    }

    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let facts = std::mem::take(&mut *self.facts());
        let status = if facts.is_done { facts.status } else { CLIENT_LEFT };
        let elapsed = self.started.elapsed();
        self.metrics.count_http(facts.handler, self.method, status, elapsed);
        if !facts.is_done {
            self.metrics.count_disconnect();
        }
        let Some(log) = &self.log else { return };
        let millis = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        log.line(
            "request",
            json!({
                "id": self.id, "method": self.method, "route": facts.handler, "status": status, "error": facts.error,
                "tenant": facts.tenant.as_deref(), "adapter": facts.adapter.as_deref(), "version": facts.version,
                "prompt_tokens": facts.prompt_tokens, "cached_tokens": 0, "completion_tokens": facts.completion_tokens,
                "stream": facts.is_stream, "first_token_ms": facts.first_token.map(millis), "total_ms": millis(elapsed),
            }),
        );
    }
}
