//! `POST /v1/completions`.

use axum::body::Body;
use axum::http::Response;

use crate::app::{App, Call};
use crate::complete::{self, Wanted};
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::prompts;
use crate::reply::Shape;
use crate::sampling;

/// Tokens that are generated when nobody says how many.
const DEFAULT_MAX_TOKENS: u32 = 16;

pub(crate) async fn create(call: Call) -> Result<Response<Body>, ApiError> {
    complete::run(call, parse).await
}

fn parse(app: &App, fields: &mut Fields<'_>) -> Result<Wanted, ApiError> {
    let missing = || ApiError::invalid("prompt", "prompt is missing");
    let prompts = prompts::parse(fields.raw("prompt").ok_or_else(missing)?)?;
    let echo = fields.take("echo")?.unwrap_or(false);
    let logprobs: Option<u32> = fields.take("logprobs")?;
    let mut sampling = sampling::take(fields, &app.config.sampling_defaults, &app.config.limits)?;
    sampling.params.logprobs = logprobs;
    if echo && logprobs.is_some() {
        sampling.params.prompt_logprobs = sampling.params.prompt_logprobs.max(logprobs);
    }
    let default = app.config.sampling_defaults.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    sampling.max_tokens = sampling.max_tokens.or(Some(default));
    let streaming = sampling::take_streaming(fields)?;
    if streaming.is_on && !echo && sampling.params.prompt_logprobs.is_some() {
        return Err(ApiError::unsupported("prompt_logprobs", "prompt_logprobs is not supported when stream is true"));
    }
    fields.ignore(&["request_id"]);
    Ok(Wanted {
        shape: Shape::Completion,
        model: fields.take("model")?,
        prompts,
        sampling,
        streaming,
        echo,
        logprobs,
        add_special_tokens: fields.take("add_special_tokens")?,
        return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
    })
}
