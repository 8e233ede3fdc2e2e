//! Adapters that come and go while requests run.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_distr::Exp1;
use serde_json::json;
use tokio::sync::Notify;

use super::client::{ask, request};
use super::connection::Connection;
use super::run::Run;
use super::{ChurnReport, Latency};

const ADMIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Replaces adapters by fresh copies under new names, so that each must be loaded anew.
pub(super) struct Churn<'a> {
    run: &'a Run,
    random: SmallRng,
    connection: Option<Connection>,
    /// Indices of models whose folder is known.
    places: Vec<usize>,
    /// The copy in each model's place.
    copies: Vec<Option<Arc<str>>>,
    /// Copies that are in no place any more. Requests with their names may be on their way.
    retired: Vec<Arc<str>>,
    /// Tells these copies from those of other loads on the same server.
    nonce: u32,
    num_copies: u64,
    registering: Latency,
    report: ChurnReport,
}

impl<'a> Churn<'a> {
    /// `None`: there is to be no churn.
    pub fn new(run: &'a Run) -> Option<Self> {
        let models = &run.config.models;
        (run.config.churn_per_s > 0.0).then(|| Self {
            run,
            random: SmallRng::seed_from_u64(run.config.seed.wrapping_add(1)),
            connection: None,
            places: (0..models.len()).filter(|index| models[*index].path.is_some()).collect(),
            copies: vec![None; models.len()],
            retired: Vec::new(),
            nonce: nonce(),
            num_copies: 0,
            registering: Latency::default(),
            report: ChurnReport::default(),
        })
    }

    /// Goes on until the requests are over, then unloads every copy that is left, and says what came of it all.
    pub async fn until(mut self, over: &Notify) -> ChurnReport {
        loop {
            let gap_s = self.random.sample::<f64, _>(Exp1) / self.run.config.churn_per_s;
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs_f64(gap_s)) => {}
                () = over.notified() => break,
            }
            self.replace().await;
            // Requests hold the names that they ask for.
            let unused = self.retired.extract_if(.., |name| Arc::strong_count(name) == 1).collect();
            self.unload(unused).await;
        }
        let left = self.retired.drain(..).chain(self.copies.iter_mut().filter_map(Option::take)).collect();
        self.unload(left).await;
        ChurnReport { registering: self.registering.summary(), ..self.report }
    }

    async fn replace(&mut self) {
        let models = &self.run.config.models;
        let Some(place) = self.places.choose(&mut self.random).copied() else { return };
        self.num_copies += 1;
        let copy: Arc<str> = format!("{}.bench-{:08x}-{}", models[place].name, self.nonce, self.num_copies).into();
        let begun = Instant::now();
        if !self.call("PUT", &copy, &json!({"path": models[place].path}).to_string()).await {
            return;
        }
        self.registering.add(begun.elapsed());
        self.report.registered += 1;
        self.run.set_name(place, copy.clone());
        self.retired.extend(self.copies[place].replace(copy));
    }

    async fn unload(&mut self, names: Vec<Arc<str>>) {
        for name in names {
            self.report.unloaded += u64::from(self.call("DELETE", &name, "").await);
        }
    }

    async fn call(&mut self, method: &str, name: &str, body: &str) -> bool {
        let run = self.run;
        let path = format!("/v1/adapters/{name}");
        let bytes = request(method, &path, run.target.address, run.config.admin_key.as_ref(), body.as_bytes());
        let exchange = exchange(&mut self.connection, run, &bytes);
        let answered = tokio::time::timeout(ADMIN_TIMEOUT, exchange).await;
        let error = match answered {
            Ok(Ok((200..=299, _))) => return true,
            Ok(Ok((status, body))) => format!("{status}: {body}"),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {ADMIN_TIMEOUT:?}"),
        };
        self.connection = None;
        self.report.failed += 1;
        self.report.first_error.get_or_insert(format!("{method} {path}: {error}"));
        false
    }
}

fn nonce() -> u32 {
    // A system without random numbers: two loads at once may take each other's copies.
    getrandom::u32().unwrap_or_default()
}

async fn exchange(connection: &mut Option<Connection>, run: &Run, bytes: &[u8]) -> io::Result<(u16, String)> {
    let (open, head) = ask(connection, run.target.address, bytes).await?;
    let (status, closes) = (head.status, head.closes);
    let body = open.whole(head.body).await?;
    if closes {
        *connection = None;
    }
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
