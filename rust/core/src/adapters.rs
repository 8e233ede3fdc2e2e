//! The life of adapters: registered, loaded, copied, pinned, replaced, unloaded.

use std::sync::Arc;

use crate::adapter::{AdapterError, AdapterId, AdapterInfo, AdapterSpec, Load, LoadFailure};
use crate::engine::Engine;
use crate::event::EndReason;
use crate::registry::{DeviceImage, HostImage, Name};

impl Engine {
    /// Makes an adapter known. With `replace`, a taken name gets a new version: it is loaded first, then becomes what the name
    /// means; unfinished requests stay with the version of their submit.
    pub fn register(&mut self, name: Arc<str>, spec: AdapterSpec, replace: bool) -> Result<AdapterId, AdapterError> {
        let limit = self.config.max_adapter_pages;
        if spec.num_pages > limit || spec.num_pages == 0 {
            return Err(AdapterError::TooLarge { num_pages: spec.num_pages, limit });
        }
        let (words, page_layers) = (spec.words.len(), spec.page_layers.len());
        if words != self.config.descriptor_words as usize || page_layers != spec.num_pages as usize {
            let (expected, num_pages) = (self.config.descriptor_words, spec.num_pages);
            return Err(AdapterError::Descriptor { words, page_layers, expected, num_pages });
        }
        let Some(entry) = self.registry.names.get(&name) else {
            let index = self.registry.insert(name.clone(), 1, spec);
            let entry = Name { current: index, next: None, versions: 1, replace_failure: None };
            self.registry.names.insert(name, entry);
            return Ok(self.registry.id(index));
        };
        if !replace {
            return Err(AdapterError::Exists(name));
        }
        let (current, pending, version) = (entry.current, entry.next, entry.versions + 1);
        let index = self.registry.insert(name.clone(), version, spec);
        if let Some(entry) = self.registry.names.get_mut(&name) {
            entry.versions = version;
            entry.next = Some(index);
            entry.replace_failure = None;
        }
        if let Some(pending) = pending {
            self.retire(pending);
        }
        let old = self.registry.get(current);
        let was_never_used = old.unfinished == 0 && matches!(old.host, HostImage::None) && !old.is_resident();
        if old.failure.is_some() || was_never_used {
            self.switch_version(&name);
        } else {
            self.registry.get_mut(index).is_next = true;
            self.refresh(index);
        }
        Ok(self.registry.id(index))
    }

    /// The next version becomes what the name means.
    fn switch_version(&mut self, name: &str) {
        let Some(entry) = self.registry.names.get_mut(name) else { return };
        let Some(next) = entry.next.take() else { return };
        let old = std::mem::replace(&mut entry.current, next);
        self.registry.get_mut(next).is_next = false;
        if self.pinned.contains(&old) {
            self.set_pinned(next, true);
        }
        self.retire(old);
    }

    /// Forgets a name. Unfinished requests finish on their version; then both tiers are freed.
    pub fn unload(&mut self, name: &str) -> Result<(), AdapterError> {
        let entry = self.registry.names.remove(name).ok_or_else(|| AdapterError::Unknown(name.into()))?;
        self.retire(entry.current);
        if let Some(next) = entry.next {
            self.retire(next);
        }
        Ok(())
    }

    /// Keeps the adapter on the device, bringing it there first; it gives way only where a request could not run otherwise.
    pub fn pin(&mut self, name: &str) -> Result<(), AdapterError> {
        let entry = self.registry.names.get(name).ok_or_else(|| AdapterError::Unknown(name.into()))?;
        self.set_pinned(entry.current, true);
        Ok(())
    }

    /// Undoes [`pin`](Self::pin).
    pub fn unpin(&mut self, name: &str) -> Result<(), AdapterError> {
        let entry = self.registry.names.get(name).ok_or_else(|| AdapterError::Unknown(name.into()))?;
        self.set_pinned(entry.current, false);
        Ok(())
    }

    fn set_pinned(&mut self, index: u32, is_pinned: bool) {
        self.leave_idle(index);
        self.registry.get_mut(index).is_pinned = is_pinned;
        self.enter_idle(index);
        if is_pinned {
            self.pinned.insert(index);
        } else {
            self.pinned.remove(&index);
        }
        self.refresh(index);
    }

    /// What the name means now.
    pub fn adapter_info(&self, name: &str) -> Option<AdapterInfo> {
        self.registry.info(name)
    }

    /// All names, in no order.
    pub fn adapters(&self) -> impl Iterator<Item = AdapterInfo> + '_ {
        self.registry.names.keys().filter_map(|name| self.registry.info(name))
    }

    /// A name whose [`adapter_info`](Self::adapter_info) may be another than when this returned it last, and what it is now;
    /// `None` within: the name is gone.
    pub fn next_changed_adapter(&mut self) -> Option<(Arc<str>, Option<AdapterInfo>)> {
        let name = self.registry.next_changed()?;
        let info = self.registry.info(&name);
        Some((name, info))
    }

    /// The next adapter to read from disk.
    pub fn next_load(&mut self) -> Option<Load> {
        self.loads.pop_front()
    }

    /// The next load to give up; it must still be answered, with either answer.
    pub fn next_cancelled_load(&mut self) -> Option<AdapterId> {
        self.cancelled_loads.pop_front()
    }

    /// The next version that is gone for ever: its files are no longer needed.
    pub fn next_dropped(&mut self) -> Option<AdapterId> {
        self.dropped.pop_front()
    }

    /// The adapter's image is in its host pages.
    pub fn load_finished(&mut self, id: AdapterId) {
        let Some(index) = self.registry.find(id) else { return };
        let (pages, _) = self.end_load(id, index);
        let adapter = self.registry.get_mut(index);
        adapter.host = HostImage::Ready(pages);
        let name = adapter.name.clone();
        self.stats.loads += 1;
        self.host_lru.touch(index);
        if self.registry.names.get(&name).is_some_and(|entry| entry.next == Some(index)) {
            self.switch_version(&name);
        }
        self.refresh(index);
        self.drop_if_done(index);
    }

    /// The adapter cannot be loaded, or its load was given up: its requests end, with this reason.
    ///
    /// A version that failed is not tried again: it stays failed, with its reason, and takes no requests until its name is
    /// replaced, or unloaded and registered anew. A replacement that fails is forgotten, and the version before it stays.
    pub fn load_failed(&mut self, id: AdapterId, failure: LoadFailure) {
        let Some(index) = self.registry.find(id) else { return };
        let (pages, was_cancelled) = self.end_load(id, index);
        let step = self.step;
        pages.iter().for_each(|page| self.host_pages.free(*page, step));
        self.stats.load_failures += u64::from(!was_cancelled);
        let adapter = self.registry.get_mut(index);
        adapter.failure = Some(failure.clone());
        let name = adapter.name.clone();
        let waiting: Vec<u32> = adapter.waiting.values().copied().collect();
        for place in waiting {
            self.finish(place, EndReason::AdapterFailed(failure.clone()));
        }
        if let Some(entry) = self.registry.names.get_mut(&name).filter(|entry| entry.next == Some(index)) {
            entry.next = None;
            entry.replace_failure = Some(failure);
            self.retire(index);
        } else if self.registry.find(id).is_some() {
            self.refresh(index);
            self.drop_if_done(index);
        }
    }

    /// The loader is done with the host pages. Also returns whether it was asked to stop.
    fn end_load(&mut self, id: AdapterId, index: u32) -> (Arc<[u32]>, bool) {
        let adapter = self.registry.get_mut(index);
        let HostImage::Loading(pages) = std::mem::take(&mut adapter.host) else {
            panic!("a load that ends was ordered, and is answered once")
        };
        self.num_loading -= 1;
        let was_cancelled = std::mem::take(&mut adapter.is_load_cancelled);
        if was_cancelled {
            self.cancelled_loads.retain(|other| *other != id);
        }
        (pages, was_cancelled)
    }

    /// The copies of all steps up to this one have arrived.
    pub fn copies_done(&mut self, step: u32) {
        while let Some((_, index)) = self.copying.front().copied().filter(|(copy_step, _)| *copy_step <= step) {
            self.copying.pop_front();
            let adapter = self.registry.get_mut(index);
            let DeviceImage::Copying { pages, is_outside, .. } = std::mem::take(&mut adapter.device) else {
                unreachable!("a copy that arrives was ordered")
            };
            if is_outside {
                self.outside_pages -= pages.len() as u32;
            }
            adapter.device = DeviceImage::Ready(pages);
            self.enter_idle(index);
            self.refresh(index);
            self.drop_if_done(index);
        }
    }

    /// Brings the queue in line with where the adapter's weights are now.
    pub(crate) fn refresh(&mut self, index: u32) {
        let adapter = self.registry.get_mut(index);
        let can_run = adapter.can_run();
        if adapter.is_ready != can_run {
            adapter.is_ready = can_run;
            for (place, request) in
                adapter.waiting.values().filter_map(|i| Some((*i, self.requests[*i as usize].as_ref()?)))
            {
                self.queue.set_ready(&request.ticket, place, can_run);
            }
        }
        let load_key = adapter.wants_load();
        if load_key != adapter.load_key {
            if let Some(old) = adapter.load_key {
                self.load_order.remove(&old);
            }
            if let Some(new) = load_key {
                self.load_order.insert(new, index);
            }
            adapter.load_key = load_key;
        }
        match (adapter.is_wished(), adapter.wish_key) {
            (true, None) => {
                adapter.wish_key = Some(self.next_seq);
                self.wanted.insert(self.next_seq, index);
                self.next_seq += 1;
            }
            (false, Some(key)) => {
                adapter.wish_key = None;
                self.wanted.remove(&key);
            }
            _ => {}
        }
        if adapter.is_absent_pin() {
            self.absent_pins.insert(index);
        } else if !self.absent_pins.is_empty() {
            self.absent_pins.remove(&index);
        }
    }

    /// The version is no longer what its name means.
    fn retire(&mut self, index: u32) {
        self.pinned.remove(&index);
        let adapter = self.registry.get_mut(index);
        adapter.is_retired = true;
        adapter.is_next = false;
        adapter.is_pinned = false;
        self.enter_idle(index);
        self.refresh(index);
        self.drop_if_done(index);
    }

    /// Frees both tiers of a retired version after its last request. What is in flight is waited for.
    pub(crate) fn drop_if_done(&mut self, index: u32) {
        let id = self.registry.id(index);
        let adapter = self.registry.get_mut(index);
        if !adapter.is_retired || adapter.unfinished > 0 || matches!(adapter.device, DeviceImage::Copying { .. }) {
            return;
        }
        if let HostImage::Loading(pages) = &adapter.host {
            if let Some(at) = self.loads.iter().position(|load| load.adapter == id) {
                // Nobody has started it.
                let step = self.step;
                pages.iter().for_each(|page| self.host_pages.free(*page, step));
                adapter.host = HostImage::None;
                self.loads.remove(at);
                self.num_loading -= 1;
            } else {
                if !std::mem::replace(&mut adapter.is_load_cancelled, true) {
                    self.cancelled_loads.push_back(id);
                }
                return;
            }
        }
        self.leave_idle(index);
        self.free_device_image(index);
        self.free_host_image(index);
        self.registry.remove(index);
        self.dropped.push_back(id);
    }
}
