//! The server over real sockets.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::io::{BufReader, Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use slora_core::EngineConfig;
use slora_server::{Level, routes};

use server_world::{
    MAX_CONTEXT, Response, SCRIPT, World, adapter_root, completion, example, num_shown, read_head, text_of, with,
};

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
        (json!({"prompt": [999_999]}), 400, "invalid_value", ""),
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
fn every_route_lets_in_whom_its_level_says() {
    let (_folder, config) = adapter_root();
    let world = World::configured(config);
    let mut num_checked = 0;
    for route in routes() {
        let path = route.path.replace("{*id}", "base").replace("{name}", "nobody");
        let body = matches!(route.method, "POST" | "PUT").then(|| json!({}));
        let statuses = ["", "wrong", "user", "admin"].map(|key| {
            let response = match key {
                "" => world.send(route.method, &path, &[], body.as_ref().map(Value::to_string).as_deref()),
                key => world.ask(key, route.method, &path, body.as_ref()),
            };
            match response.status {
                status @ (401 | 403) => {
                    response.error();
                    status
                }
                _ => 200,
            }
        });
        let expected = match route.level {
            Level::Open => [200, 200, 200, 200],
            Level::User => [401, 401, 200, 200],
            Level::Admin => [401, 401, 403, 200],
        };
        assert_eq!(statuses, expected, "{route:?}");
        num_checked += 1;
    }
    assert_eq!(num_checked, 22);
}

#[test]
fn without_keys_inference_works_here_and_management_nowhere() {
    let world = World::new();
    for route in routes().filter(|route| route.level == Level::Admin) {
        let path = route.path.replace("{name}", "nobody");
        let body = matches!(route.method, "POST" | "PUT").then_some("{}");
        let response = world.send(route.method, &path, &[], body);
        assert_eq!(response.error(), (403, "permission_denied".into()), "{route:?}");
    }
    assert_eq!(world.post("/v1/completions", &completion(1)).status, 200);
    let rebound = "GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n";
    assert_eq!(Response::read(world.raw(rebound)).error(), (401, "invalid_api_key".into()));
}

#[test]
fn a_key_sees_and_uses_only_its_adapters() {
    let (folder, mut config) = adapter_root();
    let keys = folder.path().join("keys.json");
    let entry = |key: &str, tenant: &str, adapters: &str, more: Value| {
        let hash: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
        with(json!({"sha256": hash, "tenant": tenant, "adapters": [adapters]}), more)
    };
    let entries = [entry("a", "a", "rev*", json!({})), entry("b", "b", "*", json!({"requests_per_minute": 1}))];
    std::fs::write(&keys, json!({"keys": entries}).to_string()).unwrap();
    config["api_keys_file"] = json!(keys);
    config["adapters"] = json!([
        {"name": "reverse", "path": folder.path().join("reverse")}, {"name": "upper", "path": folder.path().join("upper")},
    ]);
    let world = World::configured(config);
    let ids = |key: &str| {
        let models = world.ask(key, "GET", "/v1/models", None).json();
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids("a"), ["reverse"]);
    assert_eq!(ids("user"), ["base", "reverse", "upper"]);
    let status = |key: &str, model: &str| {
        let body = with(completion(1), json!({"model": model}));
        world.ask(key, "POST", "/v1/completions", Some(&body)).status
    };
    assert_eq!([status("a", "reverse"), status("a", "base:reverse"), status("a", "upper")], [200, 200, 404]);
    assert_eq!(status("a", "base"), 404);
    assert_eq!(world.ask("a", "GET", "/v1/models/upper", None).error(), (404, "model_not_found".into()));
    let model = world.ask("a", "GET", "/v1/models/reverse", None).json();
    assert_eq!((model["parent"].as_str(), model["max_model_len"].as_u64()), (Some("base"), Some(256)));
    assert_eq!(status("b", "base"), 200);
    let body = completion(1);
    let limited = world.ask("b", "POST", "/v1/completions", Some(&body));
    assert_eq!(limited.error(), (429, "rate_limit_exceeded".into()));
    assert!((1..=60).contains(&limited.header("retry-after").unwrap().parse::<u32>().unwrap()));
    std::fs::write(&keys, json!({"keys": []}).to_string()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while status("a", "reverse") != 401 {
        assert!(Instant::now() < deadline, "the changed file of keys was not read");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_client_that_leaves_frees_its_request_streaming_or_not_running_or_waiting() {
    let engine = EngineConfig { max_running: 2, ..EngineConfig::default() };
    let world = World::with(json!({}), engine, Duration::from_millis(5));
    for stream in [false, true] {
        let body = with(completion(250), json!({"stream": stream})).to_string();
        let open = |_| world.open("POST", "/v1/completions", &[], Some(&body));
        let clients: Vec<_> = (0..4).map(open).collect();
        world.wait_until("two run and two wait", |stats| (stats.running, stats.waiting) == (2, 2));
        let left = Instant::now();
        drop(clients);
        world.wait_until("nothing is left", |stats| stats.running + stats.waiting == 0 && stats.kv_pages == 0);
        assert!(left.elapsed() < Duration::from_millis(500), "{:?}", left.elapsed());
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while world.get("/load").json()["server_load"] != 0 {
        assert!(Instant::now() < deadline, "places were not given back");
    }
    assert!(world.get("/metrics").body.contains("slora:disconnects_total 8\n"));
}

#[test]
fn a_full_queue_is_a_503_that_says_when_to_come_again() {
    let engine = EngineConfig { max_running: 1, ..EngineConfig::default() };
    let world = World::with(json!({"limits": {"max_queued_requests": 2}}), engine, Duration::from_millis(5));
    let body = completion(200).to_string();
    let clients: Vec<_> = (0..3).map(|_| world.open("POST", "/v1/completions", &[], Some(&body))).collect();
    world.wait_until("all are there", |stats| stats.running + stats.waiting == 3);
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
    let world = World::with(json!({}), EngineConfig::default(), Duration::from_millis(2));
    assert_eq!(world.get("/health/ready").status, 200);
    let running = world.open("POST", "/v1/completions", &[], Some(&completion(200).to_string()));
    world.wait_until("it runs", |stats| stats.running == 1);
    world.server.begin_drain();
    assert_eq!(world.get("/health/ready").error(), (503, "service_unavailable".into()));
    assert_eq!(world.get("/health").status, 200);
    assert_eq!(world.post("/v1/completions", &completion(1)).error(), (503, "service_unavailable".into()));
    assert!(!world.server.wait(Duration::from_millis(1)));
    assert!(world.server.wait(Duration::from_secs(20)));
    world.server.stop();
    assert_eq!(Response::read(running).status, 200);
    assert!(world.server.wait(Duration::ZERO));
}

#[test]
fn a_failed_engine_ends_open_streams_with_an_error_event() {
    let world = World::with(json!({}), EngineConfig::default(), Duration::from_millis(5));
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
    assert!(failed.elapsed() < Duration::from_secs(2));
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
    let world = World::with(json!({"step_timeout_s": 0.3}), EngineConfig::default(), Duration::ZERO);
    assert_eq!(world.post("/v1/completions", &completion(3)).status, 200);
    world.set_step_time(Duration::from_secs(3));
    let asked = Instant::now();
    let response = world.post("/v1/completions", &completion(100));
    assert_eq!(response.error(), (503, "service_unavailable".into()));
    assert!(response.body.contains("a step took longer than 0.3 s"), "{}", response.body);
    assert!(asked.elapsed() < Duration::from_millis(2500), "{:?}", asked.elapsed());
}

#[test]
fn slow_headers_and_bodies_are_cut_off() {
    let world = World::configured(json!({"limits": {"header_timeout_s": 0.2, "body_timeout_s": 0.2}}));
    let mut silent = world.raw("GET /v1/models HTTP/1.1\r\nhost: localh");
    let mut answer = String::new();
    let asked = Instant::now();
    let _ = silent.read_to_string(&mut answer);
    assert!(asked.elapsed() < Duration::from_secs(2), "{answer}");
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
    assert!(world.get("/tokenizer_info").json()["chat_template"].is_string());
}

#[test]
fn metrics_can_be_parsed_and_name_what_dashboards_read() {
    let world = World::configured(json!({"adapters": [{"name": "reverse", "path": example("adapters/reverse")}]}));
    world.post("/v1/completions", &with(completion(4), json!({"model": "reverse"})));
    let body = world.get("/metrics").body;
    let mut families = std::collections::BTreeMap::new();
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(families.insert(name, kind).is_none(), "{name} is there twice");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
            let name = series.split('{').next().unwrap();
            let ends = ["_bucket", "_sum", "_count"];
            let family = ends.iter().find_map(|end| name.strip_suffix(end).filter(|name| families.contains_key(name)));
            assert!(families.contains_key(family.unwrap_or(name)), "{line} belongs to no family");
        }
    }
    let wanted = [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:lora_requests_info",
        "vllm:cache_config_info",
        "slora:pool_pages",
        "slora:adapters",
        "slora:swap_ins_total",
        "http_requests_total",
    ];
    for name in wanted {
        assert!(families.contains_key(name), "{name}");
    }
    assert!(body.contains("slora:adapter_generation_tokens_total{adapter=\"reverse\"} 4\n"), "{body}");
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
fn the_metrics_port_needs_no_key_and_answers_nothing_else() {
    let config = json!({"metrics_port": 0, "api_keys": ["user"], "admin_keys": ["admin"]});
    let world = World::configured(config);
    let address = world.server.metrics_address().unwrap();
    let get = |path: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: any\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        Response::read(stream).status
    };
    assert_eq!([get("/metrics"), get("/health/ready"), get("/v1/models"), get("/v1/adapters")], [200, 200, 404, 404]);
    assert_eq!(world.get("/metrics").error(), (401, "invalid_api_key".into()));
}

#[test]
fn pages_of_other_origins_are_let_in_only_if_allowed() {
    let world = World::configured(json!({"allowed_origins": ["https://good.example"]}));
    let preflight = |origin: &str| {
        let headers = [("origin", origin), ("access-control-request-method", "POST")];
        let response = world.send("OPTIONS", "/v1/completions", &headers, None);
        (response.status, response.header("access-control-allow-origin").map(str::to_owned))
    };
    assert_eq!(preflight("https://good.example"), (204, Some("https://good.example".into())));
    assert_eq!(preflight("https://bad.example"), (405, None));
    let body = completion(1).to_string();
    let asked = world.send("POST", "/v1/completions", &[("origin", "https://good.example")], Some(&body));
    assert_eq!(asked.header("access-control-allow-origin"), Some("https://good.example"));
    let untyped = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\norigin: https://bad.example\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    assert_eq!(Response::read(world.raw(&untyped)).error(), (415, "unsupported_media_type".into()));
}

#[test]
fn a_large_request_that_is_refused_gets_its_answer_and_not_a_reset() {
    let world = World::configured(json!({"api_keys": ["user"]}));
    let body = "x".repeat(8 << 20);
    assert_eq!(world.send("POST", "/v1/completions", &[], Some(&body)).error(), (401, "invalid_api_key".into()));
    let mut slow = world.raw("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{");
    for part in [998, 1] {
        std::thread::sleep(Duration::from_millis(100));
        slow.write_all(&vec![b' '; part]).unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
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
    let deadline = Instant::now() + Duration::from_secs(10);
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

#[test]
fn a_reader_that_takes_nothing_is_dropped_and_holds_nobody_up() {
    let world = World::configured(json!({"limits": {"stall_timeout_s": 0.5}}));
    let body =
        with(completion(200), json!({"stream": true, "n": 128, "logprobs": 5, "return_token_ids": true})).to_string();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(&world.server.address().into()).unwrap();
    let mut stalled = std::net::TcpStream::from(socket);
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    stalled.write_all(format!("{head}{body}").as_bytes()).unwrap();
    world.wait_until("the engine does not wait for the reader", |stats| stats.ended == 128);
    assert!(world.get("/metrics").body.contains("slora:open_streams 1\n"));
    assert_eq!(world.post("/v1/completions", &completion(3)).status, 200);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !world.get("/metrics").body.contains("slora:open_streams 0\n") {
        assert!(Instant::now() < deadline, "the stalled reader was not dropped");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(world.get("/metrics").body.contains("slora:disconnects_total 1\n"));
    assert_eq!(world.get("/load").json()["server_load"], 0);
    drop(stalled);
}
