//! Completions and chats over HTTP, on a pretended device.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

#[path = "server_fixture.rs"]
mod fixture;

use std::time::Duration;

use fixture::{Device, config, start, start_on, wait_until, with_adapters};
use serde_json::{Value, json};

/// What the pretended device writes after a prompt of so many tokens.
fn letters(prompt_len: usize, count: usize) -> String {
    (0..count).map(|index| (b'a' + ((prompt_len - 1 + index) % 26) as u8) as char).collect()
}

#[test]
fn completions_take_every_form_of_prompt() {
    let running = start(config());
    let answer = running.post("/v1/completions", &json!({"model": "tiny", "prompt": "hello", "max_tokens": 4}));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let body = answer.json();
    let prompt_tokens = body["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "tiny");
    assert_eq!(body["choices"][0]["text"], letters(prompt_tokens, 4));
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 4);
    assert!(answer.header("x-request-id").is_some());

    let texts = |prompt: Value| {
        let body = running.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 3})).json();
        let choices = body["choices"].as_array().unwrap_or_else(|| panic!("{body}")).clone();
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(texts(json!([80, 81])), [letters(2, 3)]);
    assert_eq!(texts(json!([[80, 81], [82]])), [letters(2, 3), letters(1, 3)]);
    assert_eq!(texts(json!(["a", "abc"])).len(), 2);
}

#[test]
fn chats_come_whole_and_in_pieces() {
    let running = start(config());
    let mut body = json!({"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5});
    let whole = running.post("/v1/chat/completions", &body).json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let streamed = running.post("/v1/chat/completions", &body);
    assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(streamed.events().last().map(String::as_str), Some("[DONE]"));
    let chunks = streamed.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let contents: Vec<&str> =
        chunks[1..].iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(contents.concat(), text);
    assert!(contents.len() >= 5, "one event for each token: {contents:?}");
    let finished: Vec<&Value> =
        chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "length").collect();
    assert_eq!(finished.len(), 1);
    let last = chunks.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(5)));
    assert_eq!(last["usage"], whole["usage"]);
}

#[test]
fn several_choices_interleave_and_end_together() {
    let running = start(config());
    let body = json!({"prompt": [[80], [80, 81]], "max_tokens": 4, "n": 3, "stream": true});
    let chunks = running.post("/v1/completions", &body).chunks();
    for index in 0..6 {
        let mine = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index);
        let text: String = mine.map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(text, letters(1 + index / 3, 4));
    }
}

#[test]
fn the_prompt_is_echoed_with_its_log_probabilities() {
    let running = start(config());
    let body =
        json!({"prompt": [80, 81, 82], "max_tokens": 1, "echo": true, "logprobs": 2, "temperature": 0, "seed": 1});
    let choice = running.post("/v1/completions", &body).json()["choices"][0].clone();
    assert_eq!(choice["text"], "abcc");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "b", "c", "c"]));
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.5, -0.5, -0.5]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({"b": -0.5, "c": -1.5}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));

    let body = json!({"prompt": [80, 81, 82], "max_tokens": 0, "echo": true, "logprobs": 1});
    let choice = running.post("/v1/completions", &body).json()["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["logprobs"]["tokens"]), (&json!("abc"), &json!(["a", "b", "c"])));

    let body = json!({"prompt": [80, 81, 82], "max_tokens": 1, "echo": true, "logprobs": 1, "stream": true});
    let chunks = running.post("/v1/completions", &body).chunks();
    assert_eq!(chunks[0]["choices"][0]["text"], "abc");
    assert_eq!(chunks[0]["choices"][0]["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["text_offset"], json!([3]));

    let body = json!({"prompt": [80, 81], "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": true});
    let choice = running.post("/v1/completions", &body).json()["choices"][0].clone();
    assert_eq!(choice["prompt_logprobs"][0], Value::Null);
    assert_eq!(choice["prompt_logprobs"][1]["81"]["rank"], 1);
    assert_eq!((&choice["token_ids"], &choice["prompt_token_ids"]), (&json!([81]), &json!([80, 81])));
}

#[test]
fn chat_log_probabilities_name_tokens_and_bytes() {
    let running = start(config());
    let body =
        json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": true, "top_logprobs": 2});
    let content = running.post("/v1/chat/completions", &body).json()["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(content.as_array().unwrap().len(), 2);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["bytes"][0], content[0]["token"].as_str().unwrap().as_bytes()[0]);
}

#[test]
fn stop_strings_end_the_text() {
    let running = start(config());
    let mut body = json!({"prompt": [80], "max_tokens": 20, "stop": ["zz", "fg"]});
    let choice = running.post("/v1/completions", &body).json()["choices"][0].clone();
    assert_eq!(
        (&choice["text"], &choice["finish_reason"], &choice["stop_reason"]),
        (&json!("abcde"), &json!("stop"), &json!("fg"))
    );
    body["include_stop_str_in_output"] = json!(true);
    assert_eq!(running.post("/v1/completions", &body).json()["choices"][0]["text"], "abcdefg");
    body["stream"] = json!(true);
    let chunks = running.post("/v1/completions", &body).chunks();
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "abcdefg");
    let token = json!({"prompt": [80], "max_tokens": 20, "stop_token_ids": [84]});
    let choice = running.post("/v1/completions", &token).json()["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!("abcd"), &json!(84)));
}

#[test]
fn the_model_selects_the_adapter() {
    let running = start(with_adapters(&["reverse", "upper"]));
    for model in ["reverse", "tiny:upper", "org/tiny:upper"] {
        let answer = running.post("/v1/completions", &json!({"model": model, "prompt": [80], "max_tokens": 2}));
        assert_eq!((answer.status, &answer.json()["model"]), (200, &json!(model)));
        assert_eq!(answer.header("x-adapter"), Some(model.rsplit(':').next().unwrap()));
        assert_eq!(answer.header("x-adapter-version"), Some("1"));
        let mut body = json!({"model": model, "prompt": [80], "max_tokens": 2, "stream": true});
        assert_eq!(running.post("/v1/completions", &body).chunks().len(), 2);
        body["model"] = json!("absent");
        let absent = running.post("/v1/completions", &body);
        assert_eq!((absent.status, absent.code().as_str()), (404, "model_not_found"));
    }
    for model in ["other:reverse", "../reverse", "rev erse"] {
        assert_eq!(running.post("/v1/completions", &json!({"model": model, "prompt": [80]})).status, 404);
    }
    let list = running.get("/v1/models").json();
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["tiny", "org/tiny", "reverse", "upper"]);
    assert_eq!(list["data"][2]["parent"], "tiny");
    assert!(list["data"][2]["root"].as_str().unwrap().ends_with("reverse"));
    assert_eq!(running.get("/v1/models/org/tiny").json()["id"], "org/tiny");
    assert_eq!(running.get("/v1/models/org%2Ftiny").json()["id"], "org/tiny");
    assert_eq!(running.get("/v1/models/upper").json()["parent"], "tiny");
    assert_eq!(running.get("/v1/models/absent").status, 404);
}

#[test]
fn mistakes_are_the_clients_and_in_openais_shape() {
    let running = start(config());
    let cases: &[(&str, u16, &str)] = &[
        ("{", 400, "invalid_json"),
        ("[]", 400, "invalid_json"),
        ("{}", 400, "invalid_value"),
        (r#"{"prompt": "a", "n": 0}"#, 400, "invalid_value"),
        (r#"{"prompt": "a", "n": "x"}"#, 400, "invalid_type"),
        (r#"{"prompt": "a", "temperature": -1}"#, 400, "invalid_value"),
        (r#"{"prompt": "a", "temperature": 1e999}"#, 400, "invalid_json"),
        (r#"{"prompt": "a", "top_p": 0}"#, 400, "invalid_value"),
        (r#"{"prompt": "a", "logprobs": 21}"#, 400, "invalid_value"),
        (r#"{"prompt": "a", "best_of": 2}"#, 400, "unsupported_parameter"),
        (r#"{"prompt": [9999]}"#, 400, "invalid_value"),
        (r#"{"prompt": []}"#, 400, "invalid_value"),
        (r#"{"prompt": [[]]}"#, 400, "invalid_value"),
        (r#"{"prompt": "a", "max_tokens": 100000}"#, 400, "context_length_exceeded"),
        (r#"{"prompt": "a", "model": "absent"}"#, 404, "model_not_found"),
        (r#"{"prompt": "a", "stream_options": {}}"#, 400, "invalid_value"),
    ];
    for (body, status, code) in cases {
        let answer = running.send("POST", "/v1/completions", &[], body.as_bytes());
        assert_eq!((answer.status, answer.code().as_str()), (*status, *code), "{body}: {}", answer.text());
        assert!(answer.json()["error"]["message"].is_string());
    }
    let long = json!({"prompt": "x".repeat(1 << 20)}).to_string();
    let answer = running.send("POST", "/v1/completions", &[], long.as_bytes());
    assert_eq!((answer.status, answer.code().as_str()), (400, "context_length_exceeded"));
    assert!(answer.text().contains("maximum context length"));
    let huge = vec![b' '; (16 << 20) + 1];
    let mut client = running.client();
    client.send("POST", "/v1/completions", &[("content-length", "99999999"), ("connection", "close")], b"");
    assert_eq!(client.answer().status, 415);
    client = running.client();
    client.send(
        "POST",
        "/v1/completions",
        &[("content-length", &huge.len().to_string()), ("content-type", "application/json")],
        b"",
    );
    assert_eq!(client.answer().status, 413);
    let form =
        running.send("POST", "/v1/completions", &[("content-type", "application/x-www-form-urlencoded")], b"a=b");
    assert_eq!((form.status, form.code().as_str()), (415, "unsupported_media_type"));
    let nothing = running.get("/v1/nothing");
    assert_eq!((nothing.status, nothing.code().as_str()), (404, "not_found"));
    let method = running.get("/v1/completions");
    assert_eq!(
        (method.status, method.code().as_str(), method.header("allow")),
        (405, "method_not_allowed", Some("POST"))
    );
    let header = "x".repeat(33 << 10);
    let large = running.send("GET", "/health", &[("x-large", &header)], b"");
    assert_eq!((large.status, large.code().as_str()), (431, "headers_too_large"));
}

#[test]
fn text_and_ids_turn_into_each_other() {
    let running = start(config());
    let ids = running.post("/tokenize", &json!({"prompt": "abc", "add_special_tokens": false})).json();
    assert_eq!((&ids["tokens"], &ids["count"]), (&json!([80, 81, 82]), &json!(3)));
    let text = running.post("/detokenize", &json!({"tokens": [80, 81, 82]})).json();
    assert_eq!(text["prompt"], "abc");
    let chat = running.post("/tokenize", &json!({"messages": [{"role": "user", "content": "abc"}]})).json();
    assert!(chat["count"].as_u64().unwrap() > 3);
    assert!(running.get("/tokenizer_info").json()["chat_template"].is_string());
}

#[test]
fn health_says_what_it_is_asked() {
    let running = start(config());
    for path in ["/health", "/health/ready", "/ready", "/ping"] {
        assert_eq!(running.get(path).status, 200, "{path}");
    }
    assert!(running.get("/version").json()["version"].is_string());
    assert_eq!(running.get("/load").json()["server_load"], 0);
}

#[test]
fn a_client_that_leaves_takes_its_requests_along() {
    let device = Device { step: Duration::from_millis(2), ..Device::default() };
    let running = start_on(with_adapters(&["reverse"]), &device);
    for (index, stream) in [true, false].into_iter().cycle().take(40).enumerate() {
        let model = if index % 3 == 0 { "reverse" } else { "tiny" };
        let body = json!({"model": model, "prompt": [80], "max_tokens": 900, "n": 2, "stream": stream});
        let mut client = running.client();
        client.send("POST", "/v1/completions", &[], body.to_string().as_bytes());
        if stream && index % 4 == 0 {
            client.head();
            client.chunk();
        }
        std::thread::sleep(Duration::from_millis((index % 5) as u64));
    }
    running.wait_idle();
    assert!(running.get("/metrics").text().contains("slora:open_streams 0"));
}

#[test]
fn a_queue_that_is_full_answers_before_it_streams() {
    let device = Device { max_running: 2, step: Duration::from_millis(5), ..Device::default() };
    let mut config = config();
    config.limits.max_queued_requests = 2;
    let running = start_on(config, &device);
    let body = json!({"prompt": [80], "max_tokens": 200, "stream": true}).to_string();
    let mut clients: Vec<_> = (0..4).map(|_| running.client()).collect();
    clients.iter_mut().for_each(|client| client.send("POST", "/v1/completions", &[], body.as_bytes()));
    wait_until(|| running.server.num_unfinished() == 4);
    let refused = running.send("POST", "/v1/completions", &[], body.as_bytes());
    assert_eq!((refused.status, refused.code().as_str()), (503, "server_overloaded"));
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() <= 120);
    drop(clients);
    running.wait_idle();
    assert_eq!(running.send("POST", "/v1/completions", &[], br#"{"prompt": [80], "max_tokens": 1}"#).status, 200);
}

#[test]
fn draining_lets_what_runs_finish_and_takes_nothing_new() {
    let running = start_on(config(), &Device { step: Duration::from_millis(5), ..Device::default() });
    let mut client = running.client();
    client.send("POST", "/v1/completions", &[], br#"{"prompt": [80], "max_tokens": 60, "stream": true}"#);
    client.head();
    running.server.begin_drain();
    assert_eq!(running.get("/health").status, 200);
    assert_eq!(running.get("/health/ready").status, 503);
    let refused = running.post("/v1/completions", &json!({"prompt": [80]}));
    assert_eq!((refused.status, refused.code().as_str()), (503, "service_unavailable"));
    assert!(!running.server.wait(Duration::from_millis(1)));
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        loop {
            let chunk = client.chunk();
            if chunk.is_empty() {
                return String::from_utf8(all).unwrap();
            }
            all.extend(chunk);
        }
    });
    assert!(running.server.wait(Duration::from_secs(10)));
    assert!(reader.join().unwrap().ends_with("data: [DONE]\n\n"));
}

#[test]
fn a_failed_engine_ends_streams_with_an_error_event() {
    let running = start_on(config(), &Device { step: Duration::from_millis(5), ..Device::default() });
    let mut client = running.client();
    client.send("POST", "/v1/completions", &[], br#"{"prompt": [80], "max_tokens": 900, "stream": true}"#);
    client.head();
    running.fake.runtime.fail("the device is gone");
    let mut all = Vec::new();
    loop {
        let chunk = client.chunk();
        if chunk.is_empty() {
            break;
        }
        all.extend(chunk);
    }
    let text = String::from_utf8(all).unwrap();
    assert!(text.contains("the device is gone") && !text.contains("[DONE]"), "{text}");
    wait_until(|| running.get("/health/ready").status == 503);
    assert_eq!(running.post("/v1/completions", &json!({"prompt": [80]})).status, 503);
}

#[test]
fn a_step_that_takes_too_long_is_the_engines_end() {
    let running = start(slora_server::ServerConfig { step_timeout_s: 0.3, ..config() });
    let mut client = running.client();
    let body = br#"{"prompt": [80], "max_tokens": 900, "stream": true}"#;
    running.fake.step_ns.store(2_000_000, std::sync::atomic::Ordering::Relaxed);
    client.send("POST", "/v1/completions", &[], body);
    client.head();
    running.fake.holds.store(true, std::sync::atomic::Ordering::Relaxed);
    let text = String::from_utf8(client.answer_body()).unwrap();
    assert!(text.contains("a step took longer than 0.3 s"), "{text}");
}
