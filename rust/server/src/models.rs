//! `GET /v1/models` and `/v1/models/{id}`.

use axum::body::Body;
use axum::http::Response;
use serde_json::{Value, json};
use slora_runtime::AdapterDetails;

use crate::app::{App, Call};
use crate::errors::ApiError;
use crate::model_name::adapter_part;
use crate::routes::json_response;

fn entry(app: &App, id: &str, created: u64, root: &str, parent: Option<&str>) -> Value {
    json!({
        "id": id, "object": "model", "created": created, "owned_by": "slora", "root": root, "parent": parent,
        "max_model_len": app.runtime.config().max_context, "permission": [],
    })
}

fn base(app: &App, name: &str) -> Value {
    entry(app, name, app.created, &app.config.model, None)
}

fn adapter(app: &App, details: &AdapterDetails) -> Value {
    let root = details.checkpoint.as_ref().map(|checkpoint| checkpoint.report().folder.display().to_string());
    let created = app.sources.created(&details.info.name).unwrap_or(app.created);
    entry(app, &details.info.name, created, &root.unwrap_or_default(), Some(&app.base_names[0]))
}

/// The base first, then the adapters that the key may use.
pub(crate) async fn list(call: Call) -> Result<Response<Body>, ApiError> {
    let app = &call.app;
    let adapters = app.on_runtime(|app| app.runtime.adapters()).await??;
    let bases = app.base_names.iter().filter(|name| call.caller.may_use(name)).map(|name| base(app, name));
    let adapters = adapters.iter().filter(|details| call.caller.may_use(&details.info.name));
    let data: Vec<Value> = bases.chain(adapters.map(|details| adapter(app, details))).collect();
    Ok(json_response(&json!({"object": "list", "data": data})))
}

/// One of them; ids may hold slashes.
pub(crate) async fn show(call: Call) -> Result<Response<Body>, ApiError> {
    let app = &call.app;
    let id = call.name.clone();
    let not_found = || ApiError::model_not_found(&crate::fields::shown(&id));
    if app.base_names.contains(&id) {
        return if call.caller.may_use(&id) { Ok(json_response(&base(app, &id))) } else { Err(not_found()) };
    }
    let name = adapter_part(&app.base_names, &id).to_owned();
    if !call.caller.may_use(&name) {
        return Err(not_found());
    }
    let details = app.on_runtime(move |app| app.runtime.adapter(&name)).await??.ok_or_else(not_found)?;
    Ok(json_response(&adapter(app, &details)))
}
