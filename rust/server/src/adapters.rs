//! The adapters' lifecycle: vLLM's two endpoints and a JSON resource, for admin keys.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde_json::{Value, json};
use slora_core::AdapterState;
use slora_runtime::{AdapterDetails, RegisterError, RequestError};

use crate::app::App;
use crate::errors::{ApiError, checkpoint_error};
use crate::fields::shown;
use crate::router::{Answer, Call, json_response, typed_response};
use crate::schema::{Field, adapter_name, boolean, text};

/// Entries of a checkpoint's folder that are looked at for links.
const MAX_ENTRIES: usize = 1024;
/// How long an answer waits for a replacement, which is loaded nevertheless, and how often it looks.
const REPLACE_TIMEOUT: Duration = Duration::from_secs(60);
const REPLACE_POLL: Duration = Duration::from_millis(2);

const NAME: Field = Field::required("lora_name", "The adapter's name.", adapter_name);

/// Fields of `/v1/load_lora_adapter`.
pub(crate) const LOAD_FIELDS: &[Field] = &[
    NAME,
    Field::required("lora_path", "The checkpoint's folder: absolute, beneath a root of the server's.", text),
    Field::optional("load_inplace", "Whether an adapter of that name is replaced.", boolean),
    Field::ignored("lora_int_id"),
    Field::ignored("base_model_name"),
    Field::ignored("is_3d_lora_weight"),
];

/// Fields of `/v1/unload_lora_adapter`.
pub(crate) const UNLOAD_FIELDS: &[Field] = &[NAME, Field::ignored("lora_int_id")];

/// Fields of an adapter that is put.
pub(crate) const PUT_FIELDS: &[Field] = &[
    Field::optional("path", "The checkpoint's folder; without it the weights stay what they are.", text),
    Field::optional("pinned", "Whether the adapter stays on the device.", boolean),
];

/// Fields of `/v1/adapters/validate`.
pub(crate) const VALIDATE_FIELDS: &[Field] = &[Field::required("path", "The checkpoint's folder.", text)];

/// `POST /v1/load_lora_adapter`, as vLLM's.
pub(crate) async fn load_vllm(call: Call) -> Answer {
    let fields = call.fields(&call.body)?;
    let name: String = fields.require("lora_name")?;
    let path: PathBuf = fields.require("lora_path")?;
    let replace = fields.take("load_inplace")?.unwrap_or(false);
    call.app.note_unknown(&fields)?;
    let registered = call.app.call(&call.caller.tenant, move |app| register(app, &name, &path, replace, None)).await?;
    let found = in_force(&call.app, registered).await?;
    if found.info.replacing {
        return Err(ApiError::overloaded("the adapter is still being loaded", 1));
    }
    Ok(plain(format!("Success: LoRA adapter '{}' added successfully.", found.info.name)))
}

/// `POST /v1/unload_lora_adapter`, as vLLM's; an unknown name is 404.
pub(crate) async fn unload_vllm(call: Call) -> Answer {
    let fields = call.fields(&call.body)?;
    let name: String = fields.require("lora_name")?;
    call.app.note_unknown(&fields)?;
    let shown_name = name.clone();
    call.app.call(&call.caller.tenant, move |app| unload(app, &name)).await?;
    Ok(plain(format!("Success: LoRA adapter '{shown_name}' removed successfully.")))
}

/// `GET /v1/adapters`.
pub(crate) async fn list(call: Call) -> Answer {
    let render = |app: &App| {
        let data: Vec<Value> = app.runtime.adapters()?.iter().map(resource).collect();
        Ok(json_response(&json!({"object": "list", "data": data})))
    };
    call.app.render(&call.caller.tenant, render).await
}

/// `GET /v1/adapters/{name}`.
pub(crate) async fn get(call: Call) -> Answer {
    Ok(json_response(&resource(&details(&call.app, &call.param).map_err(in_resource)?)))
}

/// `PUT /v1/adapters/{name}`: registers, replaces, pins or unpins. Without a path the weights stay what they are.
pub(crate) async fn put(call: Call) -> Answer {
    let fields = call.fields(&call.body)?;
    let path: Option<PathBuf> = fields.take("path")?;
    let pinned: Option<bool> = fields.take("pinned")?;
    call.app.note_unknown(&fields)?;
    let name = call.param;
    let work = move |app: &App| match path {
        Some(path) => register(app, &name, &path, true, pinned),
        None => {
            details(app, &name)?;
            if let Some(pinned) = pinned {
                app.runtime.pin(&name, pinned)?;
            }
            details(app, &name)
        }
    };
    let registered = call.app.call(&call.caller.tenant, work).await.map_err(in_resource)?;
    Ok(json_response(&resource(&in_force(&call.app, registered).await.map_err(in_resource)?)))
}

/// The fields of vLLM's endpoints have other names than the resource's.
fn in_resource(error: ApiError) -> ApiError {
    match error.param.as_deref() {
        Some("lora_path") => error.with_param("path"),
        Some("lora_name") => error.with_param("name"),
        _ => error,
    }
}

/// `DELETE /v1/adapters/{name}`.
pub(crate) async fn delete(call: Call) -> Answer {
    let name = call.param;
    call.app.call(&call.caller.tenant, move |app| unload(app, &name)).await.map_err(in_resource)?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}

/// `POST /v1/adapters/validate`: the accounting of every tensor; nothing is registered.
pub(crate) async fn validate(call: Call) -> Answer {
    let fields = call.fields(&call.body)?;
    let path: PathBuf = fields.require("path")?;
    call.app.note_unknown(&fields)?;
    let work = move |app: &App| {
        let path = confine(&app.roots, &path)?;
        Ok(app.runtime.validate(&app.roots, &path).map_err(|error| checkpoint_error(&error))?.to_json())
    };
    Ok(typed_response("application/json", call.app.call(&call.caller.tenant, work).await.map_err(in_resource)?))
}

fn plain(text: String) -> Response<Body> {
    typed_response("text/plain; charset=utf-8", text)
}

fn details(app: &App, name: &str) -> Result<AdapterDetails, ApiError> {
    app.runtime.adapter(name)?.ok_or_else(|| ApiError::model_not_found(&shown(name)).with_param("lora_name"))
}

fn unload(app: &App, name: &str) -> Result<(), ApiError> {
    details(app, name)?;
    Ok(app.runtime.unload(name)?)
}

fn register(
    app: &App,
    name: &str,
    path: &Path,
    replace: bool,
    pinned: Option<bool>,
) -> Result<AdapterDetails, ApiError> {
    if app.base_names.iter().any(|base| base == name) {
        let message = format!("{name:?} is the base model's name");
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "adapter_exists", message).with_param("lora_name"));
    }
    let path = confine(&app.roots, path)?;
    let register = app.runtime.register_beneath(&app.roots, name, &path, replace, pinned == Some(true));
    let registered = register.inspect_err(|error| {
        if let RegisterError::Checkpoint(error) = error {
            app.metrics.count_load_failure(error.code());
        }
    })?;
    app.log_warnings(&registered);
    if pinned == Some(false) && registered.info.pinned {
        app.runtime.pin(name, false)?;
        return details(app, name);
    }
    Ok(registered)
}

/// A replacement becomes what the name means once it is loaded. Answers wait for that: whoever asks after one is served by
/// the new version.
async fn in_force(app: &Arc<App>, registered: AdapterDetails) -> Result<AdapterDetails, ApiError> {
    let before = registered.info.version;
    let (mut found, deadline) = (registered, Instant::now() + REPLACE_TIMEOUT);
    if !found.info.replacing {
        return Ok(found);
    }
    while found.info.replacing && Instant::now() < deadline {
        tokio::time::sleep(REPLACE_POLL).await;
        found = app.runtime.adapter(&found.info.name)?.ok_or_else(|| {
            ApiError::new(StatusCode::BAD_REQUEST, "adapter_invalid", "the adapter was removed meanwhile")
                .with_param("lora_name")
        })?;
    }
    match found.info.failure.clone() {
        Some(failure) if found.info.version == before => {
            let name = found.info.name.clone();
            Err(ApiError::from(RequestError::AdapterFailed { name, failure }).with_param("lora_path"))
        }
        _ => Ok(found),
    }
}

/// As answers and metrics call it.
pub(crate) fn state_name(state: AdapterState) -> &'static str {
    match state {
        AdapterState::Registered => "registered",
        AdapterState::Loading => "loading",
        AdapterState::Host => "host",
        AdapterState::Resident => "resident",
        AdapterState::Failed => "failed",
    }
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn resource(details: &AdapterDetails) -> Value {
    let info = &details.info;
    let report = details.checkpoint.as_ref().map(|adapter| adapter.report());
    let tier = match info.state {
        AdapterState::Registered | AdapterState::Loading => "disk",
        AdapterState::Host => "host",
        AdapterState::Resident => "device",
        AdapterState::Failed => "none",
    };
    json!({
        "object": "adapter", "name": &*info.name, "version": info.version, "state": state_name(info.state), "tier": tier,
        "reason": info.failure.as_ref().map(|failure| failure.code),
        "message": info.failure.as_ref().map(|failure| &*failure.message), "pinned": info.pinned, "replacing": info.replacing,
        "pins": info.pins, "in_flight": info.unfinished, "num_pages": info.num_pages, "bytes": info.bytes,
        "path": report.map(|report| report.folder.to_string_lossy()),
        "sha256": details.checkpoint.as_ref().and_then(|adapter| adapter.sha256()).map(hex),
        "min_rank": report.map(|report| report.min_rank), "max_rank": report.map(|report| report.max_rank),
        "targets": report.map(|report| report.targets()),
        "warnings": report.map_or(&[][..], |report| &report.warnings),
    })
}

/// The path with its links resolved, which must be absolute and lie beneath a root; no link inside leads out either. What
/// lies outside is refused the same way whether it exists or not. The store looks again at what it has opened, since folders
/// may be renamed meanwhile.
fn confine(roots: &[PathBuf], path: &Path) -> Result<PathBuf, ApiError> {
    let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !is_plain {
        return Err(ApiError::path_not_allowed());
    }
    // Without a slash at the end, which would hide that the last name is a link.
    let path: PathBuf = path.components().collect();
    let is_inside = |path: &Path| roots.iter().any(|root| path.starts_with(root));
    let resolved = resolve(&path).ok_or_else(ApiError::path_not_allowed)?;
    if !is_inside(&resolved) || !links_stay(&resolved, 1, &is_inside) {
        return Err(ApiError::path_not_allowed());
    }
    Ok(resolved)
}

/// Resolves links as far as the path exists: the rest is plain names.
fn resolve(path: &Path) -> Option<PathBuf> {
    let existing = path.ancestors().find(|part| part.symlink_metadata().is_ok())?;
    let rest = path.strip_prefix(existing).ok()?;
    let resolved = existing.canonicalize().ok()?;
    Some(if rest.as_os_str().is_empty() { resolved } else { resolved.join(rest) })
}

/// Whether links in the folder, and `levels` below, stay inside. A folder that cannot be read is the store's to refuse.
fn links_stay(folder: &Path, levels: usize, is_inside: &impl Fn(&Path) -> bool) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return true };
    let stays = |path: PathBuf| {
        let target = path.canonicalize();
        let is_broken_link = target.is_err();
        let stays = target.is_ok_and(|target| is_inside(&target));
        is_broken_link || (stays && (levels == 0 || !path.is_dir() || links_stay(&path, levels - 1, is_inside)))
    };
    let mut seen = 0;
    entries.flatten().all(|entry| {
        seen += 1;
        seen <= MAX_ENTRIES && stays(entry.path())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_beneath_a_root_is_let_in_links_resolved() {
        let world = tempfile::tempdir().unwrap();
        let world = world.path().canonicalize().unwrap();
        let (root, outside) = (world.join("root"), world.join("root-outside"));
        for folder in [root.join("a/nested"), outside.join("b")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::write(outside.join("b/secret"), "x").unwrap();
        let link = |to: &Path, at: PathBuf| std::os::unix::fs::symlink(to, at).unwrap();
        link(&outside.join("b"), root.join("out"));
        link(&outside.join("b/secret"), root.join("file-out"));
        link(&root.join("a"), root.join("in"));
        std::fs::create_dir(root.join("c")).unwrap();
        link(&outside.join("b/secret"), root.join("c/adapter_model.safetensors"));
        std::fs::create_dir_all(root.join("d/e")).unwrap();
        link(&outside.join("b/secret"), root.join("d/e/adapter_config.json"));
        let roots = [root.clone()];
        let is_allowed = |path: &Path| confine(&roots, path).is_ok();
        for path in [root.join("a"), root.join("in"), root.join("a/"), root.join("a/nested"), root.join("not-there")] {
            assert!(is_allowed(&path), "{}", path.display());
        }
        let refused = [
            root.join("out"),
            root.join("out/deeper"),
            root.join("file-out/"),
            outside.clone(),
            outside.join("b"),
            outside.join("not-there"),
            root.join(".."),
            root.join("a/../../root-outside"),
            root.join("a/../a"),
            root.join("c"),
            root.join("d"),
            PathBuf::from("a"),
            PathBuf::from("./a"),
            PathBuf::from(""),
            PathBuf::from("/"),
            PathBuf::from("/proc/self/root"),
        ];
        for path in refused {
            let error = confine(&roots, &path).unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (400, "path_not_allowed"), "{}", path.display());
        }
        assert!(confine(&[], &root.join("a")).is_err(), "without roots nothing is allowed");
    }
}
