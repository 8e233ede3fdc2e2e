//! The engine in small scenes, each with an executor that checks every plan.
#![allow(clippy::unwrap_used, reason = "a test")]

mod core_world;

use core_world::World;
use core_world::model::VOCAB;
use slora_core::{Account, AdapterState, EngineConfig, Eviction, NewRequest, RequestId, SamplingParams, SubmitError};

fn config() -> EngineConfig {
    EngineConfig {
        num_pages: 32,
        num_host_pages: 16,
        page_tokens: 4,
        max_batch_tokens: 64,
        max_running: 8,
        max_adapters: 4,
        max_context: 64,
        max_adapter_pages: 8,
        descriptor_words: 4,
        vocab_size: VOCAB,
        max_loads: 2,
        ..EngineConfig::default()
    }
}

fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

/// A prompt of `len` tokens for which the model gives `max_tokens` finite ones.
fn submit(world: &mut World, adapter: Option<&str>, len: u32, max_tokens: u32) -> RequestId {
    let prompt = (0..len).map(|i| (i * 7 + 3) % VOCAB).collect();
    world.submit(adapter, prompt, greedy(max_tokens)).unwrap()
}

fn new_request(adapter: Option<&str>, prompt: Vec<u32>, params: SamplingParams) -> NewRequest {
    let account = Account::default();
    NewRequest { id: RequestId(7), adapter: adapter.map(Into::into), prompt, params: params.into(), account }
}

#[test]
fn a_refused_request_names_value_and_limit_and_leaves_nothing_behind() {
    let mut world = World::new(EngineConfig { num_pages: 10, max_waiting: 1, ..config() }, 0);
    world.register("big", 8, false).unwrap();
    let max_context = world.engine.config().max_context;
    assert_eq!(max_context, 40, "what the pool holds");
    let cases = [
        (new_request(None, vec![], greedy(1)), "the prompt is empty, it must hold at least 1 token"),
        (
            new_request(None, vec![1; 41], greedy(1)),
            "this model's maximum context length is 40 tokens, but the request needs 42",
        ),
        (new_request(None, vec![1], greedy(u32::MAX)), "this model's maximum context length is 40 tokens"),
        (new_request(None, vec![1, 29], greedy(1)), "the prompt holds token 29, the vocabulary has 29 tokens"),
        (new_request(Some("none"), vec![1], greedy(1)), "no adapter is named \"none\""),
        (
            new_request(Some("big"), vec![1; 9], greedy(1)),
            "the request needs 3 pages and its adapter 8, the pool has 10",
        ),
        (
            new_request(None, vec![1], SamplingParams { top_p: 2.0, ..greedy(1) }),
            "top_p is 2, it must be above 0 and at most 1",
        ),
    ];
    let before = world.engine.stats();
    for (request, start) in cases {
        let message = world.engine.submit(0, request).unwrap_err().to_string();
        assert!(message.starts_with(start), "{message:?} does not start with {start:?}");
    }
    assert_eq!(world.engine.stats(), before);
    world.engine.submit(0, new_request(None, vec![1], greedy(1))).unwrap();
    let error = world.engine.submit(0, new_request(None, vec![1], greedy(1))).unwrap_err();
    assert_eq!(error, SubmitError::Duplicate(7));
    let other = NewRequest { id: RequestId(8), ..new_request(None, vec![1], greedy(1)) };
    assert_eq!(world.engine.submit(0, other).unwrap_err(), SubmitError::QueueFull { max_waiting: 1 });
    world.engine.check();
}

#[test]
fn a_failed_adapter_stays_failed_until_it_is_replaced() {
    let mut world = World::new(config(), 0);
    world.register("x", 2, false).unwrap();
    for _ in 0..2 {
        submit(&mut world, Some("x"), 5, 3);
    }
    assert!(world.launch().is_none());
    assert_eq!((world.num_loads(), world.engine.stats().waiting_for_adapter), (1, 2));
    world.answer_oldest_load(true);
    assert_eq!(world.num_ended["failed"], 2);
    let info = world.engine.adapter_info("x").unwrap();
    assert_eq!((info.state, info.failure.is_some()), (AdapterState::Failed, true));
    let refused = world.submit(Some("x"), vec![1], greedy(1)).unwrap_err();
    assert!(refused.to_string().starts_with("adapter \"x\" could not be loaded: content"), "{refused}");
    world.engine.pin("x").unwrap();
    assert!(world.launch().is_none() && world.num_loads() == 0, "nobody tries again");
    world.register("x", 3, true).unwrap();
    submit(&mut world, Some("x"), 5, 3);
    world.run_to_the_end();
    assert_eq!((world.num_ended["length"], world.engine.adapter_info("x").unwrap().version), (1, 2));
}

#[test]
fn a_replacement_that_fails_leaves_the_version_before_it() {
    let mut world = World::new(config(), 0);
    world.register("x", 2, false).unwrap();
    submit(&mut world, Some("x"), 5, 3);
    world.run_to_the_end();
    world.register("x", 2, true).unwrap();
    world.launch();
    world.answer_oldest_load(true);
    let info = world.engine.adapter_info("x").unwrap();
    assert_eq!((info.version, info.state, info.replacing), (1, AdapterState::Resident, false));
    assert!(info.failure.unwrap().message.contains("is bad"), "the reason is told");
    submit(&mut world, Some("x"), 5, 3);
    world.run_to_the_end();
    assert_eq!(world.num_ended["length"], 2);
}

#[test]
fn a_load_that_was_answered_is_not_given_up_afterwards() {
    let mut world = World::new(config(), 0);
    let id = world.register("x", 2, false).unwrap();
    let request = submit(&mut world, Some("x"), 5, 3);
    world.launch();
    world.cancel(request);
    world.engine.unload("x").unwrap();
    world.engine.load_finished(id);
    assert_eq!(world.engine.next_cancelled_load(), None);
    assert_eq!(world.engine.next_dropped(), Some(id));
    assert_eq!(world.engine.stats().free_host_pages, 16);
}

/// Registers adapters and brings their images to the host tier.
fn load(world: &mut World, names: &[String], num_pages: u32) {
    for name in names {
        world.register(name, num_pages, false).unwrap();
        submit(world, Some(name), 2, 1);
    }
    world.run_to_the_end();
}

fn names(prefix: &str, count: u32) -> Vec<String> {
    (0..count).map(|i| format!("{prefix}{i}")).collect()
}

#[test]
fn a_load_that_was_given_up_is_no_failure() {
    let mut world = World::new(config(), 0);
    world.register("x", 2, false).unwrap();
    let request = submit(&mut world, Some("x"), 5, 3);
    world.launch();
    world.cancel(request);
    world.unload("x");
    world.answer_oldest_load(true);
    assert_eq!((world.engine.stats().load_failures, world.engine.stats().adapters), (0, 0));
}

#[test]
fn a_replacement_of_a_pinned_adapter_is_pinned() {
    let mut world = World::new(config(), 0);
    world.register("x", 2, false).unwrap();
    world.engine.pin("x").unwrap();
    world.step();
    world.step();
    world.register("x", 3, true).unwrap();
    world.step();
    world.step();
    let info = world.engine.adapter_info("x").unwrap();
    assert_eq!((info.version, info.pinned, info.state), (2, true, AdapterState::Resident));
    assert_eq!(world.engine.stats().adapter_pages, 3, "the old version is gone");
}

#[test]
fn small_swap_ins_do_not_keep_a_large_one_waiting_for_ever() {
    let (num_pages, num_host_pages) = (16, 40);
    let mut world =
        World::new(EngineConfig { num_pages, num_host_pages, max_copy_pages: 4, prefetch: false, ..config() }, 0);
    load(&mut world, &["large".into()], 6);
    // More of them than the pool holds: in turn, each must be swapped in.
    let small = names("s", 12);
    load(&mut world, &small, 2);
    let mut turn = small.iter().cycle();
    for _ in 0..3 {
        submit(&mut world, turn.next().map(|name| name.as_str()), 2, 1);
    }
    let large = submit(&mut world, Some("large"), 2, 1);
    for _ in 0..30 {
        while world.executor.copy_one() {}
        let plan = world.launch();
        // Of the step before: there is always a copy in flight.
        world.report_copies();
        if plan.is_some() {
            world.commit_oldest();
        }
        submit(&mut world, turn.next().map(|name| name.as_str()), 2, 1);
    }
    assert!(!world.live.contains_key(&large), "the large adapter waits for ever");
    world.run_to_the_end();
}

#[test]
fn small_requests_do_not_overtake_a_large_one_for_ever() {
    let mut world = World::new(config(), 0);
    for _ in 0..4 {
        submit(&mut world, None, 12, 12);
    }
    world.step();
    let large = submit(&mut world, None, 48, 4);
    for _ in 0..40 {
        submit(&mut world, None, 2, 6);
        world.step();
    }
    assert!(!world.live.contains_key(&large));
    world.run_to_the_end();
}

#[test]
fn requests_of_one_adapter_do_not_keep_another_from_its_turn_for_ever() {
    let mut world = World::new(EngineConfig { max_adapters: 1, ..config() }, 0);
    load(&mut world, &["x".into(), "y".into()], 2);
    submit(&mut world, Some("x"), 4, 4);
    world.step();
    let other = submit(&mut world, Some("y"), 4, 4);
    for _ in 0..30 {
        submit(&mut world, Some("x"), 4, 4);
        world.step();
    }
    assert!(!world.live.contains_key(&other), "the running set never lets go of x");
    world.run_to_the_end();
}

#[test]
fn two_pinned_adapters_do_not_chase_each_other_out_of_the_host_tier() {
    let mut world = World::new(EngineConfig { num_host_pages: 8, max_context: 128, ..config() }, 0);
    // It holds the whole device, so that neither pinned adapter can be brought there.
    let hog = submit(&mut world, None, 100, 28);
    world.step();
    for name in ["p", "q"] {
        world.register(name, 8, false).unwrap();
        world.engine.pin(name).unwrap();
    }
    while world.live.contains_key(&hog) {
        world.step();
    }
    assert_eq!(world.engine.stats().loads, 1, "the second waits until the first is on the device");
    for _ in 0..4 {
        world.step();
    }
    let stats = world.engine.stats();
    assert_eq!((stats.loads, stats.resident_adapters, stats.idle_adapter_pages), (2, 2, 0));
}

#[test]
fn step_numbers_begin_again_and_nothing_else_changes() {
    let run = |max_step: u32| {
        let mut world = World::new(EngineConfig { num_pages: 12, max_step, max_copy_pages: 2, ..config() }, 0);
        for name in ["a", "b", "c"] {
            world.register(name, 3, false).unwrap();
        }
        for i in 0..12 {
            submit(&mut world, [Some("a"), Some("b"), None, Some("c")][i % 4], 6, 8);
        }
        world.run_to_the_end();
        (world.engine.stats(), world.num_ended)
    };
    let (whole, ended) = run(i32::MAX as u32);
    assert!(whole.steps > 30 && whole.adapter_evictions > 2 && ended["length"] == 12, "{whole:?}");
    for max_step in 1..30 {
        let (stats, also_ended) = run(max_step);
        assert_eq!(also_ended, ended, "the executor has compared every token");
        assert_eq!(stats.generated_tokens, whole.generated_tokens);
    }
}

#[test]
fn a_pinned_adapter_arrives_without_a_request_however_large_it_is() {
    let mut world = World::new(EngineConfig { max_copy_pages: 2, prefetch: false, ..config() }, 0);
    world.register("p", 5, false).unwrap();
    world.engine.pin("p").unwrap();
    for _ in 0..3 {
        world.step();
    }
    let info = world.engine.adapter_info("p").unwrap();
    assert_eq!((info.state, info.pinned), (AdapterState::Resident, true));
    // It gives way only where a request could not run otherwise, and comes back.
    submit(&mut world, None, 40, 4);
    world.run_to_the_end();
    assert_eq!(world.engine.stats().adapter_evictions, 0);
}

#[test]
fn a_pinned_adapter_gives_way_to_a_request_that_needs_the_whole_pool_and_comes_back() {
    let mut world = World::new(EngineConfig { max_context: 128, ..config() }, 0);
    world.register("p", 5, false).unwrap();
    world.engine.pin("p").unwrap();
    for _ in 0..3 {
        world.step();
    }
    submit(&mut world, None, 124, 4);
    world.run_to_the_end();
    assert_eq!((world.engine.stats().adapter_evictions, world.num_ended["length"]), (1, 1));
    for _ in 0..3 {
        world.step();
    }
    assert_eq!(world.engine.adapter_info("p").unwrap().state, AdapterState::Resident);
}

#[test]
fn a_replacement_is_loaded_in_its_turn_among_the_requests() {
    let mut world = World::new(EngineConfig { max_loads: 1, num_host_pages: 8, ..config() }, 0);
    world.register("x", 2, false).unwrap();
    submit(&mut world, Some("x"), 2, 1);
    world.run_to_the_end();
    // Every one of these must be loaded each time: more of them than the host tier and the device hold.
    let others = names("o", 24);
    for name in &others {
        world.register(name, 2, false).unwrap();
    }
    for i in 0..60 {
        for k in 0..2 {
            submit(&mut world, Some(&others[(2 * i + k) % 24]), 2, 1);
        }
        if i == 4 {
            world.register("x", 2, true).unwrap();
        }
        // One load is answered for every two requests that want one.
        world.launch().is_some().then(|| world.commit_oldest());
        while world.executor.copy_one() {}
        world.report_copies();
        if world.num_loads() > 0 {
            world.answer_oldest_load(false);
        }
    }
    assert_eq!(world.engine.adapter_info("x").unwrap().version, 2);
    world.run_to_the_end();
}

#[test]
fn prefetching_takes_no_pages_that_the_next_request_waits_for() {
    let mut world = World::new(EngineConfig { num_pages: 16, num_host_pages: 40, max_context: 64, ..config() }, 0);
    let others = names("o", 6);
    load(&mut world, &others, 2);
    // Alone, it evicts all of them.
    submit(&mut world, None, 60, 1);
    world.run_to_the_end();
    submit(&mut world, None, 24, 8);
    world.step();
    let next = submit(&mut world, None, 52, 4);
    for name in &others {
        submit(&mut world, Some(name), 2, 1);
    }
    let before = world.engine.stats();
    assert_eq!((before.free_pages, before.resident_adapters), (10, 0), "some pages are free, but they are not spare");
    while world.live.len() == 8 {
        world.step();
        assert_eq!(world.engine.stats().prefetches, before.prefetches);
    }
    world.step();
    assert!(world.live.contains_key(&next) && world.engine.stats().running == 1, "it is the next to run");
    world.run_to_the_end();
}

#[test]
fn a_step_orders_no_more_copies_than_its_arrays_hold() {
    let (num_pages, num_host_pages, max_adapter_pages) = (40_000, 20_000, 9_000);
    let mut world = World::new(EngineConfig { num_pages, num_host_pages, max_adapter_pages, ..config() }, 0);
    for name in ["x", "y"] {
        world.register(name, 9_000, false).unwrap();
        submit(&mut world, Some(name), 4, 4);
    }
    assert!(world.step().is_none(), "both are loaded");
    let num_copies = [world.step().unwrap().counts.num_copies, world.step().unwrap().counts.num_copies];
    assert_eq!(num_copies, [9_000, 9_000], "the second waits for the next step");
    world.run_to_the_end();
}

#[test]
fn nobody_is_evicted_for_a_request_that_cannot_run_yet() {
    let mut world = World::new(EngineConfig { num_pages: 16, ..config() }, 0);
    load(&mut world, &["x".into(), "y".into()], 4);
    submit(&mut world, None, 16, 12);
    world.step();
    // Its own adapter must stay, and without it there are 3 + 4 pages for its 8.
    let next = submit(&mut world, Some("x"), 32, 1);
    world.step();
    let stats = world.engine.stats();
    assert_eq!((stats.adapter_evictions, stats.resident_adapters, stats.waiting), (0, 2, 1));
    world.run_to_the_end();
    assert!(!world.live.contains_key(&next));
}

#[test]
fn requests_for_more_adapters_than_the_host_tier_holds_load_each_once() {
    let mut world = World::new(EngineConfig { num_host_pages: 4, max_running: 1, ..config() }, 0);
    let others = names("o", 6);
    for name in &others {
        world.register(name, 2, false).unwrap();
    }
    submit(&mut world, None, 60, 4);
    for name in &others {
        submit(&mut world, Some(name), 8, 4);
    }
    world.run_to_the_end();
    let stats = world.engine.stats();
    assert_eq!((stats.loads, world.num_ended["length"]), (6, 7), "no image is loaded twice");
}

#[test]
fn a_cancelled_request_gives_its_pages_back_at_once() {
    let mut world = World::new(config(), 0);
    let id = submit(&mut world, None, 30, 10);
    world.launch().unwrap();
    assert_eq!(world.engine.stats().free_pages, 24);
    world.cancel(id);
    assert_eq!(world.engine.stats().free_pages, 32);
    world.commit_oldest();
    assert_eq!(world.num_ended["cancelled"], 1);
    assert!(world.launch().is_none() && world.live.is_empty());
}

#[test]
fn a_row_that_may_be_wasted_preempts_nobody() {
    let mut world = World::new(EngineConfig { num_pages: 8, ..config() }, 0);
    let old = submit(&mut world, None, 14, 8);
    submit(&mut world, None, 10, 2);
    // Pages 4 + 3 of 8; the old one needs its fifth and sixth while its token is in flight.
    world.launch().unwrap();
    for _ in 0..4 {
        world.launch();
        world.commit_oldest();
        world.engine.check();
    }
    assert_eq!(world.engine.stats().preemptions, 0);
    world.run_to_the_end();
    assert!(!world.live.contains_key(&old));
}

#[test]
fn a_preempted_request_with_stop_strings_does_not_run_ahead_when_it_resumes() {
    let mut world = World::new(EngineConfig { num_pages: 8, ..config() }, 0);
    submit(&mut world, None, 6, 20);
    let params = SamplingParams { has_stop_strings: true, ..greedy(12) };
    let watched = world.submit(None, vec![4; 5], params).unwrap();
    while world.live.len() == 2 {
        // The world asserts with every token that it is at most 4 ahead of the check.
        world.step();
    }
    assert!(world.engine.stats().preemptions > 0 && world.live.contains_key(&watched));
    assert!(world.launch().is_none(), "it waits for the check");
    world.check_text(watched);
    world.engine.checked(watched, 1);
    assert!(world.launch().is_some(), "an old report takes nothing back");
    world.run_to_the_end();
}

#[test]
fn an_adapter_unloaded_while_it_is_copied_goes_when_the_copy_has_arrived() {
    let mut world = World::new(config(), 0);
    world.register("x", 4, false).unwrap();
    let id = submit(&mut world, Some("x"), 8, 4);
    assert!(world.launch().is_none());
    world.answer_oldest_load(false);
    assert_eq!(world.launch().unwrap().counts.num_copies, 4);
    world.cancel(id);
    world.unload("x");
    let stats = world.engine.stats();
    assert_eq!((stats.adapters, stats.free_pages, stats.free_host_pages), (1, 28, 12), "the copy pins both images");
    world.run_to_the_end();
    let stats = world.engine.stats();
    assert_eq!((stats.adapters, stats.free_pages, stats.free_host_pages), (0, 32, 16));
}

#[test]
fn a_retired_version_keeps_its_host_image_until_its_last_request_ends() {
    let mut world = World::new(EngineConfig { num_host_pages: 4, ..config() }, 0);
    load(&mut world, &["x".into()], 2);
    let last = submit(&mut world, Some("x"), 4, 40);
    world.step();
    world.register("x", 2, true).unwrap();
    world.step();
    assert_eq!(world.engine.adapter_info("x").unwrap().version, 2);
    // These need the other half of the host tier, one after the other.
    for name in ["o", "p", "q"] {
        world.register(name, 2, false).unwrap();
        let id = submit(&mut world, Some(name), 4, 1);
        while world.live.contains_key(&id) {
            world.step();
        }
        world.unload(name);
    }
    world.unload("x");
    assert!(world.live.contains_key(&last));
    assert_eq!(world.engine.stats().free_host_pages, 2);
    world.run_to_the_end();
    assert_eq!(world.engine.stats().free_host_pages, 4);
}

#[test]
fn a_retired_version_without_a_host_image_gives_way_last() {
    let mut world = World::new(
        EngineConfig {
            num_pages: 9,
            num_host_pages: 2,
            max_running: 1,
            prefetch: false,
            eviction: Eviction::Lru,
            ..config()
        },
        0,
    );
    load(&mut world, &["x".into()], 2);
    load(&mut world, &["o".into()], 2);
    let hog = submit(&mut world, None, 15, 12);
    world.step();
    submit(&mut world, Some("x"), 4, 1);
    world.register("x", 2, true).unwrap();
    while world.live.contains_key(&hog) {
        world.step();
    }
    world.run_to_the_end();
    // Of x twice and of o; x was used longer ago, but its first version was not evicted.
    let stats = world.engine.stats();
    assert_eq!((stats.adapter_evictions, stats.loads), (1, 3));
}

#[test]
fn who_gives_way_is_the_least_recently_used_or_the_least_valuable() {
    // Uses within a moment of each other count as one.
    let cases = [(Eviction::Lru, 10, "often"), (Eviction::CostAware, 10, "once"), (Eviction::CostAware, 0, "often")];
    for (eviction, gap_s, evicted) in cases {
        let mut world = World::new(EngineConfig { num_pages: 16, eviction, ..config() }, 0);
        load(&mut world, &["often".into()], 4);
        for _ in 0..5 {
            submit(&mut world, Some("often"), 2, 1);
            if gap_s > 0 {
                world.run_to_the_end();
                world.now_us += gap_s * 1_000_000;
            }
        }
        world.run_to_the_end();
        load(&mut world, &["once".into()], 4);
        submit(&mut world, None, 36, 1);
        world.run_to_the_end();
        assert_eq!(world.engine.stats().adapter_evictions, 1);
        assert_eq!(world.engine.adapter_info(evicted).unwrap().state, AdapterState::Host, "{eviction:?} {gap_s}");
    }
}

#[test]
fn many_images_in_use_do_not_hide_one_that_is_not() {
    let mut world = World::new(EngineConfig { num_host_pages: 34, max_running: 1, prefetch: false, ..config() }, 0);
    let hog = submit(&mut world, None, 4, 60);
    let others = names("o", 35);
    let mut requests = Vec::new();
    for name in &others[..34] {
        world.register(name, 1, false).unwrap();
        requests.push(submit(&mut world, Some(name), 4, 1));
    }
    while world.engine.stats().free_host_pages > 0 || world.num_loads() > 0 {
        world.step();
    }
    world.cancel(requests[33]);
    world.register(&others[34], 1, false).unwrap();
    submit(&mut world, Some(&others[34]), 4, 1);
    world.step();
    world.step();
    assert_eq!((world.engine.stats().loads, world.live.contains_key(&hog)), (35, true));
    world.run_to_the_end();
}
