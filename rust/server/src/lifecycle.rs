//! Whether the server takes requests, and watching over the engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use slora_runtime::State;

use crate::app::App;

/// How often the engine is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// What is going on.
pub(crate) struct Lifecycle {
    is_draining: AtomicBool,
    has_failed: AtomicBool,
}

impl Lifecycle {
    pub fn new() -> Self {
        Self { is_draining: AtomicBool::new(false), has_failed: AtomicBool::new(false) }
    }

    pub fn begin_drain(&self) {
        self.is_draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    /// Why no work is taken; `None`: it is.
    pub fn obstacle(&self) -> Option<&'static str> {
        if self.has_failed.load(Ordering::Acquire) {
            Some("the engine has stopped")
        } else if self.is_draining() {
            Some("the server is shutting down")
        } else {
            None
        }
    }
}

/// Sees that the engine has stopped, and stops it when a step takes too long.
pub(crate) async fn watch(app: Arc<App>) {
    let limit = app.config.step_timeout_s;
    let (mut steps, mut since) = (0, Instant::now());
    loop {
        tokio::time::sleep(LOOK).await;
        if app.runtime.state() != State::Running {
            break;
        }
        let stats = app.runtime.snapshot().engine;
        if stats.steps != steps || stats.running == 0 {
            (steps, since) = (stats.steps, Instant::now());
        } else if limit > 0.0 && since.elapsed().as_secs_f64() > limit {
            app.runtime.fail(&format!("a step took longer than {limit} s"));
        }
    }
    app.lifecycle.has_failed.store(true, Ordering::Release);
    app.admission.close();
    if let State::Failed(reason) = app.runtime.state() {
        app.log.line("engine_failed", json!({"reason": &*reason}));
    }
}
