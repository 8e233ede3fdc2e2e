//! One step's plan: keep the running set going, admit, prefetch, order loads, write.

use crate::adapter::Load;
use crate::engine::Engine;
use crate::pages::Owner;
use crate::plan::{Counts, PlanArrays};
use crate::reclaim::Mercy;
use crate::registry::{DeviceImage, HostImage};
use crate::request::Phase;

/// Ready requests that one step looks at behind one that must wait for a copy.
const ADMISSION_WINDOW: usize = 64;
/// Ready requests whose adapters are prefetched.
const PREFETCH_WINDOW: usize = 32;

/// What a plan collects before it is written.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// (first layer that needs it, host page, device page).
    pub copies: Vec<(u16, u32, u32)>,
    pub copies_wait_step: u32,
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
        self.changed.clear();
        self.resets.clear();
        self.num_reset_tokens = 0;
    }
}

/// How the queue's next request fared.
enum Admission {
    /// It runs, with this many rows in this step.
    Admitted(u32),
    /// It waits for a copy, a token in flight or its text's check, and blocks nobody.
    Skip,
    /// Nobody is admitted before it.
    Stop,
}

/// When a copy may be ordered.
#[derive(PartialEq, Eq)]
enum CopyRoom {
    /// Now, and the step may use it.
    InStep,
    /// Now, but only later steps may use it.
    Outside,
    /// Not now.
    None,
}

impl Engine {
    /// Plans the next step and writes it into `buffer`, which has [`num_words`](crate::PlanLayout::num_words) words.
    /// `None`: there is nothing to run before something happens.
    ///
    /// At most one step may be launched and not committed.
    pub fn schedule(&mut self, now_us: u64, buffer: &mut [i32]) -> Option<Counts> {
        assert!(self.launched.len() <= 1, "planning is at most one step ahead of the commit");
        assert!(buffer.len() >= self.layout.num_words(), "a plan fits its buffer");
        self.scratch.clear();
        let (budget, has_preempted) = self.plan_running(now_us);
        if !has_preempted {
            self.admit(now_us, budget);
        }
        self.prefetch(now_us);
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

    /// One more row for a request, with the page that it may need. The youngest requests give way for it.
    fn plan_decode(&mut self, now_us: u64, place: u32) -> bool {
        let page_tokens = self.config.page_tokens;
        loop {
            let request = self.request(place);
            if (request.computed + 1).div_ceil(page_tokens) as usize <= request.pages.len() {
                self.request_mut(place).planned = 1;
                return true;
            }
            let mercy = if self.running.len() == 1 { Mercy::None } else { Mercy::Idle };
            if self.pages.num_free() > 0 || self.reclaim(now_us, 1, mercy) {
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

    fn admit(&mut self, now_us: u64, mut budget: u32) {
        let (mut after, mut num_skipped) = (None, 0);
        while budget > 0 && num_skipped < ADMISSION_WINDOW && self.running.len() < self.config.max_running as usize {
            let Some((seq, place)) = self.queue.next_ready(after) else { return };
            match self.try_admit(now_us, place, budget) {
                Admission::Admitted(rows) => budget -= rows,
                Admission::Skip => (after, num_skipped) = (Some(seq), num_skipped + 1),
                Admission::Stop => return,
            }
        }
    }

    fn try_admit(&mut self, now_us: u64, place: u32, budget: u32) -> Admission {
        let request = self.request(place);
        let (len, adapter, has_penalties) = (request.tokens.len() as u32, request.adapter, request.has_penalties);
        if request.pending > 0 || request.waits_for_check() {
            return Admission::Skip;
        }
        if has_penalties && self.scratch.num_reset_tokens + len > self.layout.max_reset_tokens {
            return Admission::Stop;
        }
        let kv_pages = self.pages_for(len);
        // Every running request may need a page soon: without these spare pages it would be preempted at once.
        let spare_pages = self.running.len() as u32;
        let (mut image_pages, mut own_idle_pages) = (0, 0);
        let mut room = CopyRoom::InStep;
        if let Some(index) = adapter {
            if !self.has_descriptor_row(index) {
                return Admission::Stop;
            }
            let adapter = self.registry.get(index);
            let num_pages = adapter.spec.num_pages;
            if adapter.is_resident() {
                own_idle_pages = if self.idle.contains(index) { num_pages } else { 0 };
            } else {
                image_pages = num_pages;
                room = self.copy_room(num_pages);
                if room == CopyRoom::None {
                    return Admission::Skip;
                }
            }
        }
        let needed = kv_pages + image_pages + spare_pages;
        let is_alone = self.running.is_empty();
        if !is_alone && self.pages.num_free() + self.idle_pages - own_idle_pages < needed {
            return Admission::Stop;
        }
        // From here on its adapter may not give way to it.
        let mercy = if is_alone { Mercy::None } else { Mercy::Idle };
        if let Some(index) = adapter {
            self.leave_idle(index);
            self.registry.get_mut(index).pins += 1;
        }
        let has_pages = self.reclaim(now_us, kv_pages + image_pages, mercy);
        if let Some(index) = adapter {
            self.registry.get_mut(index).pins -= 1;
            self.enter_idle(index);
        }
        if !has_pages {
            return Admission::Stop;
        }
        if let Some(index) = adapter {
            if image_pages > 0 {
                self.start_copy(index, room == CopyRoom::Outside);
            }
            if room == CopyRoom::Outside {
                return Admission::Skip;
            }
            self.pin_for_run(index);
        }
        self.start_running(place, kv_pages);
        let request = self.request_mut(place);
        request.planned = request.remaining().min(budget);
        Admission::Admitted(request.planned)
    }

    /// Moves a request from the queue to the running set; the pages are free.
    fn start_running(&mut self, place: u32, kv_pages: u32) {
        self.dequeue(place);
        let state_row = self.free_state_rows.pop().unwrap_or_default();
        let key = self.order_key(place);
        let at = self.order.partition_point(|other| self.order_key(*other) <= key);
        self.order.insert(at, place);
        self.running.push(place);
        let Some(request) = self.requests[place as usize].as_mut() else { return };
        request.phase = Phase::Running;
        request.state_row = state_row;
        let has_pages = self.pages.allocate_many(Owner::Kv, kv_pages, &mut request.pages);
        assert!(has_pages, "pages were made free before the request is admitted");
        if request.has_penalties {
            self.scratch.resets.push(place);
            self.scratch.num_reset_tokens += request.tokens.len() as u32;
        }
    }

    /// Requests of the base come first, then by descriptor row.
    fn order_key(&self, place: u32) -> u32 {
        let row = self.request(place).adapter.and_then(|index| self.registry.get(index).descriptor_row);
        row.map_or(0, |row| row + 1)
    }

    /// Whether the adapter has a descriptor row or could get one in this step.
    fn has_descriptor_row(&self, index: u32) -> bool {
        if self.registry.get(index).descriptor_row.is_some() {
            return true;
        }
        let can_change = self.scratch.changed.len() < self.layout.max_changed as usize;
        can_change && (!self.free_descriptor_rows.is_empty() || self.idle_descriptor_row().is_some())
    }

    /// The row of the adapter that no running request uses and whose last use is the longest ago.
    fn idle_descriptor_row(&self) -> Option<u32> {
        let is_unused = |row: &u32| match self.descriptor_rows[*row as usize] {
            Some(index) => self.registry.get(index).pins == 0,
            None => false,
        };
        self.idle
            .iter()
            .take(ADMISSION_WINDOW)
            .find_map(|index| self.registry.get(index).descriptor_row)
            .or_else(|| (0..self.config.max_adapters).find(is_unused))
    }

    /// One more running request uses the adapter, which is on the device or on its way.
    fn pin_for_run(&mut self, index: u32) {
        self.leave_idle(index);
        self.registry.get_mut(index).pins += 1;
        if self.registry.get(index).descriptor_row.is_some() {
            return;
        }
        let row = self.free_descriptor_rows.pop().or_else(|| {
            let row = self.idle_descriptor_row()?;
            let owner = self.descriptor_rows[row as usize].take()?;
            self.registry.get_mut(owner).descriptor_row = None;
            Some(row)
        });
        let Some(row) = row else { unreachable!("a descriptor row was found before the request is admitted") };
        self.descriptor_rows[row as usize] = Some(index);
        self.registry.get_mut(index).descriptor_row = Some(row);
        self.scratch.changed.push(index);
    }

    fn copy_room(&self, num_pages: u32) -> CopyRoom {
        let limit = self.config.max_copy_pages;
        let ordered = self.scratch.copies.len() as u32;
        let has_place = ordered + num_pages <= self.layout.max_copies;
        if has_place && self.outside_pages == 0 && (ordered + num_pages <= limit) {
            CopyRoom::InStep
        } else if has_place && (self.outside_pages == 0 || self.outside_pages + num_pages <= limit) {
            CopyRoom::Outside
        } else {
            CopyRoom::None
        }
    }

    /// Orders the copy of an adapter from the host tier; its device pages are free.
    fn start_copy(&mut self, index: u32, is_outside: bool) {
        let step = self.step + 1;
        let num_pages = self.registry.get(index).spec.num_pages;
        let mut pages = Vec::with_capacity(num_pages as usize);
        let has_pages = self.pages.allocate_many(Owner::Adapter, num_pages, &mut pages);
        assert!(has_pages, "pages were made free before the copy is ordered");
        let adapter = self.registry.get_mut(index);
        let HostImage::Ready(host_pages) = &adapter.host else { unreachable!("a copy starts from the host tier") };
        for ((&page, &host_page), &layer) in pages.iter().zip(host_pages.iter()).zip(adapter.spec.page_layers.iter()) {
            self.scratch.copies.push((layer, host_page, page));
            self.scratch.copies_wait_step = self.scratch.copies_wait_step.max(self.pages.freed_step(page));
        }
        adapter.device = DeviceImage::Copying { pages: pages.into(), step, is_outside };
        self.copying.push_back((step, index));
        self.outside_pages += if is_outside { num_pages } else { 0 };
        self.num_resident += 1;
        self.stats.swap_ins += 1;
        self.stats.swap_in_pages += u64::from(num_pages);
        self.host_lru.touch(index);
        self.wanted.remove(&index);
        self.refresh(index);
    }

    /// Spends spare pages on adapters that will be used: pinned ones, and those of requests that come next.
    fn prefetch(&mut self, now_us: u64) {
        let mut candidates = std::mem::take(&mut self.scratch.prefetch);
        candidates.clear();
        candidates
            .extend(self.wanted.iter().take(PREFETCH_WINDOW).filter(|index| self.registry.get(**index).is_pinned));
        if self.config.prefetch {
            candidates
                .extend(self.queue.ready().take(PREFETCH_WINDOW).filter_map(|(_, place)| self.request(place).adapter));
        }
        for &index in &candidates {
            let adapter = self.registry.get(index);
            if adapter.is_resident() || !matches!(adapter.host, HostImage::Ready(_)) {
                self.wanted.remove(&index).then(|| self.rewant(index));
                continue;
            }
            let num_pages = adapter.spec.num_pages;
            if self.copy_room(num_pages) != CopyRoom::InStep {
                break;
            }
            if !self.reclaim(now_us, num_pages + self.running.len() as u32, Mercy::Spare) {
                break;
            }
            self.start_copy(index, false);
            self.stats.prefetches += 1;
        }
        self.scratch.prefetch = candidates;
    }

    /// A pinned adapter stays wanted until it is on the device.
    fn rewant(&mut self, index: u32) {
        if !self.registry.get(index).is_resident() {
            self.wanted.insert(index);
        }
    }

    /// Orders loads from disk: for the requests that have waited longest, then for replacements and pinned adapters.
    fn order_loads(&mut self) {
        while self.num_loading < self.config.max_loads {
            let Some((&seq, &index)) = self.load_order.first_key_value() else { break };
            if !self.order_load(index, seq) {
                return;
            }
        }
        let mut at = 0;
        while self.num_loading < self.config.max_loads {
            let Some(&index) = self.wanted.range(at..).next() else { return };
            at = index + 1;
            let adapter = self.registry.get(index);
            let is_absent = matches!(adapter.host, HostImage::None) && !adapter.is_resident();
            if is_absent && adapter.failure.is_none() && !self.order_load(index, u64::MAX) {
                return;
            }
            if !self.registry.get(index).is_pinned || self.registry.get(index).failure.is_some() {
                self.wanted.remove(&index);
            }
        }
    }

    fn order_load(&mut self, index: u32, seq: u64) -> bool {
        let num_pages = self.registry.get(index).spec.num_pages;
        let Some(pages) = self.allocate_host(num_pages, seq) else { return false };
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
