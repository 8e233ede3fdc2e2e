//! `GET /v1/models`: the base model first, then what the key may use.

use serde_json::{Value, json};
use slora_runtime::AdapterDetails;

use crate::app::App;
use crate::auth::Caller;
use crate::errors::ApiError;
use crate::fields::shown;
use crate::router::{Answer, Call, json_response};

/// All models that the caller may use.
pub(crate) async fn list(call: Call) -> Answer {
    let Call { app, caller, .. } = call;
    let tenant = caller.tenant.clone();
    let render = move |app: &App| {
        let adapters = app.runtime.adapters()?;
        let bases = app.base_names.iter().filter(|_| may_use_base(app, &caller)).map(|name| base(app, name));
        let usable = adapters.iter().filter(|details| caller.may_use(&details.info.name));
        let data: Vec<Value> = bases.chain(usable.map(|details| adapter(app, details))).collect();
        Ok(json_response(&json!({"object": "list", "data": data})))
    };
    app.render(&tenant, render).await
}

/// One model. What the caller may not use is as unknown as what is not there.
pub(crate) async fn get(call: Call) -> Answer {
    let Call { app, caller, param: id, .. } = call;
    let unknown = ApiError::model_not_found(&shown(&id));
    if app.base_names.contains(&id) && may_use_base(&app, &caller) {
        return Ok(json_response(&base(&app, &id)));
    }
    let name = app.resolve(&caller, Some(id))?.adapter.ok_or_else(|| unknown.clone())?;
    let details = app.runtime.adapter(&name)?.ok_or(unknown)?;
    Ok(json_response(&adapter(&app, &details)))
}

fn may_use_base(app: &App, caller: &Caller) -> bool {
    app.base_names.iter().any(|name| caller.may_use(name))
}

fn base(app: &App, name: &str) -> Value {
    model(app, name, Some(&app.config.model), None)
}

fn adapter(app: &App, details: &AdapterDetails) -> Value {
    let folder = details.checkpoint.as_ref().map(|adapter| adapter.report().folder.to_string_lossy());
    model(app, &details.info.name, folder.as_deref(), app.base_names.first().map(String::as_str))
}

fn model(app: &App, id: &str, root: Option<&str>, parent: Option<&str>) -> Value {
    json!({
        "id": id, "object": "model", "created": app.started_unix_s, "owned_by": "slora", "root": root, "parent": parent,
        "max_model_len": app.runtime.config().max_context, "permission": [],
    })
}
