//! `POST /v1/chat/completions`.

use serde_json::{Map, Value, json};
use slora_core::SamplingParams;
use slora_text::{ChatInput, TextModel, part_text};

use crate::app::App;
use crate::completions::no_tokenizer;
use crate::errors::{ApiError, text_error};
use crate::fields::Fields;
use crate::inference::{Admitted, Inference, admit, fit, run};
use crate::log::unix_time_s;
use crate::reply::{Echo, Prompt, Shape};
use crate::router::{Answer, Call};
use crate::sampling::{self, take_streaming};
use crate::schema::{Bounds, Field, MODEL, any_of, boolean};

/// The route's own fields, and those of completions that mean nothing good here.
pub(crate) const FIELDS: &[Field] = &[
    MODEL,
    Field::required("messages", "The conversation.", messages),
    Field::optional("logprobs", "Whether tokens come with their log-probabilities.", boolean),
    Field::optional("top_logprobs", "So many best tokens with each; only with `logprobs`.", sampling::logprobs),
    Field::unsupported("chat_template", &[]),
    Field::unsupported("documents", &["[]"]),
    Field::unsupported("echo", &["false"]),
    Field::unsupported("add_special_tokens", &["false"]),
    Field::unsupported("reasoning_effort", &["\"none\""]),
];

/// What a chat template is told besides the messages.
pub(crate) const TEMPLATE_FIELDS: &[Field] = &[
    Field::optional("add_generation_prompt", "Whether the prompt ends where an answer begins.", boolean),
    Field::optional("continue_final_message", "Whether the last message is to be continued.", boolean),
    Field::optional("chat_template_kwargs", "Variables of the chat template.", |_| json!({"type": "object"})),
];

/// Messages: a role, and content that is text.
pub(crate) fn messages(bounds: &Bounds) -> Value {
    let text = json!({"type": "string"});
    let part = json!({
        "type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": text},
    });
    let parts = json!({"type": "array", "items": any_of(&[text.clone(), part])});
    let message = json!({
        "type": "object", "required": ["role", "content"],
        "properties": {
            // A model's template may know further ones, and refuses those that it does not know.
            "role": {"enum": ["system", "user", "assistant"]}, "content": any_of(&[text, parts]),
            "tool_calls": {"type": ["array", "null"], "maxItems": 0},
        },
    });
    json!({"type": "array", "items": message, "minItems": 1, "maxItems": bounds.max_messages})
}

/// The route.
pub(crate) async fn complete(call: Call) -> Answer {
    let (call, asked) = call.read(read).await?;
    let Asked { inference, admitted, input, keep } = asked;
    let (app, max_tokens) = (call.app.clone(), inference.sampling.max_tokens);
    let Some(text) = app.runtime.text().cloned() else { return Err(no_tokenizer()) };
    let work = move || {
        let mut ids = encode(&app, &text, &input)?;
        fit(&app, &mut ids, keep, max_tokens)?;
        Ok(vec![Prompt { ids, echo: Echo::default() }])
    };
    let prompts = call.app.text_pool.run(&call.caller.tenant.name, call.body.len(), work).await?;
    run(call, admitted, inference, prompts).await
}

/// A request that was understood and let in.
struct Asked {
    inference: Inference,
    admitted: Admitted,
    input: ChatInput,
    /// So many of the prompt's last tokens.
    keep: usize,
}

fn read(call: &mut Call) -> Result<Asked, ApiError> {
    let app = call.app.clone();
    let body = call.body.clone();
    let fields = call.fields(&body)?;
    let target = app.resolve(&call.caller, fields.take("model")?)?;
    call.record.facts().adapter = target.adapter.clone();
    let streaming = take_streaming(&fields)?;
    let input = take_input(&app, &fields)?;
    let logprobs = take_logprobs(&fields)?;
    let return_token_ids = fields.take("return_token_ids")?.unwrap_or(false);
    let n = sampling::take_n(&fields, &app.config.limits)?;
    let mut sampling = sampling::take(&fields, &app.config.sampling_defaults)?;
    sampling.max_tokens = sampling.max_tokens.or(app.config.sampling_defaults.max_tokens);
    let config = app.runtime.config();
    let keep = sampling::take_truncation(&fields, &sampling, config.max_context)?;
    app.note_unknown(&fields)?;
    sampling.params.logprobs = logprobs;
    let prompt_logprobs = sampling.params.prompt_logprobs.is_some();
    sampling.check(config.vocab_size)?;
    let admitted = admit(call, &[body.len()], n)?;
    let (shape, echo) = (Shape::Chat, false);
    let inference =
        Inference { shape, target, n, sampling, streaming, echo, logprobs, prompt_logprobs, return_token_ids };
    Ok(Asked { inference, admitted, input, keep })
}

/// Messages → ids.
pub(crate) fn encode(app: &App, text: &TextModel, input: &ChatInput) -> Result<Vec<u32>, ApiError> {
    text.encode_chat(input, app.runtime.config().max_context).map_err(|error| text_error(&error))
}

/// The fields that the chat template sees.
pub(crate) fn take_input(app: &App, fields: &Fields) -> Result<ChatInput, ApiError> {
    let limits = &app.config.limits;
    let messages: Vec<Map<String, Value>> = fields.require("messages")?;
    if messages.is_empty() || messages.len() > limits.max_messages {
        let message = format!("messages has {} entries, it must have 1 to {}", messages.len(), limits.max_messages);
        return Err(ApiError::invalid("messages", message));
    }
    for (index, message) in messages.iter().enumerate() {
        check_message(index, message)?;
    }
    let bytes: usize = messages.iter().map(content_bytes).sum();
    if bytes > limits.max_message_bytes {
        let message = format!("messages have {bytes} bytes of content, the limit is {}", limits.max_message_bytes);
        return Err(ApiError::invalid("messages", message));
    }
    Ok(ChatInput {
        messages: Value::Array(messages.into_iter().map(Value::Object).collect()),
        ..take_template(fields)?
    })
}

/// What the template is told, without messages yet.
pub(crate) fn take_template(fields: &Fields) -> Result<ChatInput, ApiError> {
    let continue_final_message = fields.take("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.take("add_generation_prompt")?.unwrap_or(!continue_final_message);
    if add_generation_prompt && continue_final_message {
        let message = "continue_final_message and add_generation_prompt exclude each other";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    Ok(ChatInput {
        add_generation_prompt,
        continue_final_message,
        kwargs: fields.take("chat_template_kwargs")?.unwrap_or_default(),
        now_unix_s: unix_time_s() as i64,
        ..ChatInput::default()
    })
}

/// A role, and content that is text or a list. What is in a list is looked at when it is rendered.
fn check_message(index: usize, message: &Map<String, Value>) -> Result<(), ApiError> {
    let invalid = |what: &str| Err(ApiError::invalid("messages", format!("messages[{index}] {what}")));
    if message.get("role").and_then(Value::as_str).is_none_or(str::is_empty) {
        return invalid("has no role");
    }
    if message.get("tool_calls").is_some_and(|calls| !calls.is_null() && calls.as_array().is_none_or(|c| !c.is_empty()))
    {
        return Err(ApiError::unsupported(
            "messages",
            format!("messages[{index}] has tool_calls, which are not supported"),
        ));
    }
    match message.get("content") {
        Some(Value::String(_) | Value::Array(_)) => Ok(()),
        _ => invalid("has no content, a string or a list of text parts"),
    }
}

fn content_bytes(message: &Map<String, Value>) -> usize {
    match message.get("content") {
        Some(Value::Array(parts)) => parts.iter().filter_map(part_text).map(str::len).sum(),
        content => content.and_then(Value::as_str).map_or(0, str::len),
    }
}

/// `logprobs` turns them on, `top_logprobs` says how many.
fn take_logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let is_on = fields.take("logprobs")?.unwrap_or(false);
    let top: Option<u32> = fields.take_whole("top_logprobs")?;
    let most = SamplingParams::MAX_LOGPROBS;
    match (is_on, top) {
        (_, Some(top)) if top > most => {
            Err(ApiError::invalid("top_logprobs", format!("top_logprobs is {top}, it must be between 0 and {most}")))
        }
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => {
            Err(ApiError::invalid("top_logprobs", "top_logprobs is only allowed when logprobs is true"))
        }
    }
}
