//! The page at `/` and the route that it reads.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use serde_json::{Value, json};

use server_world::{World, adapter_root, completion, with};

#[test]
fn the_page_is_open_and_asks_nobody_else() {
    let world = World::configured(json!({"api_keys": ["user"]}));
    for (path, kind) in [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")] {
        let file = world.get(path);
        assert_eq!(file.status, 200, "{path}");
        assert!(file.header("content-type").unwrap().starts_with(kind), "{path}");
        let policy = file.header("content-security-policy").unwrap();
        for rule in ["default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"] {
            assert!(policy.contains(rule), "{path}: {policy}");
        }
        assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
        assert_eq!(file.header("x-content-type-options"), Some("nosniff"));
        let elsewhere = file.body.replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("http://") && !elsewhere.contains("https://"), "{path}");
        assert!(!file.body.contains("innerHTML") && !file.body.contains(" style=\""), "{path}");
    }
    assert_eq!(world.get("/status").error(), (401, "invalid_api_key".into()));
}

#[test]
fn the_status_shows_the_pool_the_requests_and_the_callers_adapters() {
    let (root, mut config) = adapter_root();
    let keys = root.path().join("keys.json");
    let hash = "5eda958e9ddee7721fb71e7a7618c64dbf20cc77b06ba4e4d2269d6c3e50655b"; // of "narrow"
    std::fs::write(&keys, json!({"keys": [{"sha256": hash, "tenant": "n", "adapters": ["up*"]}]}).to_string()).unwrap();
    config["api_keys_file"] = json!(keys);
    config["adapters"] = ["reverse", "upper"].map(|name| json!({"name": name, "path": root.path().join(name)})).into();
    let world = World::configured(config);
    let body = with(completion(3), json!({"model": "reverse"}));
    assert_eq!(world.ask("user", "POST", "/v1/completions", Some(&body)).status, 200);
    let status = world.ask("user", "GET", "/status", None).json();
    assert_eq!(
        (&status["model"], &status["unready"], &status["generated_tokens"]),
        (&json!("base"), &Value::Null, &json!(3))
    );
    let pool = |name: &str| status["pool"][name].as_u64().unwrap();
    assert_eq!(pool("free") + pool("kv") + pool("adapters"), pool("pages"));
    assert!(pool("idle_adapters") > 0 && pool("idle_adapters") == pool("adapters"));
    assert_eq!(
        (&status["adapter_states"]["resident"], &status["adapter_states"]["registered"]),
        (&json!(1), &json!(1))
    );
    let names = |status: &Value| {
        let adapters = status["adapters"].as_array().unwrap().iter();
        adapters.map(|adapter| adapter["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&status), ["reverse", "upper"], "those on the device come first");
    let narrow = world.ask("narrow", "GET", "/status", None).json();
    assert_eq!((names(&narrow), &narrow["adapter_states"]["resident"]), (vec!["upper".to_owned()], &json!(0)));
    world.server.begin_drain();
    assert!(world.ask("user", "GET", "/status", None).json()["unready"].is_string());
}
