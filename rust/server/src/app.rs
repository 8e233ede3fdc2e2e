//! What all requests share.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use slora_runtime::{AdapterDetails, Runtime, State};

use crate::admission::{Admission, Bounds, Tenant};
use crate::auth::{Auth, Caller};
use crate::config::ServerConfig;
use crate::errors::ApiError;
use crate::fields::{Fields, shown};
use crate::log::{Log, unix_time_s};
use crate::metrics::Metrics;
use crate::schema;
use crate::text_pool::TextPool;
use crate::turns::Turns;

/// Names of unknown fields that are logged, each once.
const MAX_LOGGED_FIELDS: usize = 1024;
/// Calls to the step thread that wait for it at once.
const MAX_CALLS: usize = 8;
/// Answers about all adapters that are made at once.
const MAX_RENDERS: usize = 2;
/// A call that has no result by then is refused.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The server's state.
pub(crate) struct App {
    pub config: ServerConfig,
    pub runtime: Arc<Runtime>,
    pub auth: Auth,
    pub admission: Arc<Admission>,
    pub metrics: Arc<Metrics>,
    pub text_pool: TextPool,
    pub log: Log,
    /// Names of the base model; the first one is shown.
    pub base_names: Vec<String>,
    /// Folders beneath which paths over HTTP must lie, links resolved.
    pub roots: Vec<PathBuf>,
    pub started_unix_s: u64,
    is_draining: AtomicBool,
    calls: Turns,
    renders: Turns,
    logged_fields: Mutex<HashSet<String>>,
}

/// What a request's `model` means.
pub(crate) struct Target {
    /// As the client wrote it.
    pub model: String,
    /// `None`: the base model.
    pub adapter: Option<Arc<str>>,
}

impl App {
    pub fn new(config: ServerConfig, runtime: Arc<Runtime>, roots: Vec<PathBuf>, log: Log) -> Self {
        let (limits, engine) = (&config.limits, runtime.config());
        let running = u64::from(engine.max_running);
        let bounds = Bounds {
            // The engine never has to refuse one, which it would do without looking at whose it is.
            requests: (running + limits.max_queued_requests as u64).min(u64::from(engine.max_waiting)),
            tokens: limits.max_queued_tokens,
            bytes: limits.max_queued_bytes,
            running,
        };
        Self {
            auth: Auth::new(&config),
            admission: Arc::new(Admission::new(bounds)),
            metrics: Arc::new(Metrics::new()),
            text_pool: TextPool::new(limits.text_threads),
            log,
            base_names: config.base_names(),
            roots,
            started_unix_s: unix_time_s() as u64,
            is_draining: AtomicBool::new(false),
            calls: Turns::new(MAX_CALLS),
            renders: Turns::new(MAX_RENDERS),
            logged_fields: Mutex::default(),
            runtime,
            config,
        }
    }

    /// Takes no new work; what runs goes on.
    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
        self.admission.close();
    }

    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// Whether nothing that was let in is left.
    pub fn is_idle(&self) -> bool {
        self.admission.load().requests == 0 && self.metrics.open_streams.load(Ordering::Relaxed) == 0
    }

    /// Whether more than half of the connections are taken.
    pub fn is_short_of_connections(&self) -> bool {
        2 * self.metrics.open_connections.load(Ordering::Relaxed) > self.config.limits.max_connections as u64
    }

    /// Why no requests are taken, if so.
    pub fn unready(&self) -> Option<String> {
        match self.runtime.state() {
            State::Failed(reason) => Some(format!("the engine has stopped: {reason}")),
            State::Closed => Some("the engine is closed".into()),
            State::Running => self.is_draining().then(|| "the server is shutting down".into()),
        }
    }

    /// Choices of one request at most: what is configured, or fewer where more of them could never be unfinished at once.
    pub fn max_choices(&self) -> usize {
        self.config.limits.max_n.min(self.admission.max_requests() as usize)
    }

    /// What depends on this server in the fields of its bodies.
    pub fn bounds(&self) -> schema::Bounds {
        let (limits, engine) = (&self.config.limits, self.runtime.config());
        schema::Bounds {
            max_n: self.max_choices(),
            max_messages: limits.max_messages,
            max_context: engine.max_context,
            vocab_size: engine.vocab_size,
            base_names: self.base_names.clone(),
            defaults: self.config.sampling_defaults.clone(),
        }
    }

    /// Finds what `model` names: the base, an adapter, or `base:adapter`; nothing: the base. Whether the adapter exists is
    /// the engine's to say.
    pub fn resolve(&self, caller: &Caller, model: Option<String>) -> Result<Target, ApiError> {
        let model = model.or_else(|| self.base_names.first().cloned()).unwrap_or_default();
        let is_base = |name: &str| self.base_names.iter().any(|base| base == name);
        let adapter = match model.split_once(':') {
            _ if is_base(&model) => None,
            Some((base, adapter)) if is_base(base) => Some(adapter),
            _ => Some(model.as_str()),
        };
        let may_use = match adapter {
            None => self.base_names.iter().any(|name| caller.may_use(name)),
            Some(name) => is_adapter_name(name) && caller.may_use(name),
        };
        if !may_use {
            return Err(ApiError::model_not_found(&shown(&model)));
        }
        Ok(Target { adapter: adapter.map(Arc::from), model })
    }

    /// Logs what the operator should know of an adapter that was just registered.
    pub fn log_warnings(&self, registered: &AdapterDetails) {
        for warning in registered.checkpoint.iter().flat_map(|checkpoint| &checkpoint.report().warnings) {
            let fields = json!({"adapter": &*registered.info.name, "code": warning.code, "message": warning.message});
            self.log.line("adapter_warning", fields);
        }
    }

    /// Refuses unknown fields, or says once that they do nothing.
    pub fn note_unknown(&self, fields: &Fields<'_>) -> Result<(), ApiError> {
        for name in fields.unknown() {
            if self.config.strict_fields {
                let message = format!("{} is not a known field", shown(name));
                return Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "unknown_parameter", message)
                    .with_param(&shown(name)));
            }
            let mut logged = self.logged_fields.lock().unwrap_or_else(PoisonError::into_inner);
            if logged.len() < MAX_LOGGED_FIELDS && logged.insert(shown(name)) {
                self.log.line("unknown_field", json!({"name": shown(name)}));
            }
        }
        Ok(())
    }

    /// Runs `call`, which may wait for the step thread or read files, off the threads that do HTTP.
    pub async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        tenant: &Tenant,
        call: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        self.run(&self.calls, tenant, call).await
    }

    /// Runs `render`, which waits for nobody but may have thousands of adapters to show, off the threads that do HTTP.
    pub async fn render<T: Send + 'static>(
        self: &Arc<Self>,
        tenant: &Tenant,
        render: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        self.run(&self.renders, tenant, render).await
    }

    async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        turns: &Turns,
        tenant: &Tenant,
        work: impl FnOnce(&App) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let app = self.clone();
        let run = turns.run(&tenant.name, move || work(&app));
        tokio::time::timeout(CALL_TIMEOUT, run)
            .await
            .unwrap_or_else(|_| Err(ApiError::unavailable("the engine did not answer in time")))
    }
}

/// Whether a string can be an adapter's name.
pub(crate) fn is_adapter_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=Runtime::MAX_NAME_LEN).contains(&name.len()) && name.bytes().all(is_allowed)
}
