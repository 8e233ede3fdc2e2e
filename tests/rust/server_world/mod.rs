//! A server around a runtime whose executor samples from a script, and a plain HTTP/1.1 client.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slora_core::EngineConfig;
use slora_runtime::{HostMemory, Runtime, RuntimeConfig, Stepper};
use slora_server::{Server, ServerConfig};
use slora_store::{BaseSpec, Dtype};
use slora_text::TextModel;

const PAGE_BYTES: usize = 32 << 10;
const NUM_HOST_PAGES: usize = 64;

/// A step's time that is over when another one is set.
pub const HELD: Duration = Duration::from_secs(3600);
/// Tokens of one sequence.
pub const MAX_CONTEXT: u32 = 256;
/// What the executor says: one token a letter, the last one for ever after.
pub const SCRIPT: &str = "abcdefghijklmnopqrstuvwxyz";

pub fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny").join(path)
}

/// The example's base; its page size does not matter to an executor that computes nothing.
fn base() -> BaseSpec {
    let config: Value = serde_json::from_slice(&std::fs::read(example("base/config.json")).unwrap()).unwrap();
    let number = |key: &str| config[key].as_u64().unwrap() as u32;
    BaseSpec {
        num_layers: number("num_hidden_layers"),
        hidden: number("hidden_size"),
        intermediate: number("intermediate_size"),
        num_heads: number("num_attention_heads"),
        num_kv_heads: number("num_key_value_heads"),
        head_dim: number("head_dim"),
        vocab_size: number("vocab_size"),
        dtype: Dtype::F32,
        page_bytes: PAGE_BYTES as u64,
        tp_rank: 0,
        tp_size: 1,
        name: None,
        max_adapter_pages: 64,
        max_rank: u32::MAX,
    }
}

/// A server, its runtime and its step thread.
pub struct World {
    pub server: Server,
    pub runtime: Arc<Runtime>,
    pub text: Arc<TextModel>,
    step_us: Arc<AtomicU64>,
    steps: Option<JoinHandle<()>>,
    _memory: Vec<u64>,
}

impl World {
    pub fn new() -> Self {
        Self::with(json!({}), EngineConfig::default(), Duration::ZERO)
    }

    /// With fields of the server's configuration, as the binding would send them.
    pub fn configured(config: Value) -> Self {
        Self::with(config, EngineConfig::default(), Duration::ZERO)
    }

    pub fn with(config: Value, engine: EngineConfig, step_time: Duration) -> Self {
        let text = Arc::new(TextModel::from_dir(&example("base")).unwrap());
        let script = text.encode(SCRIPT, false).unwrap();
        let mut memory = vec![0u64; PAGE_BYTES / 8 * NUM_HOST_PAGES];
        let slab = (NonNull::new(memory.as_mut_ptr().cast::<u8>()).unwrap(), PAGE_BYTES * NUM_HOST_PAGES);
        // SAFETY: the memory is the world's, which joins every thread before it goes.
        let host = unsafe { HostMemory::new(&[slab], PAGE_BYTES) };
        let base = base();
        let engine = EngineConfig {
            vocab_size: base.vocab_size,
            descriptor_words: base.num_layers * 84,
            max_context: MAX_CONTEXT,
            eos_token_ids: text.stop_token_ids().to_vec(),
            ..engine
        };
        let settings = RuntimeConfig { engine, base, num_loaders: 2, seed: 0 };
        let (runtime, stepper) = Runtime::new(settings, host, Some(text.clone())).unwrap();
        let runtime = Arc::new(runtime);
        let step_us = Arc::new(AtomicU64::new(step_time.as_micros() as u64));
        let steps = std::thread::spawn({
            let (runtime, step_us) = (runtime.clone(), step_us.clone());
            move || run_steps(&runtime, stepper, &script, &step_us)
        });
        let mut fields = json!({"port": 0, "model": example("base"), "access_log": false});
        fields.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let config: ServerConfig = serde_json::from_value(fields).unwrap();
        let server = Server::start(config, runtime.clone()).unwrap();
        Self { server, runtime, text, step_us, steps: Some(steps), _memory: memory }
    }

    /// How long each step takes, the running one included.
    pub fn set_step_time(&self, time: Duration) {
        self.step_us.store(time.as_micros() as u64, Ordering::Relaxed);
    }

    pub fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.send("POST", path, &[], Some(&body.to_string()))
    }

    /// With a key.
    pub fn ask(&self, key: &str, method: &str, path: &str, body: Option<&Value>) -> Response {
        let bearer = format!("Bearer {key}");
        self.send(method, path, &[("authorization", &bearer)], body.map(Value::to_string).as_deref())
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> Response {
        Response::read(self.open(method, path, headers, body))
    }

    /// Sends a request whose answer is read, or not, later.
    pub fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> TcpStream {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if let Some(body) = body {
            if !headers.iter().any(|(name, _)| *name == "content-type") {
                head += "content-type: application/json\r\n";
            }
            head += &format!("content-length: {}\r\n", body.len());
        }
        self.raw(&format!("{head}\r\n{}", body.unwrap_or_default()))
    }

    pub fn raw(&self, bytes: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(bytes.as_bytes());
        stream
    }

    /// Waits until `/metrics`, which `key` may read, has this line.
    pub fn wait_for_metric(&self, key: &str, line: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.ask(key, "GET", "/metrics", None).body.lines().any(|found| found == line) {
            assert!(Instant::now() < deadline, "never so: {line}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn wait_until(&self, what: &str, is_so: impl Fn(&slora_core::Stats) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so(&self.runtime.snapshot().engine) {
            assert!(Instant::now() < deadline, "never so: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.stop();
        self.runtime.begin_close();
        if let Some(steps) = self.steps.take() {
            let _ = steps.join();
        }
        self.runtime.close(None);
    }
}

fn run_steps(runtime: &Runtime, mut stepper: Stepper, script: &[u32], step_us: &AtomicU64) {
    let layout = stepper.engine().layout().clone();
    let array = |name: &str| layout.arrays().iter().find(|array| array.name == name).unwrap().offset;
    let (positions, sample_rows) = (array("positions"), array("sample_rows"));
    let mut buffer = vec![0; layout.num_words()];
    while runtime.is_open() {
        let Some(counts) = stepper.schedule(&mut buffer) else {
            runtime.wait(Duration::from_millis(50));
            continue;
        };
        let started = Instant::now();
        while let left = Duration::from_micros(step_us.load(Ordering::Relaxed)).saturating_sub(started.elapsed())
            && !left.is_zero()
            && runtime.is_open()
        {
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
        let token = |i: usize| {
            let position = buffer[positions + buffer[sample_rows + i] as usize] as usize;
            script[position.min(script.len() - 1)] as i32
        };
        let ids: Vec<i32> = (0..counts.num_sampled as usize).map(token).collect();
        stepper.commit(counts.step, &ids, Default::default());
        stepper.copies_done(counts.step);
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn read(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader);
        let mut body = Vec::new();
        reader.read_to_end(&mut body).unwrap();
        let mut response = Self { status, headers, body: String::new() };
        let is_chunked = response.header("transfer-encoding") == Some("chunked");
        let body = if is_chunked { unchunked(&body) } else { body };
        response.body = String::from_utf8(body).unwrap();
        response
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Status and code of an answer that must be an error in OpenAI's shape.
    pub fn error(&self) -> (u16, String) {
        let error = &self.json()["error"];
        let is_text = |key: &str| error[key].is_string();
        assert!(is_text("message") && is_text("type") && is_text("code") && error.get("param").is_some(), "{self:?}");
        assert!(self.header("x-request-id").is_some(), "{self:?}");
        (self.status, error["code"].as_str().unwrap().to_owned())
    }

    /// The events of a stream, without `[DONE]`, which must be the last.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!((self.status, self.header("content-type")), (200, Some("text/event-stream; charset=utf-8")));
        let rest = self.body.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no [DONE]: {}", self.body));
        let data = rest.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        data.map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

/// Status and headers of an answer whose body comes later.
pub fn read_head(reader: &mut impl BufRead) -> (u16, Vec<(String, String)>) {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
    let pair = |line: &String| {
        let (name, value) = line.split_once(": ").unwrap();
        (name.to_lowercase(), value.to_owned())
    };
    (status, lines[1..].iter().map(pair).collect())
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let end = body.windows(2).position(|pair| pair == b"\r\n").expect("a chunk has a length");
        let len = usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap(), 16).unwrap();
        if len == 0 {
            return all;
        }
        all.extend_from_slice(&body[end + 2..end + 2 + len]);
        body = &body[end + 2 + len + 2..];
    }
}

/// A completion of the base model from one token, so that it says the script from its beginning.
pub fn completion(max_tokens: u32) -> Value {
    json!({"model": "base", "prompt": "x", "add_special_tokens": false, "max_tokens": max_tokens, "temperature": 0})
}

pub fn with(mut body: Value, fields: Value) -> Value {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

pub fn text_of(events: &[Value], index: usize) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    choices.filter(|choice| choice["index"] == index).filter_map(|choice| choice["text"].as_str()).collect()
}

/// Events that bring text. The end of a choice may come with its last token's event or in one of its own.
pub fn num_shown(events: &[Value]) -> usize {
    let is_shown = |event: &&Value| {
        let choice = &event["choices"][0];
        let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
        text.is_some_and(|text| !text.is_empty())
    };
    events.iter().filter(is_shown).count()
}

pub fn copy_adapter(from: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(example("adapters").join(from).join(file), to.join(file)).unwrap();
    }
}

/// A folder of adapters, and a configuration that lets an admin load them.
pub fn adapter_root() -> (tempfile::TempDir, Value) {
    let folder = tempfile::tempdir().unwrap();
    copy_adapter("reverse", &folder.path().join("reverse"));
    copy_adapter("upper", &folder.path().join("upper"));
    let config = json!({"adapter_roots": [folder.path()], "admin_keys": ["admin"], "api_keys": ["user"]});
    (folder, config)
}
