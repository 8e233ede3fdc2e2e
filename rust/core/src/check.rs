//! The engine's invariants, as assertions that tests run after every operation.

use std::collections::BTreeMap;

use crate::engine::Engine;
use crate::pages::Owner;
use crate::registry::{DeviceImage, HostImage};
use crate::request::Phase;

impl Engine {
    /// Asserts every invariant. Costs as much as everything that the engine holds.
    ///
    /// # Panics
    /// If one does not hold; the message names it.
    pub fn check(&self) {
        self.pages.check();
        self.host_pages.check();
        self.check_owners();
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
            adapter
                .device
                .pages()
                .into_iter()
                .flat_map(|pages| pages.iter())
                .for_each(|page| own(*page, Owner::Adapter));
        }
        for (page, owner) in owners.iter().enumerate() {
            assert_eq!(
                self.pages.owner(page as u32),
                *owner,
                "the pool and the page tables agree on the owner of page {page}"
            );
            assert_eq!(
                self.pages.references(page as u32),
                u32::from(*owner != Owner::Free),
                "reference counts match the tables"
            );
        }
        let mut host_owned = vec![false; self.host_pages.num_pages() as usize];
        for (_, adapter) in self.registry.iter() {
            if let HostImage::Loading(pages) | HostImage::Ready(pages) = &adapter.host {
                for &page in pages.iter() {
                    assert!(!std::mem::replace(&mut host_owned[page as usize], true), "no host page has two owners");
                    assert_eq!(self.host_pages.owner(page), Owner::Adapter, "an image's host pages are allocated");
                }
            }
        }
        let num_owned = host_owned.iter().filter(|is_owned| **is_owned).count();
        assert_eq!(self.host_pages.num_free() as usize + num_owned, host_owned.len(), "no host page is lost");
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
        let (mut pins, mut unfinished) = (BTreeMap::new(), BTreeMap::new());
        let mut is_ready = BTreeMap::new();
        for request in self.requests.iter().flatten() {
            if let Some(index) = request.adapter {
                *unfinished.entry(index).or_insert(0) += 1;
                *pins.entry(index).or_insert(0) += u32::from(request.phase == Phase::Running);
            }
            if request.phase == Phase::Waiting {
                is_ready.insert(request.seq, request.adapter.is_none_or(|index| self.registry.get(index).can_run()));
            }
        }
        let ready: Vec<u64> = self.queue.ready().map(|(seq, _)| seq).collect();
        let expected: Vec<u64> = is_ready.into_iter().filter(|(_, ready)| *ready).map(|(seq, _)| seq).collect();
        assert_eq!(ready, expected, "a waiting request is ready exactly if its adapter can run");
        let (mut idle_pages, mut num_resident, mut num_loading, mut outside_pages, mut num_copying) = (0, 0, 0, 0, 0);
        let mut num_listed = 0;
        for (index, adapter) in self.registry.iter() {
            assert_eq!(
                adapter.pins,
                pins.get(&index).copied().unwrap_or(0),
                "pins = running requests that use the adapter"
            );
            assert_eq!(
                adapter.unfinished,
                unfinished.get(&index).copied().unwrap_or(0),
                "a version counts its unfinished requests"
            );
            assert!(adapter.pins == 0 || adapter.is_resident(), "a pinned adapter is resident or on its way");
            assert!(adapter.pins == 0 || adapter.descriptor_row.is_some(), "a pinned adapter has a descriptor row");
            if let Some(row) = adapter.descriptor_row {
                assert_eq!(self.descriptor_rows[row as usize], Some(index), "a descriptor row has one owner");
                assert!(adapter.is_resident(), "an adapter with a descriptor row is on the device");
            }
            assert_eq!(self.idle.contains(index), adapter.is_evictable(), "only unpinned residents are evictable");
            idle_pages += if adapter.is_evictable() { adapter.spec.num_pages } else { 0 };
            num_resident += u32::from(adapter.is_resident());
            num_loading += u32::from(matches!(adapter.host, HostImage::Loading(_)));
            assert_eq!(
                self.host_lru.contains(index),
                matches!(adapter.host, HostImage::Ready(_)),
                "whole host images are listed"
            );
            let listed = adapter.load_key.map(|key| self.load_order.get(&key));
            assert_eq!(
                adapter.load_key,
                adapter.wants_load(),
                "an adapter that is waited for is in the order of loads"
            );
            assert!(listed.is_none_or(|listed| listed == Some(&index)), "the order of loads names it");
            assert_eq!(adapter.wish_key.is_some(), adapter.is_wished(), "an adapter that is wished for is listed");
            assert!(adapter.wish_key.is_none_or(|key| self.wanted.get(&key) == Some(&index)), "its wish names it");
            assert_eq!(self.absent_pins.contains(&index), adapter.is_absent_pin(), "absent pinned adapters are listed");
            assert_eq!(self.pinned.contains(&index), adapter.is_pinned, "pinned adapters are listed");
            num_listed += usize::from(adapter.load_key.is_some()) + usize::from(adapter.wish_key.is_some());
            num_listed += usize::from(adapter.is_absent_pin()) + usize::from(adapter.is_pinned);
            if let DeviceImage::Copying { pages, is_outside, .. } = &adapter.device {
                num_copying += 1;
                outside_pages += if *is_outside { pages.len() as u32 } else { 0 };
                assert!(matches!(adapter.host, HostImage::Ready(_)), "a copy in flight pins its source");
            }
            if adapter.is_retired {
                let in_flight = matches!(adapter.device, DeviceImage::Copying { .. })
                    || matches!(adapter.host, HostImage::Loading(_));
                assert!(adapter.unfinished > 0 || in_flight, "a retired version goes away with its last request");
            }
        }
        let lists = [self.load_order.len(), self.wanted.len(), self.absent_pins.len(), self.pinned.len()];
        assert_eq!(lists.iter().sum::<usize>(), num_listed, "the lists name nobody else");
        assert_eq!(self.idle_pages, idle_pages, "pages of idle adapters are counted");
        assert_eq!(self.num_resident, num_resident, "resident adapters are counted");
        assert_eq!(self.num_loading, num_loading, "loads are counted");
        assert_eq!(
            (self.outside_pages, self.copying.len()),
            (outside_pages, num_copying),
            "copies in flight are counted"
        );
        let owned = self.descriptor_rows.iter().flatten().count();
        assert_eq!(owned + self.free_descriptor_rows.len(), self.descriptor_rows.len(), "no descriptor row is lost");
    }
}
