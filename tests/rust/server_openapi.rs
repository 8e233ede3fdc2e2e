//! The server's OpenAPI document against the server: neither knows what the other does not.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use slora_server::{Level, routes};

use server_world::{MAX_CONTEXT, Response, World, adapter_root, with};

struct Documented {
    world: World,
    document: Value,
    root: tempfile::TempDir,
}

/// An operation of the document with a body.
struct Operation {
    path: String,
    method: String,
    schema: Value,
    /// A body that is accepted.
    good: Value,
}

impl Documented {
    fn new() -> Self {
        let (root, config) = adapter_root();
        let world = World::configured(config);
        let document = world.ask("user", "GET", "/openapi.json", None).json();
        Self { world, document, root }
    }

    fn ask(&self, operation: &Operation, fields: Value) -> Response {
        let path = operation.path.replace("{name}", "reverse");
        let body = with(operation.good.clone(), fields);
        self.world.ask("admin", &operation.method.to_uppercase(), &path, Some(&body))
    }

    fn with_bodies(&self) -> Vec<Operation> {
        let mut found = Vec::new();
        for (path, methods) in self.document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                if schema.is_object() {
                    let good = self.good_body(path);
                    found.push(Operation { path: path.clone(), method: method.clone(), schema: schema.clone(), good });
                }
            }
        }
        found
    }

    fn good_body(&self, path: &str) -> Value {
        let folder = self.root.path().join("reverse");
        match path {
            "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
            "/v1/completions" => json!({"prompt": "x", "max_tokens": 1}),
            "/tokenize" => json!({"prompt": "x"}),
            "/detokenize" => json!({"tokens": [1]}),
            "/v1/load_lora_adapter" => json!({"lora_name": "reverse", "lora_path": folder, "load_inplace": true}),
            "/v1/unload_lora_adapter" => json!({"lora_name": "reverse"}),
            "/v1/adapters/{name}" | "/v1/adapters/validate" => json!({"path": folder}),
            other => panic!("{other} has a body that this test does not know"),
        }
    }
}

impl Operation {
    fn properties(&self) -> &Map<String, Value> {
        self.schema["properties"].as_object().unwrap()
    }

    fn is_required(&self, name: &str) -> bool {
        self.schema["required"].as_array().unwrap().iter().any(|required| required == name)
    }
}

/// A property that the server looks into.
fn is_taken(property: &Value) -> bool {
    property.get("type").or(property.get("anyOf")).is_some()
}

/// The schemas that a value may follow.
fn choices(property: &Value) -> Vec<&Value> {
    property["anyOf"].as_array().map_or_else(|| vec![property], |choices| choices.iter().collect())
}

/// What one field needs beside it to be looked at.
fn companions(path: &str, name: &str) -> Value {
    match (path, name) {
        (_, "stream_options") => json!({"stream": true}),
        (_, "top_logprobs") => json!({"logprobs": true}),
        (_, "min_tokens") => json!({"max_tokens": 200}),
        ("/tokenize", "messages") => json!({"prompt": null}),
        ("/tokenize", "add_generation_prompt" | "continue_final_message" | "chat_template_kwargs") => {
            json!({"prompt": null, "messages": [{"role": "user", "content": "x"}]})
        }
        _ => json!({}),
    }
}

fn blames(response: &Response, name: &str) -> bool {
    let error = response.json();
    response.status == 400 && (error["error"]["param"] == name || error["error"]["code"] == "context_length_exceeded")
}

#[test]
fn every_route_is_documented_with_its_level_and_its_errors() {
    let documented = Documented::new();
    let paths = documented.document["paths"].as_object().unwrap();
    let mut ids = BTreeSet::new();
    for route in routes() {
        let operation = &paths[&route.path.replace("{*", "{")][route.method.to_lowercase()];
        let security = match route.level {
            Level::Open => json!([]),
            Level::User => json!([{"user": []}]),
            Level::Admin => json!([{"admin": []}]),
        };
        assert_eq!(operation["security"], security, "{route:?}");
        let has = |status: &str| operation["responses"].get(status).is_some();
        assert_eq!(has("401"), route.level != Level::Open, "{route:?}");
        assert_eq!(has("403"), route.level == Level::Admin, "{route:?}");
        assert_eq!(has("400") && has("413"), matches!(route.method, "POST" | "PUT"), "{route:?}");
        assert_eq!(operation["parameters"].is_array(), route.path.contains('{'), "{route:?}");
        assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{route:?}");
    }
    let num_documented: usize = paths.values().map(|methods| methods.as_object().unwrap().len()).sum();
    assert_eq!((num_documented, ids.len()), (routes().count(), routes().count()));
}

#[test]
fn a_name_with_a_path_of_its_own_is_no_name_of_another() {
    let documented = Documented::new();
    let param = |path: &str| documented.document["paths"][path]["get"]["parameters"][0]["schema"].clone();
    assert_eq!(param("/v1/adapters/{name}")["not"], json!({"enum": ["validate"]}));
    assert!(param("/v1/models/{id}")["not"].is_null());
}

#[test]
fn every_reference_of_the_document_leads_to_a_schema() {
    let documented = Documented::new();
    let text = documented.document.to_string();
    let mut used = BTreeSet::new();
    for reference in text.split("\"$ref\":\"#").skip(1) {
        let pointer = reference.split('"').next().unwrap();
        assert!(documented.document.pointer(pointer).is_some(), "{pointer}");
        used.insert(pointer.rsplit('/').next().unwrap().to_owned());
    }
    let schemas = documented.document["components"]["schemas"].as_object().unwrap();
    assert_eq!(used, schemas.keys().cloned().collect(), "every schema is used");
}

#[test]
fn the_parser_looks_at_every_field_that_is_documented() {
    let documented = Documented::new();
    let mut num_taken = 0;
    for operation in documented.with_bodies() {
        assert!(documented.ask(&operation, json!({})).status < 300, "{}", operation.path);
        for (name, property) in operation.properties() {
            let companions = companions(&operation.path, name);
            let ask = |value: Value| documented.ask(&operation, with(companions.clone(), json!({name: value})));
            if is_taken(property) {
                // No field takes a list of lists of objects.
                let response = ask(json!([[{}]]));
                assert!(blames(&response, name), "{} {name}: {response:?}", operation.path);
                num_taken += 1;
            } else if let Some(idle) = property["enum"].as_array() {
                assert_eq!(ask(json!({"loud": 1})).error(), (400, "unsupported_parameter".into()), "{name}");
                assert!(idle.iter().all(|idle| ask(idle.clone()).status == 200), "{} {name}", operation.path);
            } else {
                let response = ask(json!({"ignored": 1}));
                assert!(response.status < 300 || response.status == 404, "{} {name}: {response:?}", operation.path);
            }
            if operation.is_required(name) {
                let response = ask(Value::Null);
                assert_eq!(response.error(), (400, "missing_required_parameter".into()), "{} {name}", operation.path);
                assert!(blames(&response, name));
            }
        }
    }
    assert!(num_taken > 60, "{num_taken}");
}

#[test]
fn numbers_end_where_the_document_says() {
    let documented = Documented::new();
    let mut num_edges = 0;
    for operation in documented
        .with_bodies()
        .iter()
        .filter(|operation| operation.path.contains("completions") || operation.path == "/detokenize")
    {
        for (name, property) in operation.properties() {
            let companions = companions(&operation.path, name);
            let is_refused = |value: &Value| {
                let response = documented.ask(operation, with(companions.clone(), json!({name: value})));
                blames(&response, name)
            };
            for choice in choices(property) {
                for (inside, outside) in edges(choice) {
                    assert!(!is_refused(&inside), "{} {name}: {inside} is allowed", operation.path);
                    assert!(is_refused(&outside), "{} {name}: {outside} is not allowed", operation.path);
                    num_edges += 1;
                }
            }
        }
    }
    assert!(num_edges > 70, "{num_edges}");
}

/// Pairs of a number that a schema just allows and one that it just does not.
fn edges(schema: &Value) -> Vec<(Value, Value)> {
    let kind = schema["type"].as_str().or(schema["type"][0].as_str()).unwrap_or_default();
    let mut pairs = Vec::new();
    if kind == "integer" {
        // The ends of 64 bits have nothing beyond that a parser of such numbers could see.
        let (least, most) = (schema["minimum"].as_i64().unwrap(), schema["maximum"].as_i64().unwrap());
        let past = |edge: i64, by: i64| edge.checked_add(by).map_or(json!(1e30), |past| json!(past));
        // 0 is often beyond the least, but means "off" to one that may be -1.
        let below = if (least, most) == (1, i64::MAX) { json!(0) } else { past(least, -1) };
        pairs.push((json!(least), below));
        // So many tokens do not fit beside a prompt.
        let inside = if most == i64::from(MAX_CONTEXT) { json!(most / 2) } else { json!(most) };
        // An integer is one however it is written.
        pairs.push((json!(least as f64), json!(0.5)));
        pairs.push((inside, if (least, most) == (-1, -1) { json!(-2) } else { past(most, 1) }));
    }
    if kind == "array" && schema["items"]["type"] == "integer" {
        pairs.push((json!([80, 80.0, 8e1]), json!([80, 80.5])));
    }
    if kind == "number" {
        if let Some(least) = schema["minimum"].as_f64() {
            pairs.push((json!(least), json!(least - 0.01)));
        }
        if let Some(least) = schema["exclusiveMinimum"].as_f64() {
            pairs.push((json!(least + 0.01), json!(least)));
        }
        let most = schema["maximum"].as_f64().unwrap();
        pairs.push((json!(most), json!(most + 0.01)));
    }
    pairs
}

#[test]
fn a_strict_server_and_one_without_keys_document_themselves_so() {
    let world = World::configured(json!({"strict_fields": true}));
    let document = world.get("/openapi.json").json();
    let operation = &document["paths"]["/v1/completions"]["post"];
    assert_eq!(operation["security"], json!([]));
    assert_eq!(operation["requestBody"]["content"]["application/json"]["schema"]["additionalProperties"], false);
    let models = &operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["model"]["anyOf"];
    assert_eq!(models[0]["enum"], json!(["base"]));
}

#[test]
fn the_models_own_defaults_are_taken_and_documented() {
    let model = tempfile::tempdir().unwrap();
    let file = model.path().join("generation_config.json");
    std::fs::write(&file, r#"{"do_sample": true, "temperature": 0.6, "top_k": 20}"#).unwrap();
    let config = json!({"model": model.path(), "sampling_defaults": {"top_k": 5}});
    let properties = |config: &Value| {
        let document = World::configured(config.clone()).get("/openapi.json").json();
        document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
            .clone()
    };
    let found = properties(&config);
    assert_eq!([&found["temperature"]["default"], &found["top_k"]["default"]], [&json!(0.6), &json!(5)]);
    assert!(properties(&with(config, json!({"generation_config": "vllm"})))["temperature"].get("default").is_none());
    std::fs::write(file, "{").unwrap();
    let world = World::new();
    let config = serde_json::from_value(json!({"port": 0, "model": model.path()})).unwrap();
    assert!(slora_server::Server::start(config, world.runtime.clone()).is_err());
}

#[test]
fn without_a_model_the_base_answers() {
    let world = World::new();
    let answer = world.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1})).json();
    assert_eq!(answer["model"], "base");
}
