//! The engine's bookkeeping: what a step costs beside its arithmetic.
//!
//! `cargo bench -p slora-core`; `python benches/record.py slora-core core-bookkeeping` also writes the figures to
//! `benches/results/core-bookkeeping.json`.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use slora_core::{
    Account, AdapterSpec, Engine, EngineConfig, Events, NewRequest, Owner, PagePool, QueueOrder, RequestId,
    SamplingParams,
};

const RUNNING: u32 = 256;
const LIVE_ADAPTERS: u32 = 64;
const BATCH_TOKENS: u32 = 8_192;
const MODULE_WORDS: u32 = 32 * 7 * 12;
/// Steps that one world is good for.
const STEPS: u32 = 128;

/// Tokens that every running request may generate: also while the prompts of the last ones are computed.
fn max_tokens(context: u32) -> u32 {
    RUNNING * context / BATCH_TOKENS + STEPS + 64
}

fn config(queue: QueueOrder, context: u32, num_waiting: u32) -> EngineConfig {
    let pages_each = (context + max_tokens(context)).div_ceil(16) + 1;
    EngineConfig {
        num_pages: RUNNING * pages_each + LIVE_ADAPTERS * 2,
        num_host_pages: 256,
        page_tokens: 16,
        max_batch_tokens: BATCH_TOKENS,
        // The adapter budget is spent, nothing else: every step tries to admit the first that waits, and cannot.
        max_running: 2 * RUNNING,
        max_waiting: num_waiting + RUNNING,
        max_adapters: LIVE_ADAPTERS,
        max_context: context + max_tokens(context),
        max_adapter_pages: 64,
        descriptor_words: MODULE_WORDS,
        vocab_size: 128_256,
        eos_token_ids: vec![128_001, 128_009],
        max_loads: 8,
        queue,
        ..EngineConfig::default()
    }
}

/// An engine in the middle of its work.
struct World {
    engine: Engine,
    buffer: Vec<i32>,
    sampled: Vec<i32>,
    events: Events,
    next_id: u64,
}

impl World {
    fn new(queue: QueueOrder, context: u32, num_waiting: u32, num_adapters: u32) -> Self {
        let engine = Engine::new(config(queue, context, num_waiting)).unwrap();
        let buffer = vec![0; engine.layout().num_words()];
        let mut world =
            Self { engine, buffer, sampled: vec![7; RUNNING as usize], events: Events::default(), next_id: 0 };
        let spec = AdapterSpec {
            num_pages: 2,
            bytes: 1,
            words: vec![0; MODULE_WORDS as usize].into(),
            page_layers: Arc::new([0, 16]),
        };
        for i in 0..num_adapters {
            world.engine.register(name(i), spec.clone(), false).unwrap();
        }
        for i in 0..RUNNING {
            world.submit(name(i % LIVE_ADAPTERS), vec![5; context as usize - 1], max_tokens(context));
        }
        world.start();
        // Those in front want adapters that are in the host tier, but do not run.
        let front = num_waiting.min(LIVE_ADAPTERS);
        for i in 0..front {
            world.submit(name(LIVE_ADAPTERS + i % (num_adapters - LIVE_ADAPTERS)), vec![5; 64], 64);
        }
        world.start();
        for i in front..num_waiting {
            world.submit(name(i % num_adapters), vec![5; 64], 64);
        }
        world
    }

    fn submit(&mut self, adapter: Arc<str>, prompt: Vec<u32>, max_tokens: u32) {
        let params = SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() };
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.engine
            .submit(
                0,
                NewRequest {
                    id,
                    adapter: Some(adapter),
                    prompt,
                    params: Arc::new(params),
                    account: Account::default(),
                },
            )
            .unwrap();
    }

    /// Until every running request decodes and nothing is loaded or copied.
    fn start(&mut self) {
        loop {
            let num_decode = self.step();
            let mut num_loads = 0;
            while let Some(load) = self.engine.next_load() {
                self.engine.load_finished(load.adapter);
                num_loads += 1;
            }
            if num_decode == RUNNING && num_loads == 0 {
                return;
            }
        }
    }

    /// One step; returns how many requests were decoded.
    fn step(&mut self) -> u32 {
        let Some(counts) = self.engine.schedule(0, &mut self.buffer) else { return 0 };
        self.engine.copies_done(counts.step);
        self.engine.commit(0, counts.step, &self.sampled[..counts.num_sampled as usize]);
        self.engine.take_events(&mut self.events);
        counts.num_decode
    }
}

fn name(i: u32) -> Arc<str> {
    format!("adapter-{i}").into()
}

fn pages(c: &mut Criterion) {
    let mut pool = PagePool::new(65_536);
    c.bench_function("allocate and free a page", |b| {
        b.iter(|| {
            let page = pool.allocate(black_box(Owner::Kv)).unwrap();
            pool.free(page, 1);
        });
    });
}

/// A world and the steps that it is good for: then its sequences have outgrown their length, and another is made, untimed.
struct Timed(Option<World>, u32);

impl Timed {
    /// Times steps in which all 256 requests decode.
    fn steps(&mut self, iterations: u64, new_world: impl Fn() -> World) -> Duration {
        let mut elapsed = Duration::ZERO;
        for _ in 0..iterations {
            if self.1 == 0 {
                *self = Self(None, STEPS);
            }
            let world = self.0.get_or_insert_with(&new_world);
            let start = Instant::now();
            let num_decode = black_box(world.step());
            elapsed += start.elapsed();
            assert_eq!(num_decode, RUNNING);
            self.1 -= 1;
        }
        elapsed
    }
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("schedule and commit");
    group.sample_size(20).warm_up_time(Duration::from_millis(2)).measurement_time(Duration::from_millis(20));
    let cases = [
        (QueueOrder::Fcfs, 1_024, 10_000, 2_000),
        (QueueOrder::Fcfs, 8_192, 10_000, 2_000),
        (QueueOrder::Fcfs, 32_768, 10_000, 2_000),
        (QueueOrder::Fcfs, 1_024, 100, 100),
        (QueueOrder::Fcfs, 1_024, 1_000_000, 2_000),
        (QueueOrder::Fcfs, 1_024, 10_000, 1_000_000),
        (QueueOrder::Fair, 1_024, 10_000, 2_000),
        (QueueOrder::Fair, 1_024, 100, 100),
        (QueueOrder::Fair, 1_024, 1_000_000, 2_000),
    ];
    for (queue, context, waiting, registered) in cases {
        let order = if queue == QueueOrder::Fair { ", fair" } else { "" };
        let name = format!("{context} tokens, {waiting} waiting, {registered} registered{order}");
        let id = BenchmarkId::from_parameter(name);
        let mut timed = Timed(None, 0);
        group.bench_function(id, |b| {
            b.iter_custom(|n| timed.steps(n, || World::new(queue, context, waiting, registered)))
        });
    }
}

fn submit(c: &mut Criterion) {
    for (queue, name) in
        [(QueueOrder::Fcfs, "submit and cancel, 64 tokens"), (QueueOrder::Fair, "submit and cancel, 64 tokens, fair")]
    {
        submit_and_cancel(c, queue, name);
    }
}

fn submit_and_cancel(c: &mut Criterion, queue: QueueOrder, name_of_bench: &str) {
    let mut world = World::new(queue, 1_024, 10_000, 2_000);
    let params = Arc::new(SamplingParams::default());
    let names: Vec<_> = (0..2_000).map(name).collect();
    let mut next_id = 1 << 32;
    // The request is cancelled again at once, so that the queue keeps its length.
    c.bench_function(name_of_bench, |b| {
        b.iter_batched(
            || {
                next_id += 1;
                let adapter = Some(names[next_id as usize % names.len()].clone());
                let account = Account::default();
                NewRequest { id: RequestId(next_id), adapter, prompt: vec![5; 64], params: params.clone(), account }
            },
            |new| {
                let id = new.id;
                world.engine.submit(0, new).unwrap();
                world.engine.cancel(id);
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, pages, steps, submit);
criterion_main!(benches);
