//! The server under load, with an executor that computes nothing, on the same cores as the load.
//!
//! `cargo bench -p slora-server --bench serving -- requests|streams|overload|disconnects|stalled [seconds]
//! [steps a second]` prints one JSON object.

mod fake;

use std::io::Write;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fake::{Fake, LETTERS, example};
use serde_json::{Value, json};
use slora_server::load::{Arrivals, Latency, LoadConfig, Observer, Report, run};
use slora_server::{AdapterFlag, Server, ServerConfig};

fn serve(fake: &Fake, change: impl FnOnce(&mut ServerConfig)) -> Server {
    let mut config = ServerConfig {
        port: 0,
        model: example("base").display().to_string(),
        served_model_names: vec!["base".into()],
        access_log: false,
        num_threads: 1,
        ..ServerConfig::default()
    };
    change(&mut config);
    Server::start(config, fake.runtime.clone()).unwrap_or_else(|error| panic!("{error}"))
}

fn load(server: &Server, config: LoadConfig, observer: Option<Observer>) -> Report {
    let config = LoadConfig { address: server.address(), ..config };
    run(config, |_| (), observer).unwrap_or_else(|error| panic!("{error}"))
}

/// Kilobytes of this process that are in memory.
fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// 64 connections, 8 tokens in and 8 out, whole answers.
fn requests(seconds: f64) -> Value {
    let fake = Fake::start(Duration::ZERO, 64);
    let server = serve(&fake, |_| ());
    let closed = |duration_s: f64| LoadConfig { duration_s, ..LoadConfig::default() };
    load(&server, closed(2.0), None);
    let before = resident_kb();
    let report = load(&server, closed(seconds), None);
    json!({"report": report, "resident_kb_before": before, "resident_kb_after": resident_kb()})
}

/// 1,000 streams, one event for each token. The delay is from the step's end to the event at the client.
fn streams(seconds: f64, steps_per_s: f64) -> Value {
    const STREAMS: usize = 1000;
    let step = Duration::from_secs_f64(1.0 / steps_per_s);
    let fake = Fake::start(step, STREAMS as u32);
    let server = serve(&fake, |_| ());
    let config = LoadConfig {
        arrivals: Arrivals::Closed { connections: STREAMS },
        duration_s: seconds,
        max_tokens: 1000,
        stream: true,
        ..LoadConfig::default()
    };
    let delays: Arc<Mutex<Latency>> = Arc::default();
    let (made, seen) = (fake.made.clone(), delays.clone());
    let warm = Instant::now() + Duration::from_secs(2);
    let observer: Observer = Arc::new(move |event, now| {
        let text = b"xt\":\"";
        let mut places = event.iter().enumerate().filter(|(_, byte)| **byte == b'x').map(|(at, _)| at);
        let at = places.find(|at| event[*at..].starts_with(text)).map(|at| at + text.len());
        let letter = at.and_then(|at| event.get(at)).map(|byte| usize::from(byte.wrapping_sub(b'a')));
        let Some(letter) = letter.filter(|letter| *letter < LETTERS) else { return };
        if now > warm {
            seen.lock().unwrap_or_else(PoisonError::into_inner).add(made.since(letter, now));
        }
    });
    let before = fake.runtime.snapshot().engine.steps;
    let begun = Instant::now();
    let report = load(&server, config, Some(observer));
    let steps = fake.runtime.snapshot().engine.steps - before;
    let delay = delays.lock().unwrap_or_else(PoisonError::into_inner).summary();
    json!({
        "report": report, "delay": delay, "wanted_steps_per_s": steps_per_s,
        "steps_per_s": steps as f64 / begun.elapsed().as_secs_f64(),
    })
}

/// An executor of 200 requests a second is offered 2,000.
fn overload(seconds: f64) -> Value {
    // 4 at once, 8 steps each.
    let fake = Fake::start(Duration::from_micros(2500), 4);
    let server = serve(&fake, |config| config.limits.max_queued_requests = 100);
    let closed = |duration_s: f64| LoadConfig {
        arrivals: Arrivals::Closed { connections: 16 },
        duration_s,
        ..LoadConfig::default()
    };
    let peak = load(&server, closed(5.0), None);
    let offered = LoadConfig {
        arrivals: Arrivals::Poisson { rate: 2000.0 },
        duration_s: seconds,
        slo_first_token_s: 2.0,
        ..LoadConfig::default()
    };
    let overload = load(&server, offered, None);
    let begun = Instant::now();
    let after = load(&server, closed(1.0), None);
    json!({
        "peak": peak, "overload": overload, "after": after,
        "goodput_share": overload.goodput_per_s / peak.requests_per_s, "recovered_within_s": begun.elapsed().as_secs_f64(),
    })
}

/// Half of all clients leave somewhere: queued, loading, running, streaming or not. Nothing may stay behind.
fn disconnects(seconds: f64) -> Value {
    let fake = Fake::start(Duration::from_millis(2), 64);
    let adapter = |name: &str| AdapterFlag { name: name.into(), path: example("adapters").join(name), pinned: false };
    let server = serve(&fake, |config| config.adapters = ["reverse", "upper", "count"].map(adapter).into());
    let descriptors = || std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let leaving = |stream: bool, duration_s: f64| LoadConfig {
        models: ["base", "reverse", "upper", "count"].map(String::from).into(),
        arrivals: Arrivals::Poisson { rate: 1000.0 },
        max_tokens: 60,
        cancelled: 0.5,
        stream,
        duration_s,
        ..LoadConfig::default()
    };
    load(&server, leaving(true, 1.0), None);
    wait_idle(&fake);
    let (before, resident_kb_before) = (descriptors(), resident_kb());
    let streamed = load(&server, leaving(true, seconds / 2.0), None);
    let whole = load(&server, leaving(false, seconds / 2.0), None);
    let idle_within_s = wait_idle(&fake);
    let stats = fake.runtime.snapshot().engine;
    json!({
        "streamed": streamed, "whole": whole, "idle_within_s": idle_within_s,
        "descriptors_before": before, "descriptors_after": descriptors(),
        "resident_kb_before": resident_kb_before, "resident_kb_after": resident_kb(),
        "kv_pages": stats.kv_pages, "running": stats.running, "waiting": stats.waiting,
        "submitted": stats.submitted, "ended": stats.ended,
    })
}

/// Seconds until the engine holds nothing for requests.
fn wait_idle(fake: &Fake) -> f64 {
    let begun = Instant::now();
    loop {
        let stats = fake.runtime.snapshot().engine;
        let is_idle = stats.running + stats.waiting + stats.kv_pages == 0 && stats.submitted == stats.ended;
        if is_idle || begun.elapsed() > Duration::from_secs(30) {
            return begun.elapsed().as_secs_f64();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// 1,000 readers take nothing of their streams while 64 others read theirs. Compared with 1,000 requests that do not stream:
/// the engine does the same work then.
fn stalled(seconds: f64) -> Value {
    let fake = Fake::start(Duration::from_millis(20), 1100);
    // Every event names the model: a long name fills a socket's buffers at once.
    let name = "x".repeat(4096);
    let server = serve(&fake, |config| {
        config.served_model_names.push(name.clone());
        config.limits.stall_timeout_s = 60.0;
    });
    let reading = || LoadConfig {
        arrivals: Arrivals::Closed { connections: 64 },
        duration_s: seconds / 2.0,
        max_tokens: 100,
        stream: true,
        ..LoadConfig::default()
    };
    let waiting = ask_1000(&server, &name, false);
    std::thread::sleep(Duration::from_secs(4));
    let alone = load(&server, reading(), None);
    drop(waiting);
    wait_idle(&fake);
    let before = resident_kb();
    let stalls = ask_1000(&server, &name, true);
    std::thread::sleep(Duration::from_secs(4));
    let beside = load(&server, reading(), None);
    let resident_kb_after = resident_kb();
    drop(stalls);
    let idle_within_s = wait_idle(&fake);
    json!({
        "beside_whole": alone, "beside_stalled": beside, "idle_within_s": idle_within_s,
        "resident_kb_before": before, "resident_kb_after": resident_kb_after,
        "p99_growth": beside.between_tokens.p99_ms / alone.between_tokens.p99_ms - 1.0,
    })
}

/// 1,000 connections, each with a request whose answer nobody reads.
fn ask_1000(server: &Server, model: &str, stream: bool) -> Vec<std::net::TcpStream> {
    let body =
        json!({"model": model, "prompt": [80], "max_tokens": 1000, "stream": stream, "ignore_eos": true}).to_string();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json";
    let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let ask = |_| {
        let mut stream = std::net::TcpStream::connect(server.address()).ok()?;
        stream.write_all(request.as_bytes()).ok()?;
        Some(stream)
    };
    (0..1000).filter_map(ask).collect()
}

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let number =
        |index: usize, default: f64| arguments.get(index).and_then(|text| text.parse().ok()).unwrap_or(default);
    let scenario = arguments.first().map_or("requests", String::as_str);
    let figures = match scenario {
        "streams" => streams(number(1, 20.0), number(2, 150.0)),
        "disconnects" => disconnects(number(1, 24.0)),
        "stalled" => stalled(number(1, 16.0)),
        "overload" => overload(number(1, 60.0)),
        _ => requests(number(1, 20.0)),
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let report = json!({
        "commit": output_of("git", &["rev-parse", "HEAD"]),
        "is_clean": output_of("git", &["status", "--porcelain"]).is_empty(),
        "command": format!("cargo bench -p slora-server --bench serving -- {}", arguments.join(" ")),
        "versions": {"slora": env!("CARGO_PKG_VERSION"), "rustc": output_of("rustc", &["--version"])},
        "machine": {
            "cpu": cpu.trim_start_matches([' ', '\t', ':']),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "load_before": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next(),
        },
        "figures": figures,
    });
    println!("{report:#}");
}
