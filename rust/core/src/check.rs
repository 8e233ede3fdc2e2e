//! The engine's invariants, as assertions that tests run after every operation.

use std::collections::BTreeMap;

use crate::engine::Engine;
use crate::pages::Owner;
use crate::registry::{Adapter, DeviceImage, HostImage};
use crate::request::{Phase, Request};

impl Engine {
    /// Asserts every invariant. Costs as much as everything that the engine holds.
    ///
    /// # Panics
    /// If one does not hold; the message names it.
    pub fn check(&self) {
        self.pages.check();
        self.host_pages.check();
        self.check_owners();
        self.check_host_owners();
        self.check_requests();
        self.check_adapters();
    }

    fn check_owners(&self) {
        let mut owners = vec![Owner::Free; self.pages.num_pages() as usize];
        let mut own = |page: u32, owner: Owner| {
            let previous = std::mem::replace(&mut owners[page as usize], owner);
            assert_eq!(previous, Owner::Free, "no page has two owners");
        };
        for request in self.requests.iter().flatten() {
            request.pages.iter().for_each(|page| own(*page, Owner::Kv));
        }
        for (_, adapter) in self.registry.iter() {
            let pages = adapter.device.pages().into_iter().flat_map(|pages| pages.iter());
            pages.for_each(|page| own(*page, Owner::Adapter));
        }
        for (page, owner) in (0..).zip(owners) {
            assert_eq!(self.pages.owner(page), owner, "the pool and the page tables agree on page {page}");
            let references = u32::from(owner != Owner::Free);
            assert_eq!(self.pages.references(page), references, "reference counts match the tables");
        }
    }

    fn check_host_owners(&self) {
        let mut is_owned = vec![false; self.host_pages.num_pages() as usize];
        for (_, adapter) in self.registry.iter() {
            if let HostImage::Loading(pages) | HostImage::Ready(pages) = &adapter.host {
                for &page in pages.iter() {
                    assert!(!std::mem::replace(&mut is_owned[page as usize], true), "no host page has two owners");
                    assert_eq!(self.host_pages.owner(page), Owner::Adapter, "an image's host pages are allocated");
                }
            }
        }
        let num_owned = is_owned.iter().filter(|is_owned| **is_owned).count();
        assert_eq!(self.host_pages.num_free() as usize + num_owned, is_owned.len(), "no host page is lost");
    }

    fn check_requests(&self) {
        let mut running: Vec<u32> = Vec::new();
        let (mut num_waiting, mut state_rows) = (0, Vec::new());
        for (place, request) in self.requests.iter().enumerate().filter_map(|(i, r)| Some((i as u32, r.as_ref()?))) {
            assert!(request.computed <= request.known_len(), "only known tokens are computed");
            assert!(request.known_len() <= request.max_len, "a request has no more tokens than it may");
            match request.phase {
                Phase::Waiting => {
                    num_waiting += 1;
                    assert!(request.pages.is_empty() && request.computed == 0, "a waiting request owns nothing");
                }
                Phase::Running => {
                    running.push(place);
                    state_rows.push(request.state_row);
                    assert!(
                        self.pages_for(request.computed) as usize <= request.pages.len(),
                        "a page table covers its sequence"
                    );
                }
            }
        }
        self.queue.check((num_waiting + running.len()) as u32);
        let priorities = self.running.iter().map(|place| self.request(*place).ticket.priority());
        assert!(priorities.is_sorted_by(|a, b| a >= b), "those of the lowest priority give way first");
        assert_eq!(self.queue.len(), num_waiting, "the queue holds the waiting requests");
        for list in [&self.running, &self.order] {
            let mut list = list.clone();
            list.sort_unstable();
            assert_eq!(list, running, "the running set is listed twice, by admission and by adapter");
        }
        state_rows.extend(&self.free_state_rows);
        state_rows.sort_unstable();
        assert!(state_rows.iter().copied().eq(0..self.config.max_running), "every state row is free or one request's");
    }

    fn check_adapters(&self) {
        self.check_ready();
        let (mut pins, mut unfinished) = (BTreeMap::new(), BTreeMap::new());
        for request in self.requests.iter().flatten() {
            if let Some(index) = request.adapter {
                *unfinished.entry(index).or_insert(0) += 1;
                *pins.entry(index).or_insert(0) += u32::from(request.phase == Phase::Running);
            }
        }
        for (index, adapter) in self.registry.iter() {
            let count = |counts: &BTreeMap<u32, u32>| counts.get(&index).copied().unwrap_or(0);
            assert_eq!(adapter.pins, count(&pins), "pins = running requests that use the adapter");
            assert_eq!(adapter.unfinished, count(&unfinished), "a version counts its unfinished requests");
            self.check_adapter(index, adapter);
            self.check_listed(index, adapter);
        }
        self.check_counts();
    }

    fn check_ready(&self) {
        let is_ready = |request: &&Request| {
            request.phase == Phase::Waiting && request.adapter.is_none_or(|index| self.registry.get(index).can_run())
        };
        let mut expected: Vec<u64> = self.requests.iter().flatten().filter(is_ready).map(Request::seq).collect();
        expected.sort_unstable();
        let mut ready: Vec<u64> = self.queue.ready().map(|(seq, _)| seq).collect();
        ready.sort_unstable();
        assert_eq!(ready, expected, "a waiting request is ready exactly if its adapter can run");
    }

    fn check_adapter(&self, index: u32, adapter: &Adapter) {
        assert!(adapter.pins == 0 || adapter.is_resident(), "a pinned adapter is resident or on its way");
        assert!(adapter.pins == 0 || adapter.descriptor_row.is_some(), "a pinned adapter has a descriptor row");
        if let Some(row) = adapter.descriptor_row {
            assert_eq!(self.descriptor_rows[row as usize], Some(index), "a descriptor row has one owner");
            assert!(adapter.is_resident(), "an adapter with a descriptor row is on the device");
        }
        let is_copying = matches!(adapter.device, DeviceImage::Copying { .. });
        let is_in_host = matches!(adapter.host, HostImage::Ready(_));
        assert!(!is_copying || is_in_host, "a copy in flight pins its source");
        if adapter.is_retired {
            let is_in_flight = is_copying || matches!(adapter.host, HostImage::Loading(_));
            assert!(adapter.unfinished > 0 || is_in_flight, "a retired version goes away with its last request");
        }
    }

    fn check_listed(&self, index: u32, adapter: &Adapter) {
        let is_in_host = matches!(adapter.host, HostImage::Ready(_));
        assert_eq!(self.idle.contains(index), adapter.is_evictable(), "only unpinned residents are evictable");
        assert_eq!(self.host_lru.contains(index), is_in_host, "whole host images are listed");
        assert_eq!(adapter.load_key, adapter.wants_load(), "an adapter that is waited for is in the order of loads");
        assert!(adapter.load_key.is_none_or(|key| self.load_order.get(&key) == Some(&index)), "the order names it");
        assert_eq!(adapter.wish_key.is_some(), adapter.is_wished(), "an adapter that is wished for is listed");
        assert!(adapter.wish_key.is_none_or(|key| self.wanted.get(&key) == Some(&index)), "its wish names it");
        assert_eq!(self.absent_pins.contains(&index), adapter.is_absent_pin(), "absent pinned adapters are listed");
        assert_eq!(self.pinned.contains(&index), adapter.is_pinned, "pinned adapters are listed");
    }

    fn check_counts(&self) {
        let count = |matches: &dyn Fn(&Adapter) -> bool| self.registry.iter().filter(|(_, a)| matches(a)).count();
        let pages = |matches: &dyn Fn(&Adapter) -> bool| -> u32 {
            self.registry.iter().filter(|(_, a)| matches(a)).map(|(_, a)| a.spec.num_pages).sum()
        };
        let is_copying = |a: &Adapter| matches!(a.device, DeviceImage::Copying { .. });
        let is_outside = |a: &Adapter| matches!(a.device, DeviceImage::Copying { is_outside: true, .. });
        assert_eq!(self.idle_pages, pages(&Adapter::is_evictable), "pages of idle adapters are counted");
        assert_eq!(self.outside_pages, pages(&is_outside), "pages of copies outside their steps are counted");
        assert_eq!(self.copying.len(), count(&is_copying), "copies in flight are counted");
        assert_eq!(self.num_resident as usize, count(&Adapter::is_resident), "resident adapters are counted");
        let is_loading = |a: &Adapter| matches!(a.host, HostImage::Loading(_));
        assert_eq!(self.num_loading as usize, count(&is_loading), "loads are counted");
        assert_eq!(self.load_order.len(), count(&|a| a.load_key.is_some()), "the order of loads names nobody else");
        assert_eq!(self.wanted.len(), count(&|a| a.wish_key.is_some()), "the wishes name nobody else");
        assert_eq!(self.absent_pins.len(), count(&Adapter::is_absent_pin), "no other pinned adapter is absent");
        assert_eq!(self.pinned.len(), count(&|a| a.is_pinned), "nobody else is pinned");
        let owned = self.descriptor_rows.iter().flatten().count();
        assert_eq!(owned + self.free_descriptor_rows.len(), self.descriptor_rows.len(), "no descriptor row is lost");
    }
}
