//! Scheduling scenes in a few lines of text, compared with their printed plans: `tests/golden/plans/*.txt`.
//!
//! Lines that begin with `>` are calls, the lines below each are what came of it. `SLORA_BLESS=1` writes the files anew.
//! Every request's tokens are all the same number, which tells in a plan whose row it is.
#![allow(clippy::unwrap_used, reason = "a test")]

mod core_world;

use std::collections::HashMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

use core_world::plan::{Plan, PlanReader};
use slora_core::{
    Account, AdapterId, AdapterSpec, EndReason, Engine, EngineConfig, Events, Load, LoadFailure, NewRequest,
    QueueOrder, RequestId, SamplingParams,
};

const EOS: i32 = 0;

/// What a line says behind its first word: `key=value` pairs and plain words.
struct Words<'a>(HashMap<&'a str, &'a str>, Vec<&'a str>);

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Self {
        let (pairs, plain): (Vec<_>, Vec<_>) = line.split_whitespace().partition(|word| word.contains('='));
        Self(pairs.into_iter().filter_map(|pair| pair.split_once('=')).collect(), plain)
    }

    fn number(&self, key: &str, default: u32) -> u32 {
        self.0.get(key).map_or(default, |value| value.parse().unwrap())
    }

    fn account(&self) -> Account {
        let number = |key: &str| self.0.get(key).map(|value| value.parse::<f64>().unwrap());
        Account {
            tenant: self.0.get("tenant").map(|name| Arc::from(*name)),
            weight: number("weight").unwrap_or(1.0),
            priority: number("priority").unwrap_or(0.0) as i32,
        }
    }

    fn has(&self, word: &str) -> bool {
        self.1.contains(&word)
    }
}

struct Scene {
    engine: Engine,
    reader: PlanReader,
    buffer: Vec<i32>,
    /// Names of requests; a request's id is its place.
    requests: Vec<String>,
    /// Name and version of every adapter.
    adapters: HashMap<AdapterId, String>,
    versions: HashMap<String, u32>,
    loads: Vec<Load>,
    /// Requests of each launched step's sampled rows.
    launched: Vec<(u32, Vec<usize>)>,
    previous: Vec<usize>,
    out: String,
}

impl Scene {
    fn new(words: &Words<'_>) -> Self {
        let config = EngineConfig {
            num_pages: words.number("pages", 16),
            num_host_pages: words.number("host_pages", 16),
            page_tokens: words.number("page_tokens", 4),
            max_batch_tokens: words.number("rows", 16),
            max_running: words.number("running", 4),
            max_adapters: words.number("adapters", 4),
            max_adapter_pages: 8,
            descriptor_words: 1,
            max_copy_pages: words.number("copy_pages", u32::MAX),
            max_loads: words.number("loads", 2),
            queue: if words.has("fair") { QueueOrder::Fair } else { QueueOrder::Fcfs },
            prefetch: words.has("prefetch"),
            vocab_size: 100,
            eos_token_ids: vec![EOS as u32],
            ..EngineConfig::default()
        };
        let engine = Engine::new(config).unwrap();
        Self {
            reader: PlanReader::new(engine.layout(), 1),
            buffer: vec![0; engine.layout().num_words()],
            engine,
            requests: Vec::new(),
            adapters: HashMap::new(),
            versions: HashMap::new(),
            loads: Vec::new(),
            launched: Vec::new(),
            previous: Vec::new(),
            out: String::new(),
        }
    }

    fn call(&mut self, line: &str) {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let words = Words::new(rest);
        match verb {
            "submit" => self.submit(&words),
            "cancel" => drop(self.engine.cancel(self.find(words.1[0]))),
            "checked" => self.engine.checked(self.find(words.1[0]), words.number("tokens", 0)),
            "adapter" => self.register(&words),
            "unload" => self.engine.unload(words.1[0]).unwrap(),
            "pin" => self.engine.pin(words.1[0]).unwrap(),
            "load" => self.answer_load(&words),
            "schedule" => drop(self.schedule()),
            "commit" => self.commit(&words),
            "copies" => self.engine.copies_done(words.number("step", 0)),
            "step" => {
                if let Some(step) = self.schedule() {
                    self.commit(&words);
                    self.engine.copies_done(step);
                }
            }
            other => panic!("nobody knows what {other:?} means"),
        }
        self.report();
        self.engine.check();
    }

    fn find(&self, name: &str) -> RequestId {
        RequestId(self.requests.iter().position(|other| other == name).unwrap() as u64)
    }

    fn submit(&mut self, words: &Words<'_>) {
        let token = self.requests.len() as u32 + 1;
        let params = SamplingParams {
            temperature: 0.0,
            max_tokens: words.number("max", 4),
            has_stop_strings: words.has("stop_strings"),
            presence_penalty: if words.has("penalty") { 1.0 } else { 0.0 },
            prompt_logprobs: words.has("prompt_logprobs").then_some(0),
            ..SamplingParams::default()
        };
        let new = NewRequest {
            id: RequestId(self.requests.len() as u64),
            adapter: words.0.get("adapter").map(|name| Arc::from(*name)),
            prompt: vec![token; words.number("prompt", 4) as usize],
            params: Arc::new(params),
            account: words.account(),
        };
        match self.engine.submit(0, new) {
            Ok(()) => self.requests.push(words.1[0].to_owned()),
            Err(error) => writeln!(self.out, "refused: {error}").unwrap(),
        }
    }

    fn register(&mut self, words: &Words<'_>) {
        let num_pages = words.number("pages", 1);
        let spec =
            AdapterSpec { num_pages, bytes: 0, words: Arc::new([0]), page_layers: (0..num_pages as u16).collect() };
        let id = self.engine.register(words.1[0].into(), spec, words.has("replace")).unwrap();
        let version = self.versions.entry(words.1[0].to_owned()).or_default();
        *version += 1;
        self.adapters.insert(id, format!("{} version {version}", words.1[0]));
    }

    fn answer_load(&mut self, words: &Words<'_>) {
        let load = self.loads.remove(0);
        if words.has("failed") {
            self.engine.load_failed(load.adapter, LoadFailure { code: "bad", message: "its file is bad".into() });
        } else {
            self.engine.load_finished(load.adapter);
        }
    }

    fn schedule(&mut self) -> Option<u32> {
        let Some(counts) = self.engine.schedule(0, &mut self.buffer) else {
            writeln!(self.out, "nothing to run").unwrap();
            return None;
        };
        let plan = self.reader.read(counts, &self.buffer);
        self.print(&plan);
        Some(counts.step)
    }

    fn request_of(&self, token: i32) -> usize {
        if token < 0 { self.previous[(-1 - token) as usize] } else { token as usize - 1 }
    }

    fn print(&mut self, plan: &Plan) {
        let c = plan.counts;
        let parts = [(c.num_rows, "rows"), (c.num_copies, "copies"), (c.num_resets, "resets")];
        let parts: Vec<String> =
            parts.iter().filter(|(count, _)| *count > 0).map(|(count, name)| format!("{count} {name}")).collect();
        let wait = if c.copies_wait_step > 0 { format!(" behind step {}", c.copies_wait_step) } else { String::new() };
        let needs = if c.copies_needed_step > 0 {
            format!(", needs copies of {}", c.copies_needed_step)
        } else {
            String::new()
        };
        writeln!(self.out, "step {}: {}{wait}{needs}", c.step, parts.join(", ")).unwrap();
        for (i, row) in plan.reset_rows.iter().enumerate() {
            let tokens = Plan::part(&plan.reset_indptr, &plan.reset_tokens, i);
            let prompt_len = plan.reset_prompt_lens[i];
            writeln!(self.out, "  state row {row} starts with {prompt_len} of {tokens:?}").unwrap();
        }
        if c.num_copies > 0 {
            let pairs = plan.copy_host_pages.iter().zip(&plan.copy_pages);
            let pairs: Vec<String> = pairs.map(|(host_page, page)| format!("{host_page}→{page}")).collect();
            writeln!(self.out, "  copies {}", pairs.join(" ")).unwrap();
        }
        for (i, row) in plan.changed_rows.iter().enumerate() {
            let pages = Plan::part(&plan.changed_pages_indptr, &plan.changed_pages, i);
            writeln!(self.out, "  adapter row {row} is pages {pages:?}").unwrap();
        }
        let mut sampled = Vec::new();
        for r in 0..c.num_requests as usize {
            let rows = plan.rows(r);
            let request = self.request_of(plan.token_ids[rows.start]);
            let is_sampled = plan.sample_rows.contains(&(rows.end as i32 - 1));
            let mut line = format!("  {}: {} at {}", self.requests[request], rows.len(), plan.positions[rows.start]);
            write!(line, ", pages {:?}", plan.pages(r)).unwrap();
            let adapter = plan.adapter_of(rows.start);
            if adapter >= 0 {
                write!(line, ", adapter row {adapter}").unwrap();
            }
            if plan.token_ids[rows.start] < 0 {
                write!(line, ", token of row {}", -1 - plan.token_ids[rows.start]).unwrap();
            }
            if is_sampled {
                line.push_str(", sampled");
                sampled.push(request);
            }
            writeln!(self.out, "{line}").unwrap();
        }
        self.previous.clone_from(&sampled);
        self.launched.push((c.step, sampled));
    }

    /// `stop=a` gives the request an end-of-sequence token, `bad=a` logits that are not finite.
    fn commit(&mut self, words: &Words<'_>) {
        if self.launched.is_empty() {
            writeln!(self.out, "nothing is launched").unwrap();
            return;
        }
        let (step, sampled) = self.launched.remove(0);
        let token = |request: &usize| {
            let name = self.requests[*request].as_str();
            match (words.0.get("stop"), words.0.get("bad")) {
                (Some(stop), _) if *stop == name => EOS,
                (_, Some(bad)) if *bad == name => -1,
                _ => *request as i32 + 1,
            }
        };
        let tokens: Vec<i32> = sampled.iter().map(token).collect();
        self.engine.commit(0, step, &tokens);
    }

    /// What happened beside the plan.
    fn report(&mut self) {
        let mut events = Events::default();
        self.engine.take_events(&mut events);
        for end in events.ended {
            let reason = match end.reason {
                EndReason::Stop(token) => format!("token {token}"),
                EndReason::AdapterFailed(failure) => format!("adapter failed: {failure}"),
                other => format!("{other:?}").to_lowercase(),
            };
            writeln!(self.out, "{} ends: {reason}", self.requests[end.request.0 as usize]).unwrap();
        }
        while let Some(load) = self.engine.next_load() {
            writeln!(self.out, "loads {} into host pages {:?}", self.adapters[&load.adapter], load.pages).unwrap();
            self.loads.push(load);
        }
        while let Some(id) = self.engine.next_cancelled_load() {
            writeln!(self.out, "gives up loading {}", self.adapters[&id]).unwrap();
        }
        while let Some(id) = self.engine.next_dropped() {
            writeln!(self.out, "drops {}", self.adapters[&id]).unwrap();
        }
    }
}

/// The file with what really came of its calls.
fn play(text: &str) -> String {
    let mut scene: Option<Scene> = None;
    let mut played = String::new();
    for line in text.lines() {
        if let Some(call) = line.strip_prefix("> ") {
            writeln!(played, "{line}").unwrap();
            match (&mut scene, call.strip_prefix("config")) {
                (None, Some(words)) => scene = Some(Scene::new(&Words::new(words))),
                (Some(scene), _) => scene.call(call),
                (None, None) => panic!("a scene begins with its config"),
            }
            if let Some(scene) = &mut scene {
                played.push_str(&std::mem::take(&mut scene.out));
            }
        } else if line.starts_with('#') || line.is_empty() {
            writeln!(played, "{line}").unwrap();
        }
    }
    played
}

#[test]
fn scenes_give_the_plans_that_are_written_down() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/plans");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 8, "the scenes are found");
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        let played = play(&text);
        if std::env::var_os("SLORA_BLESS").is_some() {
            std::fs::write(&path, played).unwrap();
        } else {
            assert!(played == text, "{}: this came of it:\n{played}", path.display());
        }
    }
}
