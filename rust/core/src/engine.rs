//! The engine: its state, and the calls that come from outside the step loop.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use crate::adapter::{AdapterId, Load};
use crate::event::{EndEvent, EndReason, Events};
use crate::lru::Lru;
use crate::pages::{Owner, PagePool};
use crate::plan::PlanLayout;
use crate::queue::{Queue, Turn};
use crate::registry::Registry;
use crate::request::{NewRequest, Phase, Request, RequestId, SubmitError};
use crate::stats::Stats;
use crate::{ConfigError, EngineConfig};

/// A launched step whose output is not here yet.
#[derive(Debug, Default)]
pub(crate) struct LaunchedStep {
    pub step: u32,
    /// (place, seq) of the request of each sampled row.
    pub sampled: Vec<(u32, u64)>,
    /// Requests that want no token and end with this step.
    pub prompts_done: Vec<(u32, u64)>,
    /// (place, seq, position of the first target, first row, rows).
    pub prompt_rows: Vec<(u32, u64, u32, u32, u32)>,
}

/// Decides which requests run on which pages, with which adapters, in which step.
///
/// All calls come from one thread. Time is an argument, in microseconds from any fixed moment.
///
/// A step is [`schedule`](Self::schedule), then [`commit`](Self::commit); the next step may be scheduled before this one is
/// committed, but no further. What happens to requests is told through [`take_events`](Self::take_events).
#[derive(Debug)]
pub struct Engine {
    pub(crate) config: EngineConfig,
    pub(crate) layout: PlanLayout,
    pub(crate) pages: PagePool,
    pub(crate) host_pages: PagePool,
    pub(crate) registry: Registry,
    /// Adapters on the device that may give way, least recently used first, and their pages.
    pub(crate) idle: Lru,
    pub(crate) idle_pages: u32,
    /// Adapters with a whole image in the host tier, least recently used first.
    pub(crate) host_lru: Lru,
    /// Adapters that a waiting request wants loaded, by the first such request.
    pub(crate) load_order: BTreeMap<Turn, u32>,
    /// Adapters to load although nobody waits, by the order of the wishes: replacements and pinned ones.
    pub(crate) wanted: BTreeMap<u64, u32>,
    /// Pinned adapters in the host tier that should be on the device.
    pub(crate) absent_pins: BTreeSet<u32>,
    /// Adapters that the operator keeps on the device.
    pub(crate) pinned: BTreeSet<u32>,
    /// Owner of each descriptor row.
    pub(crate) descriptor_rows: Vec<Option<u32>>,
    pub(crate) free_descriptor_rows: Vec<u32>,
    pub(crate) requests: Vec<Option<Request>>,
    vacant_requests: Vec<u32>,
    by_id: HashMap<RequestId, u32>,
    pub(crate) next_seq: u64,
    pub(crate) queue: Queue,
    /// By priority, then in order of admission: the last, the youngest of the lowest priority, gives way first.
    pub(crate) running: Vec<u32>,
    /// The same, by descriptor row.
    pub(crate) order: Vec<u32>,
    pub(crate) free_state_rows: Vec<u32>,
    pub(crate) step: u32,
    pub(crate) launched: VecDeque<LaunchedStep>,
    pub(crate) spare_steps: Vec<LaunchedStep>,
    /// Adapters being copied, by step.
    pub(crate) copying: VecDeque<(u32, u32)>,
    /// Pages of those copies that are outside their step.
    pub(crate) outside_pages: u32,
    pub(crate) loads: VecDeque<Load>,
    pub(crate) num_loading: u32,
    pub(crate) cancelled_loads: VecDeque<AdapterId>,
    pub(crate) dropped: VecDeque<AdapterId>,
    pub(crate) num_resident: u32,
    pub(crate) events: Events,
    pub(crate) stats: Stats,
    pub(crate) scratch: crate::schedule::Scratch,
}

impl Engine {
    /// An engine with empty pools.
    pub fn new(config: EngineConfig) -> Result<Self, ConfigError> {
        let config = config.checked()?;
        let layout = PlanLayout::new(&config);
        Ok(Self {
            pages: PagePool::new(config.num_pages),
            host_pages: PagePool::new(config.num_host_pages),
            registry: Registry::default(),
            idle: Lru::new(),
            idle_pages: 0,
            host_lru: Lru::new(),
            load_order: BTreeMap::new(),
            wanted: BTreeMap::new(),
            absent_pins: BTreeSet::new(),
            pinned: BTreeSet::new(),
            descriptor_rows: vec![None; config.max_adapters as usize],
            free_descriptor_rows: (0..config.max_adapters).rev().collect(),
            requests: Vec::new(),
            vacant_requests: Vec::new(),
            by_id: HashMap::new(),
            next_seq: 1,
            queue: Queue::new(config.queue),
            running: Vec::with_capacity(config.max_running as usize),
            order: Vec::with_capacity(config.max_running as usize),
            free_state_rows: (0..config.max_running).rev().collect(),
            step: 0,
            launched: VecDeque::new(),
            spare_steps: Vec::new(),
            copying: VecDeque::new(),
            outside_pages: 0,
            loads: VecDeque::new(),
            num_loading: 0,
            cancelled_loads: VecDeque::new(),
            dropped: VecDeque::new(),
            num_resident: 0,
            events: Events::default(),
            stats: Stats::default(),
            scratch: crate::schedule::Scratch::default(),
            config,
            layout,
        })
    }

    /// The configuration, with limits lowered to what can be reached.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Where the arrays of a plan lie.
    pub fn layout(&self) -> &PlanLayout {
        &self.layout
    }

    /// Queues a request and binds the current version of its adapter. What can be refused is refused here; afterwards the
    /// request ends exactly once, with an [`EndEvent`].
    pub fn submit(&mut self, now_us: u64, new: NewRequest) -> Result<(), SubmitError> {
        let NewRequest { id, adapter: name, prompt, params, account } = new;
        self.check_request(id, &prompt, &params)?;
        account.check()?;
        let adapter = name.as_ref().map(|name| self.find_runnable(name)).transpose()?;
        let prompt_len = prompt.len() as u32;
        self.check_room(prompt_len + params.max_tokens, adapter)?;
        let mut ticket = self.queue.enter(&account, name.as_ref(), self.next_seq, prompt_len);
        if let Some(adapter) = adapter.map(|index| self.registry.get(index)).filter(|adapter| adapter.can_load()) {
            self.queue.ask_load(&mut ticket, adapter.wants_load());
        }
        self.next_seq += 1;
        let place = self.place(Request::new(id, ticket, adapter, prompt, params));
        self.by_id.insert(id, place);
        if let Some(index) = adapter {
            let adapter = self.registry.get_mut(index);
            adapter.unfinished += 1;
            adapter.record_use(now_us);
        }
        self.enqueue(place);
        self.stats.submitted += 1;
        Ok(())
    }

    /// Whether the request could run alone in an empty pool, and may wait for its turn.
    fn check_room(&self, max_len: u32, adapter: Option<u32>) -> Result<(), SubmitError> {
        let (kv_pages, num_pages) = (self.pages_for(max_len), self.config.num_pages);
        let adapter_pages = adapter.map_or(0, |index| self.registry.get(index).spec.num_pages);
        if u64::from(kv_pages) + u64::from(adapter_pages) > u64::from(num_pages) {
            return Err(SubmitError::PoolTooSmall { kv_pages, adapter_pages, num_pages });
        }
        let max_waiting = self.config.max_waiting;
        if self.queue.len() >= max_waiting as usize {
            return Err(SubmitError::QueueFull { max_waiting });
        }
        Ok(())
    }

    fn place(&mut self, request: Request) -> u32 {
        match self.vacant_requests.pop() {
            Some(place) => {
                self.requests[place as usize] = Some(request);
                place
            }
            None => {
                self.requests.push(Some(request));
                self.requests.len() as u32 - 1
            }
        }
    }

    fn check_request(&self, id: RequestId, prompt: &[u32], params: &crate::SamplingParams) -> Result<(), SubmitError> {
        if prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if self.by_id.contains_key(&id) {
            return Err(SubmitError::Duplicate(id.0));
        }
        self.config.check_len(prompt.len(), params.max_tokens)?;
        let vocab_size = self.config.vocab_size;
        if let Some(&token) = prompt.iter().find(|token| **token >= vocab_size) {
            return Err(SubmitError::Token { token, vocab_size });
        }
        Ok(params.check(vocab_size)?)
    }

    fn find_runnable(&self, name: &Arc<str>) -> Result<u32, SubmitError> {
        let entry = self.registry.names.get(name).ok_or_else(|| SubmitError::UnknownAdapter(name.clone()))?;
        match &self.registry.get(entry.current).failure {
            None => Ok(entry.current),
            Some(failure) => Err(SubmitError::AdapterFailed { name: name.clone(), failure: failure.clone() }),
        }
    }

    /// Ends a request at once, wherever it is; its pages are free for the next step. `false` if it ended before.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let Some(&place) = self.by_id.get(&id) else { return false };
        self.finish(place, EndReason::Cancelled);
        true
    }

    /// The text of the request's first `num_tokens` generated tokens holds no stop string.
    pub fn checked(&mut self, id: RequestId, num_tokens: u32) {
        if let Some(&place) = self.by_id.get(&id) {
            let request = self.request_mut(place);
            request.checked = request.checked.max(num_tokens);
        }
    }

    /// Moves what happened since the last call into `into`, which is emptied first. Due after every [`commit`](Self::commit),
    /// since events name rows of the step that was committed last.
    pub fn take_events(&mut self, into: &mut Events) {
        into.clear();
        std::mem::swap(&mut self.events, into);
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Stats {
        Stats {
            num_pages: self.pages.num_pages(),
            free_pages: self.pages.num_free(),
            kv_pages: self.pages.num_owned(Owner::Kv),
            adapter_pages: self.pages.num_owned(Owner::Adapter),
            idle_adapter_pages: self.idle_pages,
            num_host_pages: self.host_pages.num_pages(),
            free_host_pages: self.host_pages.num_free(),
            running: self.running.len() as u32,
            waiting: self.queue.len() as u32,
            waiting_for_adapter: (self.queue.len() - self.queue.num_ready()) as u32,
            adapters: self.registry.len() as u32,
            resident_adapters: self.num_resident,
            host_adapters: self.host_lru.len() as u32,
            loading_adapters: self.num_loading,
            ..self.stats
        }
    }

    pub(crate) fn request(&self, place: u32) -> &Request {
        match &self.requests[place as usize] {
            Some(request) => request,
            None => unreachable!("a listed request is unfinished"),
        }
    }

    pub(crate) fn request_mut(&mut self, place: u32) -> &mut Request {
        match &mut self.requests[place as usize] {
            Some(request) => request,
            None => unreachable!("a listed request is unfinished"),
        }
    }

    /// The request at `place`, if it is still the one with this `seq`.
    pub(crate) fn find_request(&mut self, place: u32, seq: u64) -> Option<&mut Request> {
        self.requests[place as usize].as_mut().filter(|request| request.seq() == seq)
    }

    /// Pages that hold the KV cache of `len` tokens.
    pub(crate) fn pages_for(&self, len: u32) -> u32 {
        len.div_ceil(self.config.page_tokens)
    }

    /// Puts a request without pages into the queue, at its place.
    pub(crate) fn enqueue(&mut self, place: u32) {
        let request = self.request_mut(place);
        request.phase = Phase::Waiting;
        let (ticket, adapter) = (request.ticket, request.adapter);
        match adapter {
            None => self.queue.push(&ticket, place, true),
            Some(index) => {
                let adapter = self.registry.get_mut(index);
                adapter.waiting.insert(ticket.turn, place);
                self.queue.push(&ticket, place, adapter.is_ready);
                self.refresh(index);
            }
        }
    }

    /// Takes a request out of the queue.
    pub(crate) fn dequeue(&mut self, place: u32) {
        let request = self.request(place);
        let (ticket, adapter) = (request.ticket, request.adapter);
        self.queue.remove(&ticket);
        if let Some(index) = adapter {
            self.registry.get_mut(index).waiting.remove(&ticket.turn);
            self.refresh(index);
        }
    }

    /// Ends a request: it owns nothing afterwards.
    pub(crate) fn finish(&mut self, place: u32, reason: EndReason) {
        match self.request(place).phase {
            Phase::Waiting => self.dequeue(place),
            Phase::Running => self.stop_running(place),
        }
        let Some(request) = self.requests[place as usize].take() else { return };
        self.vacant_requests.push(place);
        self.by_id.remove(&request.id);
        self.queue.leave(&request.ticket);
        self.stats.ended += 1;
        self.events.ended.push(EndEvent { request: request.id, reason });
        if let Some(index) = request.adapter {
            self.registry.get_mut(index).unfinished -= 1;
            self.drop_if_done(index);
        }
    }

    /// Takes a request out of the running set and gives its pages, its rows and its pin back.
    pub(crate) fn stop_running(&mut self, place: u32) {
        self.running.retain(|other| *other != place);
        self.order.retain(|other| *other != place);
        let step = self.step;
        let Some(request) = self.requests[place as usize].as_mut() else { return };
        request.pages.drain(..).for_each(|page| self.pages.free(page, step));
        request.computed = 0;
        request.planned = 0;
        self.free_state_rows.push(request.state_row);
        if let Some(index) = request.adapter {
            self.registry.get_mut(index).pins -= 1;
            self.enter_idle(index);
        }
    }
}
