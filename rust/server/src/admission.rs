//! How much work may be here at once: requests, prompt tokens and bytes, reserved in one step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::errors::ApiError;

/// Bounds on everything unfinished.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub requests: u64,
    pub tokens: u64,
    pub bytes: u64,
}

/// What is unfinished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub requests: u64,
    pub tokens: u64,
    pub bytes: u64,
}

#[derive(Debug)]
struct State {
    load: Load,
    /// Requests that ended, and since when, for telling how long a place takes to come free.
    ended: u64,
    since: Instant,
    rate_per_s: f64,
    is_open: bool,
}

/// The one place that lets work in.
#[derive(Debug)]
pub(crate) struct Admission {
    bounds: Bounds,
    state: Mutex<State>,
}

/// Work that was let in; given back when dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    admission: Arc<Admission>,
    load: Load,
}

impl Admission {
    pub fn new(bounds: Bounds) -> Self {
        let state = State { load: Load::default(), ended: 0, since: Instant::now(), rate_per_s: 0.0, is_open: true };
        Self { bounds, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that may be unfinished.
    pub fn max_requests(&self) -> u64 {
        self.bounds.requests
    }

    pub fn load(&self) -> Load {
        self.lock().load
    }

    /// Lets nothing more in.
    pub fn close(&self) {
        self.lock().is_open = false;
    }

    /// Lets `load` in, or refuses all of it.
    pub fn reserve(self: &Arc<Self>, load: Load) -> Result<Reservation, ApiError> {
        self.add(load, Load::default())?;
        Ok(Reservation { admission: self.clone(), load })
    }

    /// `own`: what the caller holds already.
    fn add(&self, load: Load, own: Load) -> Result<(), ApiError> {
        let mut state = self.lock();
        if !state.is_open {
            return Err(ApiError::unavailable("the server is shutting down and takes no new requests"));
        }
        let held = state.load;
        let checks = [
            ("requests", held.requests, load.requests, self.bounds.requests),
            ("prompt tokens", held.tokens, load.tokens, self.bounds.tokens),
            ("bytes", held.bytes, load.bytes, self.bounds.bytes),
        ];
        // Alone, anything may come in that its own limits allow.
        let is_idle = held == own;
        for (what, held, more, bound) in checks {
            if more > 0 && held + more > bound && !(is_idle && what != "requests") {
                let message = format!("the server is saturated: {held} {what} are unfinished, {bound} may be");
                return Err(ApiError::overloaded(message, state.wait_s()));
            }
        }
        state.load = add(held, load);
        Ok(())
    }
}

fn add(a: Load, b: Load) -> Load {
    Load { requests: a.requests + b.requests, tokens: a.tokens + b.tokens, bytes: a.bytes + b.bytes }
}

impl State {
    /// About how long until a tenth of what is here has ended.
    fn wait_s(&self) -> u64 {
        if self.rate_per_s <= 0.0 { 1 } else { (self.load.requests as f64 / 10.0 / self.rate_per_s).ceil() as u64 }
    }

    fn count_ended(&mut self, requests: u64) {
        self.ended += requests;
        let passed = self.since.elapsed().as_secs_f64();
        if passed >= 1.0 {
            self.rate_per_s = self.ended as f64 / passed;
            (self.ended, self.since) = (0, Instant::now());
        }
    }
}

impl Reservation {
    /// Lets more in under the same roof, or nothing more.
    pub fn grow(&mut self, more: Load) -> Result<(), ApiError> {
        self.admission.add(more, self.load)?;
        self.load = add(self.load, more);
        Ok(())
    }

    /// Tokens and bytes are known better, or needed no longer. They only become fewer.
    pub fn correct(&mut self, tokens: u64, bytes: u64) {
        let mut state = self.admission.lock();
        let (tokens, bytes) = (tokens.min(self.load.tokens), bytes.min(self.load.bytes));
        state.load.tokens -= self.load.tokens - tokens;
        state.load.bytes -= self.load.bytes - bytes;
        self.load = Load { tokens, bytes, ..self.load };
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        state.load.requests -= self.load.requests;
        state.load.tokens -= self.load.tokens;
        state.load.bytes -= self.load.bytes;
        state.count_ended(self.load.requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(requests: u64, tokens: u64, bytes: u64) -> Load {
        Load { requests, tokens, bytes }
    }

    #[test]
    fn all_or_nothing_and_all_comes_back() {
        let admission = Arc::new(Admission::new(Bounds { requests: 4, tokens: 100, bytes: 1000 }));
        let mut first = admission.reserve(load(3, 60, 10)).unwrap();
        assert!(admission.reserve(load(2, 1, 1)).is_err());
        assert_eq!(admission.reserve(load(1, 41, 1)).unwrap_err().status.as_u16(), 503);
        assert_eq!(admission.load(), load(3, 60, 10));
        first.correct(50, 0);
        let second = admission.reserve(load(1, 50, 1)).unwrap();
        first.correct(70, 70);
        assert_eq!(admission.load(), load(4, 100, 1));
        drop((first, second));
        assert_eq!(admission.load(), Load::default());
        admission.close();
        assert_eq!(admission.reserve(load(0, 0, 1)).unwrap_err().code, "service_unavailable");
    }
}
