//! Random operations on whole engines, in tiny worlds where conflicts are frequent.
//!
//! `SLORA_SEEDS` and `SLORA_EVENTS` scale the test, `SLORA_SEED` runs one seed.
#![allow(clippy::unwrap_used, reason = "a test")]

mod core_world;

use std::sync::atomic::{AtomicU64, Ordering};

use core_world::World;
use core_world::random::{Random, random_config};
use slora_core::{Owner, PagePool};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// Prints the seed of a world in which something did not hold.
struct Announce(u64);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("SLORA_SEED={} reproduces this", self.0);
        }
    }
}

fn run(seed: u64, num_events: u64) -> World {
    let _announce = Announce(seed);
    let config = random_config(&mut Random::new(seed));
    let mut world = World::new(config, seed);
    for i in 0..num_events {
        if i % 2_500 == 2_499 {
            world.run_to_the_end();
        }
        world.operate();
    }
    world.run_to_the_end();
    world.unload_all();
    world
}

#[test]
fn every_invariant_holds_after_every_event() {
    let num_events = setting("SLORA_EVENTS", 10_000);
    if let Ok(seed) = std::env::var("SLORA_SEED") {
        run(seed.parse().unwrap(), num_events);
        return;
    }
    let (num_seeds, next) = (setting("SLORA_SEEDS", 1_000), AtomicU64::new(0));
    let ended = std::sync::Mutex::new(std::collections::BTreeMap::<&str, u64>::new());
    let work = || {
        while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < num_seeds) {
            let world = run(seed, num_events);
            let mut ended = ended.lock().unwrap();
            world.num_ended.iter().for_each(|(reason, count)| *ended.entry(reason).or_default() += count);
            let stats = world.engine.stats();
            for (name, count) in [
                ("preemptions", stats.preemptions),
                ("evictions", stats.adapter_evictions),
                ("host evictions", stats.host_evictions),
                ("prefetches", stats.prefetches),
                ("load failures", stats.load_failures),
                ("steps", stats.steps),
            ] {
                *ended.entry(name).or_default() += count;
            }
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    let ended = ended.into_inner().unwrap();
    eprintln!("{ended:?}");
    assert!(ended.values().all(|count| *count > 0), "the worlds are eventful");
}

#[test]
fn the_same_inputs_give_the_same_plans() {
    for seed in 0..20 {
        let (first, second) = (run(seed, 1_000), run(seed, 1_000));
        assert_eq!(first.trace, second.trace);
        assert_eq!(first.engine.stats(), second.engine.stats());
    }
}

/// One page of the model: who holds it, how often, and when it was last freed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct ModelPage {
    owner: Owner,
    references: u32,
    freed_step: u32,
}

#[test]
fn the_page_pool_matches_a_plain_model() {
    const NUM_PAGES: u32 = 12;
    let free_page = ModelPage { owner: Owner::Free, references: 0, freed_step: 0 };
    let (mut pool, mut random) = (PagePool::new(NUM_PAGES), Random::new(1));
    let mut model = vec![free_page; NUM_PAGES as usize];
    let mut free: Vec<u32> = (0..NUM_PAGES).rev().collect();
    let mut pages = Vec::new();
    for operation in 0..setting("SLORA_POOL_OPERATIONS", 10_000_000) {
        let (step, page) = ((operation / 8) as u32, random.below(NUM_PAGES));
        let is_used = model[page as usize].references > 0;
        let owner = random.pick(&[Owner::Kv, Owner::Adapter]);
        match random.below(8) {
            0..3 => {
                let expected = free.pop();
                assert_eq!(pool.allocate(owner), expected, "the last page that was freed is given first");
                expected.iter().for_each(|page| give(&mut model, *page, owner));
            }
            3 => {
                let count = random.below(5);
                pages.clear();
                let is_possible = free.len() >= count as usize;
                assert_eq!(pool.allocate_many(owner, count, &mut pages), is_possible);
                assert_eq!(pages.len(), if is_possible { count as usize } else { 0 });
                for page in &pages {
                    assert_eq!(free.pop(), Some(*page));
                    give(&mut model, *page, owner);
                }
            }
            4 if is_used && model[page as usize].references < 4 => {
                pool.share(page);
                model[page as usize].references += 1;
            }
            _ if is_used => {
                pool.free(page, step);
                model[page as usize].references -= 1;
                if model[page as usize].references == 0 {
                    model[page as usize] = ModelPage { freed_step: step, ..free_page };
                    free.push(page);
                }
            }
            _ => {}
        }
        let found =
            ModelPage { owner: pool.owner(page), references: pool.references(page), freed_step: pool.freed_step(page) };
        assert_eq!(found, model[page as usize]);
        assert_eq!(pool.num_free() as usize, free.len());
        if operation % 64 == 0 {
            pool.check();
            let num_kv = model.iter().filter(|page| page.owner == Owner::Kv).count();
            assert_eq!(pool.num_owned(Owner::Kv) as usize, num_kv);
        }
    }
}

fn give(model: &mut [ModelPage], page: u32, owner: Owner) {
    let entry = &mut model[page as usize];
    (entry.owner, entry.references) = (owner, 1);
}
