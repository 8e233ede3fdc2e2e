//! The model that the fake executor runs: a hash of the adapter's content and of all tokens so far.
//!
//! It is written twice over the same functions: the executor reads what a plan and its own pages hold, the world knows
//! each request's tokens and parameters. Whatever a plan gets wrong shows as another token.

use slora_core::{SamplingParams, uniform};

/// What an adapter's files hold; 0 is the base model.
pub type Content = u64;

/// Tokens are below this.
pub const VOCAB: u32 = 29;
/// Ends a request.
pub const EOS: u32 = 0;

/// SplitMix64's finaliser over both.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = (a ^ b.rotate_left(32)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// What a token leaves in the KV cache, after the context before it.
pub fn kv(content: Content, context: u64, token: u32, position: u32) -> u64 {
    mix(mix(content, context), u64::from(token) << 32 | u64::from(position))
}

/// Everything that decides the next token beside the context.
#[derive(Debug, PartialEq)]
pub struct Sampling<'a> {
    /// Of temperature, top_p, min_p, presence, frequency, repetition and the uniform number.
    pub bits: [u32; 7],
    pub top_k: u32,
    /// Sum of [`in_output`] and [`in_prompt`] over all tokens, if there are penalties.
    pub counts: u64,
    pub bias: &'a [(u32, u32)],
}

/// An output token's share of the penalty counts.
pub fn in_output(token: u32) -> u64 {
    mix(1, u64::from(token))
}

/// A prompt token's share of the penalty counts.
pub fn in_prompt(token: u32) -> u64 {
    mix(2, u64::from(token))
}

/// The next token, or −1: not finite.
pub fn choose(context: u64, sampling: &Sampling<'_>) -> i32 {
    let bits = sampling.bits.iter().fold(mix(context, sampling.counts), |hash, bits| mix(hash, u64::from(*bits)));
    let finite = sampling.bias.iter().filter(|(_, value)| f32::from_bits(*value).is_finite());
    let hash = finite.fold(mix(bits, u64::from(sampling.top_k)), |hash, (token, value)| {
        mix(hash, u64::from(*token) << 32 | u64::from(*value))
    });
    if hash.is_multiple_of(401) {
        return -1;
    }
    let is_forbidden = |token: u32| sampling.bias.iter().any(|bias| *bias == (token, f32::NEG_INFINITY.to_bits()));
    let first = (hash >> 32) as u32 % VOCAB;
    (0..VOCAB).map(|i| (first + i) % VOCAB).find(|token| !is_forbidden(*token)).map_or(-1, |token| token as i32)
}

/// The log-probability of a prompt token.
pub fn score(context: u64, target: u32) -> u64 {
    mix(context, u64::from(target) << 8)
}

/// One request's tokens and the contexts after each, computed the plain way.
#[derive(Debug)]
pub struct Sequence {
    content: Content,
    pub params: std::sync::Arc<SamplingParams>,
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    contexts: Vec<u64>,
}

impl Sequence {
    pub fn new(content: Content, prompt: &[u32], params: std::sync::Arc<SamplingParams>) -> Self {
        let mut sequence = Self { content, params, tokens: Vec::new(), prompt_len: prompt.len(), contexts: Vec::new() };
        prompt.iter().for_each(|token| sequence.push(*token));
        sequence
    }

    pub fn push(&mut self, token: u32) {
        let context = self.contexts.last().copied().unwrap_or_default();
        let value = kv(self.content, context, token, self.tokens.len() as u32);
        self.tokens.push(token);
        self.contexts.push(mix(context, value));
    }

    pub fn num_generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    pub fn is_complete(&self) -> bool {
        self.num_generated() == self.params.max_tokens as usize
    }

    pub fn ends_with_stop(&self) -> bool {
        self.num_generated() > 0 && self.tokens.last().is_some_and(|last| self.stops().any(|token| token == *last))
    }

    fn stops(&self) -> impl Iterator<Item = u32> + '_ {
        (!self.params.ignore_eos).then_some(EOS).into_iter().chain(self.params.stop_token_ids.iter().copied())
    }

    /// What must be sampled next.
    pub fn next(&self) -> i32 {
        let p = &*self.params;
        let drawn = if p.temperature > 0.0 { uniform(p.seed, self.tokens.len() as u32) } else { 0.0 };
        let penalties = [p.presence_penalty, p.frequency_penalty, p.repetition_penalty];
        let (prompt, output) = self.tokens.split_at(self.prompt_len);
        let counts = if penalties == [0.0, 0.0, 1.0] {
            0
        } else {
            let prompt = prompt.iter().fold(0u64, |sum, token| sum.wrapping_add(in_prompt(*token)));
            output.iter().fold(prompt, |sum, token| sum.wrapping_add(in_output(*token)))
        };
        let mut bias: Vec<(u32, u32)> = p.logit_bias.iter().map(|(token, value)| (*token, value.to_bits())).collect();
        if self.num_generated() < p.min_tokens as usize {
            bias.extend(self.stops().map(|token| (token, f32::NEG_INFINITY.to_bits())));
        }
        let [presence, frequency, repetition] = penalties;
        let bits = [p.temperature, p.top_p, p.min_p, presence, frequency, repetition, drawn].map(f32::to_bits);
        choose(self.contexts[self.tokens.len() - 1], &Sampling { bits, top_k: p.top_k, counts, bias: &bias })
    }

    /// The log-probability of the prompt token at `position`.
    pub fn prompt_score(&self, position: usize) -> u64 {
        score(self.contexts[position - 1], self.tokens[position])
    }
}
