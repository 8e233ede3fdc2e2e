//! The Prometheus exposition, and what is built on it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod processor_time;
mod server_world;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slora_core::EngineConfig;

use server_world::{HELD, Response, World, adapter_root, completion, copy_adapter, example, with};

/// A parsed exposition: every series has its family's header before it, and families come once.
struct Exposition {
    families: BTreeMap<String, String>,
    /// Name, labels and value of each series, which come once too.
    series: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Exposition {
    fn parse(body: &str) -> Self {
        let (mut found, mut seen) = (Self { families: BTreeMap::new(), series: Vec::new() }, BTreeSet::new());
        for line in body.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(found.families.insert(name.into(), kind.into()).is_none(), "{name} is there twice");
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').map_or((series, ""), |(name, rest)| (name, rest));
                let ends = ["_bucket", "_sum", "_count"];
                let family = ends
                    .iter()
                    .find_map(|end| name.strip_suffix(end).filter(|family| found.families.contains_key(*family)));
                assert!(found.families.contains_key(family.unwrap_or(name)), "{line} belongs to no family");
                let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert!(seen.insert(series), "{series} is there twice");
                found.series.push((name.into(), labels_of(labels), value));
            }
        }
        found
    }

    fn of(world: &World) -> Self {
        Self::parse(&world.ask("user", "GET", "/metrics", None).body)
    }

    /// Names of all labels of a metric; `None`: there is no such metric.
    fn labels(&self, name: &str) -> Option<BTreeSet<&str>> {
        let mut series = self.series.iter().filter(|(other, _, _)| other == name).peekable();
        series.peek()?;
        Some(series.flat_map(|(_, labels, _)| labels.keys().map(String::as_str)).collect())
    }

    fn value(&self, name: &str, label: Option<(&str, &str)>) -> f64 {
        let is_it = |labels: &BTreeMap<String, String>| {
            label.is_none_or(|(key, value)| labels.get(key).is_some_and(|found| found == value))
        };
        let found = self.series.iter().find(|(other, labels, _)| other == name && is_it(labels));
        found.unwrap_or_else(|| panic!("no {name} with {label:?}")).2
    }
}

/// `a="b",c="d"}` as a map; values here hold no commas.
fn labels_of(text: &str) -> BTreeMap<String, String> {
    let pairs = text.trim_end_matches('}').split("\",").filter(|pair| !pair.is_empty());
    let pair = |pair: &str| {
        let (name, value) = pair.split_once("=\"").unwrap_or_else(|| panic!("{text}"));
        (name.to_owned(), value.trim_end_matches('"').to_owned())
    };
    pairs.map(pair).collect()
}

/// A server that has seen a bit of everything.
fn busy_world() -> (World, tempfile::TempDir) {
    let (root, config) = adapter_root();
    let world = World::configured(config);
    for name in ["reverse", "upper"] {
        let put = json!({"path": root.path().join(name)});
        assert_eq!(world.ask("admin", "PUT", &format!("/v1/adapters/{name}"), Some(&put)).status, 200);
    }
    for (model, stream) in [("base", false), ("reverse", false), ("reverse", true)] {
        let body = with(completion(4), json!({"model": model, "stream": stream}));
        assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).status, 200);
    }
    std::fs::write(root.path().join("upper/adapter_model.safetensors"), "spoilt").unwrap();
    let body = with(completion(4), json!({"model": "upper"}));
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).error(), (400, "adapter_invalid".into()));
    copy_adapter("upper", &root.path().join("cut"));
    std::fs::write(root.path().join("cut/adapter_config.json"), "{").unwrap();
    let put = json!({"path": root.path().join("cut")});
    assert_eq!(world.ask("admin", "PUT", "/v1/adapters/cut", Some(&put)).error().0, 400);
    world.server.begin_drain();
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).status, 503);
    (world, root)
}

#[test]
fn an_adapter_called_other_is_one_of_the_others() {
    let (root, config) = adapter_root();
    let world = World::configured(config);
    let put = json!({"path": root.path().join("upper")});
    assert_eq!(world.ask("admin", "PUT", "/v1/adapters/other", Some(&put)).status, 200);
    let ask = |fields: Value| with(completion(4), with(json!({"model": "other"}), fields)).to_string();
    let bearer = [("authorization", "Bearer user")];
    assert_eq!(world.send("POST", "/v1/completions", &bearer, Some(&ask(json!({})))).status, 200);
    world.set_step_time(Duration::from_secs(1));
    let _running = world.open("POST", "/v1/completions", &bearer, Some(&ask(json!({"stream": true}))));
    world.wait_until("it runs", |stats| stats.running == 1);
    let (found, other) = (Exposition::of(&world), Some(("adapter", "other")));
    assert_eq!(found.value("slora:adapter_requests_total", other), 1.0);
    assert_eq!(found.value("slora:adapter_requests_running", other), 1.0);
}

#[test]
fn what_other_servers_have_is_there_by_its_name_and_kind() {
    let (world, _root) = busy_world();
    let found = Exposition::of(&world);
    let kinds = [
        ("gauge", "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info lora_requests_info"),
        ("counter", "prompt_tokens_total generation_tokens_total request_success_total num_preemptions_total"),
        (
            "histogram",
            "time_to_first_token_seconds inter_token_latency_seconds time_per_output_token_seconds \
             request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds \
             request_prefill_time_seconds request_decode_time_seconds request_inference_time_seconds \
             request_prompt_tokens request_generation_tokens request_params_n request_params_max_tokens \
             request_max_num_generation_tokens iteration_tokens_total",
        ),
    ];
    for (kind, names) in kinds {
        for name in names.split_whitespace() {
            assert_eq!(found.families.get(&format!("vllm:{name}")).map(String::as_str), Some(kind), "{name}");
        }
    }
    for (name, labels) in [
        ("vllm:num_requests_running", "engine model_name"),
        ("vllm:request_success_total", "engine finished_reason model_name"),
        ("vllm:cache_config_info", "block_size engine model_name num_gpu_blocks"),
        ("vllm:lora_requests_info", "max_lora running_lora_adapters waiting_lora_adapters"),
        ("http_requests_total", "handler method status"),
    ] {
        assert_eq!(found.labels(name).unwrap(), labels.split(' ').collect(), "{name}");
    }
}

#[test]
fn figures_are_those_of_what_happened() {
    let (world, _root) = busy_world();
    let found = Exposition::of(&world);
    let value = |name: &str, label: &str, of: &str| found.value(name, Some((label, of)));
    assert_eq!(value("slora:adapter_generation_tokens_total", "adapter", "reverse"), 8.0);
    assert_eq!(value("slora:adapter_time_to_first_token_seconds_count", "adapter", "reverse"), 2.0);
    assert_eq!(value("slora:adapter_lookups_total", "tier", "disk"), 2.0, "reverse once, and upper");
    assert_eq!(value("slora:adapter_lookups_total", "tier", "device"), 1.0);
    assert_eq!(value("slora:load_failures_total", "reason", "changed"), 1.0);
    assert_eq!(found.labels("slora:adapter_refusals_total").unwrap().len(), 1);
    assert_eq!(value("slora:adapter_load_seconds_count", "tier", "disk"), 1.0);
    assert_eq!(value("slora:adapter_load_seconds_count", "tier", "host"), 1.0);
    assert_eq!(value("slora:adapters", "state", "resident"), 1.0);
    assert_eq!(value("slora:adapters", "state", "failed"), 1.0);
    let info = world.runtime.adapter("reverse").unwrap().unwrap().info;
    assert_eq!(value("slora:adapter_bytes", "tier", "device"), info.bytes as f64);
    assert_eq!(value("slora:pool_pages", "owner", "adapter"), f64::from(info.num_pages));
    assert_eq!(value("slora:rejected_requests_total", "cause", "service_unavailable"), 1.0);
    assert_eq!(found.value("vllm:generation_tokens_total", None), 12.0);
    assert_eq!(found.value("vllm:iteration_tokens_total_sum", None), 12.0, "prompts of one token, and 3 rows to go on");
    assert!(found.value("process_resident_memory_bytes", None) > 1e6);
    assert!(found.value("process_cpu_seconds_total", None) > 0.0);
}

#[test]
fn a_requests_time_is_split_into_queue_prefill_and_decode() {
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let world = World::with(json!({}), engine, HELD);
    let body = completion(50).to_string();
    let started = Instant::now();
    let first = world.open("POST", "/v1/completions", &[], Some(&body));
    world.wait_until("the first one runs", |stats| stats.running == 1);
    let second = world.open("POST", "/v1/completions", &[], Some(&body));
    world.wait_for_metric("", "slora:unfinished_requests 2");
    let held = started.elapsed().as_secs_f64();
    world.set_step_time(Duration::from_millis(10));
    assert_eq!([Response::read(first).status, Response::read(second).status], [200, 200]);
    let elapsed = started.elapsed().as_secs_f64();
    let found = Exposition::parse(&world.get("/metrics").body);
    let sum = |phase: &str| {
        assert_eq!(found.value(&format!("vllm:request_{phase}_seconds_count"), None), 2.0, "{phase}");
        found.value(&format!("vllm:request_{phase}_seconds_sum"), None)
    };
    // Each runs for fifty steps of 10 ms: the first step is its prefill, the very first one a held one, and the second
    // request waits for all others of the first.
    assert!((0.3..elapsed).contains(&sum("queue_time")), "{}", sum("queue_time"));
    assert!((0.01..held + 0.5).contains(&sum("prefill_time")), "{}", sum("prefill_time"));
    assert!((0.7..elapsed).contains(&sum("decode_time")), "{}", sum("decode_time"));
    let parts = sum("prefill_time") + sum("decode_time");
    assert!((sum("inference_time") - parts).abs() < 1e-4);
    let whole = found.value("vllm:e2e_request_latency_seconds_sum", None);
    assert!((sum("queue_time") + parts) <= whole + 0.01, "{whole}");
}

#[test]
fn an_exposition_with_ten_thousand_adapters_is_small_and_fast() {
    let world = World::new();
    let path = example("adapters/reverse");
    for index in 0..10_000 {
        world.runtime.register(&format!("an-adapter-with-a-longer-name-{index}"), &path, false, false).unwrap();
    }
    for index in 0..200 {
        let body = with(completion(1), json!({"model": format!("an-adapter-with-a-longer-name-{index}")}));
        assert_eq!(world.post("/v1/completions", &body).status, 200);
    }
    let scrape = || {
        let start = processor_time::of_process();
        let body = world.get("/metrics").body;
        (processor_time::of_process() - start, body)
    };
    // With what other tests of this program take meanwhile, which is nothing in most.
    let (fastest, body) = (0..50).map(|_| scrape()).min_by_key(|(took, _)| *took).unwrap();
    assert_eq!(Exposition::parse(&body).value("slora:adapters", Some(("state", "registered"))) as u32 / 1000, 9);
    assert!(body.len() <= 256 << 10, "{} bytes", body.len());
    assert!(fastest <= Duration::from_millis(20), "{fastest:?}");
}

/// What a PromQL expression reads: metrics with the labels that it selects by, and labels that it groups by.
#[derive(Debug, Default)]
struct Query {
    metrics: Vec<(String, Vec<String>)>,
    groupings: Vec<String>,
}

impl Query {
    fn parse(expression: &str) -> Self {
        let mut query = Self::default();
        let mut rest = expression;
        while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || matches!(c, '_' | '"' | '[')) {
            rest = &rest[start..];
            if rest.starts_with(['"', '[']) {
                let end = if rest.starts_with('"') { '"' } else { ']' };
                rest = rest[1..].split_once(end).unwrap().1;
                continue;
            }
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '_' | ':')).unwrap_or(rest.len());
            let word;
            (word, rest) = rest.split_at(end);
            rest = rest.trim_start();
            if matches!(word, "by" | "without" | "on" | "ignoring") {
                let (labels, after) = rest[1..].split_once(')').unwrap();
                query.groupings.extend(labels.split(',').map(|label| label.trim().to_owned()));
                rest = after;
            } else if !rest.starts_with('(') && !rest.starts_with("by ") && !rest.starts_with("without ") {
                let mut labels = Vec::new();
                if let Some(selected) = rest.strip_prefix('{') {
                    let (selected, after) = selected.split_once('}').unwrap();
                    let names = selected.split(',').filter_map(|label| label.split(['=', '!']).next());
                    labels.extend(names.map(str::to_owned));
                    rest = after;
                }
                query.metrics.push((word.to_owned(), labels));
            }
        }
        query
    }

    fn check(&self, found: &Exposition, expression: &str, legend: &str) {
        assert!(!self.metrics.is_empty(), "{expression} reads nothing");
        let mut known = BTreeSet::new();
        for (name, labels) in &self.metrics {
            let has = found.labels(name).unwrap_or_else(|| panic!("{expression}: there is no {name}"));
            labels
                .iter()
                .for_each(|label| assert!(has.contains(label.as_str()), "{expression}: {name} has no {label}"));
            known.extend(has);
        }
        let shown = legend.split("{{").skip(1).map(|part| part.split("}}").next().unwrap().trim());
        for label in self.groupings.iter().map(String::as_str).chain(shown) {
            assert!(known.contains(label), "{expression}: nothing has {label}");
        }
    }
}

#[test]
fn the_dashboard_and_the_alerts_read_what_there_is() {
    let (world, _root) = busy_world();
    let found = Exposition::of(&world);
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let dashboard: Value = serde_json::from_slice(&std::fs::read(deploy.join("grafana.json")).unwrap()).unwrap();
    let mut num_queries = 0;
    for target in
        dashboard["panels"].as_array().unwrap().iter().filter_map(|panel| panel["targets"].as_array()).flatten()
    {
        let expression = target["expr"].as_str().unwrap();
        Query::parse(expression).check(&found, expression, target["legendFormat"].as_str().unwrap());
        num_queries += 1;
    }
    let alerts = std::fs::read_to_string(deploy.join("alerts.yml")).unwrap();
    for expression in alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: ")) {
        Query::parse(expression).check(&found, expression, "");
        num_queries += 1;
    }
    assert!(num_queries > 40, "{num_queries}");
}

#[test]
fn a_query_is_read_as_prometheus_reads_it() {
    let query = Query::parse(r#"sum by (le, a) (rate(x:y_bucket{b="c",d=~"e"}[$__rate_interval])) / z > 5"#);
    let selected = ["b".to_owned(), "d".to_owned()].to_vec();
    assert_eq!(query.metrics, [("x:y_bucket".to_owned(), selected), ("z".to_owned(), vec![])]);
    assert_eq!(query.groupings, ["le", "a"]);
}
