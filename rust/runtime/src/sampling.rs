//! How a request's tokens are chosen and made text.

use std::sync::Arc;

use slora_core::{RequestId, SamplingParams, SubmitError};
use slora_text::{Detokenizer, StopStrings, TextModel};

use crate::error::RequestError;
use crate::output::TextState;

/// How a request's tokens are chosen and made text, and when it ends.
#[derive(Clone, Debug)]
pub struct Sampling {
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
}

impl Sampling {
    /// Refuses what is outside its range, before there is a prompt.
    ///
    /// # Errors
    /// A sampling parameter or a stop string that cannot be one.
    pub fn check(&self, vocab_size: u32) -> Result<(), RequestError> {
        let max_tokens = self.max_tokens.unwrap_or(u32::MAX);
        let params = SamplingParams { max_tokens, ..self.params.clone() };
        params.check(vocab_size).map_err(SubmitError::from)?;
        StopStrings::new(self.stops.clone(), self.include_stop)?;
        Ok(())
    }

    /// The same with `seed + index`, for one of several choices; without a seed, itself.
    #[must_use]
    pub fn for_choice(&self, index: u64) -> Self {
        Self { seed: self.seed.map(|seed| seed.wrapping_add(index)), ..self.clone() }
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

    /// What the engine is told. `room`: for tokens behind the prompt; `seed`: of requests that bring none, which differ by
    /// their ids.
    pub(crate) fn into_params(self, id: RequestId, room: u32, seed: u64) -> SamplingParams {
        SamplingParams {
            max_tokens: self.max_tokens.unwrap_or(room.max(1)),
            seed: self.seed.unwrap_or_else(|| mix(seed, id.0)),
            has_stop_strings: !self.stops.is_empty(),
            ..self.params
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
