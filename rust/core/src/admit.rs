//! Admission: which waiting requests start to run in this step, and which adapters are swapped in for them.

use crate::engine::Engine;
use crate::pages::Owner;
use crate::reclaim::Mercy;
use crate::registry::{DeviceImage, HostImage};
use crate::request::Phase;

/// Ready requests that one step looks at behind one that must wait for a copy.
const ADMISSION_WINDOW: usize = 64;
/// Idle adapters among which a descriptor row is sought.
const ROW_WINDOW: usize = 64;

/// How the queue's next request fared.
enum Admission {
    /// It runs, with this many rows in this step.
    Admitted(u32),
    /// It waits for a copy or its text's check, and blocks nobody.
    Skip,
    /// Nobody is admitted before it.
    Stop,
    /// Likewise, and what it lacks is pages.
    Short,
}

/// When a copy may be ordered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyRoom {
    /// Now, and the step may use it.
    InStep,
    /// Now, but only later steps may use it.
    Outside,
    /// Not now.
    None,
}

impl Engine {
    /// Admits waiting requests in their order. Returns whether the next one lacks pages.
    pub(crate) fn admit(&mut self, now_us: u64, mut budget: u32) -> bool {
        let mut num_skipped = 0;
        self.queue.rewind();
        while budget > 0 && num_skipped < ADMISSION_WINDOW && self.running.len() < self.config.max_running as usize {
            let Some(place) = self.queue.next() else { return false };
            match self.try_admit(now_us, place, budget) {
                Admission::Admitted(rows) => budget -= rows,
                Admission::Skip => num_skipped += 1,
                Admission::Stop => return false,
                Admission::Short => return true,
            }
        }
        false
    }

    fn try_admit(&mut self, now_us: u64, place: u32, budget: u32) -> Admission {
        let request = self.request(place);
        let adapter = request.adapter;
        let kv_pages = self.pages_for(request.tokens.len() as u32);
        // A step that preempts admits nobody, and the next one is planned behind the commit of the one before.
        assert_eq!(request.pending, 0, "a preempted request's token in flight is here before it resumes");
        if request.waits_for_check() {
            return Admission::Skip;
        }
        if !self.has_rows_for(place) {
            self.stats.row_deferrals += 1;
            return Admission::Stop;
        }
        let image_pages = adapter.map_or(0, |index| self.absent_pages(index));
        let room = if image_pages == 0 { CopyRoom::InStep } else { self.copy_room(image_pages) };
        if room == CopyRoom::None {
            // Smaller copies would keep the room from it for ever.
            self.scratch.is_copy_room_taken = true;
            return Admission::Skip;
        }
        if !self.make_room(now_us, kv_pages + image_pages, adapter) {
            return Admission::Short;
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

    /// Whether this step's plan has place for the request's descriptor and penalty counts.
    fn has_rows_for(&self, place: u32) -> bool {
        let request = self.request(place);
        let num_reset_tokens = self.scratch.num_reset_tokens + request.tokens.len() as u32;
        let has_reset = !request.has_penalties || num_reset_tokens <= self.layout.max_reset_tokens;
        has_reset && request.adapter.is_none_or(|index| self.has_descriptor_row(index))
    }

    /// Pages that must be swapped in for the adapter.
    fn absent_pages(&self, index: u32) -> u32 {
        let adapter = self.registry.get(index);
        if adapter.is_resident() { 0 } else { adapter.spec.num_pages }
    }

    /// Makes pages free for a request that is about to run. Its own adapter does not give way to it.
    fn make_room(&mut self, now_us: u64, needed: u32, own_adapter: Option<u32>) -> bool {
        if self.running.is_empty() {
            return self.reclaim(now_us, needed, Mercy::None, own_adapter);
        }
        let own_adapter = own_adapter.filter(|index| self.idle.contains(*index));
        let own_idle_pages = own_adapter.map_or(0, |index| self.registry.get(index).spec.num_pages);
        // Every running request may need a page soon: without these spare pages it would be preempted at once.
        let spare_pages = self.running.len() as u32;
        let has_pages = self.pages.num_free() + self.idle_pages - own_idle_pages >= needed + spare_pages;
        has_pages && self.reclaim(now_us, needed, Mercy::Idle, own_adapter)
    }

    /// Moves a request from the queue to the running set; the pages are free.
    fn start_running(&mut self, place: u32, kv_pages: u32) {
        self.dequeue(place);
        let Some(state_row) = self.free_state_rows.pop() else {
            unreachable!("there are as many state rows as running requests")
        };
        let key = self.order_key(place);
        let at = self.order.partition_point(|other| self.order_key(*other) <= key);
        self.order.insert(at, place);
        let priority = self.request(place).ticket.priority();
        let at = self.running.partition_point(|other| self.request(*other).ticket.priority() >= priority);
        self.running.insert(at, place);
        let Some(request) = self.requests[place as usize].as_mut() else { return };
        self.queue.admitted(&mut request.ticket);
        request.phase = Phase::Running;
        self.events.admitted.push(request.id);
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

    /// The row of an adapter that no running request uses, if possible of one whose last use is long ago.
    fn idle_descriptor_row(&self) -> Option<u32> {
        let is_unused = |row: &u32| match self.descriptor_rows[*row as usize] {
            Some(index) => self.registry.get(index).pins == 0,
            None => false,
        };
        let mut least_used = self.idle.iter().take(ROW_WINDOW);
        least_used
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

    /// When a copy of this many pages may be ordered.
    pub(crate) fn copy_room(&self, num_pages: u32) -> CopyRoom {
        let limit = self.config.max_copy_pages;
        let ordered = self.scratch.copies.len() as u32;
        if self.scratch.is_copy_room_taken || ordered + num_pages > self.layout.max_copies {
            CopyRoom::None
        } else if self.outside_pages == 0 && ordered + num_pages <= limit {
            CopyRoom::InStep
        } else if self.outside_pages == 0 || self.outside_pages + num_pages <= limit {
            CopyRoom::Outside
        } else {
            CopyRoom::None
        }
    }

    /// Orders the copy of an adapter from the host tier; its device pages are free.
    pub(crate) fn start_copy(&mut self, index: u32, is_outside: bool) {
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
        self.refresh(index);
    }
}
