//! What one key may use: requests at once, requests and tokens a minute.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::http::StatusCode;

use crate::errors::ApiError;

/// Limits of a key; `None`: none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Quota {
    pub concurrency: Option<u32>,
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
}

impl Quota {
    /// Refuses a request of more choices than the key may ever have at once: waiting would not help. Tokens are charged
    /// afterwards, so no request has too many of them to begin.
    pub fn check(&self, choices: u64) -> Result<(), ApiError> {
        let limits = [("requests at once", self.concurrency), ("requests a minute", self.requests_per_minute)];
        for (what, limit) in limits {
            if let Some(limit) = limit.filter(|limit| choices > u64::from(*limit)) {
                let message = format!("the request has {choices} choices, this key may have {limit} {what}");
                return Err(ApiError::invalid("n", message));
            }
        }
        Ok(())
    }
}

/// What a key has used.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: u32,
    requests: Bucket,
    tokens: Bucket,
}

/// What was used and not yet made up for by time: it drains by the quota within a minute.
#[derive(Debug, Default)]
struct Bucket {
    level: f64,
    at: Option<Instant>,
}

impl Bucket {
    fn drain(&mut self, per_minute: f64, now: Instant) {
        let passed = self.at.replace(now).map_or(0.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.level = (self.level - passed * per_minute / 60.0).max(0.0);
    }

    /// Seconds until `amount` more fits.
    fn wait_s(&self, amount: f64, per_minute: f64) -> Option<u64> {
        let excess = self.level + amount - per_minute;
        (excess > 0.0).then(|| (excess * 60.0 / per_minute.max(1.0)).ceil().min(120.0) as u64)
    }
}

/// A request's place among those of its key; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    usage: Arc<Usage>,
    count: u32,
}

impl Usage {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `count` requests' places, all or none.
    pub fn enter(self: &Arc<Self>, quota: &Quota, count: u32, now: Instant) -> Result<Place, ApiError> {
        let mut state = self.lock();
        let over = |what: String, wait_s: u64| {
            Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", what).with_retry_after(wait_s))
        };
        if let Some(limit) = quota.concurrency
            && state.running.saturating_add(count) > limit
        {
            return over(format!("{} requests of this key run, {limit} may", state.running), 1);
        }
        if let Some(limit) = quota.tokens_per_minute {
            state.tokens.drain(f64::from(limit), now);
            if let Some(wait_s) = state.tokens.wait_s(1.0, f64::from(limit)) {
                return over(format!("this key may use {limit} tokens a minute"), wait_s);
            }
        }
        if let Some(limit) = quota.requests_per_minute {
            state.requests.drain(f64::from(limit), now);
            if let Some(wait_s) = state.requests.wait_s(f64::from(count), f64::from(limit)) {
                return over(format!("this key may send {limit} requests a minute"), wait_s);
            }
            state.requests.level += f64::from(count);
        }
        state.running += count;
        Ok(Place { usage: self.clone(), count })
    }
}

impl Place {
    /// Tokens count once they are there.
    pub fn charge(&self, tokens: u64) {
        self.usage.lock().tokens.level += tokens as f64;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.usage.lock().running -= self.count;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn places_come_back_and_minutes_pass() {
        let usage = Arc::new(Usage::default());
        let quota = Quota { concurrency: Some(2), requests_per_minute: Some(3), tokens_per_minute: None };
        let start = Instant::now();
        let first = usage.enter(&quota, 2, start).unwrap();
        assert_eq!(usage.enter(&quota, 1, start).unwrap_err().status.as_u16(), 429);
        drop(first);
        let _second = usage.enter(&quota, 1, start).unwrap();
        let refused = usage.enter(&quota, 1, start).unwrap_err();
        assert_eq!(refused.retry_after_s, Some(20));
        assert!(usage.enter(&quota, 1, start + Duration::from_secs(21)).is_ok());
    }

    #[test]
    fn what_no_waiting_would_let_in_is_a_mistake() {
        let quota = Quota { concurrency: Some(3), requests_per_minute: Some(2), tokens_per_minute: Some(1) };
        assert!(quota.check(2).is_ok());
        let messages = [3, 4].map(|choices| {
            let error = quota.check(choices).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref(), error.retry_after_s), (400, Some("n"), None));
            error.message
        });
        assert!(messages[0].contains("2 requests a minute") && messages[1].contains("3 requests at once"));
        assert!(Quota::default().check(u64::MAX).is_ok());
    }

    #[test]
    fn tokens_are_charged_afterwards() {
        let usage = Arc::new(Usage::default());
        let quota = Quota { tokens_per_minute: Some(60), ..Quota::default() };
        let start = Instant::now();
        usage.enter(&quota, 1, start).unwrap().charge(90);
        assert_eq!(usage.enter(&quota, 1, start).unwrap_err().retry_after_s, Some(31));
        assert!(usage.enter(&quota, 1, start + Duration::from_secs(31)).is_ok());
    }
}
