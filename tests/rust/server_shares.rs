//! What one tenant may take of the limits on unfinished work, and what it leaves to others.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::io::BufReader;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use slora_core::{EngineConfig, QueueOrder};

use server_world::{HELD, Response, World, completion, read_head, with};

const FLOOD: [(&str, &str); 1] = [("authorization", "Bearer flood")];

/// A server with a key for each of two tenants.
struct Shop {
    world: World,
    _folder: tempfile::TempDir,
}

impl Shop {
    fn open(limits: Value, engine: EngineConfig, step_time: Duration) -> Self {
        Self::with_quota(json!({}), limits, engine, step_time)
    }

    /// `quota`: of the key that floods.
    fn with_quota(quota: Value, limits: Value, engine: EngineConfig, step_time: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.json");
        let key = |name: &str| {
            let sha256: String = Sha256::digest(name).iter().map(|byte| format!("{byte:02x}")).collect();
            json!({"sha256": sha256, "tenant": name})
        };
        let keys = [with(key("flood"), quota), key("light")];
        std::fs::write(&path, json!({"keys": keys}).to_string()).unwrap();
        let world = World::with(json!({"api_keys_file": path, "limits": limits}), engine, step_time);
        Self { world, _folder: folder }
    }

    fn complete(&self, key: &str) -> Response {
        self.world.ask(key, "POST", "/v1/completions", Some(&completion(6)))
    }

    fn send_flood(&self, body: &str) -> TcpStream {
        self.world.open("POST", "/v1/completions", &FLOOD, Some(body))
    }

    fn unfinished(&self) -> [u64; 3] {
        let load = self.world.ask("light", "GET", "/load", None).json();
        ["server_load", "prompt_tokens", "body_bytes"].map(|key| load[key].as_u64().unwrap())
    }

    fn wait_for(&self, what: &str, is_so: impl Fn([u64; 3]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so(self.unfinished()) {
            assert!(Instant::now() < deadline, "never so: {what}; {:?}", self.unfinished());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn is_refused(response: &Response) -> bool {
    let is_refused = response.status != 200;
    if is_refused {
        assert_eq!(response.error(), (429, "tenant_queue_full".into()));
        let wait_s: u64 = response.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=120).contains(&wait_s));
    }
    is_refused
}

#[test]
fn a_flood_of_ten_times_the_queue_takes_no_place_from_a_light_tenant() {
    const CAPACITY: usize = 16;
    for queue in [QueueOrder::Fair, QueueOrder::Fcfs] {
        let engine = EngineConfig { queue, max_running: 2, ..EngineConfig::default() };
        let limits = json!({"max_queued_requests": CAPACITY - 2});
        let shop = Shop::open(limits, engine, Duration::from_millis(1));
        let (is_over, num_refused, num_served) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
        let deadline = Instant::now() + Duration::from_secs(60);
        let insist = || {
            while !is_over.load(Ordering::Relaxed) && Instant::now() < deadline {
                if is_refused(&shop.complete("flood")) {
                    num_refused.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(20));
                } else {
                    num_served.fetch_add(1, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..10 * CAPACITY {
                scope.spawn(insist);
            }
            shop.wait_for("the flood has its share", |[requests, ..]| requests >= 12);
            let answers: Vec<Response> = (0..40).map(|_| shop.complete("light")).collect();
            is_over.store(true, Ordering::Relaxed);
            assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
        });
        let [refused, served] = [num_refused, num_served].map(AtomicUsize::into_inner);
        assert!(refused > 100 && served > 40, "{refused} refused, {served} served");
        shop.wait_for("everything was given back", |unfinished| unfinished == [0; 3]);
    }
}

#[test]
fn prompt_tokens_and_bytes_are_shared_too() {
    let limits = json!({"max_queued_tokens": 1_000, "max_queued_bytes": 10_000});
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let shop = Shop::open(limits, engine, HELD);
    let long = with(completion(20), json!({"prompt": vec![80; 100], "stream": true})).to_string();
    let sent: Vec<_> = (0..20).map(|_| shop.send_flood(&long)).collect();
    shop.world.wait_for_metric("light", "slora:rejected_requests_total{cause=\"tenant_queue_full\"} 12");
    shop.wait_for("eight of a hundred tokens each", |[_, tokens, bytes]| (tokens, bytes) == (800, 0));
    shop.world.set_step_time(Duration::from_millis(1));
    assert_eq!(shop.complete("light").status, 200);
    let refused = sent.into_iter().map(Response::read).filter(is_refused).count();
    assert_eq!(refused, 12);

    // Bodies that are announced and do not come.
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer flood\r\ncontent-type: \
                application/json\r\ncontent-length: 1000\r\n\r\n{";
    let held: Vec<_> = (0..20).map(|_| shop.world.raw(head)).collect();
    shop.wait_for("eight bodies of a thousand bytes", |[_, _, bytes]| bytes == 8_000);
    assert_eq!(shop.complete("light").status, 200);
    drop(held);
    shop.wait_for("everything was given back", |unfinished| unfinished == [0; 3]);
}

#[test]
fn what_clients_have_left_counts_until_the_engine_has_let_go_of_it() {
    let engine = EngineConfig { max_running: 2, max_waiting: 20, ..EngineConfig::default() };
    let shop = Shop::open(json!({}), engine, Duration::from_millis(500));
    let body = with(completion(200), json!({"stream": true})).to_string();
    let first = shop.send_flood(&body);
    shop.world.wait_until("a step runs", |stats| stats.running == 1);
    // Within a step or two, and none of them waits for an answer: the engine hears of all at once.
    for _ in 0..10 {
        let sent: Vec<_> = (0..8).map(|_| shop.send_flood(&body)).collect();
        std::thread::sleep(Duration::from_millis(20));
        drop(sent);
    }
    let [requests, ..] = shop.unfinished();
    assert!(requests <= 16, "{requests} of 20");
    shop.world.set_step_time(Duration::ZERO);
    assert_eq!(shop.complete("light").status, 200);
    drop(first);
    shop.wait_for("everything was given back", |unfinished| unfinished == [0; 3]);
}

#[test]
fn a_key_has_its_place_again_when_the_engine_has_let_go() {
    let quota = json!({"concurrency": 1});
    let shop = Shop::with_quota(quota, json!({}), EngineConfig::default(), Duration::from_secs(30));
    let left = shop.send_flood(&with(completion(200), json!({"stream": true})).to_string());
    assert_eq!(read_head(&mut BufReader::new(&left)).0, 200, "a step runs that has it");
    drop(left);
    let is_seen = || {
        let metrics = shop.world.ask("light", "GET", "/metrics", None).body;
        let mut finished = metrics.lines().filter(|line| line.starts_with("vllm:request_success_total"));
        finished.any(|line| line.contains("finished_reason=\"abort\"") && line.ends_with(" 1"))
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_seen() {
        assert!(Instant::now() < deadline, "the server has not seen that the client has left");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(shop.complete("flood").error(), (429, "rate_limit_exceeded".into()));
    shop.world.set_step_time(Duration::ZERO);
    while shop.complete("flood").status != 200 {
        assert!(Instant::now() < deadline, "the place never comes back");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn whatever_clients_do_all_places_come_back() {
    let engine = EngineConfig { max_running: 3, ..EngineConfig::default() };
    let shop = Shop::with_quota(json!({"concurrency": 4}), json!({}), engine, Duration::from_millis(2));
    let kinds = [
        json!({}),
        json!({"stream": true}),
        json!({"n": 3, "stream": true}),
        json!({"n": 2, "stop": ["c"]}),
        json!({"prompt": vec!["x"; 4], "stop": ["b"], "stream": true}),
        json!({"model": "nobody"}),
        json!({"prompt": "x".repeat(100), "stream": true}),
    ];
    let bodies = kinds.map(|fields| with(completion(40), fields).to_string());
    let mut statuses = std::collections::BTreeMap::<u16, usize>::new();
    for i in 0..400 {
        let stream = shop.send_flood(&bodies[i % bodies.len()]);
        // Some leave at once, some later, some stay.
        std::thread::sleep(Duration::from_millis([0, 0, 1, 3, 9][i % 5]));
        if i % 3 == 0 {
            *statuses.entry(Response::read(stream).status).or_default() += 1;
        }
    }
    assert!([200, 404, 429].iter().all(|status| statuses.contains_key(status)), "{statuses:?}");
    let whole = with(completion(1), json!({"n": 4}));
    let deadline = Instant::now() + Duration::from_secs(60);
    while shop.world.ask("flood", "POST", "/v1/completions", Some(&whole)).status != 200 {
        assert!(Instant::now() < deadline, "a place never comes back");
        std::thread::sleep(Duration::from_millis(5));
    }
    shop.wait_for("everything was given back", |unfinished| unfinished == [0; 3]);
}

#[test]
fn whoever_has_its_answer_may_ask_again_at_once() {
    let shop = Shop::with_quota(json!({"concurrency": 1}), json!({}), EngineConfig::default(), Duration::ZERO);
    let stopped = with(completion(200), json!({"stop": ["c"]}));
    for body in [completion(6), stopped] {
        for _ in 0..50 {
            let answer = shop.world.ask("flood", "POST", "/v1/completions", Some(&body));
            assert_eq!(answer.status, 200, "{answer:?}");
        }
    }
}

#[test]
fn a_refused_tenant_does_not_keep_the_connections() {
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let limits = json!({"max_queued_requests": 9, "max_connections": 20});
    let shop = Shop::open(limits, engine, HELD);
    let num_tasks = shop.world.server.num_tasks();
    let ask = || {
        let body = completion(100).to_string();
        let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer flood\r\ncontent-type: \
                    application/json";
        shop.world.raw(&format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
    };
    let held: Vec<TcpStream> = (0..8).map(|_| ask()).collect();
    shop.wait_for("the flood has its share", |[requests, ..]| requests == 8);
    let deadline = Instant::now() + Duration::from_secs(60);
    while shop.world.server.num_tasks() > num_tasks + held.len() {
        assert!(Instant::now() < deadline, "a connection that has ended is still there");
        std::thread::sleep(Duration::from_millis(1));
    }
    let refused = |stream: TcpStream| {
        let (status, headers) = read_head(&mut BufReader::new(&stream));
        (stream, status, headers.contains(&("connection".into(), "close".into())))
    };
    let kept = [ask(), ask()].map(refused);
    assert!(kept.iter().all(|(_, status, closes)| *status == 429 && !closes), "{kept:?}");
    // Ten are open: every further one is one too many.
    for _ in 0..40 {
        let (stream, status, closes) = refused(ask());
        assert!(status == 429 && closes);
        drop(stream);
    }
    shop.world.set_step_time(Duration::ZERO);
    assert_eq!(shop.complete("light").status, 200);
    drop(held);
}

#[test]
fn one_tenant_alone_may_take_everything() {
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let config = json!({"api_keys": ["only"], "admin_keys": ["admin"], "limits": {"max_queued_requests": 9}});
    let world = World::with(config, engine, HELD);
    let bearer = [("authorization", "Bearer only")];
    let body = completion(2).to_string();
    let sent: Vec<_> = (0..10).map(|_| world.open("POST", "/v1/completions", &bearer, Some(&body))).collect();
    world.wait_for_metric("admin", "slora:unfinished_requests 10");
    let refused = world.ask("only", "POST", "/v1/completions", Some(&completion(2)));
    assert_eq!(refused.error(), (503, "server_overloaded".into()));
    world.set_step_time(Duration::ZERO);
    assert!(sent.into_iter().all(|stream| Response::read(stream).status == 200));
}
