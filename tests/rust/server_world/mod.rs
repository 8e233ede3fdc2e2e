//! A server around a runtime whose executor samples from a script, and a plain HTTP/1.1 client.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]

#[path = "../runtime_world/mod.rs"]
mod runtime_world;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::ops::Deref;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slora_core::EngineConfig;
use slora_server::{Server, ServerConfig};

use runtime_world::RuntimeWorld;
pub use runtime_world::{HELD, MAX_CONTEXT, copy_adapter, example};

/// What the executor says: one token a letter, the last one for ever after.
pub const SCRIPT: &str = "abcdefghijklmnopqrstuvwxyz";

/// A server, its runtime and its step thread.
pub struct World {
    pub server: Server,
    engine: RuntimeWorld,
}

impl Deref for World {
    type Target = RuntimeWorld;

    fn deref(&self) -> &RuntimeWorld {
        &self.engine
    }
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
        let engine = RuntimeWorld::new(SCRIPT, engine, step_time, 1, 1);
        let mut fields = json!({"port": 0, "model": example("base"), "access_log": false});
        fields.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let config: ServerConfig = serde_json::from_value(fields).unwrap();
        let server = Server::start(config, engine.runtime.clone()).unwrap();
        Self { server, engine }
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
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.stop();
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

/// A folder of adapters, and a configuration that lets an admin load them.
pub fn adapter_root() -> (tempfile::TempDir, Value) {
    let folder = tempfile::tempdir().unwrap();
    copy_adapter("reverse", &folder.path().join("reverse"));
    copy_adapter("upper", &folder.path().join("upper"));
    let config = json!({"adapter_roots": [folder.path()], "admin_keys": ["admin"], "api_keys": ["user"]});
    (folder, config)
}
