//! `/metrics`, and `/stats`: what the page at `/` shows.

use std::fmt::Write;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use serde_json::{Value, json};
use slora_core::{AdapterState, Stats};
use slora_runtime::{AdapterDetails, Snapshot};

use crate::app::{App, Call};
use crate::errors::ApiError;
use crate::histogram::{header as family, label};
use crate::log::unix_time_s;
use crate::routes::json_response;

/// Adapter names in one label.
const MAX_NAMES: usize = 256;
/// Adapters that the page lists.
const MAX_SHOWN: usize = 500;

/// The exposition.
pub(crate) async fn show(call: Call) -> Result<Response<Body>, ApiError> {
    let app = &call.app;
    // An engine that has stopped has no adapters to tell of; everything else is still worth reading.
    let adapters = app.on_runtime(|app| app.runtime.adapters()).await?.unwrap_or_default();
    let mut response = Response::new(Body::from(exposition(app, &adapters)));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

fn exposition(app: &App, adapters: &[AdapterDetails]) -> String {
    let mut out = String::with_capacity(64 << 10);
    let snapshot = app.runtime.snapshot();
    let prefix = &app.config.metrics_prefix;
    let labels = format!("engine=\"0\",model_name=\"{}\"", label(&app.base_names[0]));
    app.metrics.write_common(&mut out, prefix, &labels);
    write_engine(&mut out, prefix, &labels, &snapshot.engine);
    write_config(&mut out, prefix, app);
    write_lora_info(&mut out, prefix, app, adapters);
    write_pool(&mut out, app, &snapshot);
    app.metrics.write_own(&mut out);
    out
}

fn one(out: &mut String, kind: &str, name: &str, labels: &str, help: &str, value: f64) {
    family(out, name, kind, help);
    let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    let _ = writeln!(out, "{name}{labels} {value}");
}

fn write_engine(out: &mut String, prefix: &str, labels: &str, stats: &Stats) {
    let used = f64::from(stats.num_pages - stats.free_pages.min(stats.num_pages));
    // Idle adapters give way at once, so they do not count as used.
    let usage = (used - f64::from(stats.idle_adapter_pages)).max(0.0) / f64::from(stats.num_pages.max(1));
    let lines: [(&str, &str, &str, f64); 5] = [
        ("gauge", "num_requests_running", "Requests in the running set.", f64::from(stats.running)),
        ("gauge", "num_requests_waiting", "Requests that wait.", f64::from(stats.waiting)),
        ("gauge", "kv_cache_usage_perc", "Share of the pool in use, 0 to 1; idle adapters do not count.", usage),
        ("counter", "num_preemptions_total", "Preemptions.", stats.preemptions as f64),
        ("counter", "iterations_total", "Steps.", stats.steps as f64),
    ];
    for (kind, name, help, value) in lines {
        one(out, kind, &format!("{prefix}:{name}"), labels, help, value);
    }
}

fn write_config(out: &mut String, prefix: &str, app: &App) {
    let config = app.runtime.config();
    let labels = format!(
        "engine=\"0\",block_size=\"{}\",num_gpu_blocks=\"{}\",num_cpu_blocks=\"{}\"",
        config.page_tokens, config.num_pages, config.num_host_pages
    );
    one(out, "gauge", &format!("{prefix}:cache_config_info"), &labels, "Sizes of the pool.", 1.0);
}

/// Names of adapters in use; a busy server lists the busiest.
fn write_lora_info(out: &mut String, prefix: &str, app: &App, adapters: &[AdapterDetails]) {
    let names = |mut used: Vec<(&str, u32)>| {
        used.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        used.truncate(MAX_NAMES);
        used.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(",")
    };
    let used = |count: fn(&AdapterDetails) -> u32| {
        let used = adapters.iter().map(|adapter| (&*adapter.info.name, count(adapter)));
        names(used.filter(|(_, count)| *count > 0).collect())
    };
    let running = used(|adapter| adapter.info.pins);
    let waiting = used(|adapter| adapter.info.unfinished.saturating_sub(adapter.info.pins));
    let max = app.runtime.config().max_adapters;
    let labels = format!("max_lora=\"{max}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"");
    let help = "Adapters in use; the value is the time of this line.";
    one(out, "gauge", &format!("{prefix}:lora_requests_info"), &labels, help, unix_time_s());
}

fn write_pool(out: &mut String, app: &App, snapshot: &Snapshot) {
    let stats = &snapshot.engine;
    family(out, "slora:pool_pages", "gauge", "Pages of the device pool by owner.");
    for (owner, pages) in owners(stats) {
        let _ = writeln!(out, "slora:pool_pages{{owner=\"{owner}\"}} {pages}");
    }
    family(out, "slora:host_pages", "gauge", "Pages of the host tier.");
    let used = stats.num_host_pages - stats.free_host_pages.min(stats.num_host_pages);
    let _ = writeln!(out, "slora:host_pages{{owner=\"adapter\"}} {used}");
    let _ = writeln!(out, "slora:host_pages{{owner=\"free\"}} {}", stats.free_host_pages);
    family(out, "slora:adapters", "gauge", "Adapters by tier; those on the device count in the host tier too.");
    for (tier, count) in tiers(stats) {
        let _ = writeln!(out, "slora:adapters{{tier=\"{tier}\"}} {count}");
    }
    let load = app.admission.load();
    let lines: [(&str, &str, &str, f64); 14] = [
        (
            "gauge",
            "slora:requests_waiting_for_adapter",
            "Waiting requests whose adapter is not loaded.",
            f64::from(stats.waiting_for_adapter),
        ),
        ("gauge", "slora:unfinished_requests", "Requests that the server has let in.", load.requests as f64),
        ("gauge", "slora:unfinished_prompt_tokens", "Their prompt tokens.", load.tokens as f64),
        ("gauge", "slora:unfinished_bytes", "Bytes of bodies that are worked on.", load.bytes as f64),
        ("counter", "slora:swap_ins_total", "Adapters copied to the device.", stats.swap_ins as f64),
        ("counter", "slora:swap_in_pages_total", "Their pages.", stats.swap_in_pages as f64),
        ("counter", "slora:prefetches_total", "Swap-ins before any running request asked.", stats.prefetches as f64),
        (
            "counter",
            "slora:adapter_evictions_total",
            "Adapters that gave their device pages back.",
            stats.adapter_evictions as f64,
        ),
        (
            "counter",
            "slora:host_evictions_total",
            "Adapters that gave their host pages back.",
            stats.host_evictions as f64,
        ),
        ("counter", "slora:adapter_loads_total", "Adapters read from disk.", stats.loads as f64),
        (
            "counter",
            "slora:adapter_load_failures_total",
            "Adapters that could not be read.",
            stats.load_failures as f64,
        ),
        ("counter", "slora:adapter_load_seconds_total", "Time that reading them took.", snapshot.load_us as f64 / 1e6),
        ("counter", "slora:steps_total", "Steps planned.", stats.steps as f64),
        ("counter", "slora:rows_total", "Token rows planned.", stats.rows as f64),
    ];
    for (kind, name, help, value) in lines {
        one(out, kind, name, "", help, value);
    }
}

fn owners(stats: &Stats) -> [(&'static str, u32); 4] {
    let used = stats.adapter_pages - stats.idle_adapter_pages.min(stats.adapter_pages);
    [("kv", stats.kv_pages), ("adapter", used), ("idle_adapter", stats.idle_adapter_pages), ("free", stats.free_pages)]
}

fn tiers(stats: &Stats) -> [(&'static str, u32); 4] {
    [
        ("registered", stats.adapters),
        ("loading", stats.loading_adapters),
        ("host", stats.host_adapters),
        ("device", stats.resident_adapters),
    ]
}

/// One look at everything, for people.
pub(crate) async fn stats(call: Call) -> Result<Response<Body>, ApiError> {
    let app = &call.app;
    let adapters = app.on_runtime(|app| app.runtime.adapters()).await?.unwrap_or_default();
    let mut shown: Vec<&AdapterDetails> =
        adapters.iter().filter(|adapter| call.caller.may_use(&adapter.info.name)).collect();
    shown.sort_by_key(|adapter| (std::cmp::Reverse(adapter.info.unfinished), rank(adapter.info.state)));
    let list: Vec<Value> = shown.iter().take(MAX_SHOWN).map(|adapter| {
        let info = &adapter.info;
        json!({"name": &*info.name, "state": state_name(info.state), "running": info.pins, "unfinished": info.unfinished, "pages": info.num_pages})
    }).collect();
    let stats = app.runtime.snapshot().engine;
    Ok(json_response(&json!({
        "model": app.base_names[0], "time": unix_time_s(),
        "pool": object(owners(&stats)), "num_pages": stats.num_pages, "page_tokens": app.runtime.config().page_tokens,
        "tiers": object(tiers(&stats)), "running": stats.running, "waiting": stats.waiting,
        "waiting_for_adapter": stats.waiting_for_adapter, "generated_tokens": stats.generated_tokens,
        "steps": stats.steps, "swap_ins": stats.swap_ins, "loads": stats.loads, "adapters": list,
    })))
}

fn object(pairs: [(&'static str, u32); 4]) -> Value {
    Value::Object(pairs.into_iter().map(|(name, count)| (name.to_owned(), json!(count))).collect())
}

fn rank(state: AdapterState) -> u8 {
    match state {
        AdapterState::Resident => 0,
        AdapterState::Host => 1,
        AdapterState::Loading => 2,
        AdapterState::Registered => 3,
        AdapterState::Failed => 4,
    }
}

/// A state as the API spells it.
pub(crate) fn state_name(state: AdapterState) -> &'static str {
    match state {
        AdapterState::Registered => "registered",
        AdapterState::Loading => "loading",
        AdapterState::Host => "host",
        AdapterState::Resident => "resident",
        AdapterState::Failed => "failed",
    }
}
