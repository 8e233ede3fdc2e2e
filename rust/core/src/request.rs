//! A request: what a client asks; it ends exactly once.

use std::sync::Arc;

use crate::queue::Ticket;
use crate::sampling::SamplingError;
use crate::{Account, AccountError, LoadFailure, SamplingParams};

/// Names a request; chosen by the caller, unique among the unfinished ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What [`Engine::submit`](crate::Engine::submit) takes.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Chosen by the caller.
    pub id: RequestId,
    /// The adapter's name; its current version is bound now. `None`: the base model.
    pub adapter: Option<Arc<str>>,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub params: Arc<SamplingParams>,
    /// Whose share it uses.
    pub account: Account,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// No token to start from.
    #[error("the prompt is empty, it must hold at least 1 token")]
    EmptyPrompt,
    /// The request's id is in use.
    #[error("request {0} exists already")]
    Duplicate(u64),
    /// Longer than the context.
    #[error(
        "this model's maximum context length is {max_context} tokens, but the request needs {needed} \
         ({prompt_len} in the prompt and {max_tokens} to generate); hint: shorten the prompt or lower max_tokens"
    )]
    TooLong {
        /// The limit.
        max_context: u32,
        /// Prompt and output together.
        needed: u64,
        /// Tokens of the prompt.
        prompt_len: usize,
        /// Tokens to generate.
        max_tokens: u32,
    },
    /// A token id is not in the vocabulary.
    #[error("the prompt holds token {token}, the vocabulary has {vocab_size} tokens")]
    Token {
        /// The token.
        token: u32,
        /// Tokens below this exist.
        vocab_size: u32,
    },
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// Its account's weight or priority is out of range.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// No such adapter.
    #[error("no adapter is named {0:?}; hint: add it first, or give the name of one that is there")]
    UnknownAdapter(Arc<str>),
    /// The adapter could not be loaded.
    #[error("adapter {name:?} could not be loaded: {failure}")]
    AdapterFailed {
        /// Its name.
        name: Arc<str>,
        /// Why.
        failure: LoadFailure,
    },
    /// Request and adapter together would not fit an empty pool.
    #[error(
        "the request needs {kv_pages} pages and its adapter {adapter_pages}, the pool has {num_pages}; \
         hint: give the pool more memory or lower max_tokens"
    )]
    PoolTooSmall {
        /// Pages of the longest sequence that it may become.
        kv_pages: u32,
        /// Pages of the adapter's image.
        adapter_pages: u32,
        /// All pages.
        num_pages: u32,
    },
    /// Too many requests wait.
    #[error("{max_waiting} requests wait already, which is the limit; hint: try again later")]
    QueueFull {
        /// The limit.
        max_waiting: u32,
    },
}

/// Where a request is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// In the queue, new or preempted; owns no pages.
    Waiting,
    /// In the running set.
    Running,
}

/// An unfinished request.
///
/// `computed ≤ tokens.len() + pending`: rows up to `computed` have been scheduled; `pending` tokens were sampled by launched
/// steps whose ids are not here yet.
#[derive(Debug)]
pub(crate) struct Request {
    pub id: RequestId,
    /// Its place in the queue's order.
    pub ticket: Ticket,
    pub phase: Phase,
    pub adapter: Option<u32>,
    pub tokens: Vec<u32>,
    pub prompt_len: u32,
    /// Most tokens that the sequence may have.
    pub max_len: u32,
    pub params: Arc<SamplingParams>,
    pub has_penalties: bool,
    pub computed: u32,
    pub pending: u32,
    /// Rows that it has in the plan being made.
    pub planned: u32,
    pub pages: Vec<u32>,
    pub state_row: u32,
    /// Position up to which prompt log-probabilities were asked for.
    pub prompt_logprobs_done: u32,
    /// Generated tokens whose text was checked for stop strings.
    pub checked: u32,
    /// The previous step's sampled row that holds the newest, pending token.
    pub pending_row: u32,
}

impl Request {
    /// A request that has only arrived.
    pub fn new(
        id: RequestId,
        ticket: Ticket,
        adapter: Option<u32>,
        prompt: Vec<u32>,
        params: Arc<SamplingParams>,
    ) -> Self {
        let prompt_len = prompt.len() as u32;
        Self {
            id,
            ticket,
            phase: Phase::Waiting,
            adapter,
            tokens: prompt,
            prompt_len,
            max_len: prompt_len + params.max_tokens,
            has_penalties: params.has_penalties(),
            params,
            computed: 0,
            pending: 0,
            planned: 0,
            pages: Vec::new(),
            state_row: 0,
            prompt_logprobs_done: 0,
            checked: 0,
            pending_row: 0,
        }
    }

    /// Order of arrival; unique for ever, so it also tells a slab entry's occupants apart.
    pub fn seq(&self) -> u64 {
        self.ticket.turn.seq
    }

    /// Tokens known or on their way.
    pub fn known_len(&self) -> u32 {
        self.tokens.len() as u32 + self.pending
    }

    /// Generated tokens, known or on their way.
    pub fn num_generated(&self) -> u32 {
        self.known_len() - self.prompt_len
    }

    /// Rows that could be computed now.
    pub fn remaining(&self) -> u32 {
        let known = self.known_len();
        // The last token of a sequence of full length is never an input.
        let is_full = known >= self.max_len && self.max_len > self.prompt_len;
        (known - u32::from(is_full)).saturating_sub(self.computed)
    }

    /// Whether the next row must wait until the text so far was checked for stop strings.
    pub fn waits_for_check(&self) -> bool {
        self.params.has_stop_strings && self.num_generated() >= self.checked + SamplingParams::MAX_UNCHECKED
    }
}
