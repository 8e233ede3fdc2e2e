//! A load from its first request to its last answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::churn::Churn;
use super::client::{Client, Leave, Question, Target};
use super::recorder::Recorder;
use super::{Arrivals, LoadConfig, LoadError, Observer, Report, Span};

/// Time that answers take, as long as none has come.
const FIRST_ANSWER: Duration = Duration::from_millis(50);

/// A load that runs.
pub(super) struct Run {
    pub config: LoadConfig,
    pub target: Target,
    shares: WeightedIndex<f64>,
    /// What requests ask for in each model's place.
    names: Mutex<Vec<Arc<str>>>,
    recorder: Recorder,
    stopped: Notify,
}

#[derive(Serialize)]
struct Completion<'a> {
    model: &'a str,
    prompt: Vec<u32>,
    max_tokens: u32,
    ignore_eos: bool,
    temperature: f32,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

impl Run {
    pub fn new(config: LoadConfig, observer: Option<Observer>) -> Result<Self, LoadError> {
        config.check()?;
        let timeout = Duration::from_secs_f64(config.timeout_s);
        let target = Target { address: config.address()?, key: config.api_key.clone(), timeout, observer };
        let shares = config.popularity.shares(config.models.len())?;
        let names = config.models.iter().map(|model| model.name.as_str().into()).collect();
        let (recorder, stopped) = (Recorder::new(), Notify::new());
        Ok(Self { config, target, shares, names: Mutex::new(names), recorder, stopped })
    }

    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    pub fn stop(&self) {
        self.stopped.notify_one();
    }

    fn names(&self) -> MutexGuard<'_, Vec<Arc<str>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets requests ask for another name in a model's place.
    pub fn set_name(&self, place: usize, name: Arc<str>) {
        self.names()[place] = name;
    }

    fn question(&self, random: &mut SmallRng) -> Question {
        let config = &self.config;
        let draw = |random: &mut SmallRng, span: Span| random.random_range(span.min..=span.max);
        let num_input = draw(random, config.input_tokens);
        let prompt = (0..num_input).map(|_| draw(random, config.token_ids)).collect();
        let max_tokens = draw(random, config.output_tokens);
        let model = self.names()[self.shares.sample(random)].clone();
        let stream_options = config.stream.then_some(StreamOptions { include_usage: true });
        let stream = config.stream;
        let completion = Completion {
            model: &model,
            prompt,
            max_tokens,
            ignore_eos: true,
            temperature: 0.0,
            stream,
            stream_options,
        };
        let Ok(body) = serde_json::to_vec(&completion) else { unreachable!("every field can be written") };
        let leaves = (random.random::<f64>() < config.cancel).then(|| match stream {
            true => Leave::Tokens(random.random_range(0..max_tokens)),
            false => {
                let mean = self.recorder.mean_answer().unwrap_or(FIRST_ANSWER);
                Leave::Time(mean.mul_f64(random.random()))
            }
        });
        Question { body, leaves, _model: model }
    }

    /// The `index`-th request; the seed and the index say all about it.
    async fn ask(&self, client: &mut Client, index: u64) {
        let mut random = SmallRng::seed_from_u64(self.config.seed ^ (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let question = self.question(&mut random);
        self.recorder.sent();
        let outcome = client.complete(&self.target, &question, &self.recorder).await;
        self.recorder.ended(outcome, &self.config);
    }

    /// Whether the next request is sent if it is due after so many seconds, the start being 0.
    fn is_over(&self, num_sent: u64, due_s: f64) -> bool {
        due_s >= self.config.duration_s || Some(num_sent) == self.config.num_requests
    }
}

/// Runs to the end, or until it is stopped.
pub(super) async fn run(run: Arc<Run>) -> Report {
    let over = Notify::new();
    let asking = async {
        tokio::select! {
            () = requests(&run) => {}
            () = run.stopped.notified() => {}
        }
        over.notify_one();
    };
    let churning = async {
        match Churn::new(&run) {
            Some(churn) => Some(churn.until(&over).await),
            None => None,
        }
    };
    let ((), churn) = tokio::join!(asking, churning);
    run.recorder.report(&run.config, churn)
}

async fn requests(run: &Arc<Run>) {
    match run.config.arrivals {
        Arrivals::Closed { connections } => closed(run, connections).await,
        _ => by_clock(run).await,
    }
}

/// Each connection sends its next request when the last one was answered.
async fn closed(run: &Arc<Run>, connections: usize) {
    let (mut tasks, next) = (JoinSet::new(), Arc::new(Mutex::new(0)));
    for _ in 0..connections {
        let (run, next) = (run.clone(), next.clone());
        tasks.spawn(async move {
            let mut client = Client::default();
            while let Some(index) = take(&run, &next) {
                run.ask(&mut client, index).await;
            }
        });
    }
    tasks.join_all().await;
}

/// The next request's index, unless there is none.
fn take(run: &Run, next: &Mutex<u64>) -> Option<u64> {
    let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
    let index = *next;
    (!run.is_over(index, run.recorder.elapsed_s())).then(|| {
        *next += 1;
        index
    })
}

/// Requests come when they come, whatever the server does; connections are used again.
async fn by_clock(run: &Arc<Run>) {
    let mut random = SmallRng::seed_from_u64(run.config.seed);
    let idle: Arc<Mutex<Vec<Client>>> = Arc::default();
    let (mut tasks, mut index) = (JoinSet::new(), 0);
    let mut due_s = run.config.arrivals.gap_s(&mut random);
    while !run.is_over(index, due_s) {
        tokio::time::sleep_until((run.recorder.started + Duration::from_secs_f64(due_s)).into()).await;
        let client = idle.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        tasks.spawn(ask_once(run.clone(), idle.clone(), client, index));
        index += 1;
        due_s += run.config.arrivals.gap_s(&mut random);
        while tasks.try_join_next().is_some() {}
    }
    tasks.join_all().await;
}

async fn ask_once(run: Arc<Run>, idle: Arc<Mutex<Vec<Client>>>, mut client: Client, index: u64) {
    run.ask(&mut client, index).await;
    idle.lock().unwrap_or_else(PoisonError::into_inner).push(client);
}
