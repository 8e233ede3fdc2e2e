//! The choices of one HTTP request on their way through the engine.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use slora_core::{Account, RequestId};
use slora_runtime::{Delta, End, Output, Runtime, Sampling, Submission, Wake};

use crate::admission::Reservation;
use crate::errors::ApiError;
use crate::metrics::{Finished, Metrics, Phases};
use crate::quota::Place;
use crate::record::Record;

/// Tokens of a choice that are made text at once: more of them wait as ids until these have been written.
const MAX_TAKEN: usize = 64;

/// Wakes the one task that reads all choices, and tells it which have something new.
#[derive(Default)]
struct Bell {
    ready: Mutex<Vec<u32>>,
    waker: AtomicWaker,
}

struct Ringer {
    bell: Arc<Bell>,
    index: u32,
    _held: Arc<Mutex<Held>>,
}

/// What a generation takes of the limits. Its requests' wakers have it too, so that what a client has left is counted until
/// the engine has let go of it: else clients that come and go within one step would fill the engine's own queue.
struct Held {
    reservation: Option<Reservation>,
    place: Option<Place>,
}

impl Wake for Ringer {
    fn wake(&self, _: RequestId) {
        self.bell.ready.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
        self.bell.waker.wake();
    }
}

/// One choice: a request of the engine's.
struct Choice {
    output: Output,
    num_tokens: u64,
    admitted_at: Option<Instant>,
    first_at: Option<Instant>,
    last_at: Option<Instant>,
    is_open: bool,
}

impl Choice {
    fn phases(&self, submitted: Instant) -> Phases {
        let between = |from: Option<Instant>, to: Option<Instant>| Some(to?.saturating_duration_since(from?));
        Phases {
            queue: between(Some(submitted), self.admitted_at),
            prefill: between(self.admitted_at, self.first_at),
            decode: between(self.first_at, self.last_at),
        }
    }
}

/// All choices. Dropping it cancels what has not ended.
pub(crate) struct Generation {
    choices: Vec<Choice>,
    num_open: usize,
    bell: Arc<Bell>,
    scratch: Vec<u32>,
    submitted: Instant,
    adapter: Option<Arc<str>>,
    metrics: Arc<Metrics>,
    record: Arc<Record>,
    held: Arc<Mutex<Held>>,
    /// Whether the engine may still have something to end that has ended for its client: at a stop string.
    has_stopped: bool,
}

/// What a generation is made of.
pub(crate) struct Start {
    pub adapter: Option<Arc<str>>,
    pub account: Account,
    /// Ids of each prompt; each becomes `n` choices.
    pub prompts: Vec<Vec<u32>>,
    pub n: u32,
    pub sampling: Sampling,
    pub wakes_on_token: bool,
    pub reservation: Reservation,
    pub place: Option<Place>,
}

impl Generation {
    /// Submits every choice, or none.
    pub fn start(
        runtime: &Runtime,
        metrics: Arc<Metrics>,
        record: Arc<Record>,
        start: Start,
    ) -> Result<Self, ApiError> {
        let Start { adapter, account, prompts, n, sampling, wakes_on_token, mut reservation, place } = start;
        reservation.begin();
        let submitted = Instant::now();
        let bell = Arc::new(Bell::default());
        let held = Arc::new(Mutex::new(Held { reservation: Some(reservation), place }));
        let mut choices = Vec::with_capacity(prompts.len() * n as usize);
        for prompt in prompts {
            for choice in 0..n {
                let index = choices.len() as u32;
                let wake = Arc::new(Ringer { bell: bell.clone(), index, _held: held.clone() });
                let output = runtime.submit(Submission {
                    prompt: prompt.clone(),
                    adapter: adapter.clone(),
                    account: account.clone(),
                    sampling: sampling.for_choice(u64::from(choice)),
                    wake,
                    wakes_on_token,
                })?;
                choices.push(Choice {
                    output,
                    num_tokens: 0,
                    admitted_at: None,
                    first_at: None,
                    last_at: None,
                    is_open: true,
                });
            }
        }
        let num_open = choices.len();
        Ok(Self {
            choices,
            num_open,
            bell,
            scratch: Vec::new(),
            submitted,
            adapter,
            metrics,
            record,
            held,
            has_stopped: false,
        })
    }

    /// Choices in all.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// Whether every choice has ended and was read to its end.
    pub fn is_over(&self) -> bool {
        self.num_open == 0
    }

    /// Tokens of all choices so far.
    pub fn total_tokens(&self) -> u64 {
        self.choices.iter().map(|choice| choice.num_tokens).sum()
    }

    /// Puts what is new, with the choice's index, behind `into`. Pending only while there is nothing.
    pub fn poll_deltas(&mut self, context: &mut Context<'_>, into: &mut Vec<(usize, Delta)>) -> Poll<()> {
        self.bell.waker.register(context.waker());
        std::mem::swap(&mut *self.bell.ready.lock().unwrap_or_else(PoisonError::into_inner), &mut self.scratch);
        let ready = std::mem::take(&mut self.scratch);
        let is_empty = ready.is_empty();
        for index in &ready {
            let index = *index as usize;
            if self.choices[index].is_open {
                let delta = self.choices[index].output.take_up_to(MAX_TAKEN);
                self.note(index, &delta);
                into.push((index, delta));
            }
        }
        self.scratch = ready;
        self.scratch.clear();
        if is_empty { Poll::Pending } else { Poll::Ready(()) }
    }

    /// What is new; waits until there is something.
    pub async fn next(&mut self) -> Vec<(usize, Delta)> {
        let mut deltas = Vec::new();
        std::future::poll_fn(|context| self.poll_deltas(context, &mut deltas)).await;
        deltas
    }

    fn note(&mut self, index: usize, delta: &Delta) {
        let started = self.record.started;
        let choice = &mut self.choices[index];
        choice.admitted_at = choice.admitted_at.or(delta.admitted_at);
        for piece in &delta.pieces {
            choice.num_tokens += 1;
            match choice.last_at {
                None => {
                    choice.first_at = Some(piece.at);
                    self.metrics.observe_first_token(piece.at.saturating_duration_since(started));
                }
                Some(last) => self.metrics.observe_inter_token(piece.at.saturating_duration_since(last), 1),
            }
            choice.last_at = Some(piece.at);
        }
        if let Some(end) = &delta.end {
            choice.is_open = false;
            self.has_stopped |= matches!(end, End::StopString(_));
            self.num_open -= 1;
            let reason = match end {
                End::Length => "length",
                End::Cancelled => "abort",
                End::Error(_) => "error",
                _ => "stop",
            };
            self.finish(index, reason);
        }
        if delta.is_accepted {
            self.record.facts().version = delta.version;
        }
    }

    fn finish(&self, index: usize, reason: &'static str) {
        let choice = &self.choices[index];
        let started = self.record.started;
        self.metrics.observe_finished(Finished {
            reason,
            prompt_tokens: choice.output.prompt().len() as u64,
            completion_tokens: choice.num_tokens,
            elapsed: started.elapsed(),
            first_token: choice.first_at.map(|at| at.saturating_duration_since(started)),
            phases: choice.phases(self.submitted),
            adapter: self.adapter.clone(),
        });
    }

    fn first_token(&self) -> Option<Duration> {
        let firsts = self.choices.iter().filter_map(|choice| choice.first_at);
        firsts.min().map(|at| at.saturating_duration_since(self.record.started))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let mut prompt_tokens = 0;
        for index in 0..self.choices.len() {
            prompt_tokens += self.choices[index].output.prompt().len() as u64;
            if self.choices[index].is_open {
                self.finish(index, "abort");
            }
        }
        let completion_tokens = self.total_tokens();
        self.metrics.observe_longest(self.choices.iter().map(|choice| choice.num_tokens).max().unwrap_or(0));
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = &held.place {
            place.charge(prompt_tokens + completion_tokens);
        }
        if self.is_over() {
            held.place = None;
            held.reservation.take_if(|_| !self.has_stopped);
        }
        drop(held);
        let mut facts = self.record.facts();
        facts.prompt_tokens = prompt_tokens;
        facts.completion_tokens = completion_tokens;
        facts.first_token = self.first_token();
    }
}

/// Counts an open stream for as long as it lives.
pub(crate) struct OpenStream(Arc<Metrics>);

impl OpenStream {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        metrics.open_streams.fetch_add(1, Ordering::Relaxed);
        Self(metrics)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open_streams.fetch_sub(1, Ordering::Relaxed);
    }
}
