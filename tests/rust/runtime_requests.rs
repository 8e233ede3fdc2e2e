//! Requests through the runtime's threads, with an executor that samples from a script.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod runtime_world;

use std::ops::Deref;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use slora_core::{Account, AdapterState, EngineConfig, SamplingParams, SubmitError};
use slora_runtime::{Delta, End, Mailbox, Output, RegisterError, RequestError, Sampling, State, Stepper, Submission};

use runtime_world::{RuntimeWorld, copy_adapter, example};

/// A runtime, and the mailbox of its requests.
struct World {
    engine: RuntimeWorld,
    mailbox: Arc<Mailbox>,
}

impl Deref for World {
    type Target = RuntimeWorld;

    fn deref(&self) -> &RuntimeWorld {
        &self.engine
    }
}

impl World {
    fn new(script: &str) -> Self {
        Self::with(script, EngineConfig::default(), Duration::ZERO)
    }

    fn with(script: &str, engine: EngineConfig, step_time: Duration) -> Self {
        Self::over(RuntimeWorld::new(script, engine, step_time, 1, 1))
    }

    fn over(engine: RuntimeWorld) -> Self {
        Self { engine, mailbox: Arc::default() }
    }

    fn submission(&self, prompt: &str, max_tokens: u32) -> Submission {
        Submission {
            prompt: self.text.encode(prompt, false).unwrap(),
            adapter: None,
            account: Account::default(),
            sampling: Sampling {
                params: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                max_tokens: Some(max_tokens),
                seed: None,
                stops: Vec::new(),
                include_stop: false,
                skip_special_tokens: true,
            },
            wake: self.mailbox.clone(),
            wakes_on_token: false,
        }
    }

    fn stopping_at(&self, stops: &[&str], prompt: &str, max_tokens: u32) -> Submission {
        let mut submission = self.submission(prompt, max_tokens);
        submission.sampling.stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        submission
    }

    /// Everything that the request brings.
    fn finish(&self, output: &Output) -> Delta {
        let (mut all, deadline) = (Delta::default(), Instant::now() + Duration::from_secs(60));
        while all.end.is_none() {
            assert!(Instant::now() < deadline, "request {} does not end", output.id().0);
            self.mailbox.wait(Duration::from_millis(20));
            let delta = output.take();
            all.pieces.extend(delta.pieces);
            all.tail.push_str(&delta.tail);
            all.end = delta.end;
        }
        all
    }

    fn run(&self, submission: Submission) -> Delta {
        self.finish(&self.runtime.submit(submission).unwrap())
    }
}

fn text(delta: &Delta) -> String {
    delta.pieces.iter().map(|piece| piece.text.as_str()).chain([delta.tail.as_str()]).collect()
}

#[test]
fn a_request_brings_its_tokens_as_text() {
    let world = World::new("hello world");
    let delta = world.run(world.submission("a", 11));
    assert_eq!((text(&delta).as_str(), delta.pieces.len()), ("hello world", 11));
    assert!(matches!(delta.end, Some(End::Length)));
}

#[test]
fn a_stop_string_ends_the_request_across_tokens_and_nothing_runs_on() {
    let world = World::new("abcdefghijklmnopqrstuvwxyz");
    let stopping = || world.stopping_at(&["cde", "zz"], "a", 200);
    let delta = world.run(stopping());
    assert_eq!((text(&delta).as_str(), delta.pieces.len()), ("ab", 5));
    assert!(matches!(delta.end, Some(End::StopString(0))));
    let mut keeping = stopping();
    keeping.sampling.include_stop = true;
    let delta = world.run(keeping);
    assert_eq!(text(&delta), "abcde");
    world.wait_until("the engine has nothing left", |stats| stats.running + stats.waiting == 0 && stats.kv_pages == 0);
    let generated = world.runtime.snapshot().engine.generated_tokens;
    assert!(generated <= 2 * (5 + 4), "{generated} tokens for two texts of 5, at most 4 ahead each");
}

#[test]
fn a_piece_counts_the_characters_that_it_completes_shown_or_held_back() {
    let world = World::new("a<|begin|>\u{800}bc<|end|>");
    let output = world.runtime.submit(world.stopping_at(&["bcx"], "x", 10)).unwrap();
    let delta = world.finish(&output);
    let found: Vec<(usize, &str)> = delta.pieces.iter().map(|piece| (piece.num_chars, piece.text.as_str())).collect();
    assert_eq!(found, [(1, "a"), (0, ""), (0, ""), (0, ""), (1, "\u{800}"), (1, ""), (1, ""), (0, "")]);
    assert_eq!(delta.tail, "bc");
}

#[test]
fn text_that_may_begin_a_stop_string_is_held_back_until_the_end() {
    let world = World::new("abcdefgh");
    let delta = world.run(world.stopping_at(&["efgX"], "a", 6));
    assert_eq!(text(&delta), "abcdef");
    assert!(delta.pieces[5].text.is_empty(), "the last piece was held back");
}

#[test]
fn a_stop_token_is_a_token_but_no_text() {
    let world = World::new("abcdef");
    let stop = world.text.encode("c", false).unwrap();
    let mut submission = world.submission("a", 20);
    submission.sampling.params.stop_token_ids = stop.clone();
    let delta = world.run(submission);
    assert_eq!((text(&delta).as_str(), delta.pieces.len()), ("ab", 3));
    assert!(matches!(delta.end, Some(End::StopToken(token)) if token == stop[0]));
}

#[test]
fn what_the_engine_refuses_comes_as_the_end() {
    let world = World::new("abc");
    let refusal = |submission: Submission| match world.run(submission).end {
        Some(End::Error(RequestError::Submit(error))) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(refusal(Submission { prompt: Vec::new(), ..world.submission("a", 1) }), SubmitError::EmptyPrompt);
    assert!(matches!(refusal(world.submission("a", 4000)), SubmitError::TooLong { max_context: 256, .. }));
    let token = Submission { prompt: vec![99_999], ..world.submission("a", 1) };
    assert!(matches!(refusal(token), SubmitError::Token { token: 99_999, .. }));
    let unknown = Submission { adapter: Some("nobody".into()), ..world.submission("a", 1) };
    assert_eq!(refusal(unknown), SubmitError::UnknownAdapter("nobody".into()));
}

#[test]
fn dropping_the_output_cancels_the_request() {
    let world = World::with("abc", EngineConfig::default(), Duration::from_millis(20));
    let output = world.runtime.submit(world.submission("a", 200)).unwrap();
    world.wait_until("it runs", |stats| stats.running == 1);
    drop(output);
    world.wait_until("its pages are free", |stats| stats.running == 0 && stats.kv_pages == 0);
    assert_eq!(world.runtime.snapshot().engine.ended, 1);
}

#[test]
fn what_a_reader_does_not_take_at_once_comes_later_and_the_end_with_the_last_of_it() {
    let world = World::new("abcdefgh");
    for stops in [&[][..], &["gh"]] {
        let submission = Submission { wakes_on_token: true, ..world.stopping_at(stops, "x", 8) };
        let output = world.runtime.submit(submission).unwrap();
        world.wait_until("the engine has done its part", |stats| stats.running + stats.waiting == 0);
        let (mut text, mut num_takes, mut end) = (String::new(), 0, None);
        while end.is_none() {
            assert!(!world.mailbox.wait(Duration::from_secs(60)).is_empty(), "a reader is woken for what is left");
            let delta = output.take_up_to(3);
            assert!(delta.pieces.len() <= 3 || !stops.is_empty());
            delta.pieces.iter().for_each(|piece| text += &piece.text);
            text += &delta.tail;
            (num_takes, end) = (num_takes + 1, delta.end);
        }
        match stops.is_empty() {
            true => assert!(text == "abcdefgh" && num_takes >= 3 && matches!(end, Some(End::Length)), "{text}"),
            false => assert!(text == "abcdef" && matches!(end, Some(End::StopString(0))), "{text} {end:?}"),
        }
    }
}

#[test]
fn a_failed_step_ends_every_request_with_its_reason() {
    let world = World::with("abc", EngineConfig::default(), Duration::from_millis(20));
    let outputs: Vec<Output> = (0..8).map(|_| world.runtime.submit(world.submission("a", 200)).unwrap()).collect();
    world.wait_until("they run", |stats| stats.running == 8);
    world.runtime.fail("out of memory");
    for output in &outputs {
        let end = world.finish(output).end;
        assert!(matches!(&end, Some(End::Error(RequestError::EngineFailed(reason))) if &**reason == "out of memory"));
    }
    assert_eq!(world.runtime.state(), State::Failed("out of memory".into()));
    let refused = world.runtime.submit(world.submission("a", 1)).err();
    assert!(matches!(refused, Some(RequestError::EngineFailed(_))));
    assert!(matches!(world.runtime.adapters(), Err(RequestError::EngineFailed(_))));
}

#[test]
fn closing_ends_running_and_waiting_requests() {
    let engine = EngineConfig { max_running: 2, ..EngineConfig::default() };
    let mut world = World::with("abc", engine, Duration::from_millis(20));
    let outputs: Vec<Output> = (0..6).map(|_| world.runtime.submit(world.submission("a", 200)).unwrap()).collect();
    world.wait_until("two run", |stats| (stats.running, stats.waiting) == (2, 4));
    world.engine.close();
    for output in &outputs {
        assert!(matches!(world.finish(output).end, Some(End::Error(RequestError::Closed))));
    }
    assert!(matches!(world.runtime.submit(world.submission("a", 1)), Err(RequestError::Closed)));
}

#[test]
fn more_requests_than_may_wait_are_refused() {
    let engine = EngineConfig { max_running: 1, max_waiting: 3, ..EngineConfig::default() };
    let world = World::with("abc", engine, Duration::from_millis(5));
    let outputs: Vec<_> = (0..20).map(|_| world.runtime.submit(world.submission("a", 50))).collect();
    let is_full =
        |error: &RequestError| matches!(error, RequestError::Submit(SubmitError::QueueFull { max_waiting: 3 }));
    let mut num_refused = 0;
    for output in &outputs {
        match output {
            Err(error) => num_refused += usize::from(is_full(error)),
            Ok(output) => match world.finish(output).end {
                Some(End::Error(error)) if is_full(&error) => num_refused += 1,
                Some(End::Length) => {}
                other => panic!("{other:?}"),
            },
        }
    }
    assert!((10..20).contains(&num_refused), "{num_refused} of 20 were refused");
}

#[test]
fn an_adapter_is_loaded_when_a_request_wants_it() {
    let world = World::new("abc");
    let registered = world.runtime.register("reverse", &example("adapters/reverse"), false, false).unwrap();
    assert_eq!(registered.info.state, slora_core::AdapterState::Registered);
    let delta = world.run(Submission { adapter: Some("reverse".into()), ..world.submission("a", 3) });
    assert!(matches!(delta.end, Some(End::Length)), "{:?}", delta.end);
    let details = world.runtime.adapter("reverse").unwrap().unwrap();
    assert_eq!(details.info.state, slora_core::AdapterState::Resident);
    assert_eq!(details.checkpoint.unwrap().report().max_rank, 8);
    world.runtime.unload("reverse").unwrap();
    assert!(world.runtime.adapter("reverse").unwrap().is_none());
    world.wait_until("both tiers are free", |stats| {
        stats.adapter_pages == 0 && stats.free_host_pages == stats.num_host_pages && stats.adapters == 0
    });
}

#[test]
fn an_adapter_whose_file_changed_fails_its_requests_with_the_reason() {
    let world = World::new("abc");
    let folder = tempfile::tempdir().unwrap();
    copy_adapter("reverse", folder.path());
    world.runtime.register("changed", folder.path(), false, false).unwrap();
    let weights = folder.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let delta = world.run(Submission { adapter: Some("changed".into()), ..world.submission("a", 3) });
    match delta.end {
        Some(End::Error(RequestError::AdapterFailed { name, failure })) => {
            assert_eq!(&*name, "changed");
            assert_eq!(failure.code, "changed");
            assert!(failure.message.contains("adapter_model.safetensors"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
    let other = world.run(world.submission("a", 3));
    assert!(matches!(other.end, Some(End::Length)), "the base goes on");
}

#[test]
fn names_and_checkpoints_are_checked() {
    let world = World::new("abc");
    let register = |name: &str, path: &Path| world.runtime.register(name, path, false, false);
    let path = example("adapters/reverse");
    for name in ["", "a/b", "a b", "ü", &"x".repeat(129)] {
        assert!(matches!(register(name, &path), Err(RegisterError::Name(_))), "{name:?}");
    }
    assert!(matches!(register("x", &example("base")), Err(RegisterError::Checkpoint(_))));
    register(&"x".repeat(128), &path).unwrap();
    assert!(matches!(register(&"x".repeat(128), &path), Err(RegisterError::Engine(_))));
    assert!(matches!(world.runtime.unload("nobody"), Err(RegisterError::Engine(_))));
}

#[test]
fn of_many_requests_with_random_cancels_each_ends_once_and_nothing_is_left() {
    let engine = EngineConfig { num_pages: 48, max_running: 6, max_batch_tokens: 20, ..EngineConfig::default() };
    let world = World::with("abcdefghijklmnop", engine, Duration::ZERO);
    for name in ["reverse", "upper", "spell"] {
        world.runtime.register(name, &example("adapters").join(name), false, false).unwrap();
    }
    let names = [None, Some("reverse"), Some("upper"), Some("spell")];
    let outputs: Vec<Output> = (0..300)
        .map(|i| {
            let adapter = names[i % 4].map(Into::into);
            let stops: &[&str] = if i % 5 == 0 { &["defg"] } else { &[] };
            let submission = world.stopping_at(stops, "some prompt", 1 + i as u32 % 30);
            let submission = Submission { adapter, ..submission };
            world.runtime.submit(submission).unwrap()
        })
        .collect();
    for (i, output) in outputs.iter().enumerate() {
        if i % 7 == 0 {
            output.cancel();
        }
        let delta = world.finish(output);
        assert!(!matches!(delta.end, Some(End::Error(_))), "{:?}", delta.end);
    }
    world.wait_until("nothing is left", |stats| stats.kv_pages == 0 && stats.running + stats.waiting == 0);
    let stats = world.runtime.snapshot().engine;
    assert_eq!((stats.submitted, stats.ended), (300, 300));
}

#[test]
fn a_load_into_a_slab_that_is_not_ready_is_answered_when_it_is() {
    let world = World::over(RuntimeWorld::new("abc", EngineConfig::default(), Duration::ZERO, 8, 0));
    world.runtime.register("reverse", &example("adapters/reverse"), false, false).unwrap();
    let ask = |adapter: Option<&str>| {
        let submission = Submission { adapter: adapter.map(Into::into), ..world.submission("a", 3) };
        world.runtime.submit(submission).unwrap()
    };
    let waiting = ask(Some("reverse"));
    world.wait_until("the adapter is being loaded", |stats| stats.loading_adapters == 1);
    for _ in 0..20 {
        assert!(matches!(world.finish(&ask(None)).end, Some(End::Length)), "others do not wait");
    }
    world.runtime.slabs_ready(0);
    assert_eq!(world.runtime.snapshot().engine.loads, 0);
    assert!(waiting.take().end.is_none());
    world.runtime.slabs_ready(8);
    assert!(matches!(world.finish(&waiting).end, Some(End::Length)));
    assert_eq!(world.runtime.snapshot().engine.loads, 1);
}

#[test]
fn adapters_are_listed_while_the_step_thread_is_busy_and_as_the_last_call_left_them() {
    let world = World::new("abc");
    let (runtime, path) = (&world.runtime, example("adapters/reverse"));
    let listed = || {
        let all = runtime.adapters().unwrap().into_iter();
        all.map(|details| (details.info.name.to_string(), details.info.version, details.info.pinned))
            .collect::<Vec<_>>()
    };
    for round in 0..50 {
        runtime.register("b", &path, false, false).unwrap();
        runtime.register("a", &path, false, round % 2 == 0).unwrap();
        assert_eq!(listed(), [("a".into(), 1, round % 2 == 0), ("b".into(), 1, false)]);
        runtime.pin("b", true).unwrap();
        assert!(runtime.adapter("b").unwrap().unwrap().info.pinned);
        let done = world.run(Submission { adapter: Some("b".into()), ..world.submission("x", 1) });
        assert!(matches!(done.end, Some(End::Length)), "{:?}", done.end);
        let info = runtime.adapter("b").unwrap().unwrap().info;
        assert_eq!((info.state, info.unfinished, info.pins), (AdapterState::Resident, 0, 0));
        runtime.unload("b").unwrap();
        runtime.unload("a").unwrap();
        assert_eq!(listed(), []);
    }
    runtime.register("a", &path, false, false).unwrap();
    let ((begin, begun), (release, released)) = (mpsc::channel(), mpsc::channel());
    let busy = std::thread::spawn({
        let runtime = runtime.clone();
        move || {
            let wait = move |_: &mut Stepper| {
                begin.send(()).unwrap();
                released.recv_timeout(Duration::from_secs(60)).is_ok()
            };
            runtime.call(wait).unwrap()
        }
    });
    begun.recv().unwrap();
    assert_eq!((listed().len(), runtime.adapter("a").unwrap().is_some()), (1, true));
    // The step thread may have given up waiting.
    let _ = release.send(());
    assert!(busy.join().unwrap(), "the lists waited for the step thread");
}
