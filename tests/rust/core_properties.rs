//! Random operations on whole engines, in tiny worlds where conflicts are frequent.
//!
//! `SLORA_SEEDS` and `SLORA_EVENTS` scale the test, `SLORA_SEED` runs one seed.
#![allow(clippy::unwrap_used, reason = "a test")]

mod core_world;

use std::sync::atomic::{AtomicU64, Ordering};

use core_world::{Random, World, random_config};

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
