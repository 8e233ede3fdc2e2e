//! The server's life: what is checked before it listens, the threads that serve, drain and stop.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use serde_json::json;
use slora_core::QueueOrder;
use slora_runtime::{RegisterError, Runtime, State};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::app::App;
use crate::auth::Key;
use crate::config::ServerConfig;
use crate::errors::ApiError;
use crate::log::Log;
use crate::router::{Peer, router};
use crate::stall::Stall;
use crate::watch::Watch;
use crate::{connection, generation_config, keys_file};

/// Bytes that the system keeps for a reader, and doubles: what a stalled one costs. Left to itself, Linux goes to 4 MiB.
const SEND_BUFFER_BYTES: usize = 48 << 10;

/// Connections that the system may hold until they are taken.
const BACKLOG: i32 = 4096;
/// Threads for files, listings and calls to the step thread, beside those for text.
const MAX_OTHER_THREADS: usize = 16;
/// How long answers that are being written may take to go out when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two looks at the keys file and at the engine's progress.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);
/// Pause after a connection could not be taken, which mostly means that no descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that are told at once that they are too many.
const MAX_TURNED_AWAY: usize = 256;
/// How long telling one may take.
const TURN_AWAY_TIMEOUT: Duration = Duration::from_secs(1);

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A value of the configuration is out of range.
    #[error("{0}")]
    Config(String),
    /// An adapter from the command line cannot be served.
    #[error("adapter {name:?}: {reason}")]
    Adapter {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}; hint: choose another host or port")]
    Bind {
        /// Host and port.
        address: String,
        /// The system's error.
        error: std::io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start the server's threads: {0}")]
    Threads(std::io::Error),
}

/// A running server. Dropping it stops it.
pub struct Server {
    app: Arc<App>,
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    threads: Mutex<Option<tokio::runtime::Runtime>>,
}

impl Server {
    /// Everything that [`start`](Self::start) checks and that needs no engine, so that a mistake is found before a base is
    /// loaded.
    ///
    /// # Errors
    /// Whatever is wrong with the configuration's values, its folders, its keys file or its addresses.
    pub fn check(config: &ServerConfig, queue: QueueOrder) -> Result<(), ServeError> {
        config.check().map_err(ServeError::Config)?;
        generation_config::defaults(config).map_err(ServeError::Config)?;
        roots(config)?;
        let keys = config.api_keys_file.as_ref().map(|path| read_keys(path, queue)).transpose();
        keys.map(drop)?;
        // Let go again: nobody is to wait in the queue of a server that is still loading.
        doors(config).map(drop)
    }

    /// Checks the configuration, registers its adapters, reads the keys and listens: afterwards connections are taken.
    ///
    /// Adapters are registered by the runtime's step thread, which must be running.
    ///
    /// # Errors
    /// Whatever is wrong with the configuration, an adapter or the address.
    pub fn start(mut config: ServerConfig, runtime: Arc<Runtime>) -> Result<Self, ServeError> {
        config.check().map_err(ServeError::Config)?;
        config.sampling_defaults = generation_config::defaults(&config).map_err(ServeError::Config)?;
        let roots = roots(&config)?;
        let log = Log::start().map_err(ServeError::Threads)?;
        let app = Arc::new(App::new(config, runtime, roots, log));
        let config = &app.config;
        register(&app)?;
        let mut watch = config.adapter_dir.as_deref().map(absolute).map(Watch::new);
        if let Some(watch) = &mut watch {
            watch.begin(&app);
        }
        if let Some(path) = &config.api_keys_file {
            app.auth.set_file_keys(read_keys(path, app.runtime.config().queue)?);
        }
        let ((listener, address), metrics) = doors(config)?;
        let metrics_address = metrics.as_ref().map(|(_, address)| *address);
        let threads = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.threads())
            .max_blocking_threads(2 * config.limits.text_threads + MAX_OTHER_THREADS)
            .thread_name("slora-http")
            .enable_all()
            .build()
            .map_err(ServeError::Threads)?;
        let (stop, stopped) = watch::channel(false);
        let doors = [Some((listener, false)), metrics.map(|(listener, _)| (listener, true))];
        for (listener, is_metrics_port) in doors.into_iter().flatten() {
            let _context = threads.enter();
            let listener = TcpListener::from_std(listener).map_err(ServeError::Threads)?;
            let door = Door { app: app.clone(), router: router(&app), is_metrics_port, stopped: stopped.clone() };
            threads.spawn(door.open(listener));
        }
        threads.spawn(watch_keys(app.clone()));
        threads.spawn(watch_steps(app.clone()));
        if let Some(watch) = watch {
            threads.spawn(watch.run(app.clone()));
        }
        if !app.auth.has_keys() && !address.ip().is_loopback() {
            app.log.line("no_keys", json!({"hint": "without --api-key, only requests from this machine are answered"}));
        }
        let template = app.runtime.text().and_then(|text| text.chat_template());
        if let Some(error) = template.and_then(|template| template.fault()) {
            app.log
                .line("chat_template_refused", json!({"error": error.to_string(), "hint": "chats are answered 400"}));
        }
        let (at, metrics_at) = (address.to_string(), metrics_address.map(|address| address.to_string()));
        let model = app.base_names.first();
        app.log.line("listening", json!({"address": at, "metrics_address": metrics_at, "model": model}));
        Ok(Self { app, address, metrics_address, stop, threads: Mutex::new(Some(threads)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the second port listens, if there is one.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Tasks of its threads that have not ended: one for each connection, and a few that last.
    pub fn num_tasks(&self) -> usize {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.as_ref().map_or(0, |threads| threads.metrics().num_alive_tasks())
    }

    /// Takes no new work: readiness is false, new requests are answered 503, running ones go on.
    pub fn begin_drain(&self) {
        self.app.drain();
        let unfinished = self.app.admission.load().requests;
        self.app.log.line("draining", json!({"unfinished": unfinished, "hint": "a second signal ends at once"}));
    }

    /// Waits until everything that was let in has ended after [`begin_drain`](Self::begin_drain), or the server was
    /// stopped; whether that is so within `timeout`.
    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let is_over = *self.stop.borrow() || (self.app.is_draining() && self.app.is_idle());
            let left = deadline.saturating_duration_since(Instant::now());
            if is_over || left.is_zero() {
                return is_over;
            }
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
    }

    /// Ends the process, whatever hangs in it, if it is still there so long after the engine has failed.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn exit_after_failure(&self, grace: Duration) -> Result<(), ServeError> {
        let runtime = Arc::downgrade(&self.app.runtime);
        let watch = move || {
            while let Some(state) = runtime.upgrade().map(|runtime| runtime.state()) {
                if let State::Failed(reason) = state {
                    std::thread::sleep(grace);
                    eprintln!("slora: the engine has failed and the process did not end: {reason}");
                    // No handler runs that could hang too, and no core of all the pinned memory is written.
                    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                    // The first process of a container cannot kill itself.
                    std::process::abort();
                }
                std::thread::sleep(WATCH_INTERVAL);
            }
        };
        std::thread::Builder::new().name("slora-exit".into()).spawn(watch).map(drop).map_err(ServeError::Threads)
    }

    /// Stops: answers that are whole still go out, everything else is cut off and its requests cancelled.
    pub fn stop(&self) {
        self.app.drain();
        self.stop.send_replace(true);
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(threads) = threads else { return };
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.app.metrics.open_connections.load(Ordering::Relaxed) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        threads.shutdown_timeout(STOP_TIMEOUT);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn read_keys(path: &Path, queue: QueueOrder) -> Result<Vec<Key>, ServeError> {
    keys_file::read(path, queue).map_err(|error| ServeError::Config(format!("api_keys_file {error}")))
}

fn roots(config: &ServerConfig) -> Result<Vec<PathBuf>, ServeError> {
    let resolve = |(setting, path): (&str, &PathBuf)| {
        let resolved = path.canonicalize().map_err(|error| error.to_string());
        let resolved = resolved.and_then(|path| if path.is_dir() { Ok(path) } else { Err("is not a folder".into()) });
        resolved.map_err(|error| ServeError::Config(format!("{setting} {}: {error}", path.display())))
    };
    let roots = config.adapter_roots.iter().map(|path| ("adapter_root", path));
    roots.chain(config.adapter_dir.iter().map(|path| ("adapter_dir", path))).map(resolve).collect()
}

/// Clients see where adapters lie, and may send it back.
fn absolute(path: &Path) -> PathBuf {
    // An empty path, which is none.
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

/// The adapters of the command line are there before the first request is.
fn register(app: &App) -> Result<(), ServeError> {
    for flag in &app.config.adapters {
        let registered = app.runtime.register(&flag.name, &absolute(&flag.path), false, flag.pinned);
        let refused = |error: RegisterError| ServeError::Adapter { name: flag.name.clone(), reason: error.to_string() };
        app.log_warnings(&registered.map_err(refused)?);
    }
    Ok(())
}

type Bound = (std::net::TcpListener, SocketAddr);

/// The port for everything and, where it is wanted, the one for metrics.
fn doors(config: &ServerConfig) -> Result<(Bound, Option<Bound>), ServeError> {
    let main = bind(&config.host, config.port)?;
    let metrics = config.metrics_port.map(|port| bind(&config.host, port)).transpose()?;
    Ok((main, metrics))
}

fn bind(host: &str, port: u16) -> Result<Bound, ServeError> {
    let failed = |error| ServeError::Bind { address: format!("{host}:{port}"), error };
    let listen = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = std::net::TcpListener::from(socket);
        let address = listener.local_addr()?;
        Ok((listener, address))
    };
    let mut last = std::io::ErrorKind::AddrNotAvailable.into();
    for address in (host, port).to_socket_addrs().map_err(failed)? {
        match listen(address) {
            Ok(bound) => return Ok(bound),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// A port that takes connections.
struct Door {
    app: Arc<App>,
    router: Router,
    is_metrics_port: bool,
    stopped: watch::Receiver<bool>,
}

impl Door {
    async fn open(mut self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(self.app.config.limits.max_connections));
        let turned_away = Arc::new(Semaphore::new(MAX_TURNED_AWAY));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = self.stopped.changed() => return,
            };
            let Ok((stream, address)) = accepted else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                // Without a place even for that, it is closed.
                if let Ok(place) = turned_away.clone().try_acquire_owned() {
                    tokio::spawn(turn_away(stream, place));
                }
                continue;
            };
            // Without it, small events wait for the client's acknowledgements; a socket that refuses it still works.
            let _ = stream.set_nodelay(true);
            let peer = Peer { address: address.ip(), is_metrics_port: self.is_metrics_port, unsent: Arc::default() };
            let served = connection::serve(self.app.clone(), self.router.clone(), stream, peer, self.stopped.clone());
            tokio::spawn(async move {
                served.await;
                drop(place);
            });
        }
    }
}

/// The answer to one connection too many.
async fn turn_away(mut stream: TcpStream, place: OwnedSemaphorePermit) {
    let body = ApiError::overloaded("the server has too many open connections", 1).json();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let write = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        // Closing with something unread would reset the connection, and the answer would be lost on its way.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    };
    // The client may be gone already.
    let _ = tokio::time::timeout(TURN_AWAY_TIMEOUT, write).await;
    drop(place);
}

/// Reads the keys file again when it changes. A file with a mistake changes nothing.
async fn watch_keys(app: Arc<App>) {
    let Some(path) = app.config.api_keys_file.clone() else { return };
    let queue = app.runtime.config().queue;
    let mut seen = None;
    loop {
        let (at, before) = (path.clone(), seen);
        let changed = move || {
            let stamp = keys_file::stamp(&at).filter(|stamp| before != Some(*stamp))?;
            Some((stamp, keys_file::read(&at, queue)))
        };
        if let Ok(Some((stamp, keys))) = tokio::task::spawn_blocking(changed).await {
            seen = Some(stamp);
            match keys {
                Ok(keys) => app.auth.set_file_keys(keys),
                Err(error) => app.log.line("keys_file_refused", json!({"error": error})),
            }
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

/// Ends the engine when there is something to do and no step is done, and says when it has ended, for whatever reason.
async fn watch_steps(app: Arc<App>) {
    let timeout = Duration::from_secs_f64(app.config.step_timeout_s);
    let mut stall = Stall::default();
    loop {
        tokio::time::sleep(WATCH_INTERVAL).await;
        if let State::Failed(reason) = app.runtime.state() {
            app.log.line("engine_failed", json!({"reason": &*reason}));
            return;
        }
        let stats = app.runtime.snapshot().engine;
        let has_work = stats.running > 0 || app.runtime.has_commands();
        let stalled = stall.look(has_work, stats.steps, Instant::now());
        if !timeout.is_zero() && stalled > timeout {
            app.runtime.fail(&format!("a step took longer than {} s", timeout.as_secs_f64()));
        }
    }
}
