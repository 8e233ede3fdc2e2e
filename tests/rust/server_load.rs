//! The load generator against a real server over real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slora_core::EngineConfig;
use slora_server::Secret;
use slora_server::load::{Arrivals, Load, LoadConfig, Model, Observer, Popularity, Report, Span};

use server_world::{World, copy_adapter};

fn config(world: &World) -> LoadConfig {
    LoadConfig { url: format!("http://{}", world.server.address()), duration_s: 60.0, ..LoadConfig::default() }
}

fn run(config: LoadConfig) -> Report {
    Load::start(config, None).unwrap().finish().unwrap()
}

fn with_step_time(config: Value, step_us: u64) -> World {
    World::with(config, EngineConfig::default(), Duration::from_micros(step_us))
}

fn base(name: &str) -> Model {
    Model { name: name.into(), path: None }
}

#[test]
fn every_connection_asks_again_until_enough_was_asked() {
    let world = World::new();
    let closed = Arrivals::Closed { connections: 4 };
    let report = run(LoadConfig { num_requests: Some(50), arrivals: closed, ..config(&world) });
    assert_eq!((report.sent, report.completed, report.broken, report.unfinished), (50, 50, 0, 0), "{report:?}");
    assert_eq!(report.statuses, [(200, 50)].into());
    assert_eq!((report.end_to_end.count, report.time_to_first_token.count), (50, 0), "nothing streams");
    let tokens = report.tokens_per_s * report.elapsed_s;
    assert!((tokens - 400.0).abs() < 0.01, "{tokens} tokens");
    assert!(report.requests_per_s > 0.0 && report.goodput_per_s == report.requests_per_s);
}

#[test]
fn streams_are_timed_token_by_token() {
    let world = with_step_time(json!({}), 40_000);
    let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
    let into = seen.clone();
    let observer: Observer = Arc::new(move |event, _| {
        let event: Value = serde_json::from_slice(event).unwrap();
        into.lock().unwrap().extend(event["choices"][0]["text"].as_str().unwrap().bytes());
    });
    let config = LoadConfig {
        stream: true,
        num_requests: Some(6),
        input_tokens: Span::exactly(3),
        output_tokens: Span::exactly(5),
        arrivals: Arrivals::Closed { connections: 2 },
        slo_itl_s: 0.001,
        ..config(&world)
    };
    let report = Load::start(config, Some(observer)).unwrap().finish().unwrap();
    assert_eq!((report.completed, report.broken, report.first_error.as_deref()), (6, 0, None), "{report:?}");
    assert_eq!((report.time_to_first_token.count, report.inter_token.count), (6, 24));
    // Of a reader that is held up some come together.
    assert!(report.inter_token.mean_ms >= 20.0 && report.time_to_first_token.p50_ms >= 35.0, "{report:?}");
    assert_eq!(report.goodput_per_s, 0.0, "steps take longer than the objective");
    let mut letters = seen.lock().unwrap().clone();
    letters.sort_unstable();
    assert_eq!(letters, b"ccccccddddddeeeeeeffffffgggggg");
    let in_windows: u64 = report.windows.iter().map(|window| window.inter_token.count).sum();
    assert_eq!(in_windows, 24);
    assert_eq!(report.cumulative_inter_token.last().unwrap().1, 1.0);
}

#[test]
fn arrivals_keep_their_rate_whatever_the_server_does() {
    let world = with_step_time(json!({}), 50_000);
    let config = LoadConfig {
        arrivals: Arrivals::Gamma { rate: 200.0, cv: 2.0 },
        duration_s: 1.0,
        output_tokens: Span::exactly(4),
        seed: 5,
        ..config(&world)
    };
    let report = run(config.clone());
    assert!((100..=320).contains(&report.sent), "{} sent", report.sent);
    assert_eq!(report.completed, report.sent);
    assert_eq!(run(config).sent, report.sent, "a seed sends the same requests");
}

#[test]
fn lengths_and_names_are_drawn_from_their_ranges() {
    let world = World::configured(json!({"served_model_names": ["popular", "rare"]}));
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let into = asked.clone();
    let observer: Observer = Arc::new(move |event, _| {
        let event: Value = serde_json::from_slice(event).unwrap();
        into.lock().unwrap().push(event["model"].as_str().unwrap().into());
    });
    let config = LoadConfig {
        models: vec![base("popular"), base("rare")],
        popularity: Popularity::Zipf { alpha: 3.0 },
        stream: true,
        num_requests: Some(200),
        output_tokens: Span { min: 1, max: 3 },
        ..config(&world)
    };
    let report = Load::start(config, Some(observer)).unwrap().finish().unwrap();
    let asked = asked.lock().unwrap();
    let rare = asked.iter().filter(|name| *name == "rare").count() as f64 / asked.len() as f64;
    assert!((0.03..0.25).contains(&rare), "a ninth of the requests: {rare}");
    let per_request = report.tokens_per_s * report.elapsed_s / 200.0;
    assert!((1.7..2.3).contains(&per_request), "{per_request}");
}

#[test]
fn clients_leave_and_the_engine_is_empty_afterwards() {
    let world = with_step_time(json!({}), 1000);
    for stream in [true, false] {
        let config = LoadConfig {
            stream,
            cancel: 0.5,
            num_requests: Some(200),
            output_tokens: Span::exactly(20),
            arrivals: Arrivals::Closed { connections: 16 },
            ..config(&world)
        };
        let report = run(config);
        assert_eq!((report.sent, report.broken), (200, 0), "{report:?}");
        assert!(report.left > 40 && report.completed > 60, "stream: {stream}: {report:?}");
        assert_eq!(report.left + report.completed, 200);
    }
    world.wait_until("nothing runs", |stats| stats.running + stats.waiting + stats.kv_pages == 0);
}

#[test]
fn refusals_are_counted_and_shown() {
    let world = World::configured(json!({"api_keys": ["user"]}));
    let report = run(LoadConfig { num_requests: Some(10), ..config(&world) });
    assert_eq!((report.completed, report.broken, report.refusals.count), (0, 0, 10));
    assert_eq!(report.statuses, [(401, 10)].into());
    let error = report.first_error.unwrap();
    assert!(error.starts_with("401: ") && error.contains("invalid_api_key"), "{error}");
    let key = Some(Secret("user".into()));
    let report = run(LoadConfig { num_requests: Some(10), api_key: key, ..config(&world) });
    assert_eq!(report.completed, 10);
    let shown = serde_json::to_string(&report).unwrap();
    assert!(!shown.contains("user"), "keys are not part of a report: {shown}");
}

#[test]
fn adapters_come_and_go_under_load_and_none_stays() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["reverse", "upper"] {
        copy_adapter(name, &folder.path().join(name));
    }
    let world = with_step_time(json!({"adapter_dir": folder.path(), "admin_keys": ["admin"]}), 500);
    let adapter = |name: &str| Model { name: name.into(), path: Some(folder.path().join(name).display().to_string()) };
    let config = LoadConfig {
        models: vec![adapter("reverse"), adapter("upper")],
        api_key: Some(Secret("admin".into())),
        admin_key: Some(Secret("admin".into())),
        churn_per_s: 20.0,
        arrivals: Arrivals::Closed { connections: 4 },
        duration_s: 3.0,
        ..config(&world)
    };
    let report = run(config.clone());
    let churn = report.churn.unwrap();
    assert!(churn.registered > 5 && churn.registered == churn.unloaded, "{churn:?}");
    assert_eq!((churn.failed, churn.first_error, churn.registering.count), (0, None, churn.registered));
    assert_eq!((report.completed, report.broken), (report.sent, 0), "{:?}", report.first_error);
    assert!(world.runtime.snapshot().engine.loads > 5, "copies are loaded from disk");
    let names: Vec<_> = world.runtime.adapters().unwrap().into_iter().map(|adapter| adapter.info.name).collect();
    assert_eq!(names.len(), 2, "{names:?}");

    let elsewhere = LoadConfig { models: vec![Model { path: Some("/nowhere".into()), ..adapter("upper") }], ..config };
    let churn = run(LoadConfig { duration_s: 1.0, ..elsewhere }).churn.unwrap();
    assert!(churn.failed > 0 && churn.registered == 0, "{churn:?}");
    assert!(churn.first_error.unwrap().contains("path_not_allowed"));
}

#[test]
fn a_copy_stays_for_as_long_as_somebody_asks_for_it() {
    let folder = tempfile::tempdir().unwrap();
    copy_adapter("upper", &folder.path().join("upper"));
    let world = with_step_time(json!({"adapter_dir": folder.path(), "admin_keys": ["admin"]}), 100_000);
    let (runtime, missing) = (world.runtime.clone(), Arc::<Mutex<Vec<String>>>::default());
    let into = missing.clone();
    let observer: Observer = Arc::new(move |event, _| {
        let event: Value = serde_json::from_slice(event).unwrap();
        let name = event["model"].as_str().unwrap();
        if runtime.adapter(name).unwrap().is_none() {
            into.lock().unwrap().push(name.into());
        }
    });
    let path = Some(folder.path().join("upper").display().to_string());
    let config = LoadConfig {
        models: vec![Model { name: "upper".into(), path }],
        api_key: Some(Secret("admin".into())),
        admin_key: Some(Secret("admin".into())),
        churn_per_s: 20.0,
        stream: true,
        output_tokens: Span::exactly(10),
        arrivals: Arrivals::Closed { connections: 4 },
        duration_s: 2.0,
        ..config(&world)
    };
    let report = Load::start(config, Some(observer)).unwrap().finish().unwrap();
    assert_eq!(report.completed, report.sent, "{:?}", report.first_error);
    assert_eq!(*missing.lock().unwrap(), [""; 0]);
    let churn = report.churn.unwrap();
    assert!(churn.registered > 5 && churn.unloaded == churn.registered, "{churn:?}");
}

#[test]
fn a_load_that_is_stopped_says_what_came_of_it() {
    let world = with_step_time(json!({}), 100_000);
    let config = LoadConfig { output_tokens: Span::exactly(100), ..config(&world) };
    let load = Load::start(config, None).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while load.progress().sent < 64 {
        assert!(Instant::now() < deadline && !load.wait(Duration::from_millis(5)));
    }
    load.stop();
    assert!(load.wait(Duration::from_secs(20)));
    let report = load.finish().unwrap();
    assert_eq!((report.sent, report.unfinished, report.completed), (64, 64, 0), "{report:?}");
    world.wait_until("nothing runs", |stats| stats.running + stats.waiting == 0);
}

/// Answers requests one after the other with these bytes, closing the connection behind each.
fn answering(answers: Vec<&'static str>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            while !request.windows(6).any(|bytes| bytes == b"stream") {
                let _ = stream.read(&mut request).unwrap();
            }
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    format!("http://{address}")
}

#[test]
fn answers_that_end_early_are_broken_and_closed_connections_are_not() {
    const WHOLE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 35\r\n\r\n{\"usage\": {\"completion_tokens\": 8}}";
    let one_by_one = |url: String, stream: bool, count: u64| LoadConfig {
        url,
        stream,
        num_requests: Some(count),
        arrivals: Arrivals::Closed { connections: 1 },
        timeout_s: 20.0,
        ..LoadConfig::default()
    };
    let report = run(one_by_one(answering(vec![WHOLE, WHOLE, WHOLE]), false, 3));
    assert_eq!((report.completed, report.broken), (3, 0), "{:?}", report.first_error);

    let cut = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10\r\ndata: {\"text\":\"a";
    let undone = "HTTP/1.1 200 OK\r\n\r\ndata: {\"text\":\"a\"}\n\n";
    let failed = "HTTP/1.1 200 OK\r\n\r\ndata: {\"text\":\"a\"}\n\ndata: {\"error\":{\"message\":\"x\"}}\n\n";
    for (answer, error) in [(cut, "unexpected end of file"), (undone, "without [DONE]"), (failed, "\"message\":\"x\"")]
    {
        let report = run(one_by_one(answering(vec![answer]), true, 1));
        assert_eq!((report.completed, report.broken), (0, 1), "{report:?}");
        assert!(report.first_error.as_ref().unwrap().contains(error), "{report:?}");
    }
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let report = run(LoadConfig { timeout_s: 0.2, ..one_by_one(url, false, 1) });
    assert_eq!((report.broken, report.statuses), (1, [(0, 1)].into()));
    assert!(report.first_error.unwrap().contains("within 200ms"));
}
