//! `GET /metrics`: the Prometheus exposition of the engine's, the runtime's and the server's figures.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write;

use slora_core::{AdapterState, Stats};
use slora_runtime::{AdapterDetails, Distribution, Timings};

use crate::adapters::state_name;
use crate::app::App;
use crate::histogram::{header, label, write_histogram};
use crate::log::unix_time_s;
use crate::metrics::{OTHER, TOP_ADAPTERS};
use crate::process;
use crate::router::{Answer, Call, typed_response};

/// Names in one label of `lora_requests_info`, the busiest.
const MAX_LISTED: usize = 256;

/// The route.
pub(crate) async fn expose(call: Call) -> Answer {
    let text = call.app.render(&call.caller.tenant, |app| Ok(exposition(app))).await?;
    Ok(typed_response("text/plain; version=0.0.4; charset=utf-8", text))
}

fn exposition(app: &App) -> String {
    let stats = app.runtime.snapshot();
    let mut out = String::with_capacity(32 << 10);
    let prefix = &app.config.metrics_prefix;
    let model = app.base_names.first().map_or("", String::as_str);
    let labels = format!("model_name=\"{}\",engine=\"0\"", label(model));
    let timings = app.runtime.timings();
    write_engine(&mut out, prefix, &labels, &stats.engine, app.runtime.config().page_tokens);
    let name = format!("{prefix}:iteration_tokens_total");
    write_distribution(&mut out, &name, "Token rows of a step.", &labels, &timings.step_rows);
    app.metrics.write_common(&mut out, prefix, &labels);
    // An engine that has failed has none.
    if let Ok(adapters) = app.runtime.adapters() {
        write_adapters(&mut out, prefix, &adapters, app.runtime.config().max_adapters);
    }
    write_pool(&mut out, &stats.engine);
    write_tiers(&mut out, &timings);
    app.metrics.write_own(&mut out);
    header(&mut out, "slora:ready", "gauge", "Whether requests are taken.");
    let _ = writeln!(out, "slora:ready {}", u8::from(app.unready().is_none()));
    write_load(&mut out, app);
    process::write(&mut out);
    out
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
    let names = |requests: fn(&AdapterDetails) -> u32| {
        let mut busy: Vec<(u32, &str)> =
            adapters.iter().map(|adapter| (requests(adapter), &*adapter.info.name)).collect();
        busy.retain(|(requests, _)| *requests > 0);
        busy.sort_by_key(|(requests, _)| Reverse(*requests));
        busy.truncate(MAX_LISTED);
        busy.into_iter().map(|(_, name)| name).collect::<Vec<_>>().join(",")
    };
    let running = names(|adapter| adapter.info.pins);
    let waiting = names(|adapter| adapter.info.unfinished - adapter.info.pins);
    let name = format!("{prefix}:lora_requests_info");
    header(out, &name, "gauge", "Adapters with running and with waiting requests; the value is the time.");
    let _ = writeln!(
        out,
        "{name}{{max_lora=\"{max_adapters}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} {}",
        unix_time_s()
    );
    write_busiest(out, adapters);
    header(out, "slora:adapters", "gauge", "Adapter names by where their weights are.");
    use AdapterState::{Failed, Host, Loading, Registered, Resident};
    for state in [Registered, Loading, Host, Resident, Failed] {
        let count = adapters.iter().filter(|adapter| adapter.info.state == state).count();
        let _ = writeln!(out, "slora:adapters{{state=\"{}\"}} {count}", state_name(state));
    }
    header(out, "slora:adapter_bytes", "gauge", "Bytes of adapters by the nearest tier that has them.");
    for (tier, is_in) in [("device", &[Resident][..]), ("host", &[Host]), ("disk", &[Registered, Loading])] {
        let held = adapters.iter().filter(|adapter| is_in.contains(&adapter.info.state));
        let bytes: u64 = held.map(|adapter| adapter.info.bytes).sum();
        let _ = writeln!(out, "slora:adapter_bytes{{tier=\"{tier}\"}} {bytes}");
    }
}

/// Running and waiting choices of the adapters that have most of them.
fn write_busiest(out: &mut String, adapters: &[AdapterDetails]) {
    let busy = adapters.iter().filter(|adapter| adapter.info.unfinished > 0);
    let (mut rest, mut top): (Vec<_>, Vec<_>) = busy.partition(|adapter| &*adapter.info.name == OTHER);
    top.sort_by_key(|adapter| Reverse(adapter.info.unfinished));
    rest.extend(top.drain(top.len().min(TOP_ADAPTERS)..));
    let mut write = |name: &str, help: &str, value: fn(&AdapterDetails) -> u32| {
        header(out, name, "gauge", help);
        for adapter in &top {
            let _ = writeln!(out, "{name}{{adapter=\"{}\"}} {}", adapter.info.name, value(adapter));
        }
        let other: u32 = rest.iter().map(|adapter| value(adapter)).sum();
        let _ = writeln!(out, "{name}{{adapter=\"{OTHER}\"}} {other}");
    };
    write("slora:adapter_requests_running", "Running choices of the busiest adapters.", |a| a.info.pins);
    write("slora:adapter_requests_waiting", "Their waiting choices.", |a| a.info.unfinished - a.info.pins);
}

/// The pool's pages by owner, and the ways of adapters through the tiers.
fn write_pool(out: &mut String, stats: &Stats) {
    header(out, "slora:pool_pages", "gauge", "Pages of the device pool by owner.");
    for (owner, pages) in [("kv", stats.kv_pages), ("adapter", stats.adapter_pages), ("free", stats.free_pages)] {
        let _ = writeln!(out, "slora:pool_pages{{owner=\"{owner}\"}} {pages}");
    }
    header(out, "slora:host_pages", "gauge", "Pages of the host tier by owner.");
    let used = stats.num_host_pages - stats.free_host_pages;
    for (owner, pages) in [("adapter", used), ("free", stats.free_host_pages)] {
        let _ = writeln!(out, "slora:host_pages{{owner=\"{owner}\"}} {pages}");
    }
    let gauges = [
        ("slora:idle_adapter_pages", "Pages of adapters that no running request uses.", stats.idle_adapter_pages),
        ("slora:waiting_for_adapter", "Waiting choices whose adapter is not there yet.", stats.waiting_for_adapter),
    ];
    for (name, help, value) in gauges {
        header(out, name, "gauge", help);
        let _ = writeln!(out, "{name} {value}");
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
        (
            "slora:row_deferrals_total",
            "Times that nobody was admitted for want of an adapter's row.",
            stats.row_deferrals as f64,
        ),
    ];
    for (name, help, value) in counters {
        header(out, name, "counter", help);
        let _ = writeln!(out, "{name} {value}");
    }
}

/// How adapters were found and brought.
fn write_tiers(out: &mut String, timings: &Timings) {
    let lookups = [("device", timings.lookups.device), ("host", timings.lookups.host), ("disk", timings.lookups.disk)];
    header(out, "slora:adapter_lookups_total", "counter", "Requests by where their adapter was when they came.");
    for (tier, count) in lookups {
        let _ = writeln!(out, "slora:adapter_lookups_total{{tier=\"{tier}\"}} {count}");
    }
    let name = "slora:adapter_load_seconds";
    header(out, name, "histogram", "Time to bring an adapter from disk to the host tier, or a step's from there on.");
    for (tier, times) in [("disk", &timings.disk_loads), ("host", &timings.host_loads)] {
        write_histogram(out, name, &format!("tier=\"{tier}\""), times.bounds, times.counts.iter().copied(), times.sum);
    }
    write_counts(out, "slora:load_failures_total", "Loads from disk that failed, by reason.", &timings.load_failures);
}

fn write_counts(out: &mut String, name: &str, help: &str, counts: &BTreeMap<&'static str, u64>) {
    header(out, name, "counter", help);
    for (reason, count) in counts {
        let _ = writeln!(out, "{name}{{reason=\"{reason}\"}} {count}");
    }
}

fn write_distribution(out: &mut String, name: &str, help: &str, labels: &str, found: &Distribution) {
    header(out, name, "histogram", help);
    write_histogram(out, name, labels, found.bounds, found.counts.iter().copied(), found.sum);
}
