//! Who gives way: the one place that decides which adapter loses its pages, and the bookkeeping of idle and retired adapters.

use std::sync::Arc;

use crate::config::Eviction;
use crate::engine::Engine;
use crate::queue::Turn;
use crate::registry::{Adapter, DeviceImage, HostImage};

/// The cost-aware policy chooses among this many of the least recently used.
const CANDIDATES: usize = 16;
/// Host images in use that one search may pass over.
const MAX_PASSED_OVER: usize = 32;

/// What may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mercy {
    /// Only adapters that no unfinished request wants: for prefetching.
    Spare,
    /// Any idle adapter: for requests.
    Idle,
    /// Adapters pinned by the operator too: a request could not run otherwise.
    None,
}

impl Engine {
    /// Makes at least `needed` pages free by evicting idle adapters, if that is possible at all.
    ///
    /// The order of giving way: idle adapters here; then the caller admits nobody; then it preempts the youngest request.
    /// The adapter `keep` does not give way.
    pub(crate) fn reclaim(&mut self, now_us: u64, needed: u32, mercy: Mercy, keep: Option<u32>) -> bool {
        while self.pages.num_free() < needed {
            match self.choose_victim(now_us, mercy, keep) {
                Some(index) => self.evict(index),
                None => return false,
            }
        }
        true
    }

    fn choose_victim(&self, now_us: u64, mercy: Mercy, keep: Option<u32>) -> Option<u32> {
        let is_spare = |adapter: &Adapter| mercy != Mercy::Spare || adapter.unfinished == 0;
        let idle = || self.idle.iter().filter(|index| Some(*index) != keep);
        let mut candidates = idle()
            .take(4 * CANDIDATES)
            .filter(|index| is_spare(self.registry.get(*index)))
            .take(CANDIDATES)
            .filter(|index| self.registry.get(*index).can_come_back());
        let chosen = match self.config.eviction {
            Eviction::Lru => candidates.next(),
            Eviction::CostAware => candidates
                .map(|index| (index, self.value(now_us, index)))
                .reduce(|a, b| if b.1 < a.1 { b } else { a })
                .map(|(index, _)| index),
        };
        match mercy {
            Mercy::Spare => chosen,
            Mercy::Idle => chosen.or_else(|| idle().next()),
            Mercy::None => chosen.or_else(|| idle().next()).or_else(|| self.pinned_victim(keep)),
        }
    }

    fn pinned_victim(&self, keep: Option<u32>) -> Option<u32> {
        let can_go = |index: &u32| {
            let adapter = self.registry.get(*index);
            Some(*index) != keep && adapter.pins == 0 && matches!(adapter.device, DeviceImage::Ready(_))
        };
        self.pinned.iter().copied().find(can_go)
    }

    /// What a page of the adapter is worth: cost to bring it back × recent use. (Cost ÷ bytes is the cost of a page.)
    fn value(&self, now_us: u64, index: u32) -> f64 {
        let adapter = self.registry.get(index);
        let page_cost = match adapter.host {
            HostImage::Ready(_) => self.config.host_page_cost_ns,
            _ => self.config.disk_page_cost_ns,
        };
        f64::from(page_cost) * adapter.recent_use(now_us)
    }

    fn evict(&mut self, index: u32) {
        self.leave_idle(index);
        self.free_device_image(index);
        self.stats.adapter_evictions += 1;
        self.refresh(index);
    }

    pub(crate) fn free_device_image(&mut self, index: u32) {
        let step = self.step;
        let adapter = self.registry.get_mut(index);
        let DeviceImage::Ready(pages) = std::mem::take(&mut adapter.device) else { return };
        if let Some(row) = adapter.descriptor_row.take() {
            self.descriptor_rows[row as usize] = None;
            self.free_descriptor_rows.push(row);
        }
        pages.iter().for_each(|page| self.pages.free(*page, step));
        self.num_resident -= 1;
    }

    /// The adapter may give way from now on, if nothing holds it.
    pub(crate) fn enter_idle(&mut self, index: u32) {
        let adapter = self.registry.get(index);
        if adapter.is_evictable() && !self.idle.contains(index) {
            self.idle_pages += adapter.spec.num_pages;
            self.idle.touch(index);
        }
    }

    /// The adapter may not give way from now on.
    pub(crate) fn leave_idle(&mut self, index: u32) {
        if self.idle.contains(index) {
            self.idle_pages -= self.registry.get(index).spec.num_pages;
            self.idle.remove(index);
        }
    }

    /// Host pages for an image that a request of this turn wants. Images that are wanted before and not yet on the device stay.
    pub(crate) fn allocate_host(&mut self, num_pages: u32, turn: Turn) -> Option<Arc<[u32]>> {
        while self.host_pages.num_free() < num_pages {
            let index = self.choose_host_victim(turn)?;
            self.free_host_image(index);
            self.stats.host_evictions += 1;
            self.refresh(index);
        }
        let mut pages = Vec::with_capacity(num_pages as usize);
        self.host_pages.allocate_many(crate::Owner::Adapter, num_pages, &mut pages).then(|| pages.into())
    }

    fn choose_host_victim(&mut self, turn: Turn) -> Option<u32> {
        let passed_over: Vec<u32> =
            self.host_lru.iter().take(MAX_PASSED_OVER).take_while(|i| !self.may_leave_host(*i, turn)).collect();
        let victim = self.host_lru.iter().nth(passed_over.len()).filter(|index| self.may_leave_host(*index, turn));
        // Those in use go to the end of the order, so that the next search starts behind them.
        passed_over.iter().for_each(|index| self.host_lru.touch(*index));
        victim
    }

    fn may_leave_host(&self, index: u32, turn: Turn) -> bool {
        let adapter = self.registry.get(index);
        let is_source = matches!(adapter.device, DeviceImage::Copying { .. });
        let is_last_copy = adapter.is_retired && adapter.unfinished > 0;
        let is_wanted = !adapter.is_resident() && adapter.wanted_by().is_some_and(|first| first <= turn);
        !is_source && !is_last_copy && !is_wanted
    }

    pub(crate) fn free_host_image(&mut self, index: u32) {
        let step = self.step;
        if let HostImage::Ready(pages) = std::mem::take(&mut self.registry.get_mut(index).host) {
            pages.iter().for_each(|page| self.host_pages.free(*page, step));
            self.host_lru.remove(index);
        }
    }
}
