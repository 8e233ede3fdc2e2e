//! What all requests share, and what one request brings.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::http::HeaderMap;
use bytes::Bytes;
use serde_json::json;
use slora_runtime::{RequestError, Runtime};
use slora_text::TextModel;
use tokio::sync::Semaphore;

use crate::admission::{Admission, Bounds, Load, Reservation};
use crate::auth::{Auth, Caller};
use crate::body;
use crate::config::ServerConfig;
use crate::errors::ApiError;
use crate::fields::{Fields, shown};
use crate::lifecycle::Lifecycle;
use crate::log::{Log, unix_time_s};
use crate::metrics::Metrics;
use crate::record::Record;
use crate::residency::Residency;
use crate::sources::Sources;
use crate::text_pool::TextPool;

/// Calls to the step thread that may wait for it at once.
const MAX_RUNTIME_CALLS: usize = 32;
/// Unknown field names that are logged.
const MAX_LOGGED_FIELDS: usize = 256;
/// Bodies of more bytes are parsed on the text pool.
const LONG_BODY_BYTES: usize = 64 << 10;

/// Shared by all requests.
pub(crate) struct App {
    pub config: ServerConfig,
    pub base_names: Vec<String>,
    pub runtime: Arc<Runtime>,
    pub text: Option<Arc<TextModel>>,
    pub auth: Auth,
    pub admission: Arc<Admission>,
    pub metrics: Arc<Metrics>,
    pub log: Log,
    pub text_pool: TextPool,
    pub sources: Sources,
    pub residency: Residency,
    pub lifecycle: Lifecycle,
    pub created: u64,
    calls: Arc<Semaphore>,
    logged_fields: Mutex<HashSet<String>>,
    id_prefix: u64,
    next_id: AtomicU64,
}

impl App {
    pub fn new(config: ServerConfig, runtime: Arc<Runtime>, log: Log) -> Self {
        let engine = runtime.config();
        let limits = &config.limits;
        let bounds = Bounds {
            requests: u64::from(engine.max_running) + limits.max_queued_requests as u64,
            tokens: limits.max_queued_tokens,
            bytes: limits.max_queued_bytes,
        };
        Self {
            base_names: config.base_names(),
            text: runtime.text().cloned(),
            auth: Auth::new(&config),
            admission: Arc::new(Admission::new(bounds)),
            metrics: Arc::new(Metrics::new()),
            text_pool: TextPool::new(limits.text_threads),
            sources: Sources::default(),
            residency: Residency::default(),
            lifecycle: Lifecycle::new(),
            created: unix_time_s() as u64,
            calls: Arc::new(Semaphore::new(MAX_RUNTIME_CALLS)),
            logged_fields: Mutex::default(),
            id_prefix: getrandom::u64().unwrap_or(0),
            next_id: AtomicU64::new(1),
            config,
            runtime,
            log,
        }
    }

    /// An id that no other request of any server has.
    pub fn new_id(&self) -> String {
        format!("{:016x}{:08x}", self.id_prefix, self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs a call that waits for the step thread, on a thread that may wait.
    pub async fn on_runtime<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce(&App) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let Ok(permit) = self.calls.clone().acquire_owned().await else {
            return Err(RequestError::Closed.into());
        };
        let app = self.clone();
        let call = move || {
            let result = call(&app);
            drop(permit);
            result
        };
        tokio::task::spawn_blocking(call).await.map_err(|_| ApiError::internal("the call broke on an internal error"))
    }

    /// Says once for each name that a field means nothing here; refuses it if the server is strict.
    pub fn check_unknown(&self, fields: &Fields<'_>) -> Result<(), ApiError> {
        for name in fields.unknown() {
            if self.config.strict_fields {
                let message = format!("unknown field {:?}", shown(name));
                return Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "unknown_parameter", message)
                    .with_param(&shown(name)));
            }
            let mut logged = self.logged_fields.lock().unwrap_or_else(PoisonError::into_inner);
            if logged.len() < MAX_LOGGED_FIELDS && logged.insert(shown(name)) {
                self.log.line("unknown_field", json!({"field": shown(name), "note": "ignored, here and from now on"}));
            }
        }
        Ok(())
    }
}

/// One request on its way to a handler.
pub(crate) struct Call {
    pub app: Arc<App>,
    pub caller: Caller,
    pub record: Arc<Record>,
    pub headers: HeaderMap,
    /// The part of the path that the route leaves open.
    pub name: String,
    /// Behind a lock only because a body may not be shared between threads.
    pub body: Mutex<Body>,
}

impl Call {
    /// Lets the request in as far as its headers tell, and reads its body.
    pub async fn read(&mut self, load: Load) -> Result<(Bytes, Reservation), ApiError> {
        let mut reservation = self.app.admission.reserve(load)?;
        let body = std::mem::take(self.body.get_mut().unwrap_or_else(PoisonError::into_inner));
        let bytes = body::read(&self.headers, body, &self.app.config.limits, &mut reservation).await?;
        Ok((bytes, reservation))
    }

    /// Reads a body of a management route and hands its fields to `parse`.
    pub async fn read_fields<T>(
        &mut self,
        parse: impl FnOnce(&mut Fields<'_>) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let bytes = body::announced(&self.headers).unwrap_or(0);
        let (bytes, _reservation) = self.read(Load { bytes, ..Load::default() }).await?;
        let mut fields = Fields::parse(&bytes, self.app.config.limits.max_json_depth)?;
        let parsed = parse(&mut fields)?;
        self.app.check_unknown(&fields)?;
        Ok(parsed)
    }

    /// Parses a body: a long one on the text pool, so that it holds up nobody.
    pub async fn parse<T: Send + 'static>(
        &self,
        bytes: Bytes,
        parse: fn(&App, &mut Fields<'_>) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let app = self.app.clone();
        let num_bytes = bytes.len();
        let work = move || {
            let mut fields = Fields::parse(&bytes, app.config.limits.max_json_depth)?;
            let parsed = parse(&app, &mut fields)?;
            app.check_unknown(&fields)?;
            Ok(parsed)
        };
        if num_bytes > LONG_BODY_BYTES { self.app.text_pool.run(num_bytes, work).await } else { work() }
    }
}
