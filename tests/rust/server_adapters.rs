//! The adapters' lifecycle over HTTP.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use slora_core::EngineConfig;

use server_world::{Response, World, adapter_root, completion, copy_adapter, example, text_of, with};

#[test]
fn adapters_load_and_unload_as_vllms_do() {
    let (folder, config) = adapter_root();
    let world = World::configured(config);
    let admin = |path: &str, body: Value| world.ask("admin", "POST", path, Some(&body));
    let load = json!({"lora_name": "reverse", "lora_path": folder.path().join("reverse")});
    let loaded = admin("/v1/load_lora_adapter", load.clone());
    assert_eq!((loaded.status, &*loaded.body), (200, "Success: LoRA adapter 'reverse' added successfully."));
    assert_eq!(admin("/v1/load_lora_adapter", load.clone()).error(), (400, "adapter_exists".into()));
    let body = with(completion(2), json!({"model": "reverse"}));
    let response = world.ask("user", "POST", "/v1/completions", Some(&body));
    let answer = response.json();
    assert_eq!((answer["model"].as_str(), answer["choices"][0]["text"].as_str()), (Some("reverse"), Some("ab")));
    let headers = ["x-adapter", "x-adapter-version", "x-prompt-tokens", "x-generated-tokens"];
    assert_eq!(headers.map(|name| response.header(name).unwrap()), ["reverse", "1", "1", "2"]);
    let resource = world.ask("admin", "GET", "/v1/adapters/reverse", None).json();
    assert_eq!((resource["state"].as_str(), resource["version"].as_u64()), (Some("resident"), Some(1)));
    assert_eq!(admin("/v1/load_lora_adapter", with(load, json!({"load_inplace": true}))).status, 200);
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).status, 200);
    assert_eq!(world.ask("admin", "GET", "/v1/adapters/reverse", None).json()["version"], 2);
    let unloaded = admin("/v1/unload_lora_adapter", json!({"lora_name": "reverse"}));
    assert_eq!((unloaded.status, &*unloaded.body), (200, "Success: LoRA adapter 'reverse' removed successfully."));
    let again = admin("/v1/unload_lora_adapter", json!({"lora_name": "reverse"}));
    assert_eq!(again.error(), (404, "model_not_found".into()));
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).error(), (404, "model_not_found".into()));
    world.wait_until("both tiers are free", |stats| {
        stats.adapter_pages == 0 && stats.free_host_pages == stats.num_host_pages && stats.adapters == 0
    });
}

#[test]
fn adapters_are_a_resource() {
    let (folder, config) = adapter_root();
    let world = World::configured(config);
    let ask = |method: &str, path: &str, body: Option<Value>| world.ask("admin", method, path, body.as_ref());
    let reverse = json!({"path": folder.path().join("reverse"), "pinned": true});
    let put = ask("PUT", "/v1/adapters/x", Some(reverse)).json();
    assert_eq!(
        (put["name"].as_str(), put["pinned"].as_bool(), put["max_rank"].as_u64()),
        (Some("x"), Some(true), Some(8))
    );
    world.wait_until("a pinned adapter is brought to the device", |stats| stats.resident_adapters == 1);
    let replaced = ask("PUT", "/v1/adapters/x", Some(json!({"path": folder.path().join("upper")}))).json();
    assert!(replaced["replacing"] == true || replaced["version"] == 2, "{replaced}");
    assert_eq!(ask("PUT", "/v1/adapters/x", Some(json!({"pinned": false}))).json()["pinned"], false);
    assert_eq!(ask("GET", "/v1/adapters", None).json()["data"].as_array().unwrap().len(), 1);
    let report = ask("POST", "/v1/adapters/validate", Some(json!({"path": folder.path().join("upper")})));
    assert_eq!(report.status, 200);
    assert!(!report.json()["tensors"].as_array().unwrap().is_empty());
    assert_eq!(ask("PUT", "/v1/adapters/y", Some(json!({"pinned": true}))).error().0, 404);
    assert_eq!(ask("PUT", "/v1/adapters/base", Some(json!({"path": folder.path().join("upper")}))).error().0, 400);
    assert_eq!(ask("DELETE", "/v1/adapters/x", None).status, 204);
    assert_eq!(ask("DELETE", "/v1/adapters/x", None).error(), (404, "model_not_found".into()));
    assert_eq!(ask("GET", "/v1/adapters/x", None).error(), (404, "model_not_found".into()));
}

#[test]
fn an_adapter_may_be_called_as_the_route_that_validates() {
    let (folder, config) = adapter_root();
    let world = World::configured(config);
    let ask = |method: &str, body: Option<Value>| world.ask("admin", method, "/v1/adapters/validate", body.as_ref());
    let path = json!({"path": folder.path().join("reverse")});
    assert_eq!(ask("GET", None).error(), (404, "model_not_found".into()));
    assert_eq!(ask("POST", Some(path.clone())).json()["num_ignored"], 0, "only that validates");
    assert_eq!(world.runtime.adapters().unwrap().len(), 0);
    assert_eq!(ask("PUT", Some(path)).json()["name"], "validate");
    assert_eq!(ask("GET", None).json()["name"], "validate");
    let body = with(completion(1), json!({"model": "validate"}));
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).status, 200);
    let other = ask("PATCH", None);
    assert_eq!(other.error(), (405, "method_not_allowed".into()));
    let mut allowed: Vec<&str> = other.header("allow").unwrap().split(',').collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["DELETE", "GET", "HEAD", "POST", "PUT"]);
    assert_eq!(world.ask("admin", "POST", "/v1/adapters/other", Some(&json!({}))).error().0, 405);
    assert_eq!(ask("DELETE", None).status, 204);
    assert_eq!(ask("GET", None).status, 404);
}

#[test]
fn running_requests_finish_while_their_adapter_is_replaced_or_unloaded() {
    let (folder, config) = adapter_root();
    let world = World::with(config, EngineConfig::default(), Duration::from_millis(2));
    let path = folder.path().join("reverse");
    world.ask("admin", "PUT", "/v1/adapters/x", Some(&json!({"path": path})));
    let body = with(completion(200), json!({"model": "x", "stream": true}));
    let headers = [("authorization", "Bearer user")];
    let running = world.open("POST", "/v1/completions", &headers, Some(&body.to_string()));
    world.wait_until("it runs", |stats| stats.running == 1);
    assert_eq!(world.ask("admin", "PUT", "/v1/adapters/x", Some(&json!({"path": path}))).status, 200);
    assert_eq!(world.ask("admin", "DELETE", "/v1/adapters/x", None).status, 204);
    assert_eq!(text_of(&Response::read(running).events(), 0).len(), 200);
    world.wait_until("both versions are gone", |stats| stats.adapters == 0 && stats.adapter_pages == 0);
}

#[test]
fn a_path_outside_the_roots_is_refused_whether_it_exists_or_not() {
    let (folder, config) = adapter_root();
    let outside = tempfile::tempdir().unwrap();
    copy_adapter("reverse", &outside.path().join("reverse"));
    std::os::unix::fs::symlink(outside.path().join("reverse"), folder.path().join("link")).unwrap();
    let world = World::configured(config);
    let root = folder.path().to_str().unwrap();
    let paths = [
        outside.path().join("reverse").to_str().unwrap().to_owned(),
        outside.path().join("nothing").to_str().unwrap().to_owned(),
        format!("{root}/link"),
        format!("{root}/../{}", outside.path().file_name().unwrap().to_str().unwrap()),
        format!("{root}/reverse/../../x"),
        format!("{root}x"),
        "reverse".into(),
        "../reverse".into(),
        "file:///tmp".into(),
        "~/x".into(),
        "/".into(),
        "".into(),
        "/etc/passwd".into(),
        "/proc/self/root/tmp".into(),
    ];
    for path in paths {
        let load = json!({"lora_name": "x", "lora_path": path});
        let put = json!({"path": path});
        let asked = [
            world.ask("admin", "POST", "/v1/load_lora_adapter", Some(&load)),
            world.ask("admin", "PUT", "/v1/adapters/x", Some(&put)),
            world.ask("admin", "POST", "/v1/adapters/validate", Some(&put)),
        ];
        for response in asked {
            assert_eq!(response.error(), (400, "path_not_allowed".into()), "{path:?}");
        }
    }
    assert_eq!(world.runtime.adapters().unwrap().len(), 0);
}

#[test]
fn an_adapter_that_cannot_be_served_is_a_400_with_its_reason() {
    let (folder, config) = adapter_root();
    let world = World::configured(config);
    let bad = |name: &str, damage: &dyn Fn(&Path)| {
        let path = folder.path().join(name);
        copy_adapter("reverse", &path);
        damage(&path);
        let response =
            world.ask("admin", "POST", "/v1/load_lora_adapter", Some(&json!({"lora_name": name, "lora_path": path})));
        assert_eq!(response.error(), (400, "adapter_invalid".into()), "{name}: {response:?}");
        response.json()["error"]["reason"].as_str().unwrap().to_owned()
    };
    let config_file = |path: &Path| path.join("adapter_config.json");
    let weights = |path: &Path| path.join("adapter_model.safetensors");
    let reasons = [
        bad("no-config", &|path| std::fs::remove_file(config_file(path)).unwrap()),
        bad("no-json", &|path| std::fs::write(config_file(path), "{").unwrap()),
        bad("no-weights", &|path| std::fs::remove_file(weights(path)).unwrap()),
        bad("cut", &|path| {
            let bytes = std::fs::read(weights(path)).unwrap();
            std::fs::write(weights(path), &bytes[..bytes.len() / 2]).unwrap();
        }),
        bad("no-folder", &|path| std::fs::remove_dir_all(path).unwrap()),
    ];
    let distinct: std::collections::BTreeSet<_> = reasons.iter().collect();
    assert!(distinct.len() >= 4, "{reasons:?}");
    for name in ["", "a/b", "ü", "a b"] {
        let load = json!({"lora_name": name, "lora_path": folder.path().join("reverse")});
        assert_eq!(world.ask("admin", "POST", "/v1/load_lora_adapter", Some(&load)).error().0, 400, "{name:?}");
    }
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&completion(2))).status, 200);
    assert_eq!(world.runtime.snapshot().engine.adapters, 0);
}

#[test]
fn a_watched_folder_is_what_is_served() {
    let folder = tempfile::tempdir().unwrap();
    copy_adapter("reverse", &folder.path().join("there"));
    let world = World::configured(json!({"adapter_dir": folder.path(), "adapter_poll_s": 0.02}));
    let version = |name: &str| world.runtime.adapter(name).unwrap().map(|details| details.info.version);
    let wait = |what: &str, name: &str, is_it: fn(Option<u32>) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_it(version(name)) {
            assert!(Instant::now() < deadline, "never so: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    assert_eq!(version("there"), Some(1), "what was there is known before the first request");
    std::fs::create_dir(folder.path().join("half")).unwrap();
    let file = |name: &str, to: &str| {
        std::fs::copy(example("adapters/upper").join(name), folder.path().join(to).join(name)).unwrap();
    };
    file("adapter_config.json", "half");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(version("half"), None, "a half-written one waits");
    file("adapter_model.safetensors", "half");
    wait("a whole one is registered", "half", |version| version == Some(1));
    file("adapter_model.safetensors", "there");
    file("adapter_config.json", "there");
    // A look between the two files may have found a version of its own.
    wait("a changed one is a new version", "there", |version| version >= Some(2));
    std::fs::remove_dir_all(folder.path().join("half")).unwrap();
    wait("a removed one goes", "half", |version| version.is_none());
    assert_eq!(world.post("/v1/completions", &with(completion(1), json!({"model": "there"}))).status, 200);
}

#[test]
fn an_adapter_that_is_spoilt_after_it_was_registered_fails_with_the_stores_code() {
    let (folder, config) = adapter_root();
    let world = World::configured(config);
    let path = folder.path().join("reverse");
    assert_eq!(world.ask("admin", "PUT", "/v1/adapters/x", Some(&json!({"path": path}))).status, 200);
    std::fs::write(path.join("adapter_model.safetensors"), "spoilt").unwrap();
    for stream in [false, true] {
        let body = with(completion(2), json!({"model": "x", "stream": stream}));
        let response = world.ask("user", "POST", "/v1/completions", Some(&body));
        assert_eq!(response.error(), (400, "adapter_invalid".into()));
        assert_eq!(response.json()["error"]["reason"], "changed");
        assert_eq!(response.header("x-should-retry"), None);
    }
    let resource = world.ask("admin", "GET", "/v1/adapters/x", None).json();
    assert_eq!([&resource["state"], &resource["reason"]], ["failed", "changed"]);
    assert!(resource["message"].as_str().unwrap().contains("adapter_model.safetensors"), "{resource}");
}

#[test]
fn an_adapters_hash_is_that_of_its_file_once_it_was_loaded() {
    let (folder, config) = adapter_root();
    let world = World::configured(config);
    let path = folder.path().join("reverse");
    let put = world.ask("admin", "PUT", "/v1/adapters/x", Some(&json!({"path": path}))).json();
    assert_eq!(put["sha256"], Value::Null);
    let body = with(completion(1), json!({"model": "x"}));
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).status, 200);
    let hash = Sha256::digest(std::fs::read(path.join("adapter_model.safetensors")).unwrap());
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.ask("admin", "GET", "/v1/adapters/x", None).json()["sha256"] != hash.as_str() {
        assert!(Instant::now() < deadline, "never hashed");
        std::thread::sleep(Duration::from_millis(5));
    }
}
