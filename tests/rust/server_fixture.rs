//! A whole server without Python: the example's text and adapters, and an executor that only pretends to compute.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, reason = "tests; each uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use slora_core::{Counts, EngineConfig};
use slora_runtime::{HostMemory, Runtime, RuntimeConfig, StepLogprobs, Stepper};
use slora_server::{Server, ServerConfig};
use slora_store::{BaseSpec, Dtype};
use slora_text::TextModel;

/// First of the example's 26 tokens that are letters.
pub const LETTER_A: u32 = 80;

pub fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny").canonicalize().unwrap()
}

/// What the pretended device is like.
#[derive(Clone)]
pub struct Device {
    pub step: Duration,
    pub num_pages: u32,
    pub num_host_pages: u32,
    pub max_running: u32,
    pub max_waiting: u32,
    pub max_batch_tokens: u32,
}

impl Default for Device {
    fn default() -> Self {
        Self {
            step: Duration::ZERO,
            num_pages: 4096,
            num_host_pages: 2048,
            max_running: 256,
            max_waiting: 100_000,
            max_batch_tokens: 2048,
        }
    }
}

/// The engine and the thread that runs its steps.
pub struct Fake {
    pub runtime: Arc<Runtime>,
    stops: Arc<AtomicBool>,
    /// While it is set no step runs.
    pub holds: Arc<AtomicBool>,
    /// A step's length in nanoseconds, to be changed while it runs.
    pub step_ns: Arc<AtomicU64>,
    thread: Option<JoinHandle<Stepper>>,
}

const PAGE_BYTES: u64 = 16 * 2 * 4 * 2 * 64 * 2;

impl Fake {
    pub fn start(device: &Device) -> Self {
        let engine = EngineConfig {
            num_pages: device.num_pages,
            num_host_pages: device.num_host_pages,
            max_batch_tokens: device.max_batch_tokens,
            max_running: device.max_running,
            max_waiting: device.max_waiting,
            max_context: 1024,
            descriptor_words: 4 * 7 * 12,
            vocab_size: 512,
            eos_token_ids: vec![2],
            ..EngineConfig::default()
        };
        let base = BaseSpec {
            num_layers: 4,
            hidden: 256,
            intermediate: 704,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            vocab_size: 512,
            dtype: Dtype::Bf16,
            page_bytes: PAGE_BYTES,
            tp_rank: 0,
            tp_size: 1,
            name: None,
            max_adapter_pages: 0,
        };
        let bytes = device.num_host_pages as usize * PAGE_BYTES as usize;
        let slab = Box::leak(vec![0u64; bytes / 8].into_boxed_slice());
        let address = NonNull::new(slab.as_mut_ptr().cast::<u8>()).unwrap();
        // SAFETY: the slab lives for ever and nobody else knows it.
        let host = unsafe { HostMemory::new(&[(address, bytes)], PAGE_BYTES as usize) };
        let text = Arc::new(TextModel::from_dir(&example().join("base")).unwrap());
        let config = RuntimeConfig { engine, base, num_loaders: 1, seed: 1 };
        let (runtime, stepper) = Runtime::new(config, host, Some(text)).unwrap();
        let runtime = Arc::new(runtime);
        let (stops, holds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let step_ns = Arc::new(AtomicU64::new(device.step.as_nanos() as u64));
        let steps =
            Steps { runtime: runtime.clone(), stops: stops.clone(), holds: holds.clone(), step_ns: step_ns.clone() };
        let thread = std::thread::Builder::new().name("step".into()).spawn(move || steps.run(stepper)).unwrap();
        Self { runtime, stops, holds, step_ns, thread: Some(thread) }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Relaxed);
        self.holds.store(false, Ordering::Relaxed);
        self.runtime.begin_close();
        let mut stepper = self.thread.take().unwrap().join().unwrap();
        self.runtime.close(Some(&mut stepper));
    }
}

struct Steps {
    runtime: Arc<Runtime>,
    stops: Arc<AtomicBool>,
    holds: Arc<AtomicBool>,
    step_ns: Arc<AtomicU64>,
}

impl Steps {
    fn run(&self, mut stepper: Stepper) -> Stepper {
        let layout = stepper.engine().layout().clone();
        let mut buffer = vec![0; layout.num_words()];
        let offset = |name: &str| layout.arrays().iter().find(|array| array.name == name).unwrap().offset;
        let (rows, positions, targets) = (offset("sample_rows"), offset("positions"), offset("prompt_targets"));
        while !self.stops.load(Ordering::Relaxed) {
            while self.holds.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            let begun = Instant::now();
            let Some(counts) = stepper.schedule(&mut buffer) else {
                self.runtime.wait(Duration::from_millis(20));
                continue;
            };
            let sampled: Vec<i32> = (0..counts.num_sampled as usize)
                .map(|index| LETTER_A as i32 + buffer[positions + buffer[rows + index] as usize] % 26)
                .collect();
            let logprobs = logprobs(&counts, &sampled, &buffer[targets..]);
            let length = Duration::from_nanos(self.step_ns.load(Ordering::Relaxed));
            std::thread::sleep(length.saturating_sub(begun.elapsed()));
            stepper.commit(counts.step, &sampled, logprobs);
            stepper.copies_done(counts.step);
        }
        stepper
    }
}

/// −0.5 for what stands there, which is the best, and −1, −2, … for the ids behind it.
fn logprobs(counts: &Counts, sampled: &[i32], targets: &[i32]) -> StepLogprobs {
    let best = |ids: &[i32], width: i32| -> (Vec<i32>, Vec<f32>) {
        let width = width.max(0);
        let of = |id: &i32| (0..width).map(|place| ((id + place) % 512, -0.5 - place as f32)).collect::<Vec<_>>();
        ids.iter().flat_map(of).unzip()
    };
    let mut found = StepLogprobs::default();
    if counts.max_logprobs >= 0 {
        found.chosen = vec![-0.5; sampled.len()];
        (found.best_ids, found.best) = best(sampled, counts.max_logprobs);
    }
    if counts.num_prompt_logprobs > 0 {
        let targets = &targets[..counts.num_prompt_logprobs as usize];
        found.prompt = vec![-0.5; targets.len()];
        (found.prompt_best_ids, found.prompt_best) = best(targets, counts.max_prompt_logprobs);
    }
    found
}

/// A server on a free port, with its engine.
pub struct Running {
    pub server: Server,
    pub fake: Fake,
}

/// What most tests want.
pub fn config() -> ServerConfig {
    ServerConfig {
        port: 0,
        model: example().join("base").display().to_string(),
        served_model_names: vec!["tiny".into(), "org/tiny".into()],
        access_log: false,
        num_threads: 2,
        ..ServerConfig::default()
    }
}

pub fn with_adapters(names: &[&str]) -> ServerConfig {
    let flag = |name: &&str| slora_server::AdapterFlag {
        name: (*name).into(),
        path: example().join("adapters").join(name),
        pinned: false,
    };
    ServerConfig { adapters: names.iter().map(flag).collect(), ..config() }
}

pub fn start(config: ServerConfig) -> Running {
    start_on(config, &Device::default())
}

pub fn start_on(config: ServerConfig, device: &Device) -> Running {
    let fake = Fake::start(device);
    let server = Server::start(config, fake.runtime.clone()).unwrap();
    Running { server, fake }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Code of an error.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// The data of each event.
    pub fn events(&self) -> Vec<String> {
        let text = self.text();
        text.split("\n\n").filter_map(|event| event.strip_prefix("data: ").map(str::to_owned)).collect()
    }

    /// Events that are JSON.
    pub fn chunks(&self) -> Vec<Value> {
        let events = self.events();
        events.iter().filter(|event| *event != "[DONE]").map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// One connection.
pub struct Client {
    pub stream: BufReader<TcpStream>,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream: BufReader::new(stream) }
    }

    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            head.push_str("host: localhost\r\n");
        }
        if !body.is_empty() {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
            if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
                head.push_str("content-type: application/json\r\n");
            }
        }
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        let mut bytes = (head + "\r\n").into_bytes();
        bytes.extend_from_slice(body);
        self.stream.get_mut().write_all(&bytes).unwrap();
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn head(&mut self) -> (u16, Vec<(String, String)>) {
        let status = self.line().split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        (status, headers)
    }

    /// One chunk of a chunked body; empty: the last.
    pub fn chunk(&mut self) -> Vec<u8> {
        let len = usize::from_str_radix(&self.line(), 16).unwrap();
        let mut bytes = vec![0; len + 2];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    pub fn answer(&mut self) -> Answer {
        let (status, headers) = self.head();
        let find = |name: &str| headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
        let mut body = Vec::new();
        if find("transfer-encoding").is_some() {
            loop {
                let chunk = self.chunk();
                if chunk.is_empty() {
                    break;
                }
                body.extend(chunk);
            }
        } else {
            body.resize(find("content-length").and_then(|len| len.parse().ok()).unwrap_or(0), 0);
            self.stream.read_exact(&mut body).unwrap();
        }
        Answer { status, headers, body }
    }
}

impl Running {
    pub fn client(&self) -> Client {
        Client::new(self.server.address())
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut client = self.client();
        client.send(method, path, headers, body);
        client.answer()
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[], body.to_string().as_bytes())
    }

    /// Waits until the engine and the server hold nothing for requests.
    pub fn wait_idle(&self) {
        wait_until(|| {
            let stats = self.fake.runtime.snapshot().engine;
            stats.running == 0 && stats.waiting == 0 && stats.kv_pages == 0 && self.server.num_unfinished() == 0
        });
    }
}

pub fn wait_until(mut is_done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_done() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Client {
    /// What is left of a chunked body.
    pub fn answer_body(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let chunk = self.chunk();
            if chunk.is_empty() {
                return all;
            }
            all.extend(chunk);
        }
    }
}
