//! A load generator: requests by a clock or by connections, adapters by popularity, and what came of them.
//!
//! It speaks plain HTTP/1.1 over its own sockets, on one thread: beside a server on the same machine, what it takes away is
//! little and always the same.

mod arrivals;
mod churn;
mod client;
mod config;
mod connection;
mod events;
mod latency;
mod popularity;
mod recorder;
mod report;
mod run;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use arrivals::Arrivals;
pub use config::{LoadConfig, LoadError, Model, Span};
pub use latency::{Latency, Summary};
pub use popularity::Popularity;
pub use report::{ChurnReport, Report, Window};

use crate::load::run::Run;

/// Told of every event with text, when it was read.
pub type Observer = Arc<dyn Fn(&[u8], Instant) + Send + Sync>;

/// How far a load is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Seconds since its start.
    pub elapsed_s: f64,
    /// Requests that were sent.
    pub sent: u64,
    /// Requests that ended, however.
    pub ended: u64,
    /// Events with text that were read.
    pub tokens: u64,
}

/// A load that runs on a thread of its own. Dropping it stops it.
pub struct Load {
    run: Arc<Run>,
    thread: Option<JoinHandle<Report>>,
}

impl Load {
    /// Starts a load.
    ///
    /// # Errors
    /// A value that is out of range, an address that cannot be, or a system without threads.
    pub fn start(config: LoadConfig, observer: Option<Observer>) -> Result<Self, LoadError> {
        let threads = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(LoadError::Threads)?;
        let run = Arc::new(Run::new(config, observer)?);
        let runs = run.clone();
        let work = move || threads.block_on(run::run(runs));
        let thread = std::thread::Builder::new().name("slora-load".into()).spawn(work).map_err(LoadError::Threads)?;
        Ok(Self { run, thread: Some(thread) })
    }

    /// Waits for the end; whether it came within `timeout`.
    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let is_over = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            let left = deadline.saturating_duration_since(Instant::now());
            if is_over || left.is_zero() {
                return is_over;
            }
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.run.recorder().progress()
    }

    /// Sends nothing more and leaves what has not ended.
    pub fn stop(&self) {
        self.run.stop();
    }

    /// Waits for the end and says what came of it.
    ///
    /// # Errors
    /// A bug: the load's thread has panicked.
    pub fn finish(mut self) -> Result<Report, LoadError> {
        let ended = self.thread.take().map(JoinHandle::join);
        ended.and_then(Result::ok).ok_or(LoadError::Panicked)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}
