//! One step's plan: keep the running set going, admit, prefetch, order loads, write.

use crate::adapter::Load;
use crate::admit::CopyRoom;
use crate::engine::Engine;
use crate::pages::Owner;
use crate::plan::{Counts, PlanArrays};
use crate::queue::Turn;
use crate::reclaim::Mercy;
use crate::registry::HostImage;

/// Requests, and pinned adapters, that one step prefetches for.
const PREFETCH_WINDOW: usize = 32;

/// What a plan collects before it is written.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// (first layer that needs it, host page, device page).
    pub copies: Vec<(u16, u32, u32)>,
    pub copies_wait_step: u32,
    /// A request waits for room among the copies: nobody behind it takes it.
    pub is_copy_room_taken: bool,
    /// Adapters with a new descriptor row.
    pub changed: Vec<u32>,
    /// Requests whose penalty counts start.
    pub resets: Vec<u32>,
    pub num_reset_tokens: u32,
    prefetch: Vec<u32>,
}

impl Scratch {
    fn clear(&mut self) {
        self.copies.clear();
        self.copies_wait_step = 0;
        self.is_copy_room_taken = false;
        self.changed.clear();
        self.resets.clear();
        self.num_reset_tokens = 0;
    }
}

impl Engine {
    /// Plans the next step and writes it into `buffer`, which has [`num_words`](crate::PlanLayout::num_words) words.
    /// `None`: there is nothing to run before something happens.
    ///
    /// At most one step may be launched and not committed.
    pub fn schedule(&mut self, now_us: u64, buffer: &mut [i32]) -> Option<Counts> {
        assert!(self.launched.len() <= 1, "planning is at most one step ahead of the commit");
        assert!(buffer.len() >= self.layout.num_words(), "a plan fits its buffer");
        if self.step == self.config.max_step && !self.restart_steps() {
            return None;
        }
        self.scratch.clear();
        let (budget, has_preempted) = self.plan_running(now_us);
        let is_short = has_preempted || self.admit(now_us, budget);
        self.prefetch(now_us, is_short);
        self.order_loads();
        let has_rows = self.running.iter().any(|place| self.request(*place).planned > 0);
        if !has_rows && self.scratch.copies.is_empty() {
            return None;
        }
        self.step += 1;
        let counts = self.write_plan(buffer);
        self.stats.steps += 1;
        self.stats.rows += u64::from(counts.num_rows);
        Some(counts)
    }

    /// The next step is number 1 again, unless something in flight has a number: so of two numbers the greater is always the
    /// later, here and in the executor, however long the engine runs.
    fn restart_steps(&mut self) -> bool {
        let is_quiet = self.launched.is_empty() && self.copying.is_empty();
        if is_quiet {
            self.step = 0;
            self.pages.forget_steps();
        }
        is_quiet
    }

    /// Gives every running request its rows: first one to each that decodes, then prompts as far as the budget goes.
    /// Returns what is left of the budget, and whether somebody had to give way.
    fn plan_running(&mut self, now_us: u64) -> (u32, bool) {
        let mut budget = self.config.max_batch_tokens;
        let num_running = self.running.len();
        let mut has_prompts = false;
        let mut i = 0;
        while i < self.running.len() {
            let place = self.running[i];
            i += 1;
            let request = self.request_mut(place);
            request.planned = 0;
            match request.remaining() {
                0 => {}
                1 if request.waits_for_check() => {}
                1 => budget -= u32::from(self.plan_decode(now_us, place)),
                _ => has_prompts = true,
            }
        }
        for i in 0..if has_prompts { self.running.len() } else { 0 } {
            let request = self.request_mut(self.running[i]);
            if request.planned == 0 && request.remaining() > 1 {
                request.planned = request.remaining().min(budget);
                budget -= request.planned;
            }
        }
        (budget, self.running.len() < num_running)
    }

    /// One more row for a request, with the page that it may need. The youngest requests of the lowest priority give way for it.
    fn plan_decode(&mut self, now_us: u64, place: u32) -> bool {
        let page_tokens = self.config.page_tokens;
        loop {
            let request = self.request(place);
            if (request.computed + 1).div_ceil(page_tokens) as usize <= request.pages.len() {
                self.request_mut(place).planned = 1;
                return true;
            }
            let mercy = if self.running.len() == 1 { Mercy::None } else { Mercy::Idle };
            if self.pages.num_free() > 0 || self.reclaim(now_us, 1, mercy, None) {
                if let (Some(page), Some(request)) =
                    (self.pages.allocate(Owner::Kv), &mut self.requests[place as usize])
                {
                    request.pages.push(page);
                }
                continue;
            }
            // A row that may be wasted, because the token in flight may be the last, takes no page from others.
            if self.request(place).pending > 0 {
                return false;
            }
            let Some(&youngest) = self.running.last() else { return false };
            self.preempt(youngest);
            if youngest == place {
                return false;
            }
        }
    }

    /// Takes a running request's pages; it is computed again later. A token in flight still arrives.
    fn preempt(&mut self, place: u32) {
        self.stop_running(place);
        self.enqueue(place);
        self.stats.preemptions += 1;
    }

    /// Spends spare pages on adapters that will be used: pinned ones, and those of requests that come next. If pages are short,
    /// none is spare, and only the adapter of the request that comes next is brought nearer.
    fn prefetch(&mut self, now_us: u64, is_short: bool) {
        let mut candidates = std::mem::take(&mut self.scratch.prefetch);
        candidates.clear();
        if !is_short {
            candidates.extend(self.absent_pins.iter().take(PREFETCH_WINDOW));
        }
        if self.config.prefetch {
            let window = if is_short { 1 } else { PREFETCH_WINDOW };
            self.queue.rewind();
            for _ in 0..window {
                let Some(place) = self.queue.next() else { break };
                candidates.extend(self.request(place).adapter);
            }
        }
        for &index in &candidates {
            if !self.registry.get(index).is_resident() && !self.prefetch_one(now_us, index) {
                break;
            }
        }
        self.scratch.prefetch = candidates;
    }

    fn prefetch_one(&mut self, now_us: u64, index: u32) -> bool {
        let adapter = self.registry.get(index);
        let num_pages = adapter.spec.num_pages;
        // Copies outside a step keep it from having its own: only the operator's wish is worth that.
        let room = self.copy_room(num_pages);
        let has_room = room == CopyRoom::InStep || (room == CopyRoom::Outside && adapter.is_pinned);
        if !has_room || !self.reclaim(now_us, num_pages + self.running.len() as u32, Mercy::Spare, None) {
            return false;
        }
        self.start_copy(index, room == CopyRoom::Outside);
        self.stats.prefetches += 1;
        true
    }

    /// Orders loads from disk, by the requests' turns; the operator's wishes when they are older than the request that is next.
    fn order_loads(&mut self) {
        if self.load_order.is_empty() {
            self.queue.all_loads_ordered();
        }
        let mut has_room_for_wishes = true;
        while self.num_loading < self.config.max_loads {
            let request = self.load_order.first_key_value().map(|(turn, index)| (*turn, *index));
            let wish = self.wanted.first_key_value().map(|(seq, index)| (*seq, *index));
            match (request, wish.filter(|_| has_room_for_wishes)) {
                (Some((turn, index)), wish) if wish.is_none_or(|wish| turn.seq < wish.0) => {
                    if !self.order_load(index, turn) {
                        return;
                    }
                }
                (_, Some((_, index))) => has_room_for_wishes = self.order_load(index, Turn::LAST),
                (_, None) => return,
            }
        }
    }

    fn order_load(&mut self, index: u32, turn: Turn) -> bool {
        let num_pages = self.registry.get(index).spec.num_pages;
        let Some(pages) = self.allocate_host(num_pages, turn) else { return false };
        self.queue.load_ordered(turn);
        self.registry.get_mut(index).host = HostImage::Loading(pages.clone());
        self.loads.push_back(Load { adapter: self.registry.id(index), pages });
        self.num_loading += 1;
        self.refresh(index);
        true
    }

    fn write_plan(&mut self, buffer: &mut [i32]) -> Counts {
        let mut plan = PlanArrays::new(buffer, &self.layout);
        let mut launched = self.spare_steps.pop().unwrap_or_default();
        launched.step = self.step;
        let mut writer = crate::plan_writer::PlanWriter::new(&mut plan, &mut launched, self.step, &self.config);
        for is_decode in [true, false] {
            writer.begin_part();
            for &place in &self.order {
                let Some(request) = self.requests[place as usize].as_mut() else { continue };
                if request.planned == 0 || (request.planned == 1) != is_decode {
                    continue;
                }
                let adapter = request.adapter.map(|index| self.registry.get(index));
                writer.request(place, request, adapter);
            }
        }
        self.scratch.copies.sort_by_key(|(layer, _, _)| *layer);
        writer.copies(&self.scratch.copies, self.scratch.copies_wait_step);
        for &index in &self.scratch.changed {
            writer.changed(self.registry.get(index));
        }
        for &place in &self.scratch.resets {
            if let Some(request) = &self.requests[place as usize] {
                writer.reset(request);
            }
        }
        let counts = writer.finish();
        self.launched.push_back(launched);
        counts
    }
}
