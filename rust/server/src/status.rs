//! `GET /status`: what the page at `/` shows, in one answer.

use std::cmp::Reverse;

use serde_json::{Value, json};
use slora_core::AdapterState;
use slora_runtime::AdapterDetails;

use crate::adapters::state_name;
use crate::app::App;
use crate::auth::Caller;
use crate::errors::ApiError;
use crate::router::{Answer, Call, json_response};

/// Adapters that are listed: those with requests, then those nearest to the device.
const MAX_LISTED: usize = 200;
/// The route.
pub(crate) async fn status(call: Call) -> Answer {
    let Call { app, caller, .. } = call;
    let tenant = caller.tenant.clone();
    app.render(&tenant, move |app| Ok(json_response(&shown(app, &caller)?))).await
}

fn shown(app: &App, caller: &Caller) -> Result<Value, ApiError> {
    let all = app.runtime.adapters()?;
    let mut adapters: Vec<&AdapterDetails> = all.iter().filter(|adapter| caller.may_use(&adapter.info.name)).collect();
    let states = [
        AdapterState::Resident,
        AdapterState::Host,
        AdapterState::Loading,
        AdapterState::Registered,
        AdapterState::Failed,
    ];
    let count = |state| adapters.iter().filter(|adapter| adapter.info.state == state).count();
    let counts: serde_json::Map<String, Value> =
        states.into_iter().map(|state| (state_name(state).to_owned(), json!(count(state)))).collect();
    let place = |adapter: &AdapterDetails| states.iter().position(|state| *state == adapter.info.state);
    adapters.sort_by_key(|adapter| (Reverse(adapter.info.unfinished), place(adapter)));
    adapters.truncate(MAX_LISTED);
    let listed: Vec<Value> = adapters.into_iter().map(adapter_line).collect();
    let stats = app.runtime.snapshot().engine;
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"), "model": app.base_names.first(), "unready": app.unready(),
        "running": stats.running, "waiting": stats.waiting, "waiting_for_adapter": stats.waiting_for_adapter,
        "generated_tokens": stats.generated_tokens, "steps": stats.steps, "preemptions": stats.preemptions,
        "pool": {
            "pages": stats.num_pages, "free": stats.free_pages, "kv": stats.kv_pages,
            "adapters": stats.adapter_pages, "idle_adapters": stats.idle_adapter_pages,
        },
        "host": {"pages": stats.num_host_pages, "free": stats.free_host_pages},
        "adapter_states": counts, "adapters": listed,
    }))
}

fn adapter_line(adapter: &AdapterDetails) -> Value {
    let info = &adapter.info;
    json!({
        "name": &*info.name, "state": state_name(info.state), "version": info.version, "bytes": info.bytes,
        "pinned": info.pinned, "running": info.pins, "waiting": info.unfinished - info.pins,
    })
}
