//! Writes requests, copies and descriptors into a plan's arrays.

use crate::EngineConfig;
use crate::engine::LaunchedStep;
use crate::plan::{Counts, PlanArrays};
use crate::registry::{Adapter, DeviceImage};
use crate::request::Request;
use crate::sampling::uniform;

const NO_ADAPTER: i32 = -1;

/// Appends to the arrays; `counts` says how far each is filled.
pub(crate) struct PlanWriter<'a, 'b> {
    plan: &'a mut PlanArrays<'b>,
    launched: &'a mut LaunchedStep,
    config: &'a EngineConfig,
    counts: Counts,
    /// The adapter of the open segment; `None`: no segment is open.
    segment: Option<i32>,
}

impl<'a, 'b> PlanWriter<'a, 'b> {
    pub fn new(
        plan: &'a mut PlanArrays<'b>,
        launched: &'a mut LaunchedStep,
        step: u32,
        config: &'a EngineConfig,
    ) -> Self {
        for indptr in [&mut plan.query_indptr, &mut plan.page_indptr, &mut plan.seg_indptr, &mut plan.bias_indptr] {
            indptr[0] = 0;
        }
        plan.reset_indptr[0] = 0;
        plan.changed_pages_indptr[0] = 0;
        let counts = Counts { step, max_logprobs: -1, max_prompt_logprobs: -1, ..Counts::default() };
        Self { plan, launched, config, counts, segment: None }
    }

    /// Decode rows begin, or prefill rows: no segment spans both.
    pub fn begin_part(&mut self) {
        self.segment = None;
    }

    /// The request's planned rows, its page table and what is sampled of it.
    #[inline]
    pub fn request(&mut self, place: u32, request: &mut Request, adapter: Option<&Adapter>) {
        let len = request.planned;
        let first_row = self.counts.num_rows;
        self.rows(request, first_row, len);
        self.page_table(request, len);
        self.segment(adapter, first_row + len);
        self.counts.num_rows += len;
        self.counts.max_query_len = self.counts.max_query_len.max(len);
        self.counts.num_decode += u32::from(len == 1);
        let i = self.counts.num_requests as usize;
        self.plan.query_indptr[i + 1] = self.counts.num_rows as i32;
        self.counts.num_requests += 1;
        if request.params.prompt_logprobs.is_some() {
            self.prompt_logprobs(place, request, first_row, len);
        }
        request.computed += len;
        if request.computed != request.known_len() {
            return;
        }
        if request.params.max_tokens == 0 {
            self.launched.prompts_done.push((place, request.seq()));
        } else {
            self.sample(place, request, self.counts.num_rows - 1);
        }
    }

    #[inline]
    fn rows(&mut self, request: &Request, first_row: u32, len: u32) {
        let page_tokens = self.config.page_tokens;
        let (shift, mask) = (page_tokens.trailing_zeros(), page_tokens - 1);
        let start = request.computed;
        for (row, position) in (first_row as usize..).zip(start..start + len) {
            self.plan.token_ids[row] = match request.tokens.get(position as usize) {
                Some(token) => *token as i32,
                None => -1 - request.pending_row as i32,
            };
            self.plan.positions[row] = position as i32;
            self.plan.slots[row] = ((request.pages[(position >> shift) as usize] << shift) + (position & mask)) as i32;
        }
    }

    #[inline]
    fn page_table(&mut self, request: &Request, len: u32) {
        let i = self.counts.num_requests as usize;
        let seq_len = request.computed + len;
        let num_pages = seq_len.div_ceil(self.config.page_tokens) as usize;
        let start = self.counts.num_page_indices as usize;
        let table = &mut self.plan.page_indices[start..start + num_pages];
        for (index, page) in table.iter_mut().zip(&request.pages[..num_pages]) {
            *index = *page as i32;
        }
        self.counts.num_page_indices += num_pages as u32;
        self.plan.page_indptr[i + 1] = self.counts.num_page_indices as i32;
        self.plan.seq_lens[i] = seq_len as i32;
        self.counts.max_seq_len = self.counts.max_seq_len.max(seq_len);
    }

    #[inline]
    fn segment(&mut self, adapter: Option<&Adapter>, end_row: u32) {
        let row = adapter.and_then(|adapter| adapter.descriptor_row).map_or(NO_ADAPTER, |row| row as i32);
        debug_assert_eq!(row == NO_ADAPTER, adapter.is_none(), "a running request's adapter has a descriptor row");
        if self.segment != Some(row) {
            self.segment = Some(row);
            self.plan.seg_adapter[self.counts.num_segments as usize] = row;
            self.counts.num_segments += 1;
            if let Some(adapter) = adapter {
                self.counts.flags |= Counts::HAS_LORA;
                if let DeviceImage::Copying { step, .. } = adapter.device {
                    self.counts.copies_needed_step = self.counts.copies_needed_step.max(step);
                }
            }
        }
        self.plan.seg_indptr[self.counts.num_segments as usize] = end_row as i32;
    }

    fn prompt_logprobs(&mut self, place: u32, request: &mut Request, first_row: u32, len: u32) {
        let wanted = request.params.prompt_logprobs.unwrap_or(0) as i32;
        let start = request.computed.max(request.prompt_logprobs_done);
        let end = (request.computed + len).min(request.prompt_len - 1);
        if start >= end {
            return;
        }
        let first = self.counts.num_prompt_logprobs;
        for (i, position) in (first as usize..).zip(start..end) {
            self.plan.prompt_rows[i] = (first_row + position - request.computed) as i32;
            self.plan.prompt_targets[i] = request.tokens[position as usize + 1] as i32;
            self.plan.prompt_num_logprobs[i] = wanted;
        }
        self.counts.num_prompt_logprobs += end - start;
        self.counts.max_prompt_logprobs = self.counts.max_prompt_logprobs.max(wanted);
        self.launched.prompt_rows.push((place, request.seq(), start + 1, first, end - start));
        request.prompt_logprobs_done = end;
    }

    #[inline]
    fn sample(&mut self, place: u32, request: &mut Request, row: u32) {
        let i = self.counts.num_sampled as usize;
        let params = &*request.params;
        let plan = &mut *self.plan;
        plan.sample_rows[i] = row as i32;
        plan.state_rows[i] = request.state_row as i32;
        plan.temperature[i] = params.temperature.to_bits() as i32;
        plan.top_p[i] = params.top_p.to_bits() as i32;
        plan.min_p[i] = params.min_p.to_bits() as i32;
        plan.presence[i] = params.presence_penalty.to_bits() as i32;
        plan.frequency[i] = params.frequency_penalty.to_bits() as i32;
        plan.repetition[i] = params.repetition_penalty.to_bits() as i32;
        plan.top_k[i] = params.top_k.min(i32::MAX as u32) as i32;
        let logprobs = params.logprobs.map_or(-1, |count| count as i32);
        plan.num_logprobs[i] = logprobs;
        self.counts.max_logprobs = self.counts.max_logprobs.max(logprobs);
        let position = request.known_len();
        let is_random = params.temperature > 0.0;
        plan.uniform[i] = if is_random { uniform(params.seed, position).to_bits() as i32 } else { 0 };
        self.counts.flags |=
            u32::from(is_random) * Counts::HAS_RANDOM + u32::from(request.has_penalties) * Counts::HAS_PENALTIES;
        let must_go_on = request.num_generated() < params.min_tokens;
        if must_go_on || !params.logit_bias.is_empty() {
            self.bias(request, must_go_on);
        }
        self.plan.bias_indptr[i + 1] = self.counts.num_bias as i32;
        self.counts.num_sampled += 1;
        self.launched.sampled.push((place, request.seq()));
        request.pending += 1;
        request.pending_row = i as u32;
    }

    fn bias(&mut self, request: &Request, must_go_on: bool) {
        let params = &request.params;
        let eos = self.config.eos_token_ids.iter().filter(|_| !params.ignore_eos);
        let forbidden =
            eos.chain(&params.stop_token_ids).filter(|_| must_go_on).map(|token| (*token, f32::NEG_INFINITY));
        for (token, bias) in params.logit_bias.iter().copied().chain(forbidden) {
            let i = self.counts.num_bias as usize;
            self.plan.bias_ids[i] = token as i32;
            self.plan.bias_values[i] = bias.to_bits() as i32;
            self.counts.num_bias += 1;
        }
    }

    /// The step's page copies, in order.
    pub fn copies(&mut self, copies: &[(u16, u32, u32)], wait_step: u32) {
        for (i, &(layer, host_page, page)) in copies.iter().enumerate() {
            self.plan.copy_layers[i] = i32::from(layer);
            self.plan.copy_host_pages[i] = host_page as i32;
            self.plan.copy_pages[i] = page as i32;
        }
        self.counts.num_copies = copies.len() as u32;
        self.counts.copies_wait_step = wait_step;
    }

    /// A descriptor row's new content.
    pub fn changed(&mut self, adapter: &Adapter) {
        let i = self.counts.num_changed as usize;
        let (Some(row), Some(pages)) = (adapter.descriptor_row, adapter.device.pages()) else {
            unreachable!("an adapter with a new descriptor row is on the device")
        };
        self.plan.changed_rows[i] = row as i32;
        let start = self.counts.num_changed_pages as usize;
        for (word, page) in self.plan.changed_pages[start..start + pages.len()].iter_mut().zip(pages.iter()) {
            *word = *page as i32;
        }
        self.counts.num_changed_pages += pages.len() as u32;
        self.plan.changed_pages_indptr[i + 1] = self.counts.num_changed_pages as i32;
        let words = &adapter.spec.words;
        self.plan.changed_modules[i * words.len()..][..words.len()].copy_from_slice(words);
        self.counts.num_changed += 1;
    }

    /// All tokens so far of a request whose penalty counts start.
    pub fn reset(&mut self, request: &Request) {
        let i = self.counts.num_resets as usize;
        self.plan.reset_rows[i] = request.state_row as i32;
        self.plan.reset_prompt_lens[i] = request.prompt_len as i32;
        let start = self.counts.num_reset_tokens as usize;
        let tokens = &mut self.plan.reset_tokens[start..start + request.tokens.len()];
        for (word, token) in tokens.iter_mut().zip(&request.tokens) {
            *word = *token as i32;
        }
        self.counts.num_reset_tokens += request.tokens.len() as u32;
        self.plan.reset_indptr[i + 1] = self.counts.num_reset_tokens as i32;
        self.counts.num_resets += 1;
    }

    /// Writes the scalars.
    pub fn finish(self) -> Counts {
        let words = self.counts.words();
        self.plan.counts[..words.len()].copy_from_slice(&words);
        self.counts
    }
}
