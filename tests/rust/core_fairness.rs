//! Who gets how much, and how long one waits: whole engines under load, with a fair queue and with priorities.
//!
//! An account's *service* is what it was given: prompt tokens at admission plus twice the generated ones, divided by its
//! weight.
#![allow(clippy::unwrap_used, reason = "a test")]

mod core_world;

use std::collections::HashMap;
use std::sync::Arc;

use core_world::random::Random;
use slora_core::{
    Account, AdapterSpec, Engine, EngineConfig, Events, NewRequest, QueueOrder, RequestId, SamplingParams, SubmitError,
};

fn config(queue: QueueOrder) -> EngineConfig {
    EngineConfig {
        num_pages: 256,
        num_host_pages: 64,
        page_tokens: 4,
        max_batch_tokens: 32,
        max_running: 8,
        max_adapters: 4,
        max_context: 128,
        max_adapter_pages: 4,
        descriptor_words: 1,
        vocab_size: 100,
        max_loads: 1,
        queue,
        ..EngineConfig::default()
    }
}

fn tenant(name: &str, weight: f64, priority: i32) -> Account {
    Account { tenant: Some(name.into()), weight, priority }
}

/// A request as its client knows it.
struct Client {
    account: usize,
    prompt_len: u32,
    is_admitted: bool,
}

/// An engine whose executor always has the next token, and what it has given to whom.
struct Load {
    engine: Engine,
    buffer: Vec<i32>,
    events: Events,
    accounts: Vec<Account>,
    clients: HashMap<RequestId, Client>,
    service: Vec<f64>,
    tokens: Vec<u64>,
    waiting: Vec<u32>,
    next_id: u64,
    step: u32,
    /// The order in which requests were admitted for the first time.
    admitted: Vec<RequestId>,
    ended: Vec<RequestId>,
}

impl Load {
    fn new(config: EngineConfig, accounts: &[Account]) -> Self {
        let engine = Engine::new(config).unwrap();
        let n = accounts.len();
        Self {
            buffer: vec![0; engine.layout().num_words()],
            engine,
            events: Events::default(),
            accounts: accounts.to_vec(),
            clients: HashMap::new(),
            service: vec![0.0; n],
            tokens: vec![0; n],
            waiting: vec![0; n],
            next_id: 0,
            step: 0,
            admitted: Vec::new(),
            ended: Vec::new(),
        }
    }

    fn add_account(&mut self, account: Account) {
        self.accounts.push(account);
        self.service.push(0.0);
        self.tokens.push(0);
        self.waiting.push(0);
    }

    fn register(&mut self, name: &str, num_pages: u32) {
        let page_layers = (0..num_pages as u16).collect();
        let spec = AdapterSpec { num_pages, bytes: 1, words: Arc::new([0]), page_layers };
        self.engine.register(name.into(), spec, false).unwrap();
    }

    fn submit(&mut self, account: usize, adapter: Option<&str>, prompt_len: u32, max_tokens: u32) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let params = SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() };
        let new = NewRequest {
            id,
            adapter: adapter.map(Arc::from),
            prompt: vec![1; prompt_len as usize],
            params: params.into(),
            account: self.accounts[account].clone(),
        };
        self.engine.submit(0, new).unwrap();
        self.clients.insert(id, Client { account, prompt_len, is_admitted: false });
        self.waiting[account] += 1;
        id
    }

    /// One step; the loads that it orders are done before the next.
    fn step(&mut self) -> bool {
        self.step += 1;
        let counts = self.engine.schedule(0, &mut self.buffer);
        if let Some(counts) = &counts {
            self.engine.copies_done(counts.step);
            self.engine.commit(0, counts.step, &vec![7; counts.num_sampled as usize]);
        }
        let mut has_loaded = false;
        while let Some(load) = self.engine.next_load() {
            self.engine.load_finished(load.adapter);
            has_loaded = true;
        }
        self.engine.take_events(&mut self.events);
        for id in &self.events.admitted {
            let client = self.clients.get_mut(id).unwrap();
            if !std::mem::replace(&mut client.is_admitted, true) {
                self.waiting[client.account] -= 1;
                self.service[client.account] += f64::from(client.prompt_len) / self.accounts[client.account].weight;
                self.admitted.push(*id);
            }
        }
        for event in &self.events.tokens {
            let account = self.clients[&event.request].account;
            self.service[account] += 2.0 / self.accounts[account].weight;
            self.tokens[account] += 1;
        }
        self.ended.extend(self.events.ended.iter().map(|event| event.request));
        self.engine.check();
        counts.is_some() || has_loaded
    }

    fn run_until(&mut self, mut is_done: impl FnMut(&Self) -> bool) {
        while !is_done(self) {
            assert!(self.step(), "somebody waits for ever");
        }
    }

    fn has_ended(&self, id: RequestId) -> bool {
        self.ended.contains(&id)
    }
}

/// Two accounts that always have requests waiting. Returns by how much the difference of their services changed at most,
/// between any two moments, and the bound: U = (P + 2·R·O) / weight, summed over both.
///
/// An account is admitted only while its counter is the least, or as low as the other's. From its last admission on, the
/// counter can rise by this prompt (at most P tokens), and by the output (at most O tokens each) of at most R requests
/// that run: preempted ones are resumed before anybody else is admitted, so no more than R were ever admitted and have
/// not ended.
fn service_gap(seed: u64, queue: QueueOrder) -> (f64, f64, u64) {
    let random = &mut Random::new(seed);
    let (max_prompt, max_output) = (random.between(1, 40), random.between(1, 24));
    let config = EngineConfig {
        // As few as the longest request, or plenty; a prompt may take many steps.
        num_pages: random.pick(&[20, 30, 256]),
        max_batch_tokens: random.pick(&[3, 8, 64]),
        max_running: random.between(1, 8),
        ..config(queue)
    };
    let accounts = ["a", "b"].map(|name| tenant(name, random.pick(&[0.1, 1.0, 1.0, 3.0]), 0));
    let mut load = Load::new(config, &accounts);
    let (mut least, mut most) = (0f64, 0f64);
    for _ in 0..1_500 {
        // One of them floods the queue; the other always has as many as one step may admit.
        for (account, num_waiting) in [(0, 60), (1, 8 + random.below(3))] {
            while load.waiting[account] < num_waiting {
                load.submit(account, None, random.between(1, max_prompt), random.between(1, max_output));
            }
        }
        load.step();
        let gap = load.service[0] - load.service[1];
        (least, most) = (least.min(gap), most.max(gap));
    }
    let max_running = load.engine.config().max_running;
    let most_each = f64::from(max_prompt + 2 * max_running * max_output);
    let bound = accounts.iter().map(|account| most_each / account.weight).sum();
    (most - least, bound, load.engine.stats().preemptions)
}

#[test]
fn two_accounts_that_always_wait_are_served_alike_within_the_bound() {
    let mut num_preemptions = 0;
    for seed in 0..60 {
        let (gap, bound, preemptions) = service_gap(seed, QueueOrder::Fair);
        // Weights are rounded to 2⁻²⁰.
        assert!(gap <= bound * 1.001, "seed {seed}: a gap of {gap}, the bound is {bound}");
        num_preemptions += preemptions;
    }
    assert!(num_preemptions > 200, "pages are short in some worlds: {num_preemptions}");
}

#[test]
fn in_the_order_of_arrival_the_bound_does_not_hold() {
    let gaps = (0..20).map(|seed| service_gap(seed, QueueOrder::Fcfs));
    let num_beyond = gaps.filter(|(gap, bound, _)| gap > bound).count();
    assert!(num_beyond > 10, "the bound is tight enough to tell: {num_beyond} of 20 beyond");
}

#[test]
fn weights_of_1_to_3_give_1_to_3_of_the_tokens() {
    let mut load = Load::new(config(QueueOrder::Fair), &[tenant("a", 1.0, 0), tenant("b", 3.0, 0)]);
    for _ in 0..2_000 {
        for account in 0..2 {
            while load.waiting[account] < 4 {
                load.submit(account, None, 8, 16);
            }
        }
        load.step();
    }
    let ratio = load.tokens[1] as f64 / load.tokens[0] as f64;
    assert!((2.9..3.1).contains(&ratio), "{ratio}: {:?}", load.tokens);
}

/// Steps that a request waits for its first row beside another account's 1,000 requests, again and again.
fn longest_wait(queue: QueueOrder) -> u32 {
    let mut load = Load::new(config(queue), &[tenant("heavy", 1.0, 0), tenant("light", 1.0, 0)]);
    for i in 0..1_000 {
        load.submit(0, None, 1 + i % 16, 1 + i % 32);
    }
    let mut longest = 0;
    for i in 0..20 {
        for _ in 0..i {
            load.step();
        }
        let (id, submitted) = (load.submit(1, None, 16, 32), load.step);
        load.run_until(|load| load.admitted.contains(&id));
        longest = longest.max(load.step - submitted);
        load.run_until(|load| load.has_ended(id));
    }
    longest
}

#[test]
fn a_light_account_waits_for_one_place_however_long_the_others_queue_is() {
    // The longest output is 32 tokens, and a step's rows hold two of the longest prompts: within so many steps somebody
    // ends, and the light account is next.
    let (fair, fcfs) = (longest_wait(QueueOrder::Fair), longest_wait(QueueOrder::Fcfs));
    assert!(fair <= 32 + 2, "{fair} steps");
    assert!(fcfs > 1_000, "{fcfs} steps in the order of arrival");
}

#[test]
fn without_tenants_accounts_are_adapters_and_the_base_is_one_too() {
    let mut load = Load::new(config(QueueOrder::Fair), &[Account::default()]);
    load.register("x", 1);
    for _ in 0..100 {
        load.submit(0, None, 8, 8);
    }
    load.step();
    let id = load.submit(0, Some("x"), 8, 8);
    load.run_until(|load| load.has_ended(id));
    assert!(load.admitted.len() <= 20, "{} requests before it", load.admitted.len());
}

#[test]
fn an_adapter_is_loaded_for_a_light_account_before_those_of_a_long_queue() {
    let position = |queue| {
        let mut load = Load::new(config(queue), &[tenant("heavy", 1.0, 0), tenant("light", 1.0, 0)]);
        (0..60).for_each(|i| load.register(&format!("heavy-{i}"), 1));
        load.register("light", 1);
        for i in 0..60 {
            load.submit(0, Some(&format!("heavy-{i}")), 4, 4);
        }
        load.step();
        let id = load.submit(1, Some("light"), 4, 4);
        load.run_until(|load| load.has_ended(id));
        load.admitted.iter().position(|other| *other == id).unwrap()
    };
    let (fair, fcfs) = (position(QueueOrder::Fair), position(QueueOrder::Fcfs));
    assert!(fair <= 4, "{fair} requests before it");
    assert_eq!(fcfs, 60);
}

#[test]
fn a_long_queue_has_its_share_of_the_loads() {
    let accounts = ["heavy", "a", "b", "c"].map(|name| tenant(name, 1.0, 0));
    let mut load = Load::new(config(QueueOrder::Fair), &accounts);
    let mut num_adapters = 0;
    let mut submit_cold = |load: &mut Load, account| {
        let name = format!("cold-{num_adapters}");
        num_adapters += 1;
        load.register(&name, 1);
        load.submit(account, Some(&name), 4, 1);
    };
    (0..100).for_each(|_| submit_cold(&mut load, 0));
    let mut num_served = [0; 4];
    while load.admitted.len() < 120 {
        for account in 1..4 {
            if load.waiting[account] == 0 {
                submit_cold(&mut load, account);
            }
        }
        load.step();
    }
    load.admitted.iter().for_each(|id| num_served[load.clients[id].account] += 1);
    assert!(num_served[0] >= 24 && num_served[1..].iter().all(|n| *n >= 24), "{num_served:?}");
}

#[test]
fn a_long_queue_is_not_passed_over_for_ever_by_ever_new_accounts() {
    let mut load = Load::new(config(QueueOrder::Fair), &[tenant("heavy", 1.0, 0)]);
    for i in 0..40 {
        load.register(&format!("heavy-{i}"), 1);
        load.submit(0, Some(&format!("heavy-{i}")), 4, 1);
    }
    for i in 1..60 {
        load.add_account(tenant(&format!("new-{i}"), 1.0, 0));
        load.register(&format!("new-{i}"), 1);
        load.submit(i, Some(&format!("new-{i}")), 4, 1);
        load.step();
    }
    let num_heavy = load.admitted.iter().filter(|id| load.clients[id].account == 0).count();
    // A new account a step is as much as can be loaded, so ever more of them wait, each of whom has a share too.
    assert!((8..30).contains(&num_heavy), "{num_heavy} of {}", load.admitted.len());
}

#[test]
fn loads_that_were_asked_for_and_cancelled_do_not_count() {
    let mut load = Load::new(config(QueueOrder::Fair), &[tenant("a", 1.0, 0), tenant("b", 1.0, 0)]);
    (0..8).for_each(|i| load.register(&format!("cold-{i}"), 1));
    // Somebody is always there.
    load.submit(1, None, 4, 60);
    let asked: Vec<RequestId> = (0..6).map(|i| load.submit(0, Some(&format!("cold-{i}")), 4, 1)).collect();
    load.step();
    for id in asked {
        assert!(load.engine.cancel(id));
    }
    load.step();
    load.submit(0, Some("cold-6"), 4, 1);
    let other = load.submit(1, Some("cold-7"), 4, 1);
    load.run_until(|load| load.admitted.contains(&other));
    assert_eq!(load.admitted.len(), 3, "the other account came later");
}

#[test]
fn with_fewer_rows_than_adapters_everybody_has_a_turn() {
    for queue in [QueueOrder::Fcfs, QueueOrder::Fair] {
        let mut load = Load::new(EngineConfig { max_adapters: 1, ..config(queue) }, &[Account::default()]);
        ["a", "b"].iter().for_each(|name| load.register(name, 1));
        load.submit(0, Some("a"), 4, 8);
        let id = load.submit(0, Some("b"), 4, 8);
        // a, b, a, a, a, …
        let mut num_after = 0;
        while !load.has_ended(id) {
            load.submit(0, Some("a"), 4, 8);
            num_after += 1;
            assert!(num_after < 40 && load.step(), "b waits for ever");
        }
    }
}

#[test]
fn higher_priorities_are_admitted_first_in_either_order() {
    for queue in [QueueOrder::Fcfs, QueueOrder::Fair] {
        let accounts = [tenant("a", 1.0, 0), tenant("b", 1.0, 5), tenant("c", 1.0, -5)];
        let mut load = Load::new(EngineConfig { max_running: 2, ..config(queue) }, &accounts);
        let ids: Vec<RequestId> = (0..30).map(|i| load.submit(i % 3, None, 4, 4)).collect();
        load.run_until(|load| load.ended.len() == 30);
        let account = |id: &RequestId| ids.iter().position(|other| other == id).unwrap() % 3;
        let order: Vec<usize> = load.admitted.iter().map(account).collect();
        assert!(order.chunks(10).zip([1, 0, 2]).all(|(part, account)| part.iter().all(|one| *one == account)));
    }
}

#[test]
fn the_youngest_of_the_lowest_priority_gives_way() {
    for queue in [QueueOrder::Fcfs, QueueOrder::Fair] {
        let accounts = [tenant("low", 1.0, -1), tenant("high", 1.0, 1)];
        let tight = EngineConfig { num_pages: 12, page_tokens: 2, max_context: 24, max_running: 4, ..config(queue) };
        let mut load = Load::new(tight, &accounts);
        // Admitted while there is room, the low ones first; together they need twice the pool.
        let low: Vec<RequestId> = (0..2).map(|_| load.submit(0, None, 2, 10)).collect();
        load.step();
        let high: Vec<RequestId> = (0..2).map(|_| load.submit(1, None, 2, 10)).collect();
        load.run_until(|load| load.ended.len() == 4);
        assert!(load.engine.stats().preemptions > 0);
        let place = |id: &RequestId| load.ended.iter().position(|other| other == id).unwrap();
        assert!(high.iter().all(|id| place(id) < place(&low[1])), "{:?}", load.ended);
        assert!(place(&low[0]) < place(&low[1]), "the older one keeps its place");
    }
}

#[test]
fn a_lower_priority_is_not_admitted_in_place_of_one_that_gave_way() {
    let random = &mut Random::new(3);
    for queue in [QueueOrder::Fcfs, QueueOrder::Fair] {
        let accounts = [tenant("a", 1.0, 1), tenant("b", 1.0, 1), tenant("low", 1.0, 0)];
        let tight = EngineConfig { num_pages: 24, page_tokens: 2, max_context: 48, max_running: 6, ..config(queue) };
        let mut load = Load::new(tight, &accounts);
        for i in 0..60 {
            load.submit(i % 3, None, random.between(1, 8), random.between(8, 32));
        }
        load.run_until(|load| load.ended.len() == 60);
        assert!(load.engine.stats().preemptions > 20, "{}", load.engine.stats().preemptions);
        let is_low = |id: &RequestId| id.0 % 3 == 2;
        let first_low = load.admitted.iter().position(is_low).unwrap();
        assert!(!load.admitted[first_low..].iter().any(|id| !is_low(id)), "all others were admitted before");
        assert!(load.ended[..30].iter().all(|id| !is_low(id)));
    }
}

#[test]
fn an_account_out_of_range_is_refused() {
    let mut engine = Engine::new(config(QueueOrder::Fair)).unwrap();
    for (account, message) in [
        (tenant("a", f64::NAN, 0), "weight is NaN, it must be 0.01 to 100"),
        (tenant("a", 1.0, 101), "priority is 101, it must be -100 to 100"),
    ] {
        let (id, params) = (RequestId(1), SamplingParams::default().into());
        let error = engine.submit(0, NewRequest { id, adapter: None, prompt: vec![1], params, account }).unwrap_err();
        assert!(matches!(error, SubmitError::Account(_)));
        assert_eq!(error.to_string(), message);
    }
    engine.check();
}
