//! Probes, version and load.

use axum::body::Body;
use axum::http::Response;
use serde_json::json;
use slora_runtime::State;

use crate::errors::ApiError;
use crate::router::{Answer, Call, json_response};

/// Alive: not until the engine has failed is there a reason to start the process anew.
pub(crate) async fn live(call: Call) -> Answer {
    match call.app.runtime.state() {
        State::Failed(reason) => Err(ApiError::unavailable(format!("the engine has stopped: {reason}"))),
        _ => Ok(Response::new(Body::empty())),
    }
}

/// Ready for requests.
pub(crate) async fn ready(call: Call) -> Answer {
    match call.app.unready() {
        Some(reason) => Err(ApiError::unavailable(reason)),
        None => Ok(json_response(&json!({"status": "ready"}))),
    }
}

/// The version.
pub(crate) async fn version(_: Call) -> Answer {
    Ok(json_response(&json!({"version": env!("CARGO_PKG_VERSION")})))
}

/// Unfinished choices, as load balancers read it, with what else is unfinished.
pub(crate) async fn load(call: Call) -> Answer {
    let load = call.app.admission.load();
    let (requests, tokens, bytes) = (load.requests, load.tokens, load.bytes);
    Ok(json_response(&json!({"server_load": requests, "prompt_tokens": tokens, "body_bytes": bytes})))
}
