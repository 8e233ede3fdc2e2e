//! Health, version, load.

use axum::body::Body;
use axum::http::Response;
use serde_json::json;
use slora_runtime::State;

use crate::app::Call;
use crate::errors::ApiError;
use crate::routes::json_response;

/// Alive: the process answers, and its engine has not failed. Says nothing about the queue.
pub(crate) async fn live(call: Call) -> Result<Response<Body>, ApiError> {
    match call.app.runtime.state() {
        State::Failed(reason) => Err(ApiError::unavailable(format!("the engine has stopped: {reason}"))),
        _ => Ok(Response::new(Body::empty())),
    }
}

/// Ready: new work is taken.
pub(crate) async fn ready(call: Call) -> Result<Response<Body>, ApiError> {
    if call.app.runtime.state() != State::Running {
        return Err(ApiError::unavailable("the engine has stopped"));
    }
    match call.app.lifecycle.obstacle() {
        Some(reason) => Err(ApiError::unavailable(reason)),
        None => Ok(json_response(&json!({"status": "ready"}))),
    }
}

pub(crate) async fn version(_: Call) -> Result<Response<Body>, ApiError> {
    Ok(json_response(&json!({"version": env!("CARGO_PKG_VERSION")})))
}

/// Unfinished requests, as vLLM's `/load`, and what they hold.
pub(crate) async fn load(call: Call) -> Result<Response<Body>, ApiError> {
    let load = call.app.admission.load();
    let engine = call.app.runtime.snapshot().engine;
    Ok(json_response(&json!({
        "server_load": load.requests, "prompt_tokens": load.tokens, "bytes": load.bytes,
        "running": engine.running, "waiting": engine.waiting,
    })))
}
