//! The adapters' resource API: `/v1/adapters`.
//!
//! What is loaded here does not survive a restart.

use std::path::Path;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde_json::{Value, json};
use slora_core::AdapterState;
use slora_runtime::{AdapterDetails, RegisterError};

use crate::app::{App, Call};
use crate::errors::{ApiError, adapter_failed};
use crate::exposition::state_name;
use crate::model_name::is_adapter_name;
use crate::paths;
use crate::routes::json_response;
use crate::sources::Origin;

/// How long a call waits for weights to be read.
const LOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(5);

/// An adapter as JSON.
fn shown(app: &App, details: &AdapterDetails) -> Value {
    let info = &details.info;
    let report = details.checkpoint.as_ref().map(|checkpoint| checkpoint.report());
    let source = app.sources.get(&info.name);
    let tier = match info.state {
        AdapterState::Resident => "device",
        AdapterState::Host => "host",
        _ => "disk",
    };
    json!({
        "name": &*info.name, "state": state_name(info.state), "reason": info.reason.as_deref(), "version": info.version,
        "replacing": info.replacing, "tier": tier, "pinned": info.pinned, "pins": info.pins, "in_flight": info.unfinished,
        "bytes": info.bytes, "pages": info.num_pages, "sha256": null,
        "min_rank": report.map(|report| report.min_rank), "max_rank": report.map(|report| report.max_rank),
        "targets": report.map(|report| report.targets()),
        "path": report.map(|report| report.folder.display().to_string()),
        "origin": source.as_ref().map(|source| source.origin.name()), "created": source.map(|source| source.created),
        "warnings": report.map(|report| &report.warnings),
    })
}

/// All adapters, and folders that could not become one.
pub(crate) async fn list(call: Call) -> Result<Response<Body>, ApiError> {
    let app = &call.app;
    let adapters = app.on_runtime(|app| app.runtime.adapters()).await??;
    let data: Vec<Value> = adapters.iter().map(|details| shown(app, details)).collect();
    let refused: Vec<Value> = app.sources.failures().into_iter().map(|(name, failure)| {
        json!({"name": name, "state": "failed", "path": failure.path.display().to_string(), "reason": failure.message, "code": failure.code})
    }).collect();
    Ok(json_response(&json!({"object": "list", "data": data, "refused": refused})))
}

/// One adapter.
pub(crate) async fn show(call: Call) -> Result<Response<Body>, ApiError> {
    let details = find(&call, &call.name).await?;
    Ok(json_response(&shown(&call.app, &details)))
}

async fn find(call: &Call, name: &str) -> Result<AdapterDetails, ApiError> {
    let asked = name.to_owned();
    let found = call.app.on_runtime(move |app| app.runtime.adapter(&asked)).await??;
    found.ok_or_else(|| ApiError::model_not_found(&crate::fields::shown(name)))
}

/// Makes a name known, or gives it a new version, or only changes whether it is pinned.
pub(crate) async fn put(mut call: Call) -> Result<Response<Body>, ApiError> {
    let name = call.name.clone();
    let (path, pinned) =
        call.read_fields(|fields| Ok((fields.take::<String>("path")?, fields.take::<bool>("pinned")?))).await?;
    let Some(path) = path else {
        let pinned = pinned.ok_or_else(|| ApiError::invalid("path", "path is missing"))?;
        set_pinned(&call.app, &name, pinned).await?;
        return Ok(json_response(&shown(&call.app, &find(&call, &name).await?)));
    };
    let existed = find(&call, &name).await.is_ok();
    let details = load(&call.app, &name, &path, true, pinned).await?;
    let mut response = json_response(&shown(&call.app, &details));
    if !existed {
        *response.status_mut() = StatusCode::CREATED;
    }
    Ok(response)
}

/// Forgets a name: new requests do not find it, unfinished ones finish, then every tier is freed.
pub(crate) async fn delete(call: Call) -> Result<Response<Body>, ApiError> {
    unload(&call.app, &call.name).await?;
    Ok(json_response(&json!({"name": call.name, "deleted": true})))
}

/// The tensor accounting of a checkpoint; nothing is loaded.
pub(crate) async fn validate(mut call: Call) -> Result<Response<Body>, ApiError> {
    let path: String = call.read_fields(|fields| fields.require("path")).await?;
    let (_, report) = call.app.on_runtime(move |app| paths::open(&app.config, app.runtime.base(), &path)).await??;
    let parsed: Value = serde_json::from_str(&report.to_json()).unwrap_or_default();
    Ok(json_response(&json!({"valid": true, "report": parsed})))
}

/// Removes a name.
pub(crate) async fn unload(app: &std::sync::Arc<App>, name: &str) -> Result<(), ApiError> {
    let asked = name.to_owned();
    app.on_runtime(move |app| {
        app.runtime.unload(&asked)?;
        app.sources.remove(&asked);
        Ok::<_, RegisterError>(())
    })
    .await?
    .map_err(ApiError::from)
}

async fn set_pinned(app: &std::sync::Arc<App>, name: &str, pinned: bool) -> Result<(), ApiError> {
    let name = name.to_owned();
    app.on_runtime(move |app| app.runtime.pin(&name, pinned)).await??;
    Ok(())
}

/// Registers a folder and waits until its weights were read: what is wrong with them is this call's answer. A name that
/// was free is free again then; a name that was taken keeps what it meant.
pub(crate) async fn load(
    app: &std::sync::Arc<App>,
    name: &str,
    path: &str,
    replace: bool,
    pinned: Option<bool>,
) -> Result<AdapterDetails, ApiError> {
    if !is_adapter_name(name) {
        let name = crate::fields::shown(name);
        let message = format!("adapter name {name:?} must be 1 to 128 of A-Z a-z 0-9 . _ -");
        return Err(ApiError::invalid("lora_name", message));
    }
    if app.base_names.iter().any(|base| base == name) {
        let message = format!("the base model is named {name:?}");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "adapter_exists", message).with_param("lora_name"));
    }
    let (name, path) = (name.to_owned(), path.to_owned());
    let result = app.on_runtime(move |app| load_now(app, &name, &path, replace, pinned)).await?;
    if let Err(error) = &result {
        app.metrics.count_load_failure(error.reason.as_deref().unwrap_or(error.code));
    }
    result
}

fn load_now(
    app: &App,
    name: &str,
    path: &str,
    replace: bool,
    pinned: Option<bool>,
) -> Result<AdapterDetails, ApiError> {
    let (folder, _) = paths::open(&app.config, app.runtime.base(), path)?;
    let before = app.runtime.adapter(name)?;
    register(app, name, &folder, replace)?;
    let was_pinned = before.as_ref().is_some_and(|details| details.info.pinned);
    let stays_pinned = pinned.unwrap_or(was_pinned);
    let outcome = wait_loaded(app, name);
    match &outcome {
        Ok(_) => app.runtime.pin(name, stays_pinned)?,
        Err(_) if before.is_none() => {
            app.runtime.unload(name)?;
            app.sources.remove(name);
        }
        Err(_) => app.runtime.pin(name, was_pinned)?,
    }
    outcome?;
    let gone = || ApiError::model_not_found(name);
    app.runtime.adapter(name)?.ok_or_else(gone)
}

fn register(app: &App, name: &str, folder: &Path, replace: bool) -> Result<(), ApiError> {
    // Pinned until it was read: nothing else makes the engine read it now.
    app.runtime.register(name, folder, replace, true)?;
    app.sources.set(name, Origin::Api);
    Ok(())
}

/// Waits until the newest version's weights are in the host tier, or could not be.
fn wait_loaded(app: &App, name: &str) -> Result<(), ApiError> {
    let deadline = Instant::now() + LOAD_TIMEOUT;
    loop {
        let info = app.runtime.adapter(name)?.ok_or_else(|| ApiError::model_not_found(name))?.info;
        let is_loaded = matches!(info.state, AdapterState::Host | AdapterState::Resident);
        if let (Some(reason), false) = (&info.reason, info.replacing) {
            let message = format!("adapter {name:?} could not be loaded: {reason}");
            return Err(adapter_failed(message, reason).with_param("lora_path"));
        }
        // Without room nothing is read, and the first request brings it in.
        if (is_loaded && !info.replacing) || Instant::now() > deadline {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}
