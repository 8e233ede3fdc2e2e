//! Probes, version, load and metrics.

use std::fmt::Write;
use std::time::Duration;

use axum::body::Body;
use axum::http::Response;
use serde_json::json;
use slora_core::{AdapterState, Stats};
use slora_runtime::{AdapterDetails, State};

use crate::app::App;
use crate::errors::ApiError;
use crate::histogram::{header, label};
use crate::log::unix_time_s;
use crate::router::{Answer, Call, json_response, typed_response};

/// How long `/metrics` waits for the step thread; without its answer the adapters' series are left out.
const ADAPTERS_TIMEOUT: Duration = Duration::from_secs(1);

/// Alive: not until the engine has failed is there a reason to start the process anew.
pub(crate) async fn live(call: Call) -> Answer {
    match call.app.runtime.state() {
        State::Failed(reason) => Err(ApiError::unavailable(format!("the engine has stopped: {reason}"))),
        _ => Ok(Response::new(Body::empty())),
    }
}

/// Ready for requests.
pub(crate) async fn ready(call: Call) -> Answer {
    match call.app.unready() {
        Some(reason) => Err(ApiError::unavailable(reason)),
        None => Ok(json_response(&json!({"status": "ready"}))),
    }
}

/// The version.
pub(crate) async fn version(_: Call) -> Answer {
    Ok(json_response(&json!({"version": env!("CARGO_PKG_VERSION")})))
}

/// Unfinished choices, as load balancers read it, with what else is unfinished.
pub(crate) async fn load(call: Call) -> Answer {
    let load = call.app.admission.load();
    let (requests, tokens, bytes) = (load.requests, load.tokens, load.bytes);
    Ok(json_response(&json!({"server_load": requests, "prompt_tokens": tokens, "body_bytes": bytes})))
}

/// The Prometheus exposition.
pub(crate) async fn metrics(call: Call) -> Answer {
    let app = call.app;
    let adapters = app.call(|app| Ok(app.runtime.adapters()?));
    let adapters = tokio::time::timeout(ADAPTERS_TIMEOUT, adapters).await;
    let stats = app.runtime.snapshot();
    let mut out = String::with_capacity(32 << 10);
    let prefix = &app.config.metrics_prefix;
    let model = app.base_names.first().map_or("", String::as_str);
    let labels = format!("model_name=\"{}\",engine=\"0\"", label(model));
    write_engine(&mut out, prefix, &labels, &stats.engine, app.runtime.config().page_tokens);
    app.metrics.write_common(&mut out, prefix, &labels);
    if let Ok(Ok(adapters)) = adapters {
        write_adapters(&mut out, prefix, &adapters, app.runtime.config().max_adapters);
    }
    write_pool(&mut out, &stats.engine, stats.load_us);
    app.metrics.write_own(&mut out);
    header(&mut out, "slora:ready", "gauge", "Whether requests are taken.");
    let _ = writeln!(out, "slora:ready {}", u8::from(app.unready().is_none()));
    write_load(&mut out, &app);
    Ok(typed_response("text/plain; version=0.0.4; charset=utf-8", out))
}

fn write_load(out: &mut String, app: &App) {
    let load = app.admission.load();
    let gauges = [
        ("slora:unfinished_requests", "Choices that were let in and have not ended.", load.requests),
        ("slora:unfinished_prompt_tokens", "Their prompt tokens.", load.tokens),
        ("slora:body_bytes", "Bytes of request bodies that are being read or worked on.", load.bytes),
    ];
    for (name, help, value) in gauges {
        header(out, name, "gauge", help);
        let _ = writeln!(out, "{name} {value}");
    }
}

/// The engine's figures that other servers have too.
fn write_engine(out: &mut String, prefix: &str, labels: &str, stats: &Stats, page_tokens: u32) {
    let mut sample = |name: &str, kind: &str, help: &str, value: f64| {
        let name = format!("{prefix}:{name}");
        header(out, &name, kind, help);
        let _ = writeln!(out, "{name}{{{labels}}} {value}");
    };
    let usage = f64::from(stats.kv_pages) / f64::from(stats.num_pages.max(1));
    sample("num_requests_running", "gauge", "Choices in the running set.", f64::from(stats.running));
    sample("num_requests_waiting", "gauge", "Choices that wait for a place in it.", f64::from(stats.waiting));
    sample("kv_cache_usage_perc", "gauge", "Share of the pool's pages with KV cache, 0 to 1.", usage);
    sample("num_preemptions_total", "counter", "Preemptions.", stats.preemptions as f64);
    let name = format!("{prefix}:cache_config_info");
    header(out, &name, "gauge", "Sizes of the page pool.");
    let num_pages = stats.num_pages;
    let _ = writeln!(out, "{name}{{{labels},block_size=\"{page_tokens}\",num_gpu_blocks=\"{num_pages}\"}} 1");
}

/// What routers choose a replica by: names of adapters with running and with waiting requests.
fn write_adapters(out: &mut String, prefix: &str, adapters: &[AdapterDetails], max_adapters: u32) {
    let names = |is_in: fn(&AdapterDetails) -> bool| {
        let names: Vec<&str> = adapters.iter().filter(|a| is_in(a)).map(|a| &*a.info.name).collect();
        names.join(",")
    };
    let running = names(|adapter| adapter.info.pins > 0);
    let waiting = names(|adapter| adapter.info.unfinished > adapter.info.pins);
    let name = format!("{prefix}:lora_requests_info");
    header(out, &name, "gauge", "Adapters with running and with waiting requests; the value is the time.");
    let _ = writeln!(
        out,
        "{name}{{max_lora=\"{max_adapters}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} {}",
        unix_time_s()
    );
    header(out, "slora:adapters", "gauge", "Adapter names by where their weights are.");
    let states = [
        ("registered", AdapterState::Registered),
        ("loading", AdapterState::Loading),
        ("host", AdapterState::Host),
        ("resident", AdapterState::Resident),
        ("failed", AdapterState::Failed),
    ];
    for (label, state) in states {
        let count = adapters.iter().filter(|adapter| adapter.info.state == state).count();
        let _ = writeln!(out, "slora:adapters{{state=\"{label}\"}} {count}");
    }
}

/// The pool's pages by owner, and the ways of adapters through the tiers.
fn write_pool(out: &mut String, stats: &Stats, load_us: u64) {
    header(out, "slora:pool_pages", "gauge", "Pages of the device pool by owner.");
    for (owner, pages) in [("kv", stats.kv_pages), ("adapter", stats.adapter_pages), ("free", stats.free_pages)] {
        let _ = writeln!(out, "slora:pool_pages{{owner=\"{owner}\"}} {pages}");
    }
    header(out, "slora:host_pages", "gauge", "Pages of the host tier by owner.");
    let used = stats.num_host_pages - stats.free_host_pages;
    for (owner, pages) in [("adapter", used), ("free", stats.free_host_pages)] {
        let _ = writeln!(out, "slora:host_pages{{owner=\"{owner}\"}} {pages}");
    }
    let counters = [
        ("slora:steps_total", "Steps.", stats.steps as f64),
        ("slora:swap_ins_total", "Adapters copied to the device, prefetches included.", stats.swap_ins as f64),
        ("slora:swap_in_pages_total", "Their pages.", stats.swap_in_pages as f64),
        ("slora:prefetches_total", "Swap-ins before any running request asked.", stats.prefetches as f64),
        ("slora:adapter_evictions_total", "Adapters that left the device.", stats.adapter_evictions as f64),
        ("slora:host_evictions_total", "Adapters that left the host tier.", stats.host_evictions as f64),
        ("slora:adapter_loads_total", "Loads from disk that finished.", stats.loads as f64),
        ("slora:adapter_load_failures_total", "Loads from disk that failed.", stats.load_failures as f64),
        ("slora:adapter_load_seconds_total", "Time that loads from disk took.", load_us as f64 / 1e6),
    ];
    for (name, help, value) in counters {
        header(out, name, "counter", help);
        let _ = writeln!(out, "{name} {value}");
    }
}
