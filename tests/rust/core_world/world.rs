//! The world's state, its operations, and what it asserts of every outcome.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use slora_core::{
    Account, AdapterError, AdapterId, AdapterInfo, AdapterSpec, AdapterState, EndReason, Engine, EngineConfig, Events,
    Load, LoadFailure, NewRequest, RequestId, SamplingParams, SubmitError,
};

use super::executor::{Executor, Output};
use super::model::{Content, Sequence, mix};
use super::random::{Random, random_account, random_params};

/// An unfinished request as its client knows it.
#[derive(Debug)]
pub struct Live {
    pub sequence: Sequence,
    pub adapter: Option<AdapterId>,
    /// Position up to which prompt log-probabilities came.
    scored: usize,
    checked: u32,
    is_cancelled: bool,
    is_admitted: bool,
}

pub struct World {
    pub engine: Engine,
    pub executor: Executor,
    pub random: Random,
    buffer: Vec<i32>,
    pub now_us: u64,
    names: Vec<Arc<str>>,
    /// Every version that may still exist.
    contents: BTreeMap<AdapterId, Content>,
    /// What the engine's changes say of each name.
    known: BTreeMap<Arc<str>, AdapterInfo>,
    /// The last version registered under each name.
    latest: BTreeMap<Arc<str>, AdapterId>,
    failed: BTreeSet<AdapterId>,
    loads: Vec<Load>,
    pub live: BTreeMap<RequestId, Live>,
    next_id: u64,
    next_content: Content,
    events: Events,
    /// Of all plans and events: the same inputs give the same.
    pub trace: u64,
    pub num_ended: BTreeMap<&'static str, u64>,
}

impl World {
    pub fn new(config: EngineConfig, seed: u64) -> Self {
        let engine = Engine::new(config).unwrap();
        let executor = Executor::new(engine.config(), engine.layout());
        Self {
            buffer: vec![0; engine.layout().num_words()],
            executor,
            engine,
            random: Random::new(seed),
            now_us: 0,
            names: (0..6).map(|i| format!("a{i}").into()).collect(),
            contents: BTreeMap::new(),
            known: BTreeMap::new(),
            latest: BTreeMap::new(),
            failed: BTreeSet::new(),
            loads: Vec::new(),
            live: BTreeMap::new(),
            next_id: 0,
            next_content: 1,
            events: Events::default(),
            trace: 0,
            num_ended: BTreeMap::new(),
        }
    }

    /// One random operation, then all invariants.
    pub fn operate(&mut self) {
        self.now_us += u64::from(self.random.below(3)) * 1_000_000;
        match self.random.below(200) {
            0..26 => self.submit_random(),
            26..28 => self.cancel_random(),
            28..84 => self.schedule(),
            84..134 => self.commit(),
            134..146 => drop(self.executor.copy_one()),
            146..152 => drop(self.executor.compute_one()),
            152..164 => self.report_copies(),
            164..184 => self.answer_load_random(),
            184..189 => self.register_random(),
            189..190 => self.unload_random(),
            190..193 => self.pin_random(),
            _ => self.check_text_random(),
        }
        self.listen();
        self.engine.check();
        self.check_known();
    }

    /// Whoever follows the changes knows what all names mean.
    fn check_known(&mut self) {
        while let Some((name, info)) = self.engine.next_changed_adapter() {
            match info {
                Some(info) => drop(self.known.insert(name, info)),
                None => drop(self.known.remove(&name)),
            }
        }
        let all = self.engine.adapters().map(|info| (info.name.clone(), info));
        assert_eq!(self.known, all.collect(), "every change is told");
    }

    fn submit_random(&mut self) {
        let room = self.engine.config().max_context - 1;
        let adapter = self.random.chance(75).then(|| self.random_name());
        let max_prompt_len = if self.random.chance(70) { room.min(10) } else { room };
        let prompt_len = self.random.between(1, max_prompt_len);
        let params = random_params(&mut self.random, room + 1 - prompt_len);
        let prompt = (0..prompt_len).map(|_| self.random.below(super::model::VOCAB)).collect();
        let account = random_account(&mut self.random);
        let _ = self.submit_for(account, adapter.as_deref(), prompt, params);
    }

    fn random_name(&mut self) -> Arc<str> {
        // Popularity is skewed.
        let i = self.random.below(6).min(self.random.below(6));
        self.names[i as usize].clone()
    }

    /// A request of the next id, of its adapter's account.
    pub fn submit(
        &mut self,
        adapter: Option<&str>,
        prompt: Vec<u32>,
        params: SamplingParams,
    ) -> Result<RequestId, SubmitError> {
        self.submit_for(Account::default(), adapter, prompt, params)
    }

    /// A request of the next id.
    pub fn submit_for(
        &mut self,
        account: Account,
        adapter: Option<&str>,
        prompt: Vec<u32>,
        params: SamplingParams,
    ) -> Result<RequestId, SubmitError> {
        let (id, params) = (RequestId(self.next_id), Arc::new(params));
        let info = adapter.and_then(|name| self.engine.adapter_info(name));
        let content = info.as_ref().map_or(0, |info| self.contents[&info.id]);
        let sequence = Sequence::new(content, &prompt, params.clone());
        let new = NewRequest { id, adapter: adapter.map(Arc::from), prompt, params, account };
        match self.engine.submit(self.now_us, new) {
            Ok(()) => {}
            Err(error) => {
                match &error {
                    SubmitError::UnknownAdapter(_) => assert!(info.is_none() && adapter.is_some()),
                    SubmitError::AdapterFailed { .. } => assert!(self.failed.contains(&info.unwrap().id)),
                    SubmitError::PoolTooSmall { .. } | SubmitError::QueueFull { .. } => {}
                    other => panic!("a valid request was refused: {other}"),
                }
                return Err(error);
            }
        }
        let adapter = info.map(|info| info.id);
        assert!(adapter.is_none_or(|id| !self.failed.contains(&id)), "a failed adapter takes no request");
        self.live
            .insert(id, Live { sequence, adapter, scored: 1, checked: 0, is_cancelled: false, is_admitted: false });
        self.next_id += 1;
        Ok(id)
    }

    fn cancel_random(&mut self) {
        if let Some(id) = self.random_live(|_| true) {
            self.cancel(id);
        }
    }

    pub fn cancel(&mut self, id: RequestId) {
        self.live.get_mut(&id).unwrap().is_cancelled = true;
        assert!(self.engine.cancel(id));
        assert!(!self.engine.cancel(id), "a request ends once");
    }

    fn random_live(&mut self, matches: impl Fn(&Live) -> bool) -> Option<RequestId> {
        let ids: Vec<RequestId> = self.live.iter().filter(|(_, live)| matches(live)).map(|(id, _)| *id).collect();
        (!ids.is_empty()).then(|| self.random.pick(&ids))
    }

    fn schedule(&mut self) {
        if self.executor.num_launched() < 2 {
            self.launch();
        }
    }

    /// Plans a step, whose output is not here yet, and launches it.
    pub fn launch(&mut self) -> Option<super::plan::Plan> {
        self.buffer.fill(-7);
        let counts = self.engine.schedule(self.now_us, &mut self.buffer);
        self.collect();
        let Some(counts) = counts else {
            assert!(self.live.is_empty() || self.is_in_flight(), "requests wait, but nothing is in flight");
            return None;
        };
        let plan = self.executor.launch(counts, &self.buffer);
        for words in [&counts.words()[..], &plan.token_ids, &plan.slots, &plan.seg_adapter, &plan.copy_pages] {
            self.trace = words.iter().fold(self.trace, |trace, word| mix(trace, *word as u64));
        }
        Some(plan)
    }

    /// Whether something will happen without a client.
    fn is_in_flight(&self) -> bool {
        self.executor.num_launched() > 0
            || self.executor.has_unreported_copies()
            || !self.loads.is_empty()
            || self.live.values().any(Live::is_unchecked)
    }

    fn commit(&mut self) {
        if self.executor.num_launched() > 0 {
            self.commit_oldest();
        }
    }

    pub fn commit_oldest(&mut self) {
        let (step, output) = self.executor.take_output().unwrap();
        self.engine.commit(self.now_us, step, &output.ids);
        self.hear(&output);
    }

    pub fn report_copies(&mut self) {
        let step = self.executor.report_copies();
        self.engine.copies_done(step);
    }

    /// Takes what the engine has for the loaders.
    pub fn collect(&mut self) {
        while let Some(load) = self.engine.next_load() {
            assert!(self.loads.iter().all(|other| other.adapter != load.adapter), "an adapter is loaded once");
            let is_free = |page| self.loads.iter().all(|other| !other.pages.contains(page));
            assert!(load.pages.iter().all(is_free), "a host page belongs to one loader");
            self.executor.begin_load(&load.pages);
            self.loads.push(load);
        }
        while let Some(id) = self.engine.next_cancelled_load() {
            assert!(self.loads.iter().any(|load| load.adapter == id), "a load that is given up was ordered");
        }
        while let Some(id) = self.engine.next_dropped() {
            assert!(self.loads.iter().all(|load| load.adapter != id), "a load that was ordered is answered");
            assert!(self.live.values().all(|live| live.adapter != Some(id)), "a version outlives its requests");
            assert!(self.contents.remove(&id).is_some(), "a version is dropped once");
        }
    }

    fn answer_load_random(&mut self) {
        if !self.loads.is_empty() {
            let i = self.random.below(self.loads.len() as u32) as usize;
            let fails = self.random.chance(4);
            self.answer_load(i, fails);
        }
    }

    fn answer_load(&mut self, i: usize, fails: bool) {
        let load = self.loads.remove(i);
        let content = self.contents[&load.adapter];
        if fails {
            self.failed.insert(load.adapter);
            let message = format!("content {content} is bad").into();
            self.engine.load_failed(load.adapter, LoadFailure { code: "bad", message });
            return;
        }
        self.executor.finish_load(content, &load.pages);
        self.engine.load_finished(load.adapter);
        if let Some((name, _)) = self.latest.iter().find(|(_, id)| **id == load.adapter) {
            let current = self.engine.adapter_info(name).unwrap();
            assert_eq!(current.id, load.adapter, "a replacement takes over once it is loaded");
        }
    }

    fn register_random(&mut self) {
        let name = self.random_name();
        let num_pages = self.random.between(1, self.engine.config().max_adapter_pages + 1);
        let replaces = self.random.chance(50);
        match self.register(&name, num_pages, replaces) {
            Ok(_) => {}
            Err(AdapterError::Exists(_)) => assert!(!replaces && self.latest.contains_key(&name)),
            Err(AdapterError::TooLarge { .. }) => assert!(num_pages > self.engine.config().max_adapter_pages),
            Err(other) => panic!("a valid adapter was refused: {other}"),
        }
    }

    pub fn register(&mut self, name: &str, num_pages: u32, replaces: bool) -> Result<AdapterId, AdapterError> {
        let content = mix(self.next_content, 99);
        self.next_content += 1;
        let layers: Arc<[u16]> = (0..num_pages as u16).map(|page| page / 2).collect();
        self.executor.images.insert(content, layers.clone());
        let words = Executor::words(content, self.engine.config().descriptor_words);
        let spec = AdapterSpec { num_pages, bytes: 1, words, page_layers: layers };
        let before = self.engine.adapter_info(name);
        let id = self.engine.register(name.into(), spec, replaces)?;
        self.contents.insert(id, content);
        self.latest.insert(name.into(), id);
        if let Some(before) = before.filter(|info| !matches!(info.state, AdapterState::Failed)) {
            let is_fresh = before.state == AdapterState::Registered && before.unfinished == 0;
            let expected = if is_fresh { id } else { before.id };
            let current = self.engine.adapter_info(name).unwrap().id;
            assert_eq!(current, expected, "the new version is loaded before the old one retires");
        }
        Ok(id)
    }

    fn unload_random(&mut self) {
        let name = self.random_name();
        self.unload(&name);
    }

    pub fn unload(&mut self, name: &str) {
        let is_known = self.latest.remove(name).is_some();
        assert_eq!(self.engine.unload(name).is_ok(), is_known);
    }

    fn pin_random(&mut self) {
        let name = self.random_name();
        let is_pinned = self.random.chance(40);
        let done = if is_pinned { self.engine.pin(&name) } else { self.engine.unpin(&name) };
        assert_eq!(done.is_ok(), self.latest.contains_key(&name));
        assert!(done.is_err() || self.engine.adapter_info(&name).unwrap().pinned == is_pinned);
    }

    fn check_text_random(&mut self) {
        if let Some(id) = self.random_live(|live| live.sequence.params.has_stop_strings) {
            self.check_text(id);
        }
    }

    pub fn check_text(&mut self, id: RequestId) {
        let live = self.live.get_mut(&id).unwrap();
        live.checked = live.sequence.num_generated() as u32;
        self.engine.checked(id, live.checked);
    }

    /// What happened outside of a commit.
    fn listen(&mut self) {
        self.hear(&Output::default());
        self.collect();
    }

    fn hear(&mut self, output: &Output) {
        let mut events = std::mem::take(&mut self.events);
        self.engine.take_events(&mut events);
        for id in &events.admitted {
            self.live.get_mut(id).unwrap().is_admitted = true;
        }
        for event in &events.prompts {
            let scores = &output.prompt_scores[event.row as usize..][..event.len as usize];
            self.live.get_mut(&event.request).unwrap().hear_prompt(event.position, scores);
        }
        for event in &events.tokens {
            assert_eq!(output.ids[event.row as usize], event.token as i32, "an event names its row");
            self.live.get_mut(&event.request).unwrap().hear_token(event.token);
            self.trace = mix(self.trace, event.request.0 << 32 | u64::from(event.token));
        }
        for event in &events.ended {
            let live = self.live.remove(&event.request).expect("a request ends once");
            self.trace = mix(self.trace, event.request.0);
            *self.num_ended.entry(live.hear_end(&event.reason, &self.failed)).or_default() += 1;
        }
        self.events = events;
    }

    /// One step with everything that belongs to it, nothing overlapped. Returns the plan, if there was one.
    pub fn step(&mut self) -> Option<super::plan::Plan> {
        let plan = self.launch();
        if plan.is_some() {
            self.commit_oldest();
        }
        while self.executor.copy_one() {}
        self.report_copies();
        while !self.loads.is_empty() {
            self.answer_load(0, false);
        }
        self.listen();
        self.engine.check();
        plan
    }

    /// Loads that were ordered and not answered.
    pub fn num_loads(&self) -> usize {
        self.loads.len()
    }

    /// Answers the oldest load.
    pub fn answer_oldest_load(&mut self, fails: bool) {
        self.answer_load(0, fails);
        self.listen();
        self.engine.check();
    }

    /// Answers everything until no request is left: nothing waits for ever.
    pub fn run_to_the_end(&mut self) {
        let mut num_idle = 0;
        while !self.live.is_empty() || self.is_in_flight() {
            let launched = self.executor.num_launched() < 2 && self.launch().is_some();
            if self.executor.num_launched() > usize::from(self.random.chance(50)) {
                self.commit_oldest();
            }
            while self.executor.copy_one() {}
            self.report_copies();
            while !self.loads.is_empty() {
                self.answer_load(0, false);
            }
            let unchecked: Vec<_> = self.live.iter().filter(|(_, l)| l.is_unchecked()).map(|(id, _)| *id).collect();
            unchecked.into_iter().for_each(|id| self.check_text(id));
            self.listen();
            self.engine.check();
            num_idle = if launched { 0 } else { num_idle + 1 };
            assert!(num_idle < 50, "{} requests wait for ever", self.live.len());
        }
        let stats = self.engine.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv_pages), (0, 0, 0), "at quiescence nobody holds KV pages");
        assert_eq!(stats.submitted, stats.ended, "every request ends exactly once");
    }

    /// Unloads every adapter: nothing is left of them.
    pub fn unload_all(&mut self) {
        for name in self.names.clone() {
            self.unload(&name);
        }
        self.run_to_the_end();
        self.collect();
        let stats = self.engine.stats();
        assert_eq!((stats.free_pages, stats.free_host_pages), (stats.num_pages, stats.num_host_pages));
        assert!(self.contents.is_empty() && stats.adapters == 0, "every version is dropped");
    }
}

impl Live {
    /// The request waits until its text was checked for stop strings.
    fn is_unchecked(&self) -> bool {
        let ahead = self.sequence.num_generated() as u32 - self.checked;
        self.sequence.params.has_stop_strings && ahead >= SamplingParams::MAX_UNCHECKED
    }

    fn hear_prompt(&mut self, position: u32, scores: &[u64]) {
        assert!(self.sequence.params.prompt_logprobs.is_some());
        for (i, score) in scores.iter().enumerate() {
            assert_eq!(position as usize + i, self.scored, "prompt log-probabilities come once, in order");
            assert_eq!(*score, self.sequence.prompt_score(self.scored));
            self.scored += 1;
        }
    }

    fn hear_token(&mut self, token: u32) {
        assert!(self.is_admitted, "a request is admitted before its first token");
        assert!(!self.sequence.is_complete() && !self.sequence.ends_with_stop(), "no token comes after the end");
        assert_eq!(token as i32, self.sequence.next(), "a request's tokens depend on nothing else");
        self.sequence.push(token);
        let ahead = self.sequence.num_generated() as u32 - self.checked;
        let limit = SamplingParams::MAX_UNCHECKED;
        assert!(!self.sequence.params.has_stop_strings || ahead <= limit, "text is checked in time");
    }

    fn hear_end(&self, reason: &EndReason, failed: &BTreeSet<AdapterId>) -> &'static str {
        let sequence = &self.sequence;
        let is_scored = sequence.params.prompt_logprobs.is_none() || self.scored == sequence.prompt_len;
        match reason {
            EndReason::Stop(token) => {
                assert!(sequence.ends_with_stop() && sequence.tokens.last() == Some(token) && is_scored);
                "stop"
            }
            EndReason::Length => {
                assert!(sequence.is_complete() && !sequence.ends_with_stop() && is_scored);
                "length"
            }
            EndReason::Cancelled => {
                assert!(self.is_cancelled);
                "cancelled"
            }
            EndReason::AdapterFailed(failure) => {
                assert!(failed.contains(&self.adapter.unwrap()) && failure.message.contains("is bad"));
                "failed"
            }
            EndReason::NotFinite => {
                assert_eq!(sequence.next(), -1);
                "not finite"
            }
            other => panic!("an end that nobody expects: {other:?}"),
        }
    }
}
