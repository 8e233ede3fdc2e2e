//! How much work may be here at once: requests, prompt tokens and bytes, reserved in one step, and how much of it may be one
//! tenant's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::http::StatusCode;

use crate::errors::ApiError;

/// A tenant may hold so many times what is left free: alone it leaves a fifth to the others, and so many tenants as there
/// are leave each other room too. Shared buffers of switches are divided like that ("dynamic thresholds", Choudhury and
/// Hahne, 1998), which needs to know nobody but who asks.
const SHARE_OF_FREE: f64 = 4.0;

/// Bounds on everything unfinished.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub requests: u64,
    pub tokens: u64,
    pub bytes: u64,
    /// Requests that wait for nobody: until so many are here, no tenant's share of the requests is asked for.
    pub running: u64,
}

/// What is unfinished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub requests: u64,
    pub tokens: u64,
    pub bytes: u64,
}

/// Whose work it is.
#[derive(Clone, Debug)]
pub(crate) struct Tenant {
    pub name: Arc<str>,
    /// Its weight over the greatest of all; `None`: nobody else can come, so it may take everything.
    pub share: Option<f64>,
}

#[derive(Debug)]
struct State {
    load: Load,
    /// The same by tenant, of those who have something here.
    tenants: HashMap<Arc<str>, Load>,
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
    tenant: Tenant,
    load: Load,
    /// Its end tells how fast places come free.
    has_begun: bool,
}

/// One of the limits, as a request finds it.
struct Limit {
    what: &'static str,
    more: u64,
    held: u64,
    /// Of it, the tenant's.
    own: u64,
    bound: u64,
    /// Of the bound, what anybody may take.
    open: u64,
}

impl Limit {
    fn is_full(&self) -> bool {
        self.more > 0 && self.held + self.more > self.bound
    }

    /// Whoever has nothing here needs room only.
    fn exceeds(&self, share: f64) -> bool {
        let (held, own) = (self.held + self.more, self.own + self.more);
        let allowed = SHARE_OF_FREE * share * self.bound.saturating_sub(held) as f64;
        self.more > 0 && self.own > 0 && held > self.open && own as f64 > allowed
    }
}

impl Admission {
    pub fn new(bounds: Bounds) -> Self {
        let state = State {
            load: Load::default(),
            tenants: HashMap::new(),
            ended: 0,
            since: Instant::now(),
            rate_per_s: 0.0,
            is_open: true,
        };
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
    pub fn reserve(self: &Arc<Self>, tenant: Tenant, load: Load) -> Result<Reservation, ApiError> {
        self.add(&tenant, load, Load::default())?;
        Ok(Reservation { admission: self.clone(), tenant, load, has_begun: false })
    }

    /// `has`: what the request holds already.
    fn add(&self, tenant: &Tenant, more: Load, has: Load) -> Result<(), ApiError> {
        let mut state = self.lock();
        if !state.is_open {
            return Err(ApiError::unavailable("the server is shutting down and takes no new requests"));
        }
        let own = state.tenants.get(&tenant.name).copied().unwrap_or_default();
        let limits = self.limits(more, state.load, own);
        // Alone, anything may come in that its own limits allow.
        let is_alone = state.load == has;
        if let Some(full) = limits.iter().find(|limit| limit.is_full() && !(is_alone && limit.what != "requests")) {
            let Limit { what, held, bound, .. } = full;
            let message = format!("the server is saturated: {held} {what} are unfinished, {bound} may be");
            return Err(ApiError::overloaded(message, state.wait_s()));
        }
        let shared = tenant.share.filter(|_| !is_alone);
        if let Some(Limit { what, own, .. }) = shared.and_then(|share| limits.iter().find(|limit| limit.exceeds(share)))
        {
            let message = format!(
                "{own} {what} of this tenant are unfinished, which is its share of what may be while others need room too"
            );
            let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "tenant_queue_full", message);
            return Err(error.with_retry_after(state.wait_s()));
        }
        state.load = state.load.plus(more);
        if more != Load::default() {
            state.tenants.insert(tenant.name.clone(), own.plus(more));
        }
        Ok(())
    }

    fn limits(&self, more: Load, held: Load, own: Load) -> [Limit; 3] {
        let limit = |what, more, held, own, bound, open| Limit { what, more, held, own, bound, open };
        let Bounds { requests, tokens, bytes, running } = self.bounds;
        [
            limit("requests", more.requests, held.requests, own.requests, requests, running),
            limit("prompt tokens", more.tokens, held.tokens, own.tokens, tokens, 0),
            limit("bytes", more.bytes, held.bytes, own.bytes, bytes, 0),
        ]
    }
}

impl Load {
    fn plus(self, more: Self) -> Self {
        Self {
            requests: self.requests + more.requests,
            tokens: self.tokens + more.tokens,
            bytes: self.bytes + more.bytes,
        }
    }

    fn minus(self, less: Self) -> Self {
        Self {
            requests: self.requests - less.requests,
            tokens: self.tokens - less.tokens,
            bytes: self.bytes - less.bytes,
        }
    }
}

impl State {
    /// About how long until a tenth of what is here has ended.
    fn wait_s(&self) -> u64 {
        if self.rate_per_s <= 0.0 { 1 } else { (self.load.requests as f64 / 10.0 / self.rate_per_s).ceil() as u64 }
    }

    fn give_back(&mut self, tenant: &Tenant, less: Load) {
        self.load = self.load.minus(less);
        if let Some(own) = self.tenants.get_mut(&tenant.name) {
            *own = own.minus(less);
            if *own == Load::default() {
                self.tenants.remove(&tenant.name);
            }
        }
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
        self.admission.add(&self.tenant, more, self.load)?;
        self.load = self.load.plus(more);
        Ok(())
    }

    /// It has what it needs to be worked on: it is not refused any more.
    pub fn begin(&mut self) {
        self.has_begun = true;
    }

    /// Tokens and bytes are known better, or needed no longer. They only become fewer.
    pub fn correct(&mut self, tokens: u64, bytes: u64) {
        let load = Load { tokens: tokens.min(self.load.tokens), bytes: bytes.min(self.load.bytes), ..self.load };
        self.admission.lock().give_back(&self.tenant, self.load.minus(load));
        self.load = load;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        state.give_back(&self.tenant, self.load);
        if self.has_begun {
            state.count_ended(self.load.requests);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn load(requests: u64, tokens: u64, bytes: u64) -> Load {
        Load { requests, tokens, bytes }
    }

    fn tenant(name: &str, share: Option<f64>) -> Tenant {
        Tenant { name: name.into(), share }
    }

    fn bounded(requests: u64, running: u64) -> Arc<Admission> {
        Arc::new(Admission::new(Bounds { requests, tokens: 10 * requests, bytes: 100 * requests, running }))
    }

    /// Requests of one token that are let in, of as many as are asked for.
    fn flood(admission: &Arc<Admission>, tenant: &Tenant) -> Vec<Reservation> {
        let asked = (0..2 * admission.max_requests()).map(|_| admission.reserve(tenant.clone(), load(1, 1, 1)));
        asked.filter_map(Result::ok).collect()
    }

    #[test]
    fn all_or_nothing_and_all_comes_back() {
        let admission = Arc::new(Admission::new(Bounds { requests: 4, tokens: 100, bytes: 1000, running: 0 }));
        let reserve = |load: Load| admission.reserve(tenant("anybody", None), load);
        let mut first = reserve(load(3, 60, 10)).unwrap();
        assert!(reserve(load(2, 1, 1)).is_err());
        assert_eq!(reserve(load(1, 41, 1)).unwrap_err().status.as_u16(), 503);
        assert_eq!(admission.load(), load(3, 60, 10));
        first.correct(50, 0);
        let second = reserve(load(1, 50, 1)).unwrap();
        first.correct(70, 70);
        assert_eq!(admission.load(), load(4, 100, 1));
        drop((first, second));
        assert_eq!(admission.load(), Load::default());
        admission.close();
        assert_eq!(reserve(load(0, 0, 1)).unwrap_err().code, "service_unavailable");
    }

    #[test]
    fn a_flood_fills_four_fifths_and_two_leave_each_other_their_share() {
        let admission = bounded(900, 0);
        let [first, second] = ["first", "second"].map(|name| tenant(name, Some(1.0)));
        let mut floods = [flood(&admission, &first), Vec::new()];
        assert_eq!(floods[0].len(), 720);
        let refused = admission.reserve(first.clone(), load(1, 1, 1)).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code, refused.retry_after_s), (429, "tenant_queue_full", Some(1)));
        for _ in 0..900 {
            floods[0].pop();
            floods[1].extend(flood(&admission, &second));
            floods[0].extend(flood(&admission, &first));
        }
        let held = floods.each_ref().map(Vec::len);
        assert!(held.iter().all(|held| (395..=405).contains(held)), "{held:?}");
    }

    #[test]
    fn what_was_refused_after_all_says_nothing_of_when_a_place_comes_free() {
        let admission = bounded(1_000, 0);
        let begun = |count: usize| {
            let mut asked: Vec<_> =
                (0..count).map(|_| admission.reserve(tenant("anybody", None), load(1, 1, 1)).unwrap()).collect();
            asked.iter_mut().for_each(Reservation::begin);
            asked
        };
        let (_queued, done) = (begun(900), begun(1));
        for _ in 0..10_000 {
            drop(admission.reserve(tenant("anybody", None), load(1, 1, 1)).unwrap());
        }
        admission.lock().since -= Duration::from_secs(10);
        drop(done);
        let wait_s = admission.lock().wait_s();
        assert!((900..1_000).contains(&wait_s), "{wait_s}, for a tenth of them with one in ten seconds");
    }

    #[test]
    fn shares_follow_weights() {
        let admission = bounded(1_000, 0);
        let [light, heavy] = [("light", 0.25), ("heavy", 1.0)].map(|(name, share)| tenant(name, Some(share)));
        let held = [flood(&admission, &light), flood(&admission, &heavy)];
        assert_eq!(held.each_ref().map(Vec::len), [500, 400], "a half alone, then four times what is free");
    }

    #[test]
    fn whoever_is_alone_or_could_run_at_once_is_not_asked_for_a_share() {
        let (one, other) = (tenant("one", Some(1.0)), tenant("other", Some(1.0)));
        assert_eq!(flood(&bounded(100, 95), &one).len(), 95, "the running set is never kept empty for others");
        assert_eq!(flood(&bounded(100, 0), &tenant("one", None)).len(), 100);
        let admission = bounded(100, 0);
        let whole = admission.reserve(one.clone(), load(100, 5_000, 50_000)).unwrap();
        let code = |tenant: &Tenant| admission.reserve(tenant.clone(), load(1, 0, 0)).unwrap_err().code;
        assert_eq!([code(&one), code(&other)], ["server_overloaded"; 2]);
        drop(whole);
        let _held = flood(&admission, &one);
        let room = admission.reserve(other.clone(), load(20, 200, 2_000));
        assert!(room.is_ok(), "whoever has nothing here needs room only");
        drop(room);
        assert_eq!(admission.reserve(other, load(21, 0, 0)).unwrap_err().code, "server_overloaded");
    }

    #[test]
    fn whatever_comes_and_goes_the_books_are_right() {
        for seed in 0..300 {
            let mut random = SmallRng::seed_from_u64(seed);
            let admission = bounded(random.random_range(1..40), random.random_range(0..8));
            let shares = [0.1, 0.5, 1.0].map(|share| random.random_bool(0.8).then_some(share));
            let tenants: Vec<Tenant> = (0..3).map(|i| tenant(&format!("{i}"), shares[i])).collect();
            let mut held: Vec<(usize, Reservation)> = Vec::new();
            for _ in 0..400 {
                let more = load(random.random_range(0..3), random.random_range(0..30), random.random_range(0..300));
                let place = random.random_range(0..=held.len());
                match (random.random_range(0..4), held.get_mut(place)) {
                    (0, Some(_)) => drop(held.swap_remove(place)),
                    (1, Some((_, reservation))) => reservation.correct(more.tokens, more.bytes),
                    (2, Some((_, reservation))) => drop(reservation.grow(more)),
                    _ => {
                        let who = random.random_range(0..3);
                        held.extend(
                            admission.reserve(tenants[who].clone(), more).map(|reservation| (who, reservation)),
                        );
                    }
                }
                let sum = |of: Option<usize>| {
                    let found = held.iter().filter(|(who, _)| of.is_none_or(|of| of == *who));
                    found.fold(Load::default(), |sum, (_, reservation)| sum.plus(reservation.load))
                };
                let state = admission.lock();
                assert_eq!(state.load, sum(None), "seed {seed}");
                assert!(state.load.requests <= admission.bounds.requests, "seed {seed}: {:?}", state.load);
                for (who, tenant) in tenants.iter().enumerate() {
                    let own = state.tenants.get(&tenant.name).copied();
                    assert_eq!(own.unwrap_or_default(), sum(Some(who)), "seed {seed}");
                    assert_ne!(own, Some(Load::default()), "seed {seed}: nothing is remembered of who has nothing");
                }
            }
            drop(held);
            assert!(admission.load() == Load::default() && admission.lock().tenants.is_empty(), "seed {seed}");
        }
    }
}
