//! A step's plan as flat 32-bit arrays, written straight into a buffer of the executor's.
//!
//! What each array means is stated once, in `docs/architecture.md`.

use crate::EngineConfig;
use crate::sampling::SamplingParams;

/// Descriptor rows that may change in one step; further adapters join in the next one.
pub(crate) const MAX_CHANGED: u32 = 64;
/// Words of `counts`.
const NUM_COUNTS: usize = 32;

/// One array of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array {
    /// Its name.
    pub name: &'static str,
    /// First word in the buffer.
    pub offset: usize,
    /// Words that it may have.
    pub capacity: usize,
    /// Whether the words are `f32`, else `i32`.
    pub is_float: bool,
}

macro_rules! arrays {
    ($($name:ident: $kind:ident),* $(,)?) => {
        /// The plan's arrays, borrowed from the executor's buffer.
        pub(crate) struct PlanArrays<'a> { $(pub $name: &'a mut [i32]),* }

        impl<'a> PlanArrays<'a> {
            /// `buffer` holds [`PlanLayout::num_words`] words.
            pub fn new(mut buffer: &'a mut [i32], layout: &PlanLayout) -> Self {
                let mut capacities = layout.arrays.iter().map(|array| array.capacity);
                $(let (head, tail) = buffer.split_at_mut(capacities.next().unwrap_or(0)); let $name = head; buffer = tail;)*
                let _ = buffer;
                Self { $($name),* }
            }
        }

        const NAMES: &[(&str, bool)] = &[$((stringify!($name), arrays!(@ $kind))),*];
    };
    (@ i32) => { false };
    (@ f32) => { true };
}

arrays! {
    counts: i32,
    token_ids: i32, positions: i32, slots: i32,
    query_indptr: i32, seq_lens: i32, page_indptr: i32,
    seg_indptr: i32, seg_adapter: i32,
    sample_rows: i32, state_rows: i32,
    temperature: f32, top_p: f32, min_p: f32, presence: f32, frequency: f32, repetition: f32, uniform: f32,
    top_k: i32, num_logprobs: i32,
    bias_indptr: i32, bias_ids: i32, bias_values: f32,
    reset_rows: i32, reset_prompt_lens: i32, reset_indptr: i32, reset_tokens: i32,
    prompt_rows: i32, prompt_targets: i32, prompt_num_logprobs: i32,
    copy_host_pages: i32, copy_pages: i32, copy_layers: i32,
    changed_rows: i32, changed_pages_indptr: i32, changed_pages: i32, changed_modules: i32,
    page_indices: i32,
}

/// Where each array of a plan lies in the buffer: fixed offsets, sized for the largest plan that the configuration allows.
#[derive(Clone, Debug)]
pub struct PlanLayout {
    arrays: Vec<Array>,
    num_words: usize,
    pub(crate) max_changed: u32,
    pub(crate) max_copies: u32,
    pub(crate) max_reset_tokens: u32,
}

impl PlanLayout {
    /// For a [checked](EngineConfig::checked) configuration.
    pub fn new(config: &EngineConfig) -> Self {
        let max_changed = config.max_adapters.min(MAX_CHANGED);
        let max_copies = config.num_pages.min(config.max_adapter_pages.max(16_384));
        let rows = config.max_batch_tokens as usize;
        let requests = config.max_running as usize;
        let bias_each = SamplingParams::MAX_BIAS + SamplingParams::MAX_STOP_TOKENS + config.eos_token_ids.len();
        let changed_pages = (max_changed as usize * config.max_adapter_pages as usize).min(config.num_pages as usize);
        let mut offset = 0;
        let arrays: Vec<Array> = NAMES
            .iter()
            .map(|&(name, is_float)| {
                let capacity = match name {
                    "counts" => NUM_COUNTS,
                    "token_ids" | "positions" | "slots" | "prompt_rows" | "prompt_targets" | "prompt_num_logprobs" => {
                        rows
                    }
                    "query_indptr" | "page_indptr" | "bias_indptr" | "reset_indptr" => requests + 1,
                    "seg_indptr" => 2 * requests + 1,
                    "seg_adapter" => 2 * requests,
                    "bias_ids" | "bias_values" => requests * bias_each,
                    "reset_tokens" => config.max_context as usize,
                    "copy_host_pages" | "copy_pages" | "copy_layers" => max_copies as usize,
                    "changed_rows" => max_changed as usize,
                    "changed_pages_indptr" => max_changed as usize + 1,
                    "changed_pages" => changed_pages,
                    "changed_modules" => max_changed as usize * config.descriptor_words as usize,
                    "page_indices" => config.num_pages as usize,
                    _ => requests,
                };
                // Every array starts on 16 bytes, so that kernels may read it in vectors.
                let array = Array { name, offset, capacity: capacity.next_multiple_of(4), is_float };
                offset += array.capacity;
                array
            })
            .collect();
        Self { arrays, num_words: offset, max_changed, max_copies, max_reset_tokens: config.max_context }
    }

    /// The arrays in the order in which they lie.
    pub fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    /// 32-bit words of a buffer.
    pub fn num_words(&self) -> usize {
        self.num_words
    }
}

/// The plan's scalars; also its first array, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number of the step, from 1 to `max_step`, then from 1 again; when it is 1, nothing in flight has a number.
    pub step: u32,
    /// Token rows.
    pub num_rows: u32,
    /// Requests with one row; they come first.
    pub num_decode: u32,
    /// Requests in this step.
    pub num_requests: u32,
    /// Runs of rows with the same adapter.
    pub num_segments: u32,
    /// Rows whose next token is sampled.
    pub num_sampled: u32,
    /// Rows whose next prompt token's log-probability is wanted.
    pub num_prompt_logprobs: u32,
    /// Entries of the page tables.
    pub num_page_indices: u32,
    /// Entries of the bias lists.
    pub num_bias: u32,
    /// State rows that start.
    pub num_resets: u32,
    /// Their tokens.
    pub num_reset_tokens: u32,
    /// Pages to copy from the host tier.
    pub num_copies: u32,
    /// Descriptor rows that change.
    pub num_changed: u32,
    /// Their pages.
    pub num_changed_pages: u32,
    /// Most rows of a request.
    pub max_query_len: u32,
    /// Longest sequence.
    pub max_seq_len: u32,
    /// Most log-probabilities wanted of a sampled row; −1: none.
    pub max_logprobs: i32,
    /// Likewise of a prompt row.
    pub max_prompt_logprobs: i32,
    /// The launched step behind which the copies must stay; 0: none.
    pub copies_wait_step: u32,
    /// Bits: [`HAS_LORA`](Self::HAS_LORA), [`HAS_RANDOM`](Self::HAS_RANDOM), [`HAS_PENALTIES`](Self::HAS_PENALTIES).
    pub flags: u32,
    /// The step whose copies must have arrived before this one reads adapters; 0: none.
    pub copies_needed_step: u32,
}

impl Counts {
    /// Some segment has an adapter.
    pub const HAS_LORA: u32 = 1;
    /// Some sampled row is not greedy.
    pub const HAS_RANDOM: u32 = 2;
    /// Some sampled row has penalties.
    pub const HAS_PENALTIES: u32 = 4;

    /// The scalars as words, in the order of the fields.
    pub fn words(&self) -> [i32; 21] {
        [
            self.step as i32,
            self.num_rows as i32,
            self.num_decode as i32,
            self.num_requests as i32,
            self.num_segments as i32,
            self.num_sampled as i32,
            self.num_prompt_logprobs as i32,
            self.num_page_indices as i32,
            self.num_bias as i32,
            self.num_resets as i32,
            self.num_reset_tokens as i32,
            self.num_copies as i32,
            self.num_changed as i32,
            self.num_changed_pages as i32,
            self.max_query_len as i32,
            self.max_seq_len as i32,
            self.max_logprobs,
            self.max_prompt_logprobs,
            self.copies_wait_step as i32,
            self.flags as i32,
            self.copies_needed_step as i32,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_lie_side_by_side_on_16_bytes() {
        let layout = PlanLayout::new(&EngineConfig::default());
        let mut end = 0;
        for array in layout.arrays() {
            assert_eq!(array.offset, end, "{}", array.name);
            assert_eq!(array.offset % 4, 0);
            end += array.capacity;
        }
        assert_eq!(layout.num_words(), end);
        assert_eq!(layout.arrays()[0].name, "counts");
        assert_eq!(layout.arrays().last().unwrap().name, "page_indices");
    }
}
