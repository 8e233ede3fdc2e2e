//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM's.

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};

use crate::adapters;
use crate::app::Call;
use crate::errors::ApiError;

fn text(message: String) -> Response<Body> {
    let mut response = Response::new(Body::from(message));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Makes a name known.
pub(crate) async fn load(mut call: Call) -> Result<Response<Body>, ApiError> {
    let (name, path, replace, pinned) = call
        .read_fields(|fields| {
            let name: String = fields.require("lora_name")?;
            let path: String = fields.require("lora_path")?;
            let replace = fields.take("load_inplace")?.unwrap_or(false);
            fields.refuse("is_3d_lora_weight", &["false"])?;
            fields.ignore(&["base_model_name"]);
            Ok((name, path, replace, fields.take("pinned")?))
        })
        .await?;
    adapters::load(&call.app, &name, &path, replace, pinned).await?;
    Ok(text(format!("Success: LoRA adapter '{name}' added successfully.")))
}

/// Forgets a name.
pub(crate) async fn unload(mut call: Call) -> Result<Response<Body>, ApiError> {
    let name: String = call
        .read_fields(|fields| {
            fields.ignore(&["lora_int_id"]);
            fields.require("lora_name")
        })
        .await?;
    adapters::unload(&call.app, &name)
        .await
        .map_err(|error| if error.code == "model_not_found" { error.with_param("lora_name") } else { error })?;
    Ok(text(format!("Success: LoRA adapter '{name}' removed successfully.")))
}
