//! Who may do what: every route of the table for every kind of caller.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod server_world;

use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use slora_core::EngineConfig;
use slora_server::{Level, RouteInfo, routes};

use server_world::{Response, World, adapter_root, completion, with};

/// Whom the server takes a caller for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    /// Keys are asked for, and none or a wrong one came.
    Stranger,
    User,
    Admin,
    /// No keys are asked for.
    Here,
    Elsewhere,
}

/// 200: whatever the route itself says to an empty body and a name that nobody has.
fn expected(level: Level, caller: Caller) -> u16 {
    match (level, caller) {
        (Level::Open, _) | (Level::User, Caller::User | Caller::Admin | Caller::Here) | (_, Caller::Admin) => 200,
        (_, Caller::Stranger) | (Level::User, Caller::Elsewhere) => 401,
        (Level::Admin, Caller::User | Caller::Here | Caller::Elsewhere) => 403,
    }
}

/// Sends a route's request with these headers, and tells how far it came.
fn outcome(address: SocketAddr, route: RouteInfo, method: &str, headers: &str) -> u16 {
    let path = route.path.replace("{*id}", "base").replace("{name}", "nobody");
    let body = if matches!(method, "POST" | "PUT") { "{}" } else { "" };
    let head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(format!("{head}{headers}\r\n{body}").as_bytes()).unwrap();
    let response = Response::read(stream);
    match response.status {
        status @ (401 | 403) => {
            if method != "HEAD" {
                let code = if status == 401 { "invalid_api_key" } else { "permission_denied" };
                assert_eq!(response.error().1, code, "{route:?}");
            }
            status
        }
        404 if response.body.contains("this port answers") => 404,
        status => {
            assert!(status < 500, "{route:?}: {response:?}");
            200
        }
    }
}

/// Checks every route for each of these headers, and GET routes as HEAD too.
fn check(address: SocketAddr, callers: &[(String, Caller)]) {
    for route in routes() {
        for (headers, caller) in callers {
            let wanted = expected(route.level, *caller);
            for method in [route.method, "HEAD"].iter().take(if route.method == "GET" { 2 } else { 1 }) {
                let found = outcome(address, route, method, headers);
                assert_eq!(found, wanted, "{method} {} with {headers:?}, {caller:?}", route.path);
            }
        }
    }
}

fn bearer(key: &str) -> String {
    format!("host: any.example\r\nauthorization: Bearer {key}\r\n")
}

/// None, wrong, empty, of another scheme, nearly right.
fn strangers() -> Vec<(String, Caller)> {
    let headers = [
        "host: localhost\r\n".to_owned(),
        bearer("wrong"),
        bearer(""),
        bearer("use"),
        bearer("userr"),
        bearer("user admin"),
        "host: localhost\r\nauthorization: Basic user\r\n".to_owned(),
        "host: localhost\r\nauthorization: admin\r\n".to_owned(),
        "host: localhost\r\nx-api-key: admin\r\n".to_owned(),
    ];
    headers.map(|headers| (headers, Caller::Stranger)).into()
}

fn with_strangers(callers: &[(&str, Caller)]) -> Vec<(String, Caller)> {
    let mut all = strangers();
    all.extend(callers.iter().map(|(key, caller)| (bearer(key), *caller)));
    all
}

fn hash(key: &str) -> String {
    Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn with_users_and_admins_each_gets_what_its_level_says() {
    let world = World::configured(json!({"api_keys": ["user", "other"], "admin_keys": ["admin"]}));
    let callers = [("user", Caller::User), ("other", Caller::User), ("admin", Caller::Admin)];
    check(world.server.address(), &with_strangers(&callers));
    let small = "host: x\r\nAUTHORIZATION: bearer user\r\n".to_owned();
    check(world.server.address(), &[(small, Caller::User)]);
}

#[test]
fn with_users_only_nobody_manages() {
    let world = World::configured(json!({"api_keys": ["user"]}));
    check(world.server.address(), &with_strangers(&[("user", Caller::User), ("admin", Caller::Stranger)]));
}

#[test]
fn with_admins_only_nobody_else_asks() {
    let world = World::configured(json!({"admin_keys": ["admin"]}));
    check(world.server.address(), &with_strangers(&[("admin", Caller::Admin), ("user", Caller::Stranger)]));
}

#[test]
fn keys_of_a_file_are_users_and_an_empty_file_lets_nobody_in() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    std::fs::write(&keys, json!({"keys": [{"sha256": hash("user"), "tenant": "t"}]}).to_string()).unwrap();
    let world = World::configured(json!({"api_keys_file": keys}));
    let hashed = [(bearer(&hash("user")), Caller::Stranger)];
    check(world.server.address(), &[&with_strangers(&[("user", Caller::User)])[..], &hashed].concat());
    std::fs::write(&keys, json!({"keys": []}).to_string()).unwrap();
    let world = World::configured(json!({"api_keys_file": keys}));
    check(world.server.address(), &with_strangers(&[("user", Caller::Stranger)]));
}

#[test]
fn keys_are_read_from_another_file_however_like_the_old_one_it_looks() {
    let folder = tempfile::tempdir().unwrap();
    let (keys, next) = (folder.path().join("keys.json"), folder.path().join("next"));
    // As secrets are mounted: a link is led to another file.
    let put = |name: &str| {
        let path = folder.path().join(name);
        let text = json!({"keys": [{"sha256": hash(name), "tenant": "t"}]}).to_string();
        std::fs::write(&path, text).unwrap();
        File::options().append(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        symlink(&path, &next).unwrap();
        std::fs::rename(&next, &keys).unwrap();
    };
    put("first");
    let world = World::configured(json!({"api_keys_file": keys}));
    // The server reads the file once more in the beginning, so that one change proves nothing.
    for (old, new) in [("first", "second"), ("second", "third")] {
        put(new);
        let deadline = Instant::now() + Duration::from_secs(60);
        while world.ask(new, "GET", "/v1/models", None).status != 200 {
            assert!(Instant::now() < deadline, "the {new} key is never let in");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(world.ask(old, "GET", "/v1/models", None).status, 401);
    }
}

#[test]
fn without_keys_only_loopback_asks_and_nobody_manages() {
    let world = World::configured(json!({"host": "0.0.0.0"}));
    let port = world.server.address().port();
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    let host = |name: &str, caller| (format!("host: {name}\r\n"), caller);
    let names = [
        host("localhost", Caller::Here),
        host("LocalHost:8000", Caller::Here),
        host("127.0.0.1:8000", Caller::Here),
        host("[::1]:8000", Caller::Here),
        (bearer("any").replace("any.example", "localhost"), Caller::Here),
        // Pages of somebody else that were led here.
        host("evil.example", Caller::Elsewhere),
        host("localhost.evil.example", Caller::Elsewhere),
        host("127.0.0.1.evil.example:8000", Caller::Elsewhere),
    ];
    check(here, &names);
    match outer_address() {
        Some(address) => {
            let headers = [host("localhost", Caller::Elsewhere), host("127.0.0.1", Caller::Elsewhere)];
            check(SocketAddr::new(address, port), &headers);
        }
        None => eprintln!("this machine has no network: callers from elsewhere are left to the unit test"),
    }
}

/// An address of this machine that is not loopback. Nothing is sent for it.
fn outer_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[test]
fn the_second_port_answers_metrics_and_probes_only_and_asks_for_no_key() {
    let world = World::configured(json!({"metrics_port": 0, "api_keys": ["user"], "admin_keys": ["admin"]}));
    let address = world.server.metrics_address().unwrap();
    let open = ["/metrics", "/health", "/health/ready", "/ready", "/ping"];
    for route in routes() {
        for headers in ["host: any\r\n".to_owned(), bearer("admin")] {
            let wanted = if open.contains(&route.path) { 200 } else { 404 };
            assert_eq!(outcome(address, route, route.method, &headers), wanted, "{route:?}");
        }
    }
    assert_eq!(world.get("/metrics").error(), (401, "invalid_api_key".into()));
}

#[test]
fn only_what_must_be_is_open() {
    let open: Vec<&str> = routes().filter(|route| route.level == Level::Open).map(|route| route.path).collect();
    let probes = ["/health", "/health/ready", "/ready", "/ping"];
    assert_eq!(open, [&["/", "/page.css", "/page.js"][..], &probes].concat());
    assert!(routes().all(|route| (route.level == Level::Admin) == route.path.contains("adapter")));
}

#[test]
fn a_key_sees_and_uses_only_its_adapters() {
    let (folder, mut config) = adapter_root();
    let keys = folder.path().join("keys.json");
    let entry = |key: &str, tenant: &str, adapters: &str, more: Value| {
        with(json!({"sha256": hash(key), "tenant": tenant, "adapters": [adapters]}), more)
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
    let deadline = Instant::now() + Duration::from_secs(60);
    while status("a", "reverse") != 401 {
        assert!(Instant::now() < deadline, "the changed file of keys was not read");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_request_of_more_choices_than_its_key_may_ever_have_is_a_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.json");
    let key = |name: &str, limits: Value| with(json!({"sha256": hash(name), "tenant": name}), limits);
    let entries = [key("a", json!({"concurrency": 2})), key("b", json!({"requests_per_minute": 2}))];
    std::fs::write(&keys, json!({"keys": entries}).to_string()).unwrap();
    let config = json!({"api_keys_file": keys, "admin_keys": ["admin"], "limits": {"max_queued_requests": 1}});
    let world = World::with(config, EngineConfig { max_running: 3, ..EngineConfig::default() }, Duration::ZERO);
    let ask = |key: &str, fields: Value| world.ask(key, "POST", "/v1/completions", Some(&with(completion(1), fields)));
    let four = json!({"prompt": ["x", "x"], "n": 2});
    for (key, too_many, fields) in [("a", "2 requests at once", json!({"n": 3})), ("b", "2 requests a minute", four)] {
        let refused = ask(key, fields);
        assert_eq!(refused.error(), (400, "invalid_value".into()));
        let error = &refused.json()["error"];
        assert!(error["param"] == "n" && error["message"].as_str().unwrap().contains(too_many), "{error}");
        assert_eq!(refused.header("retry-after"), None);
        assert_eq!(ask(key, json!({"n": 2})).status, 200);
    }
    assert_eq!(ask("b", json!({})).error(), (429, "rate_limit_exceeded".into()));
    assert_eq!(ask("admin", json!({"n": 4})).status, 200);
    assert_eq!(ask("admin", json!({"n": 5})).error(), (400, "invalid_value".into()), "more than the server ever takes");
    let document = world.ask("admin", "GET", "/openapi.json", None).json();
    let body = &document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"];
    assert_eq!(body["properties"]["n"]["maximum"], 4);
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
