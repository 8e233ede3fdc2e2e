//! What happens to every request before and after its route.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{RawPathParams, Request};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use axum::routing::on;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};

use crate::admission::{Load, Reservation};
use crate::app::App;
use crate::auth::{Caller, Level};
use crate::connection::Unsent;
use crate::cors;
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::record::{Facts, Record};
use crate::routes::{ROUTES, Route};

/// Longest request id of a client's that is taken over.
const MAX_ID_LEN: usize = 128;

/// Bodies that are read at once, which takes at most 1 ms.
const INLINE_BYTES: usize = 16 << 10;

/// Of a body that names an adapter and a path. It is read at once.
const MAX_ADMIN_BYTES: usize = 64 << 10;

/// All that the second port answers, without a key.
const METRICS_PORT_ROUTES: [&str; 5] = ["/metrics", "/health", "/health/ready", "/ready", "/ping"];

/// What a route sends back.
pub(crate) type Answer = Result<Response<Body>, ApiError>;
/// Where a request came in.
#[derive(Clone)]
pub(crate) struct Peer {
    pub address: IpAddr,
    /// Of its connection.
    pub unsent: Arc<Unsent>,
    /// The second port, where `/metrics` needs no key and only it and the open routes are there.
    pub is_metrics_port: bool,
}

/// A request on its way to its route.
pub(crate) struct Call {
    pub app: Arc<App>,
    pub caller: Caller,
    pub record: Arc<Record>,
    /// Of the connection that the answer goes to.
    pub unsent: Arc<Unsent>,
    /// What stands for the path's `{}`; without one, the path's last segment, which may be a name too.
    pub param: String,
    pub body: Bytes,
    /// Of the body's bytes; a request without a body has none.
    pub reservation: Option<Reservation>,
    route: &'static Route,
}

impl Call {
    /// The fields of the body, of which those in the route's table are known.
    pub fn fields<'a>(&self, body: &'a Bytes) -> Result<Fields<'a>, ApiError> {
        Fields::parse(body, self.app.config.limits.max_json_depth, self.route.body)
    }

    /// What `read` makes of the body. A long one is read off the threads that do HTTP: millions of values take a while.
    pub async fn read<T: Send + 'static>(
        mut self,
        read: fn(&mut Self) -> Result<T, ApiError>,
    ) -> Result<(Self, T), ApiError> {
        if self.body.len() <= INLINE_BYTES {
            let found = read(&mut self)?;
            return Ok((self, found));
        }
        let (app, tenant, bytes) = (self.app.clone(), self.caller.tenant.clone(), self.body.len());
        let work = move || {
            let found = read(&mut self)?;
            Ok((self, found))
        };
        app.text_pool.run(&tenant.name, bytes, work).await
    }
}

/// The routes as a service.
pub(crate) fn router(app: &Arc<App>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        let app = app.clone();
        let handler = move |params: Result<RawPathParams, _>, request: Request| {
            let param = params.ok().and_then(|params: RawPathParams| {
                params.iter().next().map(|(_, value)| value.trim_start_matches('/').to_owned())
            });
            let last_segment = || route.path.rsplit('/').next().unwrap_or_default().to_owned();
            answer(app.clone(), route, param.unwrap_or_else(last_segment), request)
        };
        router = router.route(route.path, on(route.verb.filter(), handler));
    }
    let (missing, other_method) = (app.clone(), app.clone());
    router
        .fallback(move |request: Request| {
            let error = ApiError::new(
                StatusCode::NOT_FOUND,
                "not_found",
                "there is no such route; hint: GET /openapi.json lists them",
            );
            refuse(missing.clone(), request, error)
        })
        .method_not_allowed_fallback(move |request: Request| {
            let message = format!("the route does not take {}", request.method());
            let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
            refuse(other_method.clone(), request, error)
        })
}

async fn answer(app: Arc<App>, route: &'static Route, param: String, request: Request) -> Response<Body> {
    let record = record(&app, route.verb.name(), route.path, request.headers());
    let origin = cors::allowed_origin(&app.config.allowed_origins, request.headers());
    let result = match call(&app, &record, route, param, request).await {
        Ok(call) => (route.handler)(call).await,
        Err(error) => Err(error),
    };
    finish(&app, &record, origin, result)
}

async fn refuse(app: Arc<App>, request: Request, error: ApiError) -> Response<Body> {
    let record = record(&app, "other", "none", request.headers());
    let origin = cors::allowed_origin(&app.config.allowed_origins, request.headers());
    let is_preflight = origin.is_some() && cors::is_preflight(request.method(), request.headers());
    finish(&app, &record, origin, if is_preflight { Ok(cors::preflight()) } else { Err(error) })
}

fn record(app: &App, method: &'static str, path: &'static str, headers: &HeaderMap) -> Arc<Record> {
    let log = app.config.access_log.then(|| app.log.clone());
    let record = Record::new(request_id(headers), method, log, app.metrics.clone());
    record.facts().handler = path;
    Arc::new(record)
}

/// The client's own id where it is sane, so that its log and this one can be laid side by side.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|id| id.to_str().ok());
    let is_sane = |id: &&str| {
        (1..=MAX_ID_LEN).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    };
    given.filter(is_sane).map_or_else(new_id, str::to_owned)
}

/// 32 hex digits that nobody guesses.
pub(crate) fn new_id() -> String {
    let mut bytes = [0; 16];
    // A system without random numbers: ids are for logs, they may repeat.
    let _ = getrandom::fill(&mut bytes);
    format!("{:032x}", u128::from_le_bytes(bytes))
}

/// Lets the request in and reads its body.
async fn call(
    app: &Arc<App>,
    record: &Arc<Record>,
    route: &'static Route,
    param: String,
    request: Request,
) -> Result<Call, ApiError> {
    let Some(peer) = request.extensions().get::<Peer>() else {
        return Err(ApiError::internal("the connection's address is not known"));
    };
    let (caller, unsent) = (admit(app, route, &request, peer)?, peer.unsent.clone());
    record.facts().tenant = Some(caller.tenant.name.clone());
    let (mut body, mut reservation) = (Bytes::new(), None);
    if route.verb.has_body() {
        check_media_type(request.headers())?;
        let limit = max_body_bytes(app, route);
        let len = announced_len(request.headers(), limit)?;
        let load = Load { bytes: len as u64, ..Load::default() };
        let mut reserved = app.admission.reserve(caller.tenant.clone(), load)?;
        body = read_body(app, request.into_body(), limit).await?;
        // One that came in chunks did not say how short it is.
        reserved.correct(0, body.len() as u64);
        reservation = Some(reserved);
    }
    Ok(Call { app: app.clone(), caller, record: record.clone(), unsent, param, body, reservation, route })
}

fn admit(app: &App, route: &Route, request: &Request, peer: &Peer) -> Result<Caller, ApiError> {
    let headers = request.headers();
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    let bytes = bytes + request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    let limit = app.config.limits.max_header_bytes;
    if bytes > limit {
        let message = format!("the request's headers have {bytes} bytes, the limit is {limit}");
        return Err(ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message));
    }
    if !peer.is_metrics_port {
        return app.auth.admit(route.level, headers, peer.address);
    }
    if METRICS_PORT_ROUTES.contains(&route.path) {
        return app.auth.admit(Level::Open, headers, peer.address);
    }
    Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", "this port answers /metrics and the health routes only"))
}

fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused = |message| Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return refused("the body must not be compressed; hint: send it without `Content-Encoding`");
    }
    let value = headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or_default());
    let kind = value.and_then(|value| value.split(';').next()).map(str::trim);
    // Browsers send a body without a type for any page that asks them to, and ask nobody before.
    let may_be_absent = !headers.contains_key(header::ORIGIN);
    if kind.map_or(may_be_absent, |kind| kind.eq_ignore_ascii_case("application/json")) {
        return Ok(());
    }
    refused("the body must be JSON; hint: send `Content-Type: application/json`")
}

/// Bytes that any body of the route may have.
fn max_body_bytes(app: &App, route: &Route) -> usize {
    let limit = app.config.limits.max_body_bytes;
    if route.level == Level::Admin { limit.min(MAX_ADMIN_BYTES) } else { limit }
}

/// Bytes that the body may have: what it says, or all that any may.
fn announced_len(headers: &HeaderMap, limit: usize) -> Result<usize, ApiError> {
    let len = headers.get(header::CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok()).unwrap_or(limit);
    if len > limit { Err(too_large(limit)) } else { Ok(len) }
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is larger than {limit} bytes, which is the limit");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

async fn read_body(app: &App, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let timeout_s = app.config.limits.body_timeout_s;
    let bad = |message: String| ApiError::new(StatusCode::BAD_REQUEST, "incomplete_body", message);
    match tokio::time::timeout(Duration::from_secs_f64(timeout_s), Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large(limit)),
        Ok(Err(error)) => Err(bad(format!("the body could not be read: {error}"))),
        Err(_) => Err(bad(format!("the body was not there within {timeout_s} s"))),
    }
}

/// Writes down how it went. A stream says itself when it is done.
fn finish(app: &App, record: &Record, origin: Option<HeaderValue>, result: Answer) -> Response<Body> {
    let mut facts = record.facts();
    let mut response = result.unwrap_or_else(|error| {
        facts.error = Some(error.code);
        if matches!(error.status.as_u16(), 429 | 503) {
            app.metrics.count_rejected(error.code);
        }
        facts.is_stream = false;
        let mut response = error.response();
        if error.code == "tenant_queue_full" && app.is_short_of_connections() {
            // Others could not even ask while the tenant that is refused keeps its connections.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    });
    facts.status = response.status().as_u16();
    facts.is_done |= !facts.is_stream;
    if response.status().is_success() {
        describe(&mut response, &facts);
    }
    drop(facts);
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert("x-request-id", id);
    }
    if let Some(origin) = origin {
        cors::allow(&mut response, origin);
    }
    response
}

/// What proxies log without reading bodies: which weights answered and, unless it is a stream, for how many tokens.
fn describe(response: &mut Response<Body>, facts: &Facts) {
    let headers = response.headers_mut();
    if let Some(name) = facts.adapter.as_deref().and_then(|name| HeaderValue::from_str(name).ok()) {
        headers.insert("x-adapter", name);
        headers.insert("x-adapter-version", facts.version.into());
    }
    if !facts.is_stream && facts.prompt_tokens > 0 {
        headers.insert("x-prompt-tokens", facts.prompt_tokens.into());
        headers.insert("x-generated-tokens", facts.completion_tokens.into());
    }
}

/// A JSON answer.
pub(crate) fn json_response(value: &serde_json::Value) -> Response<Body> {
    typed_response("application/json", value.to_string())
}

/// An answer with its media type.
pub(crate) fn typed_response(media_type: &'static str, body: String) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}
