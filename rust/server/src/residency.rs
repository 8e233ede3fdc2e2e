//! Whether adapters that streams wait for are in the host tier: one question to the step thread for all of them.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use slora_core::AdapterState;

use crate::app::App;

/// How long an answer is good for.
const MAX_AGE: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Board {
    at: Option<Instant>,
    loaded: HashSet<Arc<str>>,
}

/// The answer, shared by everyone who waits.
#[derive(Default)]
pub(crate) struct Residency {
    wanted: Mutex<HashSet<Arc<str>>>,
    board: tokio::sync::Mutex<Board>,
}

impl Residency {
    /// Whether the adapter's weights are in the host tier or on the device.
    pub async fn is_loaded(&self, app: &Arc<App>, name: &Arc<str>) -> bool {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        let mut board = self.board.lock().await;
        if board.at.is_none_or(|at| at.elapsed() > MAX_AGE) {
            let names = std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner));
            // An engine that has stopped ends the requests themselves.
            board.loaded = app.on_runtime(move |app| loaded(app, names)).await.unwrap_or_default();
            board.at = Some(Instant::now());
        }
        board.loaded.contains(name)
    }
}

fn loaded(app: &App, names: HashSet<Arc<str>>) -> HashSet<Arc<str>> {
    let ask = move |stepper: &mut slora_runtime::Stepper| {
        let is_loaded = |name: &Arc<str>| {
            let info = stepper.engine().adapter_info(name);
            info.is_some_and(|info| matches!(info.state, AdapterState::Host | AdapterState::Resident))
        };
        names.into_iter().filter(is_loaded).collect()
    };
    app.runtime.call(ask).unwrap_or_default()
}
