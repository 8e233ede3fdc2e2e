//! A load generator: requests by a clock or by connections, adapters by popularity, and what came of them.
//!
//! It speaks plain HTTP/1.1 over its own sockets, on one thread: beside a server on the same machine, what it takes away is
//! little and always the same.

mod arrivals;
mod client;
mod latency;
mod popularity;
mod random;
mod report;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

pub use arrivals::Arrivals;
pub use latency::{Latency, Summary};
pub use popularity::Popularity;
pub use report::{Outcome, Report};

use crate::load::client::{Client, Target};
use crate::load::popularity::Picker;
use crate::load::random::Random;

/// What is sent, and how fast.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadConfig {
    /// The server.
    pub address: SocketAddr,
    /// A user's key.
    #[serde(skip_serializing)]
    pub api_key: Option<String>,
    /// Names that requests ask for; the first is the most popular.
    pub models: Vec<String>,
    /// How often each is asked for.
    pub popularity: Popularity,
    /// When requests are sent.
    pub arrivals: Arrivals,
    /// For how long, in seconds.
    pub duration_s: f64,
    /// Token ids of a prompt.
    pub prompt_tokens: usize,
    /// Ids are drawn from these.
    pub token_ids: (u32, u32),
    /// Tokens to generate; the model's end of sequence is ignored.
    pub max_tokens: u32,
    /// Whether answers stream.
    pub stream: bool,
    /// Share of requests whose client leaves somewhere before the end.
    pub cancelled: f64,
    /// What counts as good: seconds to the first token.
    pub slo_first_token_s: f64,
    /// What counts as good: seconds for each token after it, on average.
    pub slo_per_token_s: f64,
    /// Of random numbers.
    pub seed: u64,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8000)),
            api_key: None,
            models: vec!["base".into()],
            popularity: Popularity::default(),
            arrivals: Arrivals::default(),
            duration_s: 10.0,
            prompt_tokens: 8,
            token_ids: (80, 106),
            max_tokens: 8,
            stream: false,
            cancelled: 0.0,
            slo_first_token_s: 6.0,
            slo_per_token_s: 0.2,
            seed: 0,
        }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Seconds since its start.
    pub elapsed_s: f64,
    /// Requests that were sent.
    pub sent: u64,
    /// Requests that ended, however.
    pub ended: u64,
}

struct Run {
    config: LoadConfig,
    target: Target,
    picker: Picker,
    started: Instant,
    sent: AtomicU64,
    ended: AtomicU64,
}

/// Told of every event of every stream, and when it came.
pub type Observer = Arc<dyn Fn(&[u8], Instant) + Send + Sync>;

/// Runs a load to its end. `progress` is told about twice a second.
///
/// # Errors
/// A setting that cannot be, or a system without threads or sockets.
pub fn run(config: LoadConfig, progress: impl Fn(Progress), observer: Option<Observer>) -> Result<Report, String> {
    if config.models.is_empty() || config.token_ids.0 >= config.token_ids.1 {
        return Err("models and token_ids must not be empty".into());
    }
    config.arrivals.check()?;
    let picker = Picker::new(&config.popularity, config.models.len())?;
    let target = Target { address: config.address, api_key: config.api_key.clone(), observer };
    let threads =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    let (sent, ended) = (AtomicU64::new(0), AtomicU64::new(0));
    let run = Arc::new(Run { config, target, picker, started: Instant::now(), sent, ended });
    threads.block_on(async {
        let mut work = tokio::spawn(all(run.clone()));
        loop {
            tokio::select! {
                outcomes = &mut work => {
                    let outcomes = outcomes.map_err(|error| error.to_string())?;
                    return Ok(Report::new(&run.config, &outcomes, run.started.elapsed()));
                }
                () = tokio::time::sleep(Duration::from_millis(500)) => progress(run.progress()),
            }
        }
    })
}

impl Run {
    fn progress(&self) -> Progress {
        let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Progress { elapsed_s: self.started.elapsed().as_secs_f64(), sent: count(&self.sent), ended: count(&self.ended) }
    }

    fn is_over(&self) -> bool {
        self.started.elapsed().as_secs_f64() >= self.config.duration_s
    }

    /// One request's body, and after how many tokens its client leaves.
    fn body(&self, random: &mut Random) -> (String, Option<u32>) {
        let config = &self.config;
        let (first, end) = config.token_ids;
        let ids: Vec<u32> = (0..config.prompt_tokens).map(|_| first + random.below(end - first)).collect();
        let model = &config.models[self.picker.pick(random)];
        let body = serde_json::json!({
            "model": model, "prompt": ids, "max_tokens": config.max_tokens, "ignore_eos": true,
            "temperature": 0, "stream": config.stream,
        });
        let leaves = (random.uniform() < config.cancelled).then(|| random.below(config.max_tokens.max(1)));
        (body.to_string(), leaves)
    }

    async fn one(&self, client: &mut Client, random: &mut Random) -> Outcome {
        let (body, leaves) = self.body(random);
        self.sent.fetch_add(1, Ordering::Relaxed);
        let begun = self.started.elapsed();
        let outcome = client.complete(&self.target, &body, self.config.stream, leaves).await;
        self.ended.fetch_add(1, Ordering::Relaxed);
        Outcome { begun, ..outcome }
    }
}

async fn all(run: Arc<Run>) -> Vec<Outcome> {
    match run.config.arrivals.clone() {
        Arrivals::Closed { connections } => closed(run, connections).await,
        open => by_clock(run, open).await,
    }
}

/// Each connection sends its next request when the last one was answered.
async fn closed(run: Arc<Run>, connections: usize) -> Vec<Outcome> {
    let mut tasks = JoinSet::new();
    for index in 0..connections {
        let run = run.clone();
        tasks.spawn(async move {
            let mut random = Random::new(run.config.seed, index as u64);
            let (mut client, mut outcomes) = (Client::default(), Vec::new());
            while !run.is_over() {
                outcomes.push(run.one(&mut client, &mut random).await);
            }
            outcomes
        });
    }
    tasks.join_all().await.concat()
}

/// Requests come when they come, whatever the server does; connections are used again.
async fn by_clock(run: Arc<Run>, arrivals: Arrivals) -> Vec<Outcome> {
    let mut random = Random::new(run.config.seed, u64::MAX);
    let idle: Arc<std::sync::Mutex<Vec<Client>>> = Arc::default();
    let lock = |idle: &std::sync::Mutex<Vec<Client>>| -> Option<Client> {
        idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop()
    };
    let (mut tasks, mut next_s, mut index) = (JoinSet::new(), 0.0, 0);
    loop {
        next_s += arrivals.gap_s(&mut random);
        if next_s >= run.config.duration_s {
            break;
        }
        let due = run.started + Duration::from_secs_f64(next_s);
        tokio::time::sleep_until(due.into()).await;
        index += 1;
        let (run, pool, client) = (run.clone(), idle.clone(), lock(&idle).unwrap_or_default());
        tasks.spawn(async move {
            let (mut client, mut random) = (client, Random::new(run.config.seed, index));
            let outcome = run.one(&mut client, &mut random).await;
            pool.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(client);
            outcome
        });
    }
    tasks.join_all().await
}
