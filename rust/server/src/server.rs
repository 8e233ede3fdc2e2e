//! Starting and stopping.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use slora_runtime::Runtime;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::app::App;
use crate::config::ServerConfig;
use crate::errors::ApiError;
use crate::log::Log;
use crate::routes::router;
use crate::sources::Origin;
use crate::watch::Watch;
use crate::{connections, keys_file, lifecycle};

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The system has no threads or descriptors left.
    #[error("the system refuses: {0}")]
    System(#[from] std::io::Error),
    /// An adapter of the command line cannot be served.
    #[error("adapter {name:?}: {message}")]
    Adapter {
        /// Its name.
        name: String,
        /// Why not.
        message: String,
    },
    /// A setting that cannot be.
    #[error("{0}")]
    Config(String),
}

/// A running server. Dropping it stops it at once.
pub struct Server {
    app: Arc<App>,
    threads: Option<tokio::runtime::Runtime>,
    closing: watch::Sender<bool>,
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
}

impl Server {
    /// Registers the configured adapters, then listens. The step thread must be running: it registers them.
    ///
    /// # Errors
    /// An address that cannot be had, an adapter that cannot be served, a setting that cannot be.
    pub fn start(config: ServerConfig, runtime: Arc<Runtime>) -> Result<Self, ServeError> {
        check(&config)?;
        let threads = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.threads())
            .max_blocking_threads(config.limits.text_threads * 2 + 40)
            .thread_name("slora-http")
            .enable_all()
            .build()?;
        let address = resolve(&config.host, config.port)?;
        let metrics = config.metrics_port.map(|port| resolve(&config.host, port)).transpose()?;
        let app = Arc::new(App::new(config, runtime, Log::start()?));
        read_keys(&app).map_err(ServeError::Config)?;
        let folder = register_configured(&app)?;
        let _guard = threads.enter();
        let (closing, closed) = watch::channel(false);
        let open = |address: SocketAddr, only_open: bool| -> Result<SocketAddr, ServeError> {
            let failed = |source| ServeError::Listen { address: address.to_string(), source };
            let listener = TcpListener::from_std(connections::listen(address).map_err(failed)?)?;
            let address = listener.local_addr()?;
            tokio::spawn(connections::serve(app.clone(), router(&app, only_open), listener, closed.clone()));
            Ok(address)
        };
        let metrics_address = metrics.map(|address| open(address, true)).transpose()?;
        let address = open(address, false)?;
        tokio::spawn(lifecycle::watch(app.clone()));
        tokio::spawn(watch_keys(app.clone()));
        if app.config.adapter_dir.is_some() {
            tokio::spawn(crate::watch::run(app.clone(), folder));
        }
        app.log.line("listening", json!({"address": address.to_string(), "keys": app.auth.has_keys()}));
        drop(_guard);
        Ok(Self { app, threads: Some(threads), closing, address, metrics_address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where probes and scrapers are answered without a key.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Takes no new work; what is running goes on. Readiness turns false.
    pub fn begin_drain(&self) {
        if !self.app.lifecycle.is_draining() {
            self.app.log.line("draining", json!({"unfinished": self.app.admission.load().requests}));
        }
        self.app.lifecycle.begin_drain();
        self.app.admission.close();
    }

    /// Waits until nothing is unfinished, or the time is over. Whether nothing is.
    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let is_done = self.app.admission.load().requests == 0;
            let left = deadline.saturating_duration_since(Instant::now());
            if is_done || left.is_zero() {
                return is_done;
            }
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    /// Requests that have not ended.
    pub fn num_unfinished(&self) -> u64 {
        self.app.admission.load().requests
    }

    /// Closes every connection and joins the threads. Unfinished requests are cancelled.
    pub fn stop(&mut self) {
        self.begin_drain();
        let _ = self.closing.send(true);
        if let Some(threads) = self.threads.take() {
            // Idle connections close at once; answers that are being written get a moment.
            let deadline = Instant::now() + Duration::from_millis(500);
            let open = &self.app.metrics.open_connections;
            while open.load(std::sync::atomic::Ordering::Relaxed) > 0 && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            threads.shutdown_timeout(Duration::from_secs(5));
            self.app.log.line("stopped", json!({}));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A time of the configuration; nonsense was refused at the start.
pub(crate) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(1))
}

fn check(config: &ServerConfig) -> Result<(), ServeError> {
    let limits = &config.limits;
    let times = [
        ("adapter_poll_s", config.adapter_poll_s),
        ("header_timeout_s", limits.header_timeout_s),
        ("body_timeout_s", limits.body_timeout_s),
        ("stall_timeout_s", limits.stall_timeout_s),
        ("keep_alive_s", limits.keep_alive_s),
    ];
    if let Some((name, value)) = times.iter().find(|(_, value)| !(0.001..=86_400.0).contains(value)) {
        return Err(ServeError::Config(format!("{name} is {value}, it must be between 0.001 and 86400")));
    }
    let is_prefix = |prefix: &str| !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !is_prefix(&config.metrics_prefix) {
        return Err(ServeError::Config(format!("metrics_prefix is {:?}, it must be letters", config.metrics_prefix)));
    }
    if config.adapter_chat_templates {
        return Err(ServeError::Config("adapter_chat_templates is not supported yet".into()));
    }
    let short = config.api_keys.iter().chain(&config.admin_keys).any(|key| key.0.trim().is_empty());
    if short { Err(ServeError::Config("an API key is empty".into())) } else { Ok(()) }
}

fn resolve(host: &str, port: u16) -> Result<SocketAddr, ServeError> {
    let failed = |source| ServeError::Listen { address: format!("{host}:{port}"), source };
    let mut found = (host, port).to_socket_addrs().map_err(failed)?;
    found.next().ok_or_else(|| failed(std::io::ErrorKind::AddrNotAvailable.into()))
}

fn read_keys(app: &App) -> Result<(), String> {
    let Some(path) = &app.config.api_keys_file else { return Ok(()) };
    app.auth.set_file_keys(keys_file::read(path)?);
    Ok(())
}

/// Reads the keys file again when it changes; a bad one changes nothing.
async fn watch_keys(app: Arc<App>) {
    let Some(path) = app.config.api_keys_file.clone() else { return };
    let stamp = |path: &Path| std::fs::metadata(path).and_then(|file| Ok((file.modified()?, file.len()))).ok();
    let mut last = stamp(&path);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = stamp(&path);
        if now != last {
            last = now;
            match read_keys(&app) {
                Ok(()) => app.log.line("keys_read", json!({})),
                Err(error) => app.log.line("keys_not_read", json!({"error": error})),
            }
        }
    }
}

/// Adapters of the command line must all be servable; those of the folder are taken as they are.
fn register_configured(app: &Arc<App>) -> Result<Watch, ServeError> {
    for adapter in &app.config.adapters {
        let failed = |message: String| ServeError::Adapter { name: adapter.name.clone(), message };
        if app.base_names.contains(&adapter.name) {
            return Err(failed("the base model has this name".into()));
        }
        let registered = app.runtime.register(&adapter.name, &adapter.path, false, adapter.pinned);
        registered.map_err(|error| failed(ApiError::from(error).message))?;
        app.sources.set(&adapter.name, Origin::CommandLine);
    }
    let mut folder = Watch::default();
    folder.look(app, true);
    Ok(folder)
}
