//! `/tokenize`, `/detokenize` and `/tokenizer_info`: the model's text side, for clients that have no copy of it.

use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::{Map, Value, json};
use slora_text::{ChatInput, TextModel};

use crate::app::App;
use crate::chat;
use crate::completions::no_tokenizer;
use crate::errors::{ApiError, text_error};
use crate::fields::{Fields, values};
use crate::inference::check_text_len;
use crate::router::{Answer, Call, json_response};
use crate::schema::{self, Field, MODEL, boolean, token_id};

/// Fields of `/tokenize`: a text or a chat.
pub(crate) const TOKENIZE_FIELDS: &[Field] = &[
    MODEL,
    Field::optional("prompt", "The text; either this or `messages` must be there.", schema::text),
    Field::optional("messages", "The conversation.", chat::messages),
    Field::optional(
        "add_special_tokens",
        "Whether special tokens are added to a text; a template has its own.",
        boolean,
    ),
    Field::optional("return_token_strs", "Whether tokens are shown as text too.", boolean),
];

/// Fields of `/detokenize`.
pub(crate) const DETOKENIZE_FIELDS: &[Field] = &[
    MODEL,
    Field::required("tokens", "Token ids.", |bounds| json!({"type": "array", "items": token_id(bounds)})),
    Field::optional("skip_special_tokens", "Whether special tokens are left out of the text.", boolean),
];

fn text(app: &App) -> Result<Arc<TextModel>, ApiError> {
    app.runtime.text().cloned().ok_or_else(no_tokenizer)
}

/// The caller must be allowed to use the model.
fn check_model(call: &Call, fields: &Fields) -> Result<(), ApiError> {
    call.app.resolve(&call.caller, fields.take("model")?).map(drop)
}

/// Text or messages → ids.
pub(crate) async fn tokenize(call: Call) -> Answer {
    let (call, asked) = call.read(read_text).await?;
    let app = call.app.clone();
    let work = move || {
        let Asked { model, prompt, input, adds_special, shows_tokens } = asked;
        let ids = match prompt {
            Some(prompt) => {
                check_text_len(&app, prompt.len())?;
                model.encode(&prompt, adds_special).map_err(|error| text_error(&error))?
            }
            None => chat::encode(&app, &model, &input)?,
        };
        let strings = ids.iter().map(|id| model.token_text(*id).unwrap_or_default());
        let strings: Option<Vec<String>> = shows_tokens.then(|| strings.collect());
        let max_context = app.runtime.config().max_context;
        let answer = json!({"count": ids.len(), "max_model_len": max_context, "tokens": ids, "token_strs": strings});
        Ok(json_response(&answer))
    };
    call.app.text_pool.run(&call.caller.tenant.name, call.body.len(), work).await
}

/// What is to be tokenized: a text, or the chat of `input`.
struct Asked {
    model: Arc<TextModel>,
    prompt: Option<String>,
    input: ChatInput,
    adds_special: bool,
    shows_tokens: bool,
}

fn read_text(call: &mut Call) -> Result<Asked, ApiError> {
    let app = &call.app;
    let fields = call.fields(&call.body)?;
    check_model(call, &fields)?;
    let model = text(app)?;
    let shows_tokens = fields.take("return_token_strs")?.unwrap_or(false);
    let adds_special = fields.take("add_special_tokens")?.unwrap_or(true);
    let prompt: Option<String> = fields.take("prompt")?;
    if prompt.is_some() && fields.raw("messages").is_some() {
        return Err(ApiError::invalid("messages", "messages and prompt exclude each other"));
    }
    if prompt.is_none() && fields.raw("messages").is_none() {
        let message = "prompt and messages are missing; hint: give one of them";
        return Err(
            ApiError::new(StatusCode::BAD_REQUEST, "missing_required_parameter", message).with_param("messages")
        );
    }
    // A text needs no template, but what is said of one must still be well said.
    let input = if prompt.is_none() { chat::take_input(app, &fields)? } else { chat::take_template(&fields)? };
    app.note_unknown(&fields)?;
    Ok(Asked { model, prompt, input, adds_special, shows_tokens })
}

/// Ids → text.
pub(crate) async fn detokenize(call: Call) -> Answer {
    let (call, (model, ids, skips_special)) = call.read(read_ids).await?;
    let work = move || {
        let prompt = model.decode(&ids, skips_special).map_err(|error| text_error(&error))?;
        Ok(json_response(&json!({"prompt": prompt})))
    };
    call.app.text_pool.run(&call.caller.tenant.name, call.body.len(), work).await
}

fn read_ids(call: &mut Call) -> Result<(Arc<TextModel>, Vec<u32>, bool), ApiError> {
    let app = &call.app;
    let fields = call.fields(&call.body)?;
    check_model(call, &fields)?;
    let ids: Vec<u32> = values(fields.require("tokens")?);
    let skips_special = fields.take("skip_special_tokens")?.unwrap_or(false);
    app.note_unknown(&fields)?;
    let vocab_size = app.runtime.config().vocab_size;
    if let Some(id) = ids.iter().find(|id| **id >= vocab_size) {
        let message = format!("token {id} is not one of the {vocab_size} in the vocabulary");
        return Err(ApiError::invalid("tokens", message));
    }
    Ok((text(app)?, ids, skips_special))
}

/// What clients need to build prompts themselves.
pub(crate) async fn info(call: Call) -> Answer {
    let model = text(&call.app)?;
    let mut info: Map<String, Value> =
        model.special_tokens().map(|(name, token)| (name.to_owned(), json!(token))).collect();
    info.insert("eos_token_id".into(), json!(model.eos_token_id()));
    info.insert("stop_token_ids".into(), json!(model.stop_token_ids()));
    info.insert("vocab_size".into(), json!(model.vocab_size()));
    info.insert("model_max_length".into(), json!(call.app.runtime.config().max_context));
    info.insert("chat_template".into(), json!(model.chat_template().and_then(|template| template.source(false))));
    Ok(json_response(&Value::Object(info)))
}
