//! The server as a process of its own, so that its memory and its descriptors are its alone.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slora_server::{Server, ServerConfig};

use crate::engine::{Engine, Made, example};

/// What lines begin with that are no log lines of the server's.
const MARK: &str = "bench ";

/// What the server's process is told.
pub struct Settings {
    pub step: Duration,
    pub max_running: u32,
    /// Fields of the server's configuration.
    pub config: Value,
}

/// The server's process: runs until its input ends, and answers each line of it with figures.
pub fn serve(arguments: &[String]) {
    let [step_us, max_running, config, made] = arguments else { panic!("{arguments:?}") };
    let number = |text: &String| text.parse::<u64>().unwrap_or_else(|error| panic!("{text}: {error}"));
    let made = File::options().write(true).open(made).unwrap_or_else(|error| panic!("{made}: {error}"));
    let engine = Engine::start(Duration::from_micros(number(step_us)), number(max_running) as u32, Made(made));
    let mut fields = json!({
        "port": 0, "model": example("base"), "served_model_names": ["base"], "access_log": false, "num_threads": 1,
    });
    let given: Value = serde_json::from_str(config).unwrap_or_else(|error| panic!("{config}: {error}"));
    if let (Some(fields), Value::Object(given)) = (fields.as_object_mut(), given) {
        fields.extend(given);
    }
    let config: ServerConfig = serde_json::from_value(fields).unwrap_or_else(|error| panic!("{error}"));
    let server = Server::start(config, engine.runtime.clone()).unwrap_or_else(|error| panic!("{error}"));
    println!("{MARK}{}", json!({"url": format!("http://{}", server.address())}));
    for _ in std::io::stdin().lines().map_while(Result::ok) {
        let stats = engine.runtime.snapshot().engine;
        let figures = json!({
            "running": stats.running, "waiting": stats.waiting, "kv_pages": stats.kv_pages, "steps": stats.steps,
            "submitted": stats.submitted, "ended": stats.ended, "tasks": server.num_tasks(),
        });
        println!("{MARK}{figures}");
    }
}

/// A server's process, seen from the load's.
pub struct Process {
    pub url: String,
    made: PathBuf,
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Process {
    pub fn start(settings: &Settings) -> Self {
        let program = std::env::current_exe().unwrap_or_else(|error| panic!("{error}"));
        let mut command = Command::new(program);
        command.args(["serve", &settings.step.as_micros().to_string(), &settings.max_running.to_string()]);
        command.arg(settings.config.to_string());
        Self::spawn(command)
    }

    /// Any server that says its address as this one does, and writes when it made its tokens.
    pub fn peer(command_line: &str, settings: &Settings) -> Self {
        let mut words = command_line.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).arg(settings.step.as_micros().to_string());
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let made = std::env::temp_dir().join(format!("slora-bench-{}", std::process::id()));
        std::fs::write(&made, [0; 8 * crate::engine::LETTERS]).unwrap_or_else(|error| panic!("{error}"));
        command.arg(&made).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let Some(stdout) = child.stdout.take() else { panic!("the output is a pipe") };
        let mut process = Self { url: String::new(), made, child, lines: BufReader::new(stdout) };
        process.url = process.line()["url"].as_str().unwrap_or_default().into();
        process
    }

    fn line(&mut self) -> Value {
        loop {
            let mut line = String::new();
            let read = self.lines.read_line(&mut line).unwrap_or(0);
            assert!(read > 0, "the server's process has ended");
            if let Some(figures) = line.strip_prefix(MARK) {
                return serde_json::from_str(figures).unwrap_or_else(|error| panic!("{line}: {error}"));
            }
        }
    }

    /// When the last step of each letter was made.
    pub fn made(&self) -> Made {
        Made(File::open(&self.made).unwrap_or_else(|error| panic!("{error}")))
    }

    /// The engine's figures.
    pub fn stats(&mut self) -> Value {
        if let Some(input) = &mut self.child.stdin {
            let _ = input.write_all(b"stats\n");
        }
        self.line()
    }

    /// Seconds until the engine holds nothing for requests and the server has no more tasks than `tasks`.
    pub fn wait_idle(&mut self, tasks: u64) -> f64 {
        let begun = Instant::now();
        loop {
            let stats = self.stats();
            let number = |name: &str| stats[name].as_u64().unwrap_or(u64::MAX);
            let is_idle = ["running", "waiting", "kv_pages"].iter().all(|name| number(name) == 0);
            if is_idle && stats["submitted"] == stats["ended"] && number("tasks") <= tasks {
                return begun.elapsed().as_secs_f64();
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "never idle: {stats}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string()).join(name)
    }

    /// Kilobytes in memory.
    pub fn resident_kb(&self) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(self.proc("fd")).map_or(0, Iterator::count)
    }

    /// Seconds of a core that it has used.
    pub fn cpu_s(&self) -> f64 {
        let stat = std::fs::read_to_string(self.proc("stat")).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        // Linux counts these in hundredths on every machine.
        (ticks(11) + ticks(12)) / 100.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.made);
    }
}
