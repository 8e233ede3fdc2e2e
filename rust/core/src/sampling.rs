//! How a request's next token is chosen.

/// How a request's next token is chosen, and when the request ends.
///
/// Penalties, bias and filters are applied by the executor, in this order: repetition, presence and frequency penalty,
/// bias, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0: greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0: all.
    pub top_k: u32,
    /// Keep the most likely tokens that together have this probability; 1: all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0: none.
    pub min_p: f32,
    /// Subtracted from the logit of every token that the output holds.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for every time that the output holds it.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1: off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Of the random numbers: one for each (seed, position).
    pub seed: u64,
    /// Most tokens to generate; 0: only the prompt is computed.
    pub max_tokens: u32,
    /// Tokens before which neither an end-of-sequence nor a stop token is sampled.
    pub min_tokens: u32,
    /// Whether the model's end-of-sequence tokens are tokens like any other.
    pub ignore_eos: bool,
    /// Further tokens that end the request.
    pub stop_token_ids: Vec<u32>,
    /// Whether someone looks for stop strings in the text and reports with [`Engine::checked`](crate::Engine::checked)
    /// how far: the request then runs at most [`MAX_UNCHECKED`](Self::MAX_UNCHECKED) tokens ahead.
    pub has_stop_strings: bool,
    /// Log-probabilities of the chosen token and this many best; `None`: off.
    pub logprobs: Option<u32>,
    /// Likewise for the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            has_stop_strings: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A number is negative, not finite or too large.
    #[error("{name} is {value}, it must be {range}")]
    Range {
        /// Which parameter.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it may be.
        range: &'static str,
    },
    /// A list is longer than its limit.
    #[error("{name} has {len} entries, the limit is {limit}")]
    TooMany {
        /// Which parameter.
        name: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// A token id is not in the vocabulary.
    #[error("{name} holds token {token}, the vocabulary has {vocab_size} tokens")]
    Token {
        /// Which parameter.
        name: &'static str,
        /// The token.
        token: u32,
        /// Tokens below this exist.
        vocab_size: u32,
    },
    /// Fewer tokens may be generated than must be.
    #[error("min_tokens is {min_tokens}, more than max_tokens, which is {max_tokens}")]
    MinTokens {
        /// Tokens that must be generated.
        min_tokens: u32,
        /// Tokens that may be generated.
        max_tokens: u32,
    },
}

impl SamplingParams {
    /// Entries of `logit_bias` at most.
    pub const MAX_BIAS: usize = 300;
    /// Entries of `stop_token_ids` at most.
    pub const MAX_STOP_TOKENS: usize = 64;
    /// Log-probabilities of a position at most.
    pub const MAX_LOGPROBS: u32 = 20;
    /// How many tokens a request with stop strings runs ahead of the position checked for them.
    pub const MAX_UNCHECKED: u32 = 4;

    /// Whether the executor needs the counts of the request's tokens.
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }

    /// Refuses values outside their range, naming the value and the limit.
    pub fn check(&self, vocab_size: u32) -> Result<(), SamplingError> {
        let numbers: [(&'static str, f32, bool, &'static str); 7] = [
            ("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "between 0 and 100"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1"),
            (
                "presence_penalty",
                self.presence_penalty,
                (-2.0..=2.0).contains(&self.presence_penalty),
                "between -2 and 2",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                (-2.0..=2.0).contains(&self.frequency_penalty),
                "between -2 and 2",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty <= 100.0,
                "above 0 and at most 100",
            ),
            (
                "logit_bias",
                self.logit_bias
                    .iter()
                    .map(|(_, bias)| *bias)
                    .find(|bias| bias.is_nan() || *bias > 100.0)
                    .unwrap_or(0.0),
                self.logit_bias.iter().all(|(_, bias)| *bias <= 100.0),
                "at most 100",
            ),
        ];
        if let Some(&(name, value, _, range)) = numbers.iter().find(|(_, _, good, _)| !good) {
            return Err(SamplingError::Range { name, value: f64::from(value), range });
        }
        for (name, value) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(value) = value.filter(|value| *value > Self::MAX_LOGPROBS) {
                return Err(SamplingError::Range { name, value: f64::from(value), range: "between 0 and 20" });
            }
        }
        for (name, len, limit) in [
            ("logit_bias", self.logit_bias.len(), Self::MAX_BIAS),
            ("stop_token_ids", self.stop_token_ids.len(), Self::MAX_STOP_TOKENS),
        ] {
            if len > limit {
                return Err(SamplingError::TooMany { name, len, limit });
            }
        }
        let biased = self.logit_bias.iter().map(|(token, _)| ("logit_bias", *token));
        let stops = self.stop_token_ids.iter().map(|token| ("stop_token_ids", *token));
        if let Some((name, token)) = biased.chain(stops).find(|(_, token)| *token >= vocab_size) {
            return Err(SamplingError::Token { name, token, vocab_size });
        }
        if self.min_tokens > self.max_tokens {
            return Err(SamplingError::MinTokens { min_tokens: self.min_tokens, max_tokens: self.max_tokens });
        }
        Ok(())
    }
}

/// The number in [0, 1) with which the token at `position` is drawn, whatever else is in the batch.
///
/// SplitMix64's finaliser over seed and position; 24 bits, so that it is exact as `f32`.
pub fn uniform(seed: u64, position: u32) -> f32 {
    let mut x = seed ^ (u64::from(position) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for _ in 0..2 {
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
    }
    (x >> 40) as f32 / (1u32 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(SamplingParams::default().check(10), Ok(()));
    }

    #[test]
    fn every_bad_value_is_named() {
        let base = SamplingParams::default;
        let bad = [
            (SamplingParams { temperature: -0.1, ..base() }, "temperature is -0.1"),
            (SamplingParams { temperature: f32::NAN, ..base() }, "temperature is NaN"),
            (SamplingParams { top_p: 0.0, ..base() }, "top_p is 0"),
            (SamplingParams { top_p: f32::INFINITY, ..base() }, "top_p is inf"),
            (SamplingParams { min_p: 1.5, ..base() }, "min_p is 1.5"),
            (SamplingParams { presence_penalty: 3.0, ..base() }, "presence_penalty is 3"),
            (SamplingParams { frequency_penalty: f32::NAN, ..base() }, "frequency_penalty is NaN"),
            (SamplingParams { repetition_penalty: 0.0, ..base() }, "repetition_penalty is 0"),
            (SamplingParams { logit_bias: vec![(1, f32::NAN)], ..base() }, "logit_bias is NaN"),
            (SamplingParams { logit_bias: vec![(99, 1.0)], ..base() }, "logit_bias holds token 99"),
            (
                SamplingParams { logit_bias: vec![(1, 1.0); 301], ..base() },
                "logit_bias has 301 entries, the limit is 300",
            ),
            (SamplingParams { stop_token_ids: vec![10], ..base() }, "stop_token_ids holds token 10"),
            (SamplingParams { logprobs: Some(21), ..base() }, "logprobs is 21"),
            (SamplingParams { min_tokens: 17, ..base() }, "min_tokens is 17"),
        ];
        for (params, start) in bad {
            let message = params.check(10).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message:?} does not start with {start:?}");
        }
    }

    #[test]
    fn uniform_numbers_are_spread_and_differ_by_seed_and_position() {
        let mut buckets = [0u32; 16];
        for seed in 0..64 {
            for position in 0..256 {
                let number = uniform(seed, position);
                assert!((0.0..1.0).contains(&number));
                buckets[(number * 16.0) as usize] += 1;
            }
        }
        assert!(buckets.iter().all(|count| (900..1150).contains(count)), "{buckets:?}");
        assert_ne!(uniform(1, 2), uniform(2, 1));
        assert_eq!(uniform(7, 3), uniform(7, 3));
    }
}
