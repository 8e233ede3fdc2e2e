//! Weights and priorities of keys, as their tenants feel them over HTTP.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use slora_core::{EngineConfig, QueueOrder};
use slora_server::{Server, ServerConfig};

use server_world::{Response, World, completion};

/// A key by its text, which is also its tenant's name, with further fields.
fn key(name: &str, fields: Value) -> Value {
    let sha256: String = Sha256::digest(name).iter().map(|byte| format!("{byte:02x}")).collect();
    server_world::with(json!({"sha256": sha256, "tenant": name}), fields)
}

fn write(path: &Path, keys: &[Value]) {
    // Never seen half-written.
    let whole = path.with_extension("new");
    std::fs::write(&whole, json!({"keys": keys}).to_string()).unwrap();
    std::fs::rename(whole, path).unwrap();
}

/// Long enough for clients on a busy machine to be back before it is their turn.
const STEP_TIME: Duration = Duration::from_millis(5);
/// While clients come, few steps pass.
const SLOW_STEP_TIME: Duration = Duration::from_millis(50);
/// Steps that pass while they come, or while an answer is on its way.
const MAX_WAY: u64 = 150;

struct Shop {
    world: World,
    keys: PathBuf,
    _folder: tempfile::TempDir,
}

impl Shop {
    fn open(queue: QueueOrder, max_running: u32, keys: &[Value]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.json");
        write(&path, keys);
        let engine = EngineConfig { queue, max_running, ..EngineConfig::default() };
        let world = World::with(json!({"api_keys_file": path}), engine, STEP_TIME);
        Self { world, keys: path, _folder: folder }
    }

    fn complete(&self, key: &str, max_tokens: u32) -> Response {
        self.world.ask(key, "POST", "/v1/completions", Some(&completion(max_tokens)))
    }

    fn num_steps(&self) -> u64 {
        self.world.runtime.snapshot().engine.steps
    }

    /// Steps that a request of `key` takes from end to end, beside 60 of another tenant's that came before it.
    fn steps_beside_a_flood(&self, key: &str) -> u64 {
        let open = |key: &str, max_tokens: u32| {
            let (bearer, body) = (format!("Bearer {key}"), completion(max_tokens).to_string());
            self.world.open("POST", "/v1/completions", &[("authorization", &bearer)], Some(&body))
        };
        self.world.set_step_time(SLOW_STEP_TIME);
        let flood: Vec<_> = (0..60).map(|_| open("flood", 30)).collect();
        self.world.wait_until("the flood is here", |stats| stats.submitted == 60);
        let asked = open(key, 8);
        self.world.wait_until("the other one is here, too", |stats| stats.submitted == 61);
        let start = self.num_steps();
        self.world.set_step_time(STEP_TIME);
        assert_eq!(Response::read(asked).status, 200);
        let steps = self.num_steps() - start;
        self.world.set_step_time(Duration::ZERO);
        assert!(flood.into_iter().all(|stream| Response::read(stream).status == 200), "nobody is forgotten");
        steps
    }
}

#[test]
fn weights_of_1_to_3_are_served_1_to_3_of_the_tokens() {
    const NUM_CLIENTS: usize = 12;
    const NUM_REQUESTS: u64 = 300;
    let keys = [key("one", json!({"weight": 1})), key("three", json!({"weight": 3.0}))];
    let shop = Shop::open(QueueOrder::Fair, 4, &keys);
    let (tokens, num_done) = ([AtomicU64::new(0), AtomicU64::new(0)], AtomicU64::new(0));
    let ask_again = |tenant: usize| {
        while num_done.load(Ordering::Relaxed) < NUM_REQUESTS {
            let answer = shop.complete(["one", "three"][tenant], 12).json();
            let num_tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
            // Afterwards nobody asks again, and no queue is full any more.
            if num_done.fetch_add(1, Ordering::Relaxed) < NUM_REQUESTS {
                tokens[tenant].fetch_add(num_tokens, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for client in 0..2 * NUM_CLIENTS {
            scope.spawn(move || ask_again(client % 2));
        }
    });
    let [one, three] = tokens.map(|tokens| tokens.into_inner() as f64);
    assert!((2.5..3.5).contains(&(three / one)), "{three} to {one} tokens");
}

#[test]
fn one_tenants_flood_holds_up_another_in_the_order_of_arrival_only() {
    let keys = [key("flood", json!({})), key("light", json!({}))];
    let [fair, fcfs] =
        [QueueOrder::Fair, QueueOrder::Fcfs].map(|queue| Shop::open(queue, 2, &keys).steps_beside_a_flood("light"));
    // One of two places is free within 30 steps, then come the request's own.
    assert!(fair < 30 + 8 + MAX_WAY, "{fair} steps");
    assert!(
        fcfs > 60 * 30 / 2 - 30 - MAX_WAY && fcfs > 3 * fair,
        "{fcfs} steps in the order of arrival, {fair} with a fair queue"
    );
}

#[test]
fn a_keys_priority_works_in_either_order() {
    let keys = [key("flood", json!({})), key("urgent", json!({"priority": 5}))];
    for queue in [QueueOrder::Fair, QueueOrder::Fcfs] {
        let steps = Shop::open(queue, 2, &keys).steps_beside_a_flood("urgent");
        assert!(steps < 30 + 8 + MAX_WAY, "{steps} steps, {queue:?}");
    }
}

#[test]
fn a_weight_without_a_fair_queue_is_refused_at_the_start_and_later_changes_nothing() {
    let shop = Shop::open(QueueOrder::Fcfs, 2, &[key("old", json!({"priority": 1}))]);
    let config = ServerConfig { api_keys_file: Some(shop.keys.clone()), port: 0, ..ServerConfig::default() };
    assert!(Server::check(&config, QueueOrder::Fcfs).is_ok());
    write(&shop.keys, &[key("new", json!({"weight": 2}))]);
    assert!(Server::check(&config, QueueOrder::Fair).is_ok());
    let refusal = Server::check(&config, QueueOrder::Fcfs).unwrap_err().to_string();
    assert!(refusal.contains("keys[0]: weight is 2") && refusal.contains("hint: start the server with --queue fair"));
    let refusal = Server::start(config, shop.world.runtime.clone()).map(drop).unwrap_err().to_string();
    assert!(refusal.contains("keys[0]: weight is 2"), "{refusal}");
    // Twice the time after which a good file is read.
    let deadline = Instant::now() + Duration::from_millis(1_200);
    while Instant::now() < deadline {
        assert_eq!([shop.complete("old", 1).status, shop.complete("new", 1).status], [200, 401]);
        std::thread::sleep(Duration::from_millis(100));
    }
    write(&shop.keys, &[key("new", json!({}))]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while shop.complete("new", 1).status != 200 {
        assert!(Instant::now() < deadline, "the mended file was not read");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(shop.complete("old", 1).status, 401);
}
