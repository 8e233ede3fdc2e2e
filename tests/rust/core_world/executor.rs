//! A fake executor: checks every plan as it is launched, and runs it on simulated pages as early or as late as it may.
//!
//! Two streams are simulated. Steps are computed in order; copies arrive in order; a copy waits for the step that its plan
//! names, a step for the copies that it needs. The world moves both on at random.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use slora_core::{Counts, EngineConfig, PlanLayout};

use super::model::{self, Content, Sampling};
use super::plan::{Plan, PlanReader};

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Page {
    Garbage,
    Kv,
    Image(Content, u32),
}

/// The device's tables of adapters.
#[derive(Clone, Debug, Default)]
struct Descriptor {
    content: Content,
    pages: Vec<i32>,
}

/// Sums of the tokens in a state row.
#[derive(Clone, Debug, Default)]
struct State {
    prompt: u64,
    output: u64,
}

/// What a step brought.
#[derive(Clone, Debug, Default)]
pub struct Output {
    pub ids: Vec<i32>,
    pub prompt_scores: Vec<u64>,
}

struct CopyBatch {
    step: u32,
    wait_step: u32,
    copies: VecDeque<(usize, usize)>,
}

pub struct Executor {
    config: EngineConfig,
    reader: PlanReader,
    /// Layers of each image page, by the content that its descriptor names.
    pub images: HashMap<Content, Arc<[u16]>>,
    device: Vec<Page>,
    kv: Vec<u64>,
    host: Vec<Page>,
    /// As the last computed step sees it.
    descriptors: Vec<Descriptor>,
    /// As the last launched step will see it.
    launched_descriptors: Vec<Descriptor>,
    states: Vec<State>,
    sampled: Vec<i32>,
    launched: VecDeque<Plan>,
    outputs: VecDeque<Output>,
    copies: VecDeque<CopyBatch>,
    /// Steps are counted for ever here, plans' numbers begin again behind this one.
    first_step: u32,
    step: u32,
    computed_step: u32,
    committed_step: u32,
    copied_step: u32,
    reported_step: u32,
    /// Of each device page: the last launched step that names it, and the last that orders a copy to it.
    named_step: Vec<u32>,
    copy_step: Vec<u32>,
    last_num_sampled: u32,
}

impl Executor {
    pub fn new(config: &EngineConfig, layout: &PlanLayout) -> Self {
        let num_pages = config.num_pages as usize;
        Self {
            reader: PlanReader::new(layout, config.descriptor_words),
            images: HashMap::new(),
            device: vec![Page::Garbage; num_pages],
            kv: vec![u64::MAX; num_pages * config.page_tokens as usize],
            host: vec![Page::Garbage; config.num_host_pages as usize],
            descriptors: vec![Descriptor::default(); config.max_adapters as usize],
            launched_descriptors: vec![Descriptor::default(); config.max_adapters as usize],
            states: vec![State::default(); config.max_running as usize],
            sampled: Vec::new(),
            launched: VecDeque::new(),
            outputs: VecDeque::new(),
            copies: VecDeque::new(),
            first_step: 0,
            step: 0,
            computed_step: 0,
            committed_step: 0,
            copied_step: 0,
            reported_step: 0,
            named_step: vec![0; num_pages],
            copy_step: vec![0; num_pages],
            last_num_sampled: 0,
            config: config.clone(),
        }
    }

    /// The descriptor words of a content: told apart by its first two.
    pub fn words(content: Content, num_words: u32) -> Arc<[i32]> {
        (0..num_words as i32).map(|i| if i < 2 { (content >> (32 * i)) as i32 } else { i }).collect()
    }

    /// A loader scribbles over host pages that it was given.
    pub fn begin_load(&mut self, pages: &[u32]) {
        pages.iter().for_each(|page| self.host[*page as usize] = Page::Garbage);
    }

    pub fn finish_load(&mut self, content: Content, pages: &[u32]) {
        for (i, page) in pages.iter().enumerate() {
            self.host[*page as usize] = Page::Image(content, i as u32);
        }
    }

    pub fn num_launched(&self) -> usize {
        (self.step - self.committed_step) as usize
    }

    pub fn has_unreported_copies(&self) -> bool {
        self.copies.back().map_or(self.copied_step, |batch| batch.step) > self.reported_step
    }

    /// Checks a plan and queues it.
    pub fn launch(&mut self, counts: Counts, buffer: &[i32]) -> Plan {
        let mut plan = self.reader.read(counts, buffer);
        self.count_from_first(&mut plan.counts);
        let counts = plan.counts;
        self.step += 1;
        assert_eq!(counts.step, self.step, "steps are counted");
        assert!(self.num_launched() <= 2, "at most one step is launched ahead");
        assert!(counts.copies_wait_step < self.step && counts.copies_needed_step <= self.step);
        super::rules::check_shape(&plan, &self.config, self.last_num_sampled);
        self.check_copies(&plan);
        self.change_launched_descriptors(&plan);
        self.check_pages(&plan);
        self.last_num_sampled = counts.num_sampled;
        self.launched.push_back(plan.clone());
        if counts.num_copies > 0 {
            let pairs = plan.copy_host_pages.iter().zip(&plan.copy_pages);
            let copies = pairs.map(|(host_page, page)| (*host_page as usize, *page as usize)).collect();
            self.copies.push_back(CopyBatch { step: self.step, wait_step: counts.copies_wait_step, copies });
        }
        plan
    }

    fn count_from_first(&mut self, counts: &mut Counts) {
        assert!(counts.step <= self.config.max_step);
        if counts.step == 1 {
            let is_quiet = self.num_launched() == 0 && !self.has_unreported_copies();
            assert!(is_quiet, "numbers begin again when nothing in flight has one");
            self.first_step = self.step;
        }
        for step in [&mut counts.step, &mut counts.copies_wait_step, &mut counts.copies_needed_step] {
            *step += if *step > 0 { self.first_step } else { 0 };
        }
    }

    /// **Invariant:** no copy overwrites a page that a launched step still names.
    fn check_copies(&mut self, plan: &Plan) {
        assert!(plan.copy_layers.is_sorted(), "copies go layer by layer");
        for (&page, &host_page) in plan.copy_pages.iter().zip(&plan.copy_host_pages) {
            let named = self.named_step[page as usize];
            assert!(
                named <= self.committed_step || named <= plan.counts.copies_wait_step,
                "a copy to page {page} in step {} does not wait for step {named}",
                self.step
            );
            assert!(self.copy_step[page as usize] <= self.reported_step, "page {page} has a copy in flight");
            assert!((host_page as usize) < self.host.len());
            self.copy_step[page as usize] = self.step;
        }
    }

    fn change_launched_descriptors(&mut self, plan: &Plan) {
        for (row, descriptor) in changes(plan, self.config.descriptor_words) {
            let layers = &self.images[&descriptor.content];
            assert_eq!(layers.len(), descriptor.pages.len(), "a descriptor row names all pages of its image");
            for (page, layer) in descriptor.pages.iter().zip(layers.iter()) {
                if let Some(i) = plan.copy_pages.iter().position(|copied| copied == page) {
                    assert_eq!(plan.copy_layers[i], i32::from(*layer), "a copy names its first layer");
                }
            }
            self.launched_descriptors[row] = descriptor;
        }
    }

    /// **Invariant:** a plan never names a page whose copy has not been ordered before its use.
    fn check_pages(&mut self, plan: &Plan) {
        for &page in &plan.page_indices {
            let page = page as usize;
            assert!(self.copy_step[page] <= self.reported_step, "KV page {page} has a copy in flight");
            assert!(self.named_step[page] < self.step, "page {page} is named once in a step");
            self.named_step[page] = self.step;
        }
        let mut rows: Vec<i32> = plan.seg_adapter.iter().copied().filter(|row| *row >= 0).collect();
        rows.sort_unstable();
        rows.dedup();
        for row in rows {
            for &page in &self.launched_descriptors[row as usize].pages {
                let page = page as usize;
                let arrived = self.reported_step.max(plan.counts.copies_needed_step);
                assert!(self.copy_step[page] <= arrived, "step {} does not wait for its adapters", self.step);
                assert!(self.named_step[page] < self.step, "page {page} is named once in a step");
                self.named_step[page] = self.step;
            }
        }
    }

    /// Moves the copy stream on by one page, if it may.
    pub fn copy_one(&mut self) -> bool {
        let Some(batch) = self.copies.front_mut() else { return false };
        if batch.wait_step > self.computed_step {
            return false;
        }
        if let Some((host_page, page)) = batch.copies.pop_front() {
            self.device[page] = self.host[host_page];
        }
        if batch.copies.is_empty() {
            self.copied_step = batch.step;
            self.copies.pop_front();
        }
        true
    }

    /// Moves the compute stream on by one step, and the copies as far as it needs them.
    pub fn compute_one(&mut self) -> bool {
        let Some(plan) = self.launched.pop_front() else { return false };
        while self.copies.front().is_some_and(|batch| batch.step <= plan.counts.copies_needed_step) {
            assert!(self.copy_one(), "copies that a step needs wait for an earlier step");
        }
        let output = self.compute(&plan);
        self.computed_step = plan.counts.step;
        self.sampled = output.ids.clone();
        self.outputs.push_back(output);
        true
    }

    /// The oldest launched step that was not taken, with its output.
    pub fn take_output(&mut self) -> Option<(u32, Output)> {
        if self.outputs.is_empty() {
            self.compute_one();
        }
        let output = self.outputs.pop_front()?;
        self.committed_step += 1;
        Some((self.committed_step - self.first_step, output))
    }

    /// The last step, since numbers began again, whose copies, and all before, have arrived.
    pub fn report_copies(&mut self) -> u32 {
        let unfinished = self.copies.front().map_or(self.step + 1, |batch| batch.step);
        self.reported_step = self.reported_step.max(unfinished - 1);
        self.reported_step.saturating_sub(self.first_step)
    }

    fn compute(&mut self, plan: &Plan) -> Output {
        for (row, descriptor) in changes(plan, self.config.descriptor_words) {
            self.descriptors[row] = descriptor;
        }
        self.reset_states(plan);
        self.check_images(plan);
        let mut contexts = vec![0; plan.token_ids.len()];
        for r in 0..plan.counts.num_requests as usize {
            self.compute_request(plan, r, &mut contexts);
        }
        let ids: Vec<i32> = (0..plan.sample_rows.len()).map(|i| self.sample(plan, i, &contexts)).collect();
        let prompt = plan.prompt_rows.iter().zip(&plan.prompt_targets);
        let prompt_scores = prompt.map(|(row, target)| model::score(contexts[*row as usize], *target as u32)).collect();
        Output { ids, prompt_scores }
    }

    fn reset_states(&mut self, plan: &Plan) {
        for (i, &row) in plan.reset_rows.iter().enumerate() {
            let tokens = Plan::part(&plan.reset_indptr, &plan.reset_tokens, i);
            let (prompt, output) = tokens.split_at(plan.reset_prompt_lens[i] as usize);
            let sum = |tokens: &[i32], share: fn(u32) -> u64| {
                tokens.iter().fold(0u64, |sum, token| sum.wrapping_add(share(*token as u32)))
            };
            self.states[row as usize] =
                State { prompt: sum(prompt, model::in_prompt), output: sum(output, model::in_output) };
        }
    }

    fn check_images(&self, plan: &Plan) {
        for &row in plan.seg_adapter.iter().filter(|row| **row >= 0) {
            let descriptor = &self.descriptors[row as usize];
            for (i, page) in descriptor.pages.iter().enumerate() {
                let expected = Page::Image(descriptor.content, i as u32);
                assert_eq!(self.device[*page as usize], expected, "step {}: an adapter's page", plan.counts.step);
            }
        }
    }

    /// Every row attends to all slots before its own.
    fn compute_request(&mut self, plan: &Plan, r: usize, contexts: &mut [u64]) {
        let page_tokens = self.config.page_tokens as usize;
        let (rows, pages) = (plan.rows(r), plan.pages(r));
        let slot_of = |position: usize| pages[position / page_tokens] as usize * page_tokens + position % page_tokens;
        let adapter = plan.adapter_of(rows.start);
        let content = if adapter < 0 { 0 } else { self.descriptors[adapter as usize].content };
        let start = plan.positions[rows.start] as usize;
        let mut context = 0;
        for position in 0..start {
            assert_eq!(self.device[slot_of(position) / page_tokens], Page::Kv, "a sequence lies in KV pages");
            context = model::mix(context, self.kv[slot_of(position)]);
        }
        for row in rows {
            let token = match plan.token_ids[row] {
                token if token >= 0 => token,
                reference => self.sampled[(-1 - reference) as usize].max(0),
            };
            let value = model::kv(content, context, token as u32, plan.positions[row] as u32);
            let slot = plan.slots[row] as usize;
            self.device[slot / page_tokens] = Page::Kv;
            self.kv[slot] = value;
            context = model::mix(context, value);
            contexts[row] = context;
        }
    }

    fn sample(&mut self, plan: &Plan, i: usize, contexts: &[u64]) -> i32 {
        let state = &mut self.states[plan.state_rows[i] as usize];
        let floats = [
            &plan.temperature,
            &plan.top_p,
            &plan.min_p,
            &plan.presence,
            &plan.frequency,
            &plan.repetition,
            &plan.uniform,
        ];
        let bits = floats.map(|values| values[i] as u32);
        let has_penalties = bits[3..6] != [0.0f32, 0.0, 1.0].map(f32::to_bits);
        let counts = if has_penalties { state.prompt.wrapping_add(state.output) } else { 0 };
        let ids = Plan::part(&plan.bias_indptr, &plan.bias_ids, i);
        let values = Plan::part(&plan.bias_indptr, &plan.bias_values, i);
        let bias: Vec<(u32, u32)> = ids.iter().zip(values).map(|(id, value)| (*id as u32, *value as u32)).collect();
        let sampling = Sampling { bits, top_k: plan.top_k[i] as u32, counts, bias: &bias };
        let token = model::choose(contexts[plan.sample_rows[i] as usize], &sampling);
        if plan.counts.flags & Counts::HAS_PENALTIES > 0 && token >= 0 {
            state.output = state.output.wrapping_add(model::in_output(token as u32));
        }
        token
    }
}

/// The plan's new descriptors, by row.
fn changes(plan: &Plan, num_words: u32) -> impl Iterator<Item = (usize, Descriptor)> + '_ {
    let words = plan.changed_modules.chunks(num_words as usize);
    plan.changed_rows.iter().zip(words).enumerate().map(|(i, (row, words))| {
        let content = u64::from(words[0] as u32) | u64::from(words[1] as u32) << 32;
        assert!(words[2..].iter().enumerate().all(|(i, word)| *word == i as i32 + 2), "a descriptor is whole");
        let pages = Plan::part(&plan.changed_pages_indptr, &plan.changed_pages, i).to_vec();
        (*row as usize, Descriptor { content, pages })
    })
}
