//! Random numbers, configurations and parameters from a seed.

use slora_core::{Account, EngineConfig, Eviction, QueueOrder, SamplingParams};

use super::model::{EOS, VOCAB, mix};

pub struct Random(u64, u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed, 77), 0)
    }

    pub fn next(&mut self) -> u64 {
        self.1 += 1;
        mix(self.0, self.1)
    }

    /// In 0..n.
    pub fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }

    /// In low..=high.
    pub fn between(&mut self, low: u32, high: u32) -> u32 {
        low + self.below(high - low + 1)
    }

    pub fn chance(&mut self, percent: u32) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u32) as usize]
    }
}

/// A world of 8 to 40 pages.
pub fn random_config(random: &mut Random) -> EngineConfig {
    EngineConfig {
        num_pages: random.between(8, 40),
        num_host_pages: random.between(3, 14),
        page_tokens: random.pick(&[1, 2, 4]),
        max_batch_tokens: random.pick(&[1, 2, 3, 5, 8, 24]),
        max_running: random.between(1, 6),
        max_waiting: random.between(3, 16),
        max_adapters: random.between(1, 4),
        max_context: random.between(8, 48),
        max_adapter_pages: random.between(1, 6),
        descriptor_words: 4,
        vocab_size: VOCAB,
        eos_token_ids: vec![EOS],
        max_loads: random.between(1, 3),
        max_copy_pages: random.pick(&[1, 2, 4, u32::MAX]),
        queue: random.pick(&[QueueOrder::Fcfs, QueueOrder::Fair]),
        prefetch: random.chance(70),
        eviction: random.pick(&[Eviction::Lru, Eviction::CostAware]),
        max_step: random.pick(&[1, 2, 3, 10, 100, i32::MAX as u32]),
        ..EngineConfig::default()
    }
}

/// Of a few tenants, or of the adapter; mostly without a priority.
pub fn random_account(random: &mut Random) -> Account {
    Account {
        tenant: random.chance(70).then(|| format!("t{}", random.below(4)).into()),
        weight: random.pick(&[0.01, 1.0, 1.0, 3.0, 100.0]),
        priority: random.pick(&[0, 0, 0, 0, 1, -1, 100, -100]),
    }
}

/// Every parameter is off most of the time.
pub fn random_params(random: &mut Random, max_tokens: u32) -> SamplingParams {
    let max_tokens = if random.chance(8) { 0 } else { random.between(1, max_tokens.max(1)) };
    let mut params = SamplingParams { max_tokens, temperature: 0.0, seed: random.next(), ..SamplingParams::default() };
    if random.chance(30) {
        (params.temperature, params.top_p, params.min_p, params.top_k) = (0.5, 0.9, 0.05, random.below(5));
    }
    if random.chance(25) {
        params.presence_penalty = random.pick(&[0.0, 1.0]);
        params.frequency_penalty = random.pick(&[0.0, -0.5]);
        params.repetition_penalty = random.pick(&[1.0, 1.25]);
    }
    if random.chance(10) {
        params.logit_bias = vec![(random.below(VOCAB), f32::NEG_INFINITY), (random.below(VOCAB), 1.5)];
    }
    if random.chance(20) {
        params.stop_token_ids = vec![random.below(VOCAB), random.below(VOCAB)];
        params.min_tokens = random.between(0, max_tokens);
    }
    params.ignore_eos = random.chance(20);
    params.has_stop_strings = random.chance(15);
    params.logprobs = random.chance(20).then(|| random.below(4));
    params.prompt_logprobs = random.chance(20).then(|| random.below(3));
    params
}
