//! The server over real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::io::{BufReader, Read, Write};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use slora_core::EngineConfig;

use server_world::{
    HELD, MAX_CONTEXT, Response, SCRIPT, World, completion, example, num_shown, read_head, text_of, with,
};

/// The step thread does nothing from here on until this is dropped.
fn hold(world: &World) -> mpsc::Sender<()> {
    let ((begin, begun), (release, released)) = (mpsc::channel(), mpsc::channel());
    let runtime = world.runtime.clone();
    std::thread::spawn(move || {
        runtime.call(move |_| {
            begin.send(()).unwrap();
            released.recv()
        })
    });
    begun.recv().unwrap();
    release
}

#[test]
fn a_completion_is_whole() {
    let world = World::new();
    let response =
        world.send("POST", "/v1/completions", &[("x-request-id", "my-id.1")], Some(&completion(5).to_string()));
    assert_eq!((response.status, response.header("x-request-id")), (200, Some("my-id.1")));
    let answer = response.json();
    assert_eq!(response.header("x-adapter"), None);
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "base");
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["choices"][0]["text"], SCRIPT[..5]);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let usage = json!({"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(answer["usage"], usage);
}

#[test]
fn a_prompt_may_be_a_list_and_ids_and_have_several_choices() {
    let world = World::new();
    let ids = world.text.encode("xy", false).unwrap();
    let prompts = [json!(["x", "xy"]), json!([&ids[..1], ids])];
    for prompt in prompts {
        let answer = world.post("/v1/completions", &with(completion(3), json!({"prompt": prompt, "n": 2}))).json();
        let texts: Vec<&str> =
            answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(texts, ["abc", "abc", "bcd", "bcd"]);
        assert_eq!(answer["usage"]["prompt_tokens"], 3);
        assert_eq!(answer["usage"]["completion_tokens"], 12);
    }
}

#[test]
fn a_completion_streams_one_event_a_token_and_then_its_usage() {
    let world = World::new();
    let body = with(completion(6), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = world.post("/v1/completions", &body).events();
    assert_eq!((num_shown(&events), text_of(&events, 0).as_str()), (6, &SCRIPT[..6]));
    let [.., before, last, usage] = &events[..] else { panic!("{events:?}") };
    assert_eq!(before["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 6);
    let with_n = with(body, json!({"n": 3, "stream_options": null}));
    let events = world.post("/v1/completions", &with_n).events();
    assert_eq!(num_shown(&events), 18);
    assert!((0..3).all(|index| text_of(&events, index) == SCRIPT[..6]));
}

#[test]
fn a_stop_string_ends_a_completion_streamed_or_not() {
    let world = World::new();
    let body = with(completion(20), json!({"stop": ["def", "nothing"]}));
    let answer = world.post("/v1/completions", &body).json();
    assert_eq!(answer["choices"][0]["text"], "abc");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["stop_reason"], "def");
    let events = world.post("/v1/completions", &with(body, json!({"stream": true}))).events();
    assert_eq!(text_of(&events, 0), "abc");
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_prompt_is_echoed_with_a_log_probability_for_each_token_after_the_first() {
    let world = World::new();
    let body = with(completion(1), json!({"prompt": "xyz", "echo": true, "logprobs": 1}));
    let choice = world.post("/v1/completions", &body).json()["choices"][0].clone();
    assert_eq!(choice["text"], "xyzc");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 4);
    let token_logprobs = logprobs["token_logprobs"].as_array().unwrap();
    assert!(token_logprobs[0].is_null() && token_logprobs[1..].iter().all(Value::is_number), "{token_logprobs:?}");
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));
    let nothing = world.post("/v1/completions", &with(body, json!({"max_tokens": 0}))).json();
    assert_eq!(nothing["choices"][0]["text"], "xyz");
    assert_eq!(nothing["usage"]["completion_tokens"], 0);
}

/// Text and `text_offset` of a completion's first choice, whole and streamed.
fn offsets(world: &World, fields: Value) -> [(String, Value); 2] {
    let body = with(with(completion(3), json!({"logprobs": 0})), fields);
    let whole = world.post("/v1/completions", &body).json()["choices"][0].clone();
    let events = world.post("/v1/completions", &with(body, json!({"stream": true}))).events();
    let lists = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["text_offset"].as_array());
    let streamed = lists.flatten().cloned().collect();
    [
        (whole["text"].as_str().unwrap().to_owned(), whole["logprobs"]["text_offset"].clone()),
        (text_of(&events, 0), streamed),
    ]
}

#[test]
fn text_offsets_are_positions_in_the_text_that_is_returned() {
    let world = World::new();
    let ids = |text| world.text.encode(text, false).unwrap();
    let (begin, stop) = (ids("<|begin|>")[0], ids("c")[0]);
    let with_special = [ids("x"), vec![begin], ids("y")].concat();
    let cases = [
        ("plain", json!({}), "abc", json!([0, 1, 2])),
        (
            "a special token is left out of the echo",
            json!({"prompt": "xy", "echo": true, "add_special_tokens": true}),
            "xycde",
            json!([0, 0, 1, 2, 3, 4]),
        ),
        ("also in the middle", json!({"prompt": with_special, "echo": true}), "xycde", json!([0, 1, 1, 2, 3, 4])),
        (
            "a character of three tokens",
            json!({"prompt": "\u{800}y", "echo": true}),
            "\u{800}ydef",
            json!([0, 0, 0, 1, 2, 3, 4]),
        ),
        (
            "half a character",
            json!({"prompt": ids("\u{800}")[..2], "echo": true}),
            "\u{fffd}bcd",
            json!([0, 0, 1, 2, 3]),
        ),
        ("a stop token", json!({"stop_token_ids": [stop]}), "ab", json!([0, 1, 2])),
        ("held back for a stop string that does not come", json!({"stop": ["bcx"]}), "abc", json!([0, 1, 2])),
    ];
    for (what, fields, text, expected) in cases {
        for (shown, found) in offsets(&world, fields) {
            assert_eq!((shown.as_str(), &found), (text, &expected), "{what}");
        }
    }
    let [(text, found), (streamed, _)] = offsets(&world, json!({"stop": ["bc"]}));
    assert_eq!((text.as_str(), streamed.as_str(), found), ("a", "a", json!([0, 1, 1])), "a stop string is cut off");
}

#[test]
fn content_that_is_a_list_of_texts_is_as_one_text_of_so_many_lines() {
    let world = World::new();
    let ids = |content: Value| {
        let body = json!({"messages": [{"role": "user", "content": content}]});
        world.post("/tokenize", &body).json()["tokens"].clone()
    };
    let expected = ids(json!("ab\ncd"));
    assert!(expected.as_array().unwrap().len() > 5, "{expected}");
    assert_eq!(ids(json!([{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}])), expected);
    assert_eq!(ids(json!(["ab", "cd"])), expected);
}

#[test]
fn a_chat_is_whole_or_streams_with_its_role_first() {
    let world = World::new();
    let content = json!([{"type": "text", "text": "hello"}]);
    let body = json!({"model": "base", "messages": [{"role": "user", "content": content}], "max_completion_tokens": 4});
    let answer = world.post("/v1/chat/completions", &body).json();
    assert_eq!(answer["object"], "chat.completion", "{answer}");
    let prompt_len = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    let last = SCRIPT.len() - 1;
    let expected: String = (prompt_len - 1..prompt_len + 3).map(|at| SCRIPT.as_bytes()[at.min(last)] as char).collect();
    assert_eq!(answer["choices"][0]["message"]["content"], expected);
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    let streamed = with(body, json!({"stream": true, "logprobs": true, "top_logprobs": 2}));
    let events = world.post("/v1/chat/completions", &streamed).events();
    assert_eq!(num_shown(&events), 4);
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let deltas = events[1..].iter().map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap());
    assert_eq!(deltas.collect::<String>(), expected);
    assert!(events[1]["choices"][0]["logprobs"]["content"][0]["bytes"].is_array());
}

#[test]
fn what_a_user_gets_wrong_is_a_4xx_with_a_code_and_the_field() {
    let world = World::new();
    let chat = json!({"model": "base", "messages": [{"role": "user", "content": "x"}]});
    let completions = [
        (json!({"model": "nobody"}), 404, "model_not_found", "model"),
        (json!({"model": "base:nobody"}), 404, "model_not_found", "model"),
        (json!({"model": "a/../b"}), 404, "model_not_found", "model"),
        (json!({"model": 3}), 400, "invalid_type", "model"),
        (json!({"prompt": []}), 400, "invalid_value", "prompt"),
        (json!({"prompt": [1, "x"]}), 400, "invalid_type", "prompt"),
        (json!({"prompt": [999_999]}), 400, "invalid_value", "prompt"),
        (json!({"prompt": null}), 400, "missing_required_parameter", "prompt"),
        (json!({"temperature": -1}), 400, "invalid_value", "temperature"),
        (json!({"temperature": "hot"}), 400, "invalid_type", "temperature"),
        (json!({"n": 1000}), 400, "invalid_value", "n"),
        (json!({"logprobs": 21}), 400, "invalid_value", "logprobs"),
        (json!({"suffix": "x"}), 400, "unsupported_parameter", "suffix"),
        (json!({"tools": [{}]}), 400, "unsupported_parameter", "tools"),
        (json!({"stop": vec!["x"; 17]}), 400, "invalid_value", "stop"),
        (json!({"stream_options": {}}), 400, "invalid_value", "stream_options"),
        (json!({"max_tokens": 4000}), 400, "context_length_exceeded", ""),
    ];
    for (fields, status, code, param) in completions {
        for stream in [false, true] {
            let is_about_streams = fields.get("stream_options").is_some();
            let body = with(with(completion(4), json!({"stream": stream && !is_about_streams})), fields.clone());
            let response = world.post("/v1/completions", &body);
            assert_eq!(response.error(), (status, code.to_owned()), "{body} {response:?}");
            assert_eq!(response.json()["error"]["param"].as_str().unwrap_or_default(), param, "{response:?}");
        }
    }
    let chats = [
        json!({"messages": []}),
        json!({"messages": "x"}),
        json!({"messages": [{"content": "x"}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        json!({"top_logprobs": 3}),
        json!({"chat_template": "{{ x }}"}),
        json!({"echo": true}),
    ];
    for fields in chats {
        let response = world.post("/v1/chat/completions", &with(chat.clone(), fields));
        assert_eq!(response.status, 400, "{response:?}");
        response.error();
    }
}

#[test]
fn where_adapters_lie_is_told_as_an_absolute_path() {
    let path = "../../examples/tiny/adapters/upper";
    let world = World::configured(json!({"adapters": [{"name": "upper", "path": path}]}));
    let root = world.get("/v1/models/upper").json()["root"].as_str().unwrap().to_owned();
    assert!(Path::new(&root).is_absolute() && root.ends_with("upper"), "{root}");
}

#[test]
fn what_is_wrong_with_http_is_in_openais_shape_too() {
    let world = World::configured(json!({"limits": {"max_body_bytes": 1000, "max_header_bytes": 2000}}));
    let post = |headers: &[(&str, &str)], body: &str| world.send("POST", "/v1/completions", headers, Some(body));
    assert_eq!(post(&[], "{").error(), (400, "invalid_json".into()));
    assert_eq!(post(&[], "[1]").error(), (400, "invalid_json".into()));
    assert_eq!(post(&[], &"[".repeat(900)).error(), (400, "invalid_json".into()));
    assert_eq!(post(&[("content-type", "text/plain")], "{}").error(), (415, "unsupported_media_type".into()));
    assert_eq!(post(&[], &"x".repeat(1001)).error(), (413, "body_too_large".into()));
    assert_eq!(world.get("/v1/nothing").error(), (404, "not_found".into()));
    assert_eq!(world.get("/v1/completions").error(), (405, "method_not_allowed".into()));
    let large = "x".repeat(2000);
    let response = world.send("GET", "/v1/models", &[("x-large", &large)], None);
    assert_eq!(response.error(), (431, "headers_too_large".into()));
    let chunked = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                   transfer-encoding: chunked\r\n\r\n";
    let body = format!("400\r\n{}\r\n0\r\n\r\n", "x".repeat(1024));
    assert_eq!(Response::read(world.raw(&format!("{chunked}{body}"))).error(), (413, "body_too_large".into()));
}

#[test]
fn what_an_admin_sends_is_short() {
    let world = World::configured(json!({"admin_keys": ["admin"]}));
    let sent = |method: &str, path: &str, bytes: usize| {
        let empty = json!({"padding": ""}).to_string().len();
        world.ask("admin", method, path, Some(&json!({"padding": "x".repeat(bytes - empty)}))).error()
    };
    let routes = [("POST", "/v1/load_lora_adapter"), ("PUT", "/v1/adapters/a"), ("POST", "/v1/adapters/validate")];
    for (method, path) in routes {
        assert_ne!(sent(method, path, 64 << 10).0, 413);
        assert_eq!(sent(method, path, (64 << 10) + 1), (413, "body_too_large".into()));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer admin\r\n\
             content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        let chunk = format!("10001\r\n{}\r\n0\r\n\r\n", " ".repeat(0x10001));
        assert_eq!(Response::read(world.raw(&(head + &chunk))).error(), (413, "body_too_large".into()));
    }
    assert_eq!(
        sent("POST", "/v1/completions", 1 << 20),
        (400, "missing_required_parameter".into()),
        "of others, longer ones"
    );
}

#[test]
fn a_prompt_that_is_too_long_is_told_so_in_the_words_that_tools_look_for() {
    let world = World::new();
    let long = |prompt: Value| world.post("/v1/completions", &with(completion(4), json!({"prompt": prompt})));
    let ids = vec![5; MAX_CONTEXT as usize];
    for response in [long(json!("x ".repeat(300))), long(json!(ids)), long(json!("x".repeat(1 << 20)))] {
        assert_eq!(response.error(), (400, "context_length_exceeded".into()));
        let message = response.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains("maximum context length is 256 tokens"), "{message}");
    }
    let cut = with(completion(4), json!({"prompt": "xy".repeat(300), "truncate_prompt_tokens": -1}));
    let answer = world.post("/v1/completions", &cut).json();
    assert_eq!(answer["usage"]["total_tokens"], MAX_CONTEXT);
}

#[test]
fn a_prompt_that_is_too_long_needs_no_engine_to_be_refused() {
    let world = World::new();
    let _held = hold(&world);
    let ids = json!(vec![5; 1 << 20]);
    for fields in [
        json!({"prompt": ids, "n": 128}),
        json!({"prompt": ids, "echo": true, "logprobs": 1}),
        json!({"prompt": ids, "truncate_prompt_tokens": 1 << 19}),
        json!({"prompt": "x ".repeat(MAX_CONTEXT as usize), "stream": true}),
        json!({"prompt": vec![5; MAX_CONTEXT as usize - 3]}),
    ] {
        let refused = world.post("/v1/completions", &with(completion(4), fields)).error();
        assert_eq!(refused, (400, "context_length_exceeded".into()));
    }
    let messages = json!([{"role": "user", "content": "x ".repeat(MAX_CONTEXT as usize)}]);
    let refused = world.post("/v1/chat/completions", &json!({"model": "base", "messages": messages})).error();
    assert_eq!(refused, (400, "context_length_exceeded".into()));
}

#[test]
fn a_body_that_comes_in_chunks_counts_as_what_it_is() {
    let world = World::configured(json!({"admin_keys": ["admin"], "api_keys": ["user"]}));
    world.runtime.register("upper", &example("adapters/upper"), false, false).unwrap();
    let held = hold(&world);
    let body = json!({"pinned": true}).to_string();
    let stream = world.raw(&format!(
        "PUT /v1/adapters/upper HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer admin\r\n\
         content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
        body.len()
    ));
    let counted = || world.ask("user", "GET", "/load", None).json()["body_bytes"].as_u64().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while counted() != body.len() as u64 {
        assert!(Instant::now() < deadline, "other than {} bytes were counted", body.len());
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(held);
    assert_eq!(Response::read(stream).status, 200);
}

#[test]
fn a_client_that_leaves_frees_its_request_streaming_or_not_running_or_waiting() {
    let engine = EngineConfig { max_running: 2, ..EngineConfig::default() };
    let world = World::with(json!({}), engine, Duration::from_millis(300));
    for stream in [false, true] {
        let body = with(completion(250), json!({"stream": stream})).to_string();
        let open = |_| world.open("POST", "/v1/completions", &[], Some(&body));
        let clients: Vec<_> = (0..4).map(open).collect();
        world.wait_until("two run and two wait", |stats| (stats.running, stats.waiting) == (2, 2));
        let num_steps = || world.runtime.snapshot().engine.steps;
        let left_at = num_steps();
        drop(clients);
        world.wait_until("nothing is left", |stats| stats.running + stats.waiting == 0 && stats.kv_pages == 0);
        // The one that runs, one that is planned before the server has seen it, and what a busy machine takes to see it.
        assert!(num_steps() - left_at <= 3, "{} steps", num_steps() - left_at);
    }
    for line in ["slora:unfinished_requests 0", "slora:disconnects_total 8"] {
        world.wait_for_metric("", line);
    }
}

#[test]
fn a_full_queue_is_a_503_that_says_when_to_come_again() {
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let world = World::with(json!({"limits": {"max_queued_requests": 2}}), engine, HELD);
    let body = completion(200).to_string();
    let clients: Vec<_> = (0..3).map(|_| world.open("POST", "/v1/completions", &[], Some(&body))).collect();
    world.wait_for_metric("", "slora:unfinished_requests 3");
    for stream in [false, true] {
        let asked = Instant::now();
        let response = world.post("/v1/completions", &with(completion(1), json!({"stream": stream})));
        assert_eq!(response.error(), (503, "server_overloaded".into()));
        assert!((1..=120).contains(&response.header("retry-after").unwrap().parse::<u32>().unwrap()));
        assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
    }
    world.set_step_time(Duration::ZERO);
    for client in clients {
        assert_eq!(Response::read(client).status, 200);
    }
    assert_eq!(world.post("/v1/completions", &completion(1)).status, 200);
}

#[test]
fn draining_takes_nothing_new_and_finishes_what_runs() {
    let world = World::with(json!({}), EngineConfig::default(), HELD);
    assert_eq!(world.get("/health/ready").status, 200);
    let running = world.open("POST", "/v1/completions", &[], Some(&completion(200).to_string()));
    world.wait_until("it runs", |stats| stats.running == 1);
    world.server.begin_drain();
    assert_eq!(world.get("/health/ready").error(), (503, "service_unavailable".into()));
    assert_eq!(world.get("/health").status, 200);
    assert_eq!(world.post("/v1/completions", &completion(1)).error(), (503, "service_unavailable".into()));
    assert!(!world.server.wait(Duration::from_millis(1)));
    world.set_step_time(Duration::ZERO);
    assert!(world.server.wait(Duration::from_secs(20)));
    world.server.stop();
    assert_eq!(Response::read(running).status, 200);
    assert!(world.server.wait(Duration::ZERO));
}

#[test]
fn a_failed_engine_ends_open_streams_with_an_error_event() {
    let world = World::with(json!({}), EngineConfig::default(), Duration::from_millis(100));
    let streamed = with(completion(250), json!({"stream": true})).to_string();
    let stream = world.open("POST", "/v1/completions", &[], Some(&streamed));
    let whole = world.open("POST", "/v1/completions", &[], Some(&completion(250).to_string()));
    world.wait_until("both run", |stats| stats.running == 2);
    let mut reader = BufReader::new(stream);
    assert_eq!(read_head(&mut reader).0, 200);
    world.runtime.fail("out of memory");
    let failed = Instant::now();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(
        failed.elapsed() < Duration::from_secs(2),
        "{:?}; by itself it would have gone on for 25 s",
        failed.elapsed()
    );
    assert!(rest.contains("data: {\"error\":{") && rest.contains("out of memory"), "{rest}");
    assert!(!rest.contains("[DONE]"), "a broken stream is not a whole one");
    assert_eq!(Response::read(whole).error(), (503, "service_unavailable".into()));
    for path in ["/health", "/health/ready", "/v1/models"] {
        assert_eq!(world.get(path).error(), (503, "service_unavailable".into()), "{path}");
    }
    assert!(world.get("/metrics").body.contains("slora:ready 0\n"));
}

#[test]
fn a_step_that_takes_too_long_ends_the_engine() {
    let world = World::with(json!({"step_timeout_s": 1.0}), EngineConfig::default(), Duration::ZERO);
    assert_eq!(world.post("/v1/completions", &completion(3)).status, 200);
    world.set_step_time(HELD);
    let asked = Instant::now();
    let response = world.post("/v1/completions", &completion(100));
    assert_eq!(response.error(), (503, "service_unavailable".into()));
    assert!(response.body.contains("a step took longer than 1 s"), "{}", response.body);
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
}

#[test]
fn a_step_thread_that_hangs_before_anything_runs_is_noticed_too() {
    let world = World::configured(json!({"step_timeout_s": 0.3}));
    let _held = hold(&world);
    let asked = Instant::now();
    let response = world.post("/v1/completions", &completion(1));
    assert_eq!(response.error(), (503, "service_unavailable".into()));
    assert!(response.body.contains("a step took longer than 0.3 s"), "{}", response.body);
    assert!(asked.elapsed() < Duration::from_millis(2300), "{:?}", asked.elapsed());
}

#[test]
fn slow_headers_and_bodies_are_cut_off() {
    let world = World::configured(json!({"limits": {"header_timeout_s": 0.2}}));
    let mut silent = world.raw("GET /v1/models HTTP/1.1\r\nhost: localh");
    let mut answer = String::new();
    let asked = Instant::now();
    let _ = silent.read_to_string(&mut answer);
    assert!(asked.elapsed() < Duration::from_secs(2), "{answer}");
    let world = World::configured(json!({"limits": {"body_timeout_s": 0.2}}));
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{";
    let mut slow = world.raw(head);
    let mut reader = BufReader::new(slow.try_clone().unwrap());
    assert_eq!(read_head(&mut reader).0, 400);
    let _ = slow.write_all(b"x");
}

#[test]
fn text_and_tokens_convert_both_ways() {
    let world = World::new();
    let tokens =
        world.post("/tokenize", &json!({"model": "base", "prompt": "hello", "return_token_strs": true})).json();
    assert_eq!(tokens["count"].as_u64().unwrap() as usize, tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["max_model_len"], MAX_CONTEXT);
    let body = json!({"tokens": tokens["tokens"], "skip_special_tokens": true});
    assert_eq!(world.post("/detokenize", &body).json()["prompt"], "hello");
    let chat = json!({"messages": [{"role": "user", "content": "hello"}]});
    assert!(world.post("/tokenize", &chat).json()["count"].as_u64().unwrap() > 5);
    assert_eq!(world.post("/detokenize", &json!({"tokens": [99_999]})).error(), (400, "invalid_value".into()));
    let mixed = world.post("/tokenize", &json!({"prompt": "hello", "continue_final_message": 7}));
    assert_eq!(mixed.error(), (400, "invalid_type".into()));
    let nothing = world.post("/tokenize", &json!({}));
    assert_eq!(nothing.error(), (400, "missing_required_parameter".into()));
    assert_eq!(nothing.json()["error"]["message"], "prompt and messages are missing; hint: give one of them");
    assert!(world.get("/tokenizer_info").json()["chat_template"].is_string());
}

#[test]
fn unknown_fields_are_ignored_unless_the_server_is_strict() {
    let odd = with(completion(1), json!({"odd_field": 1}));
    assert_eq!(World::new().post("/v1/completions", &odd).status, 200);
    let strict = World::configured(json!({"strict_fields": true}));
    let response = strict.post("/v1/completions", &odd);
    assert_eq!(response.error(), (400, "unknown_parameter".into()));
    assert_eq!(response.json()["error"]["param"], "odd_field");
}

#[test]
fn a_stream_whose_engine_is_slow_is_kept_alive_by_comments() {
    let config = json!({"limits": {"keep_alive_s": 0.1, "accept_timeout_s": 0.1}});
    let world = World::with(config, EngineConfig::default(), Duration::from_millis(400));
    let body = with(completion(2), json!({"stream": true}));
    let response = world.post("/v1/completions", &body);
    assert!(response.body.contains(": keep-alive\n\n"), "{}", response.body);
    assert_eq!(num_shown(&response.events()), 2);
}

#[test]
fn a_streams_headers_wait_for_the_adapter_and_not_for_a_turn() {
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let world = World::with(json!({}), engine, Duration::from_millis(100));
    world.runtime.register("reverse", &example("adapters/reverse"), false, false).unwrap();
    let body = with(completion(200), json!({"stream": true})).to_string();
    let first = world.open("POST", "/v1/completions", &[], Some(&body));
    world.wait_until("the first runs", |stats| stats.running == 1);
    let body = with(completion(1), json!({"stream": true, "model": "reverse"})).to_string();
    let second = world.open("POST", "/v1/completions", &[], Some(&body));
    let (status, _) = read_head(&mut BufReader::new(second));
    assert_eq!(status, 200);
    world.wait_until("the first still runs, the second waits", |stats| (stats.running, stats.waiting) == (1, 1));
    drop(first);
}

#[test]
fn a_large_request_that_is_refused_gets_its_answer_and_not_a_reset() {
    let world = World::configured(json!({"api_keys": ["user"]}));
    let body = "x".repeat(8 << 20);
    assert_eq!(world.send("POST", "/v1/completions", &[], Some(&body)).error(), (401, "invalid_api_key".into()));
    let mut slow = world.raw("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{");
    // All of it while the server still reads.
    for part in [998, 1] {
        std::thread::sleep(Duration::from_millis(30));
        slow.write_all(&vec![b' '; part]).unwrap();
    }
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(Response::read(slow).error(), (401, "invalid_api_key".into()));
}

#[test]
fn a_server_that_cannot_work_does_not_start() {
    let world = World::new();
    let config = [
        json!({"limits": {"max_n": 0}}),
        json!({"limits": {"body_timeout_s": -1.0}}),
        json!({"port": 0, "host": "192.0.2.1"}),
    ];
    for config in config {
        let config = serde_json::from_value(config).unwrap();
        assert!(slora_server::Server::start(config, world.runtime.clone()).is_err());
    }
}

#[test]
fn one_connection_too_many_is_told_so() {
    let world = World::configured(json!({"limits": {"max_connections": 2}}));
    let held = [world.raw("GET"), world.raw("GET")];
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let response = Response::read(world.raw("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"));
        if response.status == 503 {
            assert_eq!(response.json()["error"]["code"], "server_overloaded");
            break;
        }
        assert!(Instant::now() < deadline);
    }
    drop(held);
}

/// A stream of 16 choices for a client whose system takes little of it ahead.
fn open_long_stream(world: &World) -> std::net::TcpStream {
    let body =
        with(completion(200), json!({"stream": true, "n": 16, "logprobs": 5, "return_token_ids": true})).to_string();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&world.server.address().into()).unwrap();
    let mut stream = std::net::TcpStream::from(socket);
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close";
    stream.write_all(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    world.wait_until("the engine does not wait for the reader", |stats| stats.ended == 16);
    stream
}

#[test]
fn a_body_of_a_million_values_holds_nobody_up() {
    let world = World::configured(json!({"num_threads": 1}));
    let bias: Vec<String> = (0..1_300_000).map(|token| format!("\"{token}\":1")).collect();
    let body = format!(r#"{{"prompt": "x", "logit_bias": {{{}}}}}"#, bias.join(","));
    let stream = world.open("POST", "/v1/completions", &[], Some(&body));
    let asked = std::thread::spawn(move || {
        let begun = Instant::now();
        (Response::read(stream), begun.elapsed())
    });
    let mut longest = Duration::ZERO;
    while !asked.is_finished() {
        let begun = Instant::now();
        assert_eq!(world.get("/version").status, 200);
        longest = longest.max(begun.elapsed());
    }
    let (answer, took) = asked.join().unwrap();
    assert_eq!(answer.error(), (400, "invalid_value".into()));
    assert!(longest < took / 2, "another waited {longest:?} of the {took:?} that the body took");
}

#[test]
fn a_reader_that_begins_late_gets_everything() {
    let world = World::new();
    let stream = open_long_stream(&world);
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let events = Response::read(stream).events();
    assert_eq!(num_shown(&events), 16 * 200, "an event for each token");
    let whole = world.post("/v1/completions", &completion(200)).json()["choices"][0]["text"].clone();
    assert!((0..16).all(|index| text_of(&events, index) == whole.as_str().unwrap()));
}

#[test]
fn a_reader_that_takes_nothing_is_dropped_and_holds_nobody_up() {
    let world = World::configured(json!({"limits": {"stall_timeout_s": 0.5}}));
    let stalled = open_long_stream(&world);
    assert_eq!(world.post("/v1/completions", &completion(3)).status, 200);
    for line in ["slora:disconnects_total 1", "slora:open_streams 0", "slora:unfinished_requests 0"] {
        world.wait_for_metric("", line);
    }
    drop(stalled);
}
