//! A request, before the engine knows of it.

use std::sync::Arc;

use slora_core::{Account, RequestId, SamplingParams};
use slora_text::{Detokenizer, StopStrings, TextModel};

use crate::error::RequestError;
use crate::mailbox::Wake;
use crate::output::TextState;

/// One request, as a client gives it.
pub struct Submission {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// The adapter's name; `None`: the base model.
    pub adapter: Option<Arc<str>>,
    /// Whose share of the machine it uses.
    pub account: Account,
    /// How tokens are chosen. `seed`, `max_tokens` and `has_stop_strings` are overwritten from the fields below.
    pub params: SamplingParams,
    /// `None`: as many tokens as the context holds.
    pub max_tokens: Option<u32>,
    /// `None`: one that no other request has.
    pub seed: Option<u64>,
    /// Strings that end the text.
    pub stops: Vec<String>,
    /// Whether the text keeps the stop string that ended it.
    pub include_stop: bool,
    /// Whether special tokens are left out of the text.
    pub skip_special_tokens: bool,
    /// Told when there is something new.
    pub wake: Arc<dyn Wake>,
    /// Whether each token is something new, or only the end.
    pub wakes_on_token: bool,
}

impl Submission {
    /// `seed`: of requests that bring none, which differ by their ids.
    pub(crate) fn params(&self, id: RequestId, max_context: u32, seed: u64) -> SamplingParams {
        let left = max_context.saturating_sub(self.prompt.len() as u32);
        SamplingParams {
            max_tokens: self.max_tokens.unwrap_or(left.max(1)),
            seed: self.seed.unwrap_or_else(|| mix(seed, id.0)),
            has_stop_strings: !self.stops.is_empty(),
            ..self.params.clone()
        }
    }

    /// Where its text begins; `None`: the model's folder has no tokenizer.
    pub(crate) fn text_state(&self, model: Option<&Arc<TextModel>>) -> Result<Option<TextState>, RequestError> {
        let stops = StopStrings::new(self.stops.clone(), self.include_stop)?;
        match model {
            Some(model) => Ok(Some(TextState::new(Detokenizer::new(model, self.skip_special_tokens), stops))),
            None if stops.is_empty() => Ok(None),
            None => Err(RequestError::NoTokenizer("stop strings cannot be looked for")),
        }
    }
}

/// Spreads (seed, number) over 64 bits (SplitMix64).
fn mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
