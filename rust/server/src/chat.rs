//! `POST /v1/chat/completions`.

use axum::body::Body;
use axum::http::Response;
use serde_json::{Map, Value};
use slora_text::ChatInput;

use crate::app::{App, Call};
use crate::complete::{self, Wanted};
use crate::errors::ApiError;
use crate::fields::Fields;
use crate::log::unix_time_s;
use crate::prompts::PromptInput;
use crate::reply::Shape;
use crate::sampling;

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

pub(crate) async fn create(call: Call) -> Result<Response<Body>, ApiError> {
    complete::run(call, parse).await
}

fn parse(app: &App, fields: &mut Fields<'_>) -> Result<Wanted, ApiError> {
    let input = take_input(app, fields)?;
    let wants_logprobs = fields.take("logprobs")?.unwrap_or(false);
    let top: Option<u32> = fields.take("top_logprobs")?;
    if top.is_some_and(|top| top > 0) && !wants_logprobs {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    let logprobs = wants_logprobs.then(|| top.unwrap_or(0));
    fields.refuse("echo", &["false"])?;
    let mut sampling = sampling::take(fields, &app.config.sampling_defaults, &app.config.limits)?;
    sampling.params.logprobs = logprobs;
    sampling.max_tokens = sampling.max_tokens.or(app.config.sampling_defaults.max_tokens);
    let streaming = sampling::take_streaming(fields)?;
    if streaming.is_on && sampling.params.prompt_logprobs.is_some() {
        return Err(ApiError::unsupported("prompt_logprobs", "prompt_logprobs is not supported when stream is true"));
    }
    fields.ignore(&["request_id"]);
    Ok(Wanted {
        shape: Shape::Chat,
        model: fields.take("model")?,
        prompts: vec![PromptInput::Chat(Box::new(input))],
        sampling,
        streaming,
        echo: false,
        logprobs,
        add_special_tokens: fields.take("add_special_tokens")?,
        return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
    })
}

/// What the template is rendered with. Templates come from the model's folder, never from a request.
pub(crate) fn take_input(app: &App, fields: &mut Fields<'_>) -> Result<ChatInput, ApiError> {
    fields.refuse("chat_template", &[])?;
    let limit = app.config.limits.max_message_bytes;
    let raw = fields.raw("messages").ok_or_else(|| ApiError::invalid("messages", "messages is missing"))?;
    if raw.get().len() > limit {
        let message = format!("messages has {} bytes, the limit is {limit}", raw.get().len());
        return Err(ApiError::invalid("messages", message));
    }
    let messages: Vec<Value> =
        serde_json::from_str(raw.get()).map_err(|error| crate::fields::type_error("messages", &error))?;
    let continues = fields.take("continue_final_message")?.unwrap_or(false);
    let mut kwargs: Map<String, Value> = fields.take("chat_template_kwargs")?.unwrap_or_default();
    if let Some(effort) = fields.take::<String>("reasoning_effort")? {
        kwargs.insert("reasoning_effort".into(), Value::String(effort));
    }
    Ok(ChatInput {
        messages: Value::Array(checked(messages, app.config.limits.max_messages)?),
        tools: None,
        documents: fields.take("documents")?,
        add_generation_prompt: fields.take("add_generation_prompt")?.unwrap_or(!continues),
        continue_final_message: continues,
        kwargs,
        now_unix_s: unix_time_s() as i64,
        utc_offset_s: 0,
    })
}

fn checked(mut messages: Vec<Value>, limit: usize) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() || messages.len() > limit {
        let message = format!("messages has {} entries, it must have 1 to {limit}", messages.len());
        return Err(ApiError::invalid("messages", message));
    }
    for (index, message) in messages.iter_mut().enumerate() {
        check_message(message).map_err(|reason| {
            let at = format!("messages[{index}]");
            ApiError::invalid(&at, format!("{at}{reason}"))
        })?;
    }
    Ok(messages)
}

/// Roles are known ones, and content becomes one string, as templates for text expect it.
fn check_message(message: &mut Value) -> Result<(), String> {
    let Some(fields) = message.as_object_mut() else { return Err(" must be an object".into()) };
    let role = fields.get("role").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !ROLES.contains(&role.as_str()) {
        return Err(format!(".role is {:?}, it must be one of {}", crate::fields::shown(&role), ROLES.join(", ")));
    }
    let content = match fields.get("content") {
        Some(Value::String(_)) => return Ok(()),
        None | Some(Value::Null) if role == "assistant" => String::new(),
        Some(Value::Array(parts)) => joined(parts)?,
        _ => return Err(".content must be a string or a list of text parts".into()),
    };
    fields.insert("content".into(), Value::String(content));
    Ok(())
}

fn joined(parts: &[Value]) -> Result<String, String> {
    fn text((index, part): (usize, &Value)) -> Result<&str, String> {
        let text = match part {
            Value::String(text) => Some(text.as_str()),
            part if part["type"] == "text" => part["text"].as_str(),
            _ => None,
        };
        text.ok_or_else(|| format!(".content[{index}] must be of type text, with a text: the model reads nothing else"))
    }
    let texts: Result<Vec<&str>, String> = parts.iter().enumerate().map(text).collect();
    Ok(texts?.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn text_parts_are_joined_and_others_refused() {
        let mut message = json!({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]});
        check_message(&mut message).unwrap();
        assert_eq!(message["content"], "a\nb");
        let bad = [
            json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}),
            json!({"role": "robot", "content": "a"}),
            json!({"role": "user"}),
            json!({"role": "user", "content": 5}),
            json!("text"),
        ];
        assert!(bad.into_iter().all(|mut message| check_message(&mut message).is_err()));
    }
}
