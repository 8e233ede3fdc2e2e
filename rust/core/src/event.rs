//! What happened: the flat arrays that `commit` and the other calls leave behind.

use crate::{LoadFailure, RequestId};

/// Why a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndReason {
    /// A stop or end-of-sequence token was sampled; it is the request's last token.
    Stop(u32),
    /// As many tokens as were asked for.
    Length,
    /// The client's wish.
    Cancelled,
    /// Its adapter could not be loaded, for this reason.
    AdapterFailed(LoadFailure),
    /// The model's logits were not finite.
    NotFinite,
}

/// A token for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenEvent {
    /// Whose.
    pub request: RequestId,
    /// Which.
    pub token: u32,
    /// Row of the step's sampled arrays: where its log-probabilities are.
    pub row: u32,
}

/// Log-probabilities of a run of a request's prompt tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptEvent {
    /// Whose.
    pub request: RequestId,
    /// Position of the first token whose log-probability is here.
    pub position: u32,
    /// First of the step's prompt rows.
    pub row: u32,
    /// How many rows.
    pub len: u32,
}

/// The end of a request, exactly one for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndEvent {
    /// Whose.
    pub request: RequestId,
    /// Why.
    pub reason: EndReason,
}

/// What happened since the last look. Admissions come before prompt events, those before token events, those before end
/// events.
#[derive(Debug, Default)]
pub struct Events {
    /// Requests that began to run; one that was preempted and runs again is here again.
    pub admitted: Vec<RequestId>,
    /// Tokens, in order.
    pub tokens: Vec<TokenEvent>,
    /// Prompt log-probabilities.
    pub prompts: Vec<PromptEvent>,
    /// Ends.
    pub ended: Vec<EndEvent>,
}

impl Events {
    /// Whether nothing happened.
    pub fn is_empty(&self) -> bool {
        self.admitted.is_empty() && self.tokens.is_empty() && self.prompts.is_empty() && self.ended.is_empty()
    }

    /// Empties the arrays and keeps their memory.
    pub fn clear(&mut self) {
        self.admitted.clear();
        self.tokens.clear();
        self.prompts.clear();
        self.ended.clear();
    }
}
