//! What is measured: one function for each figure of docs/http.md.

use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use memchr::memmem::Finder;
use serde_json::{Value, json};
use slora_server::Secret;
use slora_server::load::{Arrivals, Latency, Load, LoadConfig, Model, Observer, Report, Span};

use crate::engine::{LETTERS, Made, example, unix_time_ns};
use crate::process::{Process, Settings};

const WARM_UP: Duration = Duration::from_secs(2);

/// What the command line may change.
pub struct Options {
    pub seconds: Option<f64>,
    pub steps_per_s: f64,
    /// Another server's command, measured instead.
    pub peer: Option<String>,
}

impl Options {
    fn start(&self, step: Duration, max_running: u32, config: Value) -> Process {
        let settings = Settings { step, max_running, config };
        match &self.peer {
            Some(command) => Process::peer(command, &settings),
            None => Process::start(&settings),
        }
    }
}

fn load(process: &Process, config: LoadConfig) -> Report {
    observed(process, config, None)
}

fn observed(process: &Process, config: LoadConfig, observer: Option<Observer>) -> Report {
    let config = LoadConfig { url: process.url.clone(), ..config };
    Load::start(config, observer).and_then(Load::finish).unwrap_or_else(|error| panic!("{error}"))
}

/// A report without what it says of every quarter of a second.
fn shown(report: &Report) -> Value {
    let mut report = json!(report);
    if let Some(fields) = report.as_object_mut() {
        for name in ["windows", "cumulative_time_to_first_token", "cumulative_inter_token"] {
            fields.remove(name);
        }
    }
    // Where the example lies on this machine is nobody's business.
    if let Some(models) = report.pointer_mut("/config/models").and_then(Value::as_array_mut) {
        models.iter_mut().filter_map(Value::as_object_mut).for_each(|model| {
            model.remove("path");
        });
    }
    report
}

/// 64 keep-alive connections, 8 tokens in and 8 out, whole answers.
pub fn requests(options: &Options) -> Value {
    let process = options.start(Duration::ZERO, 64, json!({}));
    let closed = |duration_s: f64| LoadConfig { duration_s, ..LoadConfig::default() };
    load(&process, closed(WARM_UP.as_secs_f64()));
    let cpu_s = process.cpu_s();
    let report = load(&process, closed(options.seconds.unwrap_or(10.0)));
    json!({
        "requests_per_s": report.requests_per_s, "server_cores": (process.cpu_s() - cpu_s) / report.elapsed_s,
        "report": shown(&report),
    })
}

/// 1,000 streams, one event for each token. The delay is from the step's end to the event at the client.
pub fn streams(options: &Options) -> Value {
    const STREAMS: usize = 1000;
    let seconds = options.seconds.unwrap_or(20.0);
    let step = Duration::from_secs_f64(1.0 / options.steps_per_s);
    let process = options.start(step, STREAMS as u32, json!({}));
    let config = LoadConfig {
        arrivals: Arrivals::Closed { connections: STREAMS },
        duration_s: seconds,
        // Some end and others begin at all times.
        output_tokens: Span { min: 500, max: 1000 },
        stream: true,
        ..LoadConfig::default()
    };
    let delays = Arc::new(Delays::new(process.made(), step));
    let seen = delays.clone();
    let observer: Observer = Arc::new(move |event, _| seen.add(event));
    let load = Load::start(LoadConfig { url: process.url.clone(), ..config }, Some(observer));
    let load = load.unwrap_or_else(|error| panic!("{error}"));
    load.wait(WARM_UP);
    let (begun, cpu_s, ended) = (Instant::now(), process.cpu_s(), load.progress().tokens);
    load.wait(Duration::from_secs_f64(seconds).saturating_sub(WARM_UP));
    let elapsed_s = begun.elapsed().as_secs_f64();
    let (cpu_s, tokens) = (process.cpu_s() - cpu_s, load.progress().tokens - ended);
    let report = load.finish().unwrap_or_else(|error| panic!("{error}"));
    let delay = delays.latency.lock().unwrap_or_else(PoisonError::into_inner).summary();
    json!({
        "delay_p99_ms": delay.p99_ms, "delay_p50_ms": delay.p50_ms, "delay_max_ms": delay.max_ms,
        "steps_per_s": tokens as f64 / STREAMS as f64 / elapsed_s, "wanted_steps_per_s": options.steps_per_s,
        "server_cores": cpu_s / elapsed_s, "report": shown(&report),
    })
}

static TEXT: LazyLock<Finder> = LazyLock::new(|| Finder::new("\"text\":"));

/// How old tokens are when they are read.
struct Delays {
    made: Made,
    begun: Instant,
    /// For so long a letter's time is not read again: it is another one 26 steps later only.
    step_ns: u64,
    /// When each letter was made, and when that was read.
    read: Mutex<[(u64, u64); LETTERS]>,
    latency: Mutex<Latency>,
}

impl Delays {
    fn new(made: Made, step: Duration) -> Self {
        let step_ns = step.as_nanos() as u64;
        Self { made, begun: Instant::now(), step_ns, read: Mutex::new([(0, 0); LETTERS]), latency: Mutex::default() }
    }

    fn add(&self, event: &[u8]) {
        let value = TEXT.find(event).map(|at| event[at + TEXT.needle().len()..].trim_ascii_start());
        let letter = value.and_then(|value| Some(usize::from(value.get(1)?.wrapping_sub(b'a'))));
        let Some(letter) = letter.filter(|letter| *letter < LETTERS && self.begun.elapsed() > WARM_UP) else { return };
        let now = unix_time_ns();
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let (made, at) = &mut read[letter];
        if now.saturating_sub(*at) > self.step_ns {
            (*made, *at) = (self.made.get(letter), now);
        }
        let delay = Duration::from_nanos(now.saturating_sub(*made));
        self.latency.lock().unwrap_or_else(PoisonError::into_inner).add(delay);
    }
}

/// An executor of 200 requests a second is offered 2,000.
pub fn overload(options: &Options) -> Value {
    // 4 at once, 8 steps each.
    let limits = json!({"limits": {"max_queued_requests": 100}});
    let process = options.start(Duration::from_micros(2500), 4, limits);
    let closed = |duration_s: f64| LoadConfig {
        arrivals: Arrivals::Closed { connections: 16 },
        duration_s,
        ..LoadConfig::default()
    };
    let peak = load(&process, closed(5.0));
    let offered = LoadConfig {
        arrivals: Arrivals::Poisson { rate: 2000.0 },
        duration_s: options.seconds.unwrap_or(60.0),
        slo_ttft_s: 2.0,
        ..LoadConfig::default()
    };
    let overload = load(&process, offered);
    // Recovered: 16 connections get the peak's rate again, within the second that this takes.
    let after = load(&process, closed(1.0));
    json!({
        "refusal_p99_ms": overload.refusals.p99_ms,
        "goodput_share": overload.goodput_per_s / peak.requests_per_s,
        "offered_per_s": overload.sent as f64 / overload.elapsed_s,
        "recovered_share": after.requests_per_s / peak.requests_per_s,
        "recovered_within_s": after.elapsed_s,
        "peak": shown(&peak), "overload": shown(&overload), "after": shown(&after),
    })
}

/// Half of all clients leave somewhere: queued, loading, running, streaming or not. Nothing may stay behind.
pub fn disconnects(options: &Options) -> Value {
    let names = ["reverse", "upper", "count"];
    let config = json!({"adapter_dir": example("adapters"), "admin_keys": ["admin"], "api_keys": ["user"]});
    let mut process = options.start(Duration::from_millis(2), 64, config);
    let model =
        |name: &str| Model { name: name.into(), path: Some(example("adapters").join(name).display().to_string()) };
    let leaving = |stream: bool, num_requests: u64| LoadConfig {
        models: names.iter().map(|name| model(name)).chain([Model { name: "base".into(), path: None }]).collect(),
        api_key: Some(Secret("user".into())),
        admin_key: Some(Secret("admin".into())),
        arrivals: Arrivals::Closed { connections: 256 },
        output_tokens: Span { min: 1, max: 60 },
        cancel: 0.5,
        churn_per_s: 5.0,
        stream,
        num_requests: Some(num_requests),
        duration_s: options.seconds.unwrap_or(600.0),
        ..LoadConfig::default()
    };
    let idle = process.stats()["tasks"].as_u64().unwrap_or(0);
    load(&process, leaving(true, 1000));
    process.wait_idle(idle);
    let (descriptors, resident_kb) = (process.descriptors(), process.resident_kb());
    let streamed = load(&process, leaving(true, 10_500));
    let whole = load(&process, leaving(false, 10_500));
    let idle_within_s = process.wait_idle(idle);
    let stats = process.stats();
    json!({
        "left": streamed.left + whole.left, "broken": streamed.broken + whole.broken, "idle_within_s": idle_within_s,
        "kv_pages": stats["kv_pages"], "tasks_before": idle, "tasks_after": stats["tasks"],
        "descriptors_before": descriptors, "descriptors_after": process.descriptors(),
        "resident_kb_before": resident_kb, "resident_kb_after": process.resident_kb(),
        "submitted": stats["submitted"], "ended": stats["ended"],
        "streamed": shown(&streamed), "whole": shown(&whole),
    })
}

/// 1,000 readers take nothing of their streams while 64 others read theirs. Compared with 1,000 requests that do not stream,
/// so that the engine does the same work, in turns.
pub fn stalled(options: &Options) -> Value {
    const TURNS: usize = 8;
    // Every event names the model: a long name fills a socket's buffers at once.
    let name = "x".repeat(4096);
    let config = json!({"served_model_names": ["base", name], "limits": {"stall_timeout_s": 60.0}});
    let kb_per_stalled_reader = kb_per_stalled_reader(options, &name, &config);
    let mut process = options.start(Duration::from_millis(20), 1100, config);
    let idle = process.stats()["tasks"].as_u64().unwrap_or(0);
    let reading = LoadConfig {
        arrivals: Arrivals::Closed { connections: 64 },
        duration_s: options.seconds.unwrap_or(10.0),
        output_tokens: Span::exactly(100),
        stream: true,
        ..LoadConfig::default()
    };
    let mut turn = |is_stalled: bool| {
        let others = ask_1000(&process.url, &name, is_stalled);
        // By then the buffers of those that stall are full.
        std::thread::sleep(Duration::from_secs(4));
        let report = load(&process, reading.clone());
        let resident_kb = process.resident_kb();
        drop(others);
        process.wait_idle(idle);
        json!({"inter_token_p99_ms": report.inter_token.p99_ms, "resident_kb": resident_kb, "report": shown(&report)})
    };
    turn(false);
    let turns: Vec<(Value, Value)> = (0..TURNS).map(|_| (turn(false), turn(true))).collect();
    let p99_ms = |values: Vec<&Value>| crate::median(values.iter().filter_map(|v| v["inter_token_p99_ms"].as_f64()));
    let (whole, stalled): (Vec<&Value>, Vec<&Value>) = turns.iter().map(|(whole, stalled)| (whole, stalled)).unzip();
    let (p99_ms_whole, p99_ms_stalled) = (p99_ms(whole), p99_ms(stalled));
    json!({
        "p99_growth": p99_ms_stalled / p99_ms_whole - 1.0, "kb_per_stalled_reader": kb_per_stalled_reader,
        "p99_ms_beside_whole": p99_ms_whole, "p99_ms_beside_stalled": p99_ms_stalled, "turns": turns,
    })
}

/// What a stalled reader takes of the process's memory once its 1,000 tokens are made, its request included. The socket's
/// buffer in the kernel comes on top.
fn kb_per_stalled_reader(options: &Options, model: &str, config: &Value) -> f64 {
    let mut process = options.start(Duration::from_millis(5), 1100, config.clone());
    let idle_kb = process.resident_kb();
    let _readers = ask_1000(&process.url, model, true);
    while process.stats()["ended"] != 1000 {
        std::thread::sleep(Duration::from_millis(100));
    }
    process.resident_kb().saturating_sub(idle_kb) as f64 / 1000.0
}

/// 1,000 connections, each with a request whose answer nobody reads.
fn ask_1000(url: &str, model: &str, stream: bool) -> Vec<TcpStream> {
    let body = json!({"model": model, "prompt": [80], "max_tokens": 1000, "stream": stream, "ignore_eos": true});
    let (body, host) = (body.to_string(), url.trim_start_matches("http://"));
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json");
    let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let ask = |_| {
        let mut stream = TcpStream::connect(host).unwrap_or_else(|error| panic!("{error}"));
        stream.write_all(request.as_bytes()).unwrap_or_else(|error| panic!("{error}"));
        stream
    };
    (0..1000).map(ask).collect()
}

/// Streams, whole answers, adapters and clients that come and go: what the server's memory is after a minute, and later.
pub fn memory(options: &Options) -> Value {
    const MINUTE: Duration = Duration::from_secs(60);
    let config = json!({"adapter_dir": example("adapters"), "admin_keys": ["admin"], "api_keys": ["user"]});
    let process = options.start(Duration::from_millis(20), 600, config);
    let path = Some(example("adapters").join("upper").display().to_string());
    let mixed = |stream: bool| LoadConfig {
        url: process.url.clone(),
        models: vec![Model { name: "upper".into(), path: path.clone() }, Model { name: "base".into(), path: None }],
        api_key: Some(Secret("user".into())),
        admin_key: Some(Secret("admin".into())),
        arrivals: Arrivals::Closed { connections: if stream { 500 } else { 64 } },
        output_tokens: Span { min: 1, max: 200 },
        cancel: 0.1,
        churn_per_s: 1.0,
        stream,
        duration_s: options.seconds.unwrap_or(240.0),
        ..LoadConfig::default()
    };
    let loads = [true, false].map(|stream| Load::start(mixed(stream), None).unwrap_or_else(|error| panic!("{error}")));
    let begun = Instant::now();
    let mut samples = Vec::new();
    while !loads[0].wait(Duration::from_secs(5)) {
        samples.push((begun.elapsed().as_secs_f64(), process.resident_kb()));
    }
    let first = samples.iter().find(|(at, _)| *at >= MINUTE.as_secs_f64()).map_or(0, |(_, kb)| *kb);
    let last = samples.last().map_or(0, |(_, kb)| *kb);
    let reports = loads.map(|load| shown(&load.finish().unwrap_or_else(|error| panic!("{error}"))));
    json!({
        "growth": last as f64 / first as f64 - 1.0, "resident_kb_at_60_s": first, "resident_kb_at_end": last,
        "samples": samples, "reports": reports,
    })
}
