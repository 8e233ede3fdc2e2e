//! Counters of the server, and the exposition of them and of the engine's.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::histogram::{Histogram, SECONDS, SMALL, TOKENS, header, label};

/// Adapters with series of their own; the others are summed up as `other`.
pub(crate) const TOP_ADAPTERS: usize = 64;
/// What stands for all others; an adapter of that name is one of them.
pub(crate) const OTHER: &str = "other";
/// Adapters that are counted one by one.
const MAX_COUNTED_ADAPTERS: usize = 16_384;

/// Traffic of one adapter.
#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    requests: u64,
    prompt_tokens: u64,
    completion_tokens: u64,
    /// Requests that got a first token, and how long they waited for it, summed up.
    first_tokens: u64,
    first_token_us: u64,
}

impl Traffic {
    fn add(&mut self, other: Traffic) {
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.first_tokens += other.first_tokens;
        self.first_token_us += other.first_token_us;
    }
}

#[derive(Default)]
struct Labelled {
    http: HashMap<(&'static str, &'static str, u16), u64>,
    http_seconds: HashMap<&'static str, Histogram>,
    finished: HashMap<&'static str, u64>,
    rejected: HashMap<&'static str, u64>,
    load_failures: HashMap<String, u64>,
    adapters: HashMap<Arc<str>, Traffic>,
    other_adapters: Traffic,
}

/// Reasons of failed loads that are counted one by one.
const MAX_REASONS: usize = 64;

/// Everything the server counts.
pub(crate) struct Metrics {
    pub prompt_tokens: AtomicU64,
    pub generation_tokens: AtomicU64,
    disconnects: AtomicU64,
    pub open_streams: AtomicU64,
    pub open_connections: AtomicU64,
    first_token: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt_lens: Histogram,
    generation_lens: Histogram,
    longest_generations: Histogram,
    choices: Histogram,
    max_tokens: Histogram,
    labelled: Mutex<Labelled>,
}

/// One finished choice.
pub(crate) struct Finished {
    pub reason: &'static str,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub elapsed: Duration,
    pub first_token: Option<Duration>,
    pub phases: Phases,
    pub adapter: Option<Arc<str>>,
}

/// How long a choice was in each phase, as far as it got.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Phases {
    /// From its submission to its admission.
    pub queue: Option<Duration>,
    /// From there to its first token.
    pub prefill: Option<Duration>,
    /// From there to its last token.
    pub decode: Option<Duration>,
}

impl Metrics {
    pub fn new() -> Self {
        let zero = || AtomicU64::new(0);
        let seconds = || Histogram::new(SECONDS);
        let tokens = || Histogram::new(TOKENS);
        Self {
            prompt_tokens: zero(),
            generation_tokens: zero(),
            disconnects: zero(),
            open_streams: zero(),
            open_connections: zero(),
            first_token: seconds(),
            inter_token: seconds(),
            per_token: seconds(),
            end_to_end: seconds(),
            queue: seconds(),
            prefill: seconds(),
            decode: seconds(),
            inference: seconds(),
            prompt_lens: tokens(),
            generation_lens: tokens(),
            longest_generations: tokens(),
            choices: Histogram::new(SMALL),
            max_tokens: tokens(),
            labelled: Mutex::default(),
        }
    }

    fn labelled(&self) -> MutexGuard<'_, Labelled> {
        self.labelled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn count_http(&self, handler: &'static str, method: &'static str, status: u16, elapsed: Duration) {
        let mut labelled = self.labelled();
        *labelled.http.entry((handler, method, status)).or_default() += 1;
        let seconds = labelled.http_seconds.entry(handler).or_insert_with(|| Histogram::new(SECONDS));
        seconds.observe(elapsed.as_secs_f64());
    }

    pub fn count_disconnect(&self) {
        self.disconnects.fetch_add(1, Ordering::Relaxed);
    }

    pub fn count_rejected(&self, cause: &'static str) {
        *self.labelled().rejected.entry(cause).or_default() += 1;
    }

    pub fn count_load_failure(&self, reason: &str) {
        let mut labelled = self.labelled();
        let is_known = labelled.load_failures.contains_key(reason) || labelled.load_failures.len() < MAX_REASONS;
        let reason = if is_known { reason } else { OTHER };
        *labelled.load_failures.entry(reason.to_owned()).or_default() += 1;
    }

    pub fn observe_request(&self, choices: u32, max_tokens: Option<u32>) {
        self.choices.observe(f64::from(choices));
        if let Some(max_tokens) = max_tokens {
            self.max_tokens.observe(f64::from(max_tokens));
        }
    }

    pub fn observe_first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    /// Tokens that came one after the other, this far apart on average.
    pub fn observe_inter_token(&self, apart: Duration, times: u64) {
        self.inter_token.observe_many(apart.as_secs_f64(), times);
    }

    /// A request has ended; its longest choice had this many tokens.
    pub fn observe_longest(&self, tokens: u64) {
        self.longest_generations.observe(tokens as f64);
    }

    fn observe_phases(&self, phases: Phases) {
        let all = [(&self.queue, phases.queue), (&self.prefill, phases.prefill), (&self.decode, phases.decode)];
        for (histogram, time) in all {
            if let Some(time) = time {
                histogram.observe(time.as_secs_f64());
            }
        }
        if let (Some(prefill), Some(decode)) = (phases.prefill, phases.decode) {
            self.inference.observe((prefill + decode).as_secs_f64());
        }
    }

    pub fn observe_finished(&self, finished: Finished) {
        let Finished { reason, prompt_tokens, completion_tokens, elapsed, first_token, phases, adapter } = finished;
        self.observe_phases(phases);
        self.prompt_tokens.fetch_add(prompt_tokens, Ordering::Relaxed);
        self.generation_tokens.fetch_add(completion_tokens, Ordering::Relaxed);
        self.end_to_end.observe(elapsed.as_secs_f64());
        self.prompt_lens.observe(prompt_tokens as f64);
        self.generation_lens.observe(completion_tokens as f64);
        if let Some(first) = first_token.filter(|_| completion_tokens > 1) {
            let rest = elapsed.saturating_sub(first).as_secs_f64();
            self.per_token.observe(rest / (completion_tokens - 1) as f64);
        }
        let mut labelled = self.labelled();
        *labelled.finished.entry(reason).or_default() += 1;
        let traffic = Traffic {
            requests: 1,
            prompt_tokens,
            completion_tokens,
            first_tokens: u64::from(first_token.is_some()),
            first_token_us: first_token.map_or(0, |first| first.as_micros() as u64),
        };
        let Some(adapter) = adapter else { return };
        let has_room = labelled.adapters.len() < MAX_COUNTED_ADAPTERS || labelled.adapters.contains_key(&adapter);
        if has_room && &*adapter != OTHER {
            labelled.adapters.entry(adapter).or_default().add(traffic);
        } else {
            labelled.other_adapters.add(traffic);
        }
    }

    /// The families that other servers have too, behind `prefix`.
    pub fn write_common(&self, out: &mut String, prefix: &str, labels: &str) {
        let counter = |out: &mut String, name: &str, help: &str, value: &AtomicU64| {
            let name = format!("{prefix}:{name}");
            header(out, &name, "counter", help);
            let _ = writeln!(out, "{name}{{{labels}}} {}", value.load(Ordering::Relaxed));
        };
        counter(out, "prompt_tokens_total", "Prompt tokens of finished requests.", &self.prompt_tokens);
        counter(out, "generation_tokens_total", "Generated tokens of finished requests.", &self.generation_tokens);
        let name = format!("{prefix}:request_success_total");
        header(out, &name, "counter", "Finished requests.");
        for (reason, count) in &self.labelled().finished {
            let _ = writeln!(out, "{name}{{{labels},finished_reason=\"{reason}\"}} {count}");
        }
        let histograms: [(&str, &str, &Histogram); 14] = [
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", &self.first_token),
            ("inter_token_latency_seconds", "Between two tokens of a request.", &self.inter_token),
            ("time_per_output_token_seconds", "Between two tokens of a request (old name).", &self.inter_token),
            (
                "request_time_per_output_token_seconds",
                "A request's mean time per token after the first.",
                &self.per_token,
            ),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", &self.end_to_end),
            ("request_queue_time_seconds", "From a choice's submission to its admission.", &self.queue),
            ("request_prefill_time_seconds", "From a choice's admission to its first token.", &self.prefill),
            ("request_decode_time_seconds", "From a choice's first token to its last.", &self.decode),
            ("request_inference_time_seconds", "From a choice's admission to its last token.", &self.inference),
            ("request_max_num_generation_tokens", "Tokens of a request's longest choice.", &self.longest_generations),
            ("request_prompt_tokens", "Prompt tokens of a request.", &self.prompt_lens),
            ("request_generation_tokens", "Generated tokens of a request.", &self.generation_lens),
            ("request_params_n", "Choices asked for.", &self.choices),
            ("request_params_max_tokens", "max_tokens asked for.", &self.max_tokens),
        ];
        for (name, help, histogram) in histograms {
            histogram.write(out, &format!("{prefix}:{name}"), help, labels);
        }
    }

    /// The server's own families.
    pub fn write_own(&self, out: &mut String) {
        let simple = [
            (
                "slora:disconnects_total",
                "counter",
                "Clients that left before their answer was whole.",
                &self.disconnects,
            ),
            ("slora:open_streams", "gauge", "Event streams being written.", &self.open_streams),
            ("slora:open_connections", "gauge", "Open connections.", &self.open_connections),
        ];
        for (name, kind, help, value) in simple {
            header(out, name, kind, help);
            let _ = writeln!(out, "{name} {}", value.load(Ordering::Relaxed));
        }
        let labelled = self.labelled();
        header(out, "slora:rejected_requests_total", "counter", "Requests that were refused, by error code.");
        for (cause, count) in &labelled.rejected {
            let _ = writeln!(out, "slora:rejected_requests_total{{cause=\"{cause}\"}} {count}");
        }
        header(out, "slora:adapter_refusals_total", "counter", "Adapters refused when registered, by reason.");
        for (reason, count) in &labelled.load_failures {
            let _ = writeln!(out, "slora:adapter_refusals_total{{reason=\"{}\"}} {count}", label(reason));
        }
        labelled.write_adapters(out);
        header(out, "http_requests_total", "counter", "HTTP requests.");
        for ((handler, method, status), count) in &labelled.http {
            let _ = writeln!(
                out,
                "http_requests_total{{handler=\"{handler}\",method=\"{method}\",status=\"{status}\"}} {count}"
            );
        }
        header(out, "http_request_duration_seconds", "histogram", "Time of HTTP requests, streams included.");
        for (handler, histogram) in &labelled.http_seconds {
            histogram.write_samples(out, "http_request_duration_seconds", &format!("handler=\"{handler}\""));
        }
    }
}

/// A family of the adapters' series: its name, help and value.
type Family = (&'static str, &'static str, fn(&Traffic) -> u64);

impl Labelled {
    fn write_adapters(&self, out: &mut String) {
        let mut ranked: Vec<(&Arc<str>, &Traffic)> = self.adapters.iter().collect();
        ranked.sort_by(|a, b| b.1.requests.cmp(&a.1.requests).then(a.0.cmp(b.0)));
        let mut other = self.other_adapters;
        ranked.iter().skip(TOP_ADAPTERS).for_each(|(_, traffic)| other.add(**traffic));
        ranked.truncate(TOP_ADAPTERS);
        let families: [Family; 3] = [
            ("slora:adapter_requests_total", "Finished requests of the busiest adapters.", |t| t.requests),
            ("slora:adapter_prompt_tokens_total", "Their prompt tokens.", |t| t.prompt_tokens),
            ("slora:adapter_generation_tokens_total", "Their generated tokens.", |t| t.completion_tokens),
        ];
        for (name, help, value) in families {
            header(out, name, "counter", help);
            for (adapter, traffic) in &ranked {
                let _ = writeln!(out, "{name}{{adapter=\"{}\"}} {}", label(adapter), value(traffic));
            }
            let _ = writeln!(out, "{name}{{adapter=\"{OTHER}\"}} {}", value(&other));
        }
        let name = "slora:adapter_time_to_first_token_seconds";
        header(out, name, "summary", "From a request's arrival to its first token, by adapter.");
        let others = Arc::from(OTHER);
        for (adapter, traffic) in ranked.into_iter().chain([(&others, &other)]) {
            let (adapter, seconds) = (label(adapter), traffic.first_token_us as f64 / 1e6);
            let _ = writeln!(out, "{name}_sum{{adapter=\"{adapter}\"}} {seconds}");
            let _ = writeln!(out, "{name}_count{{adapter=\"{adapter}\"}} {}", traffic.first_tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_busiest_adapters_have_series_of_their_own() {
        let metrics = Metrics::new();
        for index in 0..200u64 {
            for _ in 0..=index {
                let adapter = Some(Arc::from(format!("a{index}").as_str()));
                let elapsed = Duration::from_millis(5);
                let (reason, first_token) = ("stop", Some(elapsed));
                metrics.observe_finished(Finished {
                    reason,
                    prompt_tokens: 1,
                    completion_tokens: 2,
                    elapsed,
                    first_token,
                    phases: Phases::default(),
                    adapter,
                });
            }
        }
        let mut out = String::new();
        metrics.write_own(&mut out);
        assert_eq!(out.lines().filter(|line| line.starts_with("slora:adapter_requests_total{")).count(), 65);
        assert!(out.contains("slora:adapter_requests_total{adapter=\"a199\"} 200\n"));
        assert!(out.contains("slora:adapter_requests_total{adapter=\"other\"} 9316\n"), "{out}");
    }
}
