//! The one table of routes: each has its level, or the build fails.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use axum::routing::{MethodFilter, MethodRouter, on};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::Value;

use crate::app::{App, Call};
use crate::auth::Level;
use crate::errors::ApiError;
use crate::record::Record;
use crate::{adapters, chat, completions, exposition, health, models, page, tokens, vllm_adapters};

type Handler = fn(Call) -> BoxFuture<'static, Result<Response<Body>, ApiError>>;

/// A way in.
pub(crate) struct Route {
    pub method: Method,
    /// As axum writes paths; also the route's name in logs and metrics.
    pub path: &'static str,
    /// What it asks of its caller.
    pub level: Level,
    pub handler: Handler,
    /// Whether it goes on while the server shuts down.
    pub is_always_open: bool,
}

macro_rules! routes {
    ($($method:ident $path:literal $level:ident $handler:path $(, $always:ident)?;)*) => {
        /// Every route.
        pub(crate) const ROUTES: &[Route] = &[$(Route {
            method: Method::$method,
            path: $path,
            level: Level::$level,
            handler: |call| Box::pin($handler(call)),
            is_always_open: routes!(@ $($always)?),
        }),*];
    };
    (@ always) => { true };
    (@) => { false };
}

routes! {
    POST   "/v1/chat/completions"      User  chat::create;
    POST   "/v1/completions"           User  completions::create;
    GET    "/v1/models"                User  models::list, always;
    GET    "/v1/models/{*id}"          User  models::show, always;
    POST   "/tokenize"                 User  tokens::tokenize;
    POST   "/detokenize"               User  tokens::detokenize;
    GET    "/tokenizer_info"           User  tokens::info, always;
    GET    "/health"                   Open  health::live, always;
    GET    "/health/ready"             Open  health::ready, always;
    GET    "/ready"                    Open  health::ready, always;
    GET    "/ping"                     Open  health::live, always;
    POST   "/ping"                     Open  health::live, always;
    GET    "/version"                  User  health::version, always;
    GET    "/load"                     User  health::load, always;
    GET    "/metrics"                  User  exposition::show, always;
    GET    "/stats"                    User  exposition::stats, always;
    POST   "/v1/load_lora_adapter"     Admin vllm_adapters::load;
    POST   "/v1/unload_lora_adapter"   Admin vllm_adapters::unload;
    GET    "/v1/adapters"              Admin adapters::list, always;
    POST   "/v1/adapters/validate"     Admin adapters::validate;
    GET    "/v1/adapters/{name}"       Admin adapters::show, always;
    PUT    "/v1/adapters/{name}"       Admin adapters::put;
    DELETE "/v1/adapters/{name}"       Admin adapters::delete;
    GET    "/"                         Open  page::show, always;
    GET    "/openapi.json"             Open  page::openapi, always;
}

/// Where a request came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub SocketAddr);

/// The table as a router. `only_open`: the port for probes and scrapers, where `/metrics` needs no key.
pub(crate) fn router(app: &Arc<App>, only_open: bool) -> Router {
    let mut paths: Vec<(&'static str, MethodRouter)> = Vec::new();
    for route in ROUTES.iter().filter(|route| !only_open || is_for_probes(route)) {
        let app = app.clone();
        let handler = move |request: Request| dispatch(app, route, only_open, request);
        let Ok(filter) = MethodFilter::try_from(route.method.clone()) else { continue };
        match paths.iter_mut().find(|(path, _)| *path == route.path) {
            Some((_, methods)) => *methods = std::mem::take(methods).on(filter, handler),
            None => paths.push((route.path, on(filter, handler))),
        }
    }
    let fail = |app: &Arc<App>, status: StatusCode, code: &'static str| {
        let app = app.clone();
        move |request: Request| async move {
            let message = format!("{} {} is not offered", request.method(), crate::fields::shown(request.uri().path()));
            let record = record(&app, &request, "none");
            finish(&record, Err(ApiError::new(status, code, message)))
        }
    };
    let table = paths.into_iter().fold(Router::new(), |router, (path, methods)| router.route(path, methods));
    table.fallback(fail(app, StatusCode::NOT_FOUND, "not_found")).method_not_allowed_fallback(fail(
        app,
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
    ))
}

fn is_for_probes(route: &Route) -> bool {
    route.path == "/metrics" || route.path.starts_with("/health") || route.path == "/ready"
}

/// The caller's own id, if it is sane, else a new one.
fn request_id(app: &App, headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let is_sane = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    given.filter(is_sane).map_or_else(|| app.new_id(), str::to_owned)
}

fn record(app: &Arc<App>, request: &Request, handler: &'static str) -> Arc<Record> {
    let method = ROUTES.iter().find(|route| route.method == request.method());
    let method = method.map_or("OTHER", |route| route.method.as_str());
    let log = app.config.access_log.then(|| app.log.clone());
    let record = Record::new(request_id(app, request.headers()), method_name(method), log, app.metrics.clone());
    record.facts().handler = handler;
    Arc::new(record)
}

/// Names with which metrics may be labelled, whatever a client sends.
fn method_name(method: &str) -> &'static str {
    ["GET", "POST", "PUT", "DELETE"].into_iter().find(|known| *known == method).unwrap_or("OTHER")
}

async fn dispatch(
    app: Arc<App>,
    route: &'static Route,
    is_probe: bool,
    request: Request,
) -> Result<Response<Body>, Infallible> {
    let record = record(&app, &request, route.path);
    let result = match prepare(app, route, is_probe, &record, request) {
        Ok(call) => AssertUnwindSafe((route.handler)(call))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Err(ApiError::internal("the request broke on an internal error"))),
        Err(error) => Err(error),
    };
    Ok(finish(&record, result))
}

fn prepare(
    app: Arc<App>,
    route: &'static Route,
    is_probe: bool,
    record: &Arc<Record>,
    request: Request,
) -> Result<Call, ApiError> {
    let peer = request.extensions().get::<Peer>().map_or([0, 0, 0, 0].into(), |peer| peer.0.ip());
    let (parts, body) = request.into_parts();
    check_headers(&parts.headers, app.config.limits.max_header_bytes)?;
    let level = if is_probe { Level::Open } else { route.level };
    let caller = app.auth.admit(level, &parts.headers, peer)?;
    record.facts().tenant = Some(caller.tenant.clone());
    if let (Some(reason), false) = (app.lifecycle.obstacle(), route.is_always_open) {
        return Err(ApiError::unavailable(reason));
    }
    let name = open_part(route.path, parts.uri.path())?;
    Ok(Call { app, caller, record: record.clone(), headers: parts.headers, name, body: body.into() })
}

fn check_headers(headers: &HeaderMap, limit: usize) -> Result<(), ApiError> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if bytes <= limit {
        return Ok(());
    }
    let message = format!("the headers have {bytes} bytes, the limit is {limit}");
    Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message))
}

/// What stands in the path where the route has its `{…}`, with its `%` escapes undone.
fn open_part(route: &str, path: &str) -> Result<String, ApiError> {
    let Some((before, _)) = route.split_once('{') else { return Ok(String::new()) };
    let raw = path.get(before.len()..).unwrap_or_default().as_bytes();
    let mut bytes = Vec::with_capacity(raw.len());
    let mut at = 0;
    while at < raw.len() {
        let escaped = (raw[at] == b'%').then(|| raw.get(at + 1..at + 3)).flatten();
        let byte = escaped.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(raw[at]));
        at += if byte.is_some() { 3 } else { 1 };
    }
    String::from_utf8(bytes).map_err(|_| ApiError::new(StatusCode::NOT_FOUND, "not_found", "the path is not UTF-8"))
}

/// The last touch to every answer, and what the record keeps of it.
fn finish(record: &Record, result: Result<Response<Body>, ApiError>) -> Response<Body> {
    let mut facts = record.facts();
    let mut response = result.unwrap_or_else(|error| {
        facts.error = Some(error.code);
        error.response()
    });
    if let Some(cause) = facts.error.filter(|_| matches!(response.status().as_u16(), 429 | 503)) {
        record.count_rejected(cause);
    }
    facts.status = response.status().as_u16();
    // A stream is done when its last event went out.
    facts.is_done |= !facts.is_stream;
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

/// A JSON answer.
pub(crate) fn json_response(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_routes_collide() {
        let mut all: Vec<_> = ROUTES.iter().map(|route| (route.path, route.method.as_str())).collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn management_is_for_admins_and_little_is_open() {
        for route in ROUTES {
            let is_management = route.path.contains("adapter");
            assert_eq!(is_management, route.level == Level::Admin, "{}", route.path);
        }
        let open = ROUTES.iter().filter(|route| route.level == Level::Open).map(|route| route.path);
        assert_eq!(
            open.collect::<Vec<_>>(),
            ["/health", "/health/ready", "/ready", "/ping", "/ping", "/", "/openapi.json"]
        );
    }

    #[test]
    fn the_open_part_of_a_path_is_unescaped() {
        assert_eq!(open_part("/v1/models/{*id}", "/v1/models/a%2Fb/c").unwrap(), "a/b/c");
        assert_eq!(open_part("/v1/models/{*id}", "/v1/models/%zz%").unwrap(), "%zz%");
        assert!(open_part("/v1/models/{*id}", "/v1/models/%ff").is_err());
    }
}
