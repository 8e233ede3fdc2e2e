//! What the server is told once.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize, Serializer};

/// A key: never printed.
#[derive(Clone, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct Secret(pub String);

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// An adapter that is registered before the server listens.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterFlag {
    /// Its name.
    pub name: String,
    /// Its checkpoint: the operator's own, so any path and links are followed.
    pub path: PathBuf,
    /// Whether it stays on the device.
    #[serde(default)]
    pub pinned: bool,
}

/// For fields that a request leaves out.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the names are the request fields'")]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_tokens: Option<u32>,
}

/// Everything about the server that an operator may set; `docs/http.md` has the flags.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address to listen on.
    pub host: String,
    /// Port; 0: any free one.
    pub port: u16,
    /// A second port that answers `/metrics` and the health routes without a key.
    pub metrics_port: Option<u16>,
    /// The base model's folder: its `root` in `/v1/models`.
    pub model: String,
    /// Names of the base model, the first one is shown; none: the folder's name.
    pub served_model_names: Vec<String>,
    /// Adapters from the command line.
    pub adapters: Vec<AdapterFlag>,
    /// A folder that is watched: each of its folders is an adapter, by its name. It is a root too.
    pub adapter_dir: Option<PathBuf>,
    /// Folders beneath which paths over HTTP must lie.
    pub adapter_roots: Vec<PathBuf>,
    /// Time between two looks at `adapter_dir`, in seconds.
    pub adapter_poll_s: f64,
    /// Users' keys.
    pub api_keys: Vec<Secret>,
    /// A file of users' keys with what each may do; read again when it changes.
    pub api_keys_file: Option<PathBuf>,
    /// Keys that may manage adapters.
    pub admin_keys: Vec<Secret>,
    /// Origins that browsers may call from; `*`: any.
    pub allowed_origins: Vec<String>,
    /// Whether unknown request fields are refused.
    pub strict_fields: bool,
    /// Defaults that go before the model's own.
    pub sampling_defaults: SamplingDefaults,
    /// Where the model's own come from: `auto`: `generation_config.json` in its folder; `vllm`: nowhere; else that folder.
    pub generation_config: String,
    /// Prefix of the metrics that other servers have too.
    pub metrics_prefix: String,
    /// Whether each request is logged.
    pub access_log: bool,
    /// Threads that do HTTP; 0: a half of the cores, 1 to 8.
    pub num_threads: usize,
    /// A step that takes longer ends the engine, in seconds; 0: none does.
    pub step_timeout_s: f64,
    /// Limits on what strangers may ask.
    pub limits: Limits,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".into(),
            port: 8000,
            metrics_port: None,
            model: "base".into(),
            served_model_names: Vec::new(),
            adapters: Vec::new(),
            adapter_dir: None,
            adapter_roots: Vec::new(),
            adapter_poll_s: 5.0,
            api_keys: Vec::new(),
            api_keys_file: None,
            admin_keys: Vec::new(),
            allowed_origins: Vec::new(),
            strict_fields: false,
            sampling_defaults: SamplingDefaults::default(),
            generation_config: "auto".into(),
            metrics_prefix: "vllm".into(),
            access_log: true,
            num_threads: 0,
            step_timeout_s: 120.0,
            limits: Limits::default(),
        }
    }
}

/// Limits on what strangers may ask. Times in seconds.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections.
    pub max_connections: usize,
    /// Requests beyond those that the engine can run at once.
    pub max_queued_requests: usize,
    /// Prompt tokens of all unfinished requests.
    pub max_queued_tokens: u64,
    /// Bytes of request bodies that are being read or worked on.
    pub max_queued_bytes: u64,
    /// Bytes of one body.
    pub max_body_bytes: usize,
    /// Bytes of one request's headers.
    pub max_header_bytes: usize,
    /// Nesting of a JSON body.
    pub max_json_depth: usize,
    /// Choices of one prompt, and prompts of one request.
    pub max_n: usize,
    /// Messages of a chat.
    pub max_messages: usize,
    /// Bytes of all messages.
    pub max_message_bytes: usize,
    /// A request's headers must be here by then; a connection idles no longer.
    pub header_timeout_s: f64,
    /// A request's body must be here by then.
    pub body_timeout_s: f64,
    /// A reader that takes nothing for so long is dropped.
    pub stall_timeout_s: f64,
    /// A stream's headers wait so long for its adapter.
    pub accept_timeout_s: f64,
    /// A silent stream gets a comment after so long.
    pub keep_alive_s: f64,
    /// Threads for templates and tokenizing.
    pub text_threads: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 8192,
            max_queued_requests: 4096,
            max_queued_tokens: 8 << 20,
            max_queued_bytes: 256 << 20,
            max_body_bytes: 16 << 20,
            max_header_bytes: 32 << 10,
            max_json_depth: 64,
            max_n: 128,
            max_messages: 4096,
            max_message_bytes: 8 << 20,
            header_timeout_s: 10.0,
            body_timeout_s: 30.0,
            stall_timeout_s: 30.0,
            accept_timeout_s: 5.0,
            keep_alive_s: 15.0,
            text_threads: 2,
        }
    }
}

/// Of any time.
const MAX_SECONDS: f64 = 86_400.0;

fn check_seconds(name: &str, value: f64) -> Result<(), String> {
    let is_good = value > 0.0 && value <= MAX_SECONDS;
    if is_good { Ok(()) } else { Err(format!("{name} is {value}, it must be above 0 and at most {MAX_SECONDS}")) }
}

impl Limits {
    fn check(&self) -> Result<(), String> {
        check_seconds("header_timeout", self.header_timeout_s)?;
        check_seconds("body_timeout", self.body_timeout_s)?;
        check_seconds("stall_timeout", self.stall_timeout_s)?;
        check_seconds("accept_timeout", self.accept_timeout_s)?;
        check_seconds("keep_alive", self.keep_alive_s)?;
        let counts = [
            ("max_connections", self.max_connections as u64, 1 << 20),
            ("max_queued_requests", self.max_queued_requests as u64, 1 << 24),
            ("max_queued_tokens", self.max_queued_tokens, 1 << 40),
            ("max_queued_bytes", self.max_queued_bytes, 1 << 40),
            ("max_body_bytes", self.max_body_bytes as u64, 1 << 30),
            ("max_header_bytes", self.max_header_bytes as u64, 1 << 24),
            ("max_json_depth", self.max_json_depth as u64, 128),
            ("max_n", self.max_n as u64, 1 << 16),
            ("max_messages", self.max_messages as u64, 1 << 20),
            ("max_message_bytes", self.max_message_bytes as u64, 1 << 30),
            ("text_threads", self.text_threads as u64, 64),
        ];
        match counts.iter().find(|(_, value, limit)| !(1..=*limit).contains(value)) {
            Some((name, value, limit)) => Err(format!("{name} is {value}, it must be 1 to {limit}")),
            None => Ok(()),
        }
    }
}

impl ServerConfig {
    /// What is out of range, or can only be a mistake.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.limits.check()?;
        check_seconds("adapter_poll", self.adapter_poll_s)?;
        if !(0.0..=MAX_SECONDS).contains(&self.step_timeout_s) {
            return Err(format!("step_timeout is {}, it must be 0 to {MAX_SECONDS}", self.step_timeout_s));
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if self.metrics_prefix.is_empty() || !self.metrics_prefix.chars().all(is_name) {
            return Err(format!("metrics_prefix is {:?}, it must be of A-Z a-z 0-9 _", self.metrics_prefix));
        }
        // As browsers send it: anything else would never match.
        let is_origin = |origin: &str| origin.split_once("://").is_some_and(|(_, host)| !host.contains('/'));
        if let Some(origin) = self.allowed_origins.iter().find(|origin| *origin != "*" && !is_origin(origin)) {
            return Err(format!("allowed_origins has {origin:?}; hint: https://HOST or https://HOST:PORT, or *"));
        }
        let bases = self.base_names();
        if let Some(name) = bases.iter().find(|name| name.contains(':')) {
            return Err(format!("served model name {name:?} has a colon, which stands between base and adapter"));
        }
        match self.adapters.iter().find(|adapter| bases.contains(&adapter.name)) {
            Some(adapter) => Err(format!("adapter {:?}: is the base model's name", adapter.name)),
            None => Ok(()),
        }
    }

    /// Names of the base model, at least one.
    pub(crate) fn base_names(&self) -> Vec<String> {
        if !self.served_model_names.is_empty() {
            return self.served_model_names.clone();
        }
        let folder = std::path::Path::new(&self.model);
        let name = folder.file_name().map_or_else(|| self.model.clone(), |name| name.to_string_lossy().into_owned());
        vec![name]
    }

    /// HTTP threads.
    pub(crate) fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        if self.num_threads > 0 { self.num_threads } else { (cores / 2).clamp(1, 8) }
    }
}
