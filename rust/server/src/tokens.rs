//! `/tokenize`, `/detokenize` and `/tokenizer_info`.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use serde_json::json;
use slora_runtime::RequestError;
use slora_text::TextModel;

use crate::admission::{Load, Reservation};
use crate::app::{App, Call};
use crate::chat;
use crate::errors::{ApiError, text_error};
use crate::fields::Fields;
use crate::model_name;
use crate::prompts::PromptInput;
use crate::routes::json_response;

fn text_model(app: &App) -> Result<Arc<TextModel>, ApiError> {
    let none = || RequestError::NoTokenizer("text and ids cannot be turned into each other");
    app.text.clone().ok_or_else(|| none().into())
}

async fn read<T: Send + 'static>(
    call: &mut Call,
    parse: fn(&App, &mut Fields<'_>) -> Result<T, ApiError>,
) -> Result<(T, usize, Reservation), ApiError> {
    let bytes = crate::body::announced(&call.headers).unwrap_or(0);
    let (body, reservation) = call.read(Load { bytes, ..Load::default() }).await?;
    let num_bytes = body.len();
    Ok((call.parse(body, parse).await?, num_bytes, reservation))
}

struct Tokenize {
    model: Option<String>,
    prompt: PromptInput,
    add_special_tokens: Option<bool>,
    token_strings: bool,
}

fn parse_tokenize(app: &App, fields: &mut Fields<'_>) -> Result<Tokenize, ApiError> {
    let prompt = match fields.take::<String>("prompt")? {
        Some(text) => PromptInput::Text(text),
        None => PromptInput::Chat(Box::new(chat::take_input(app, fields)?)),
    };
    fields.refuse("tools", &["[]"])?;
    Ok(Tokenize {
        model: fields.take("model")?,
        prompt,
        add_special_tokens: fields.take("add_special_tokens")?,
        token_strings: fields.take("return_token_strs")?.unwrap_or(false),
    })
}

/// Text or messages → ids.
pub(crate) async fn tokenize(mut call: Call) -> Result<Response<Body>, ApiError> {
    let (wanted, bytes, _reservation) = read(&mut call, parse_tokenize).await?;
    model_name::resolve(&call.app, &call.caller, wanted.model)?;
    let model = text_model(&call.app)?;
    let max_context = call.app.runtime.config().max_context;
    let work = move || {
        let encoded = wanted.prompt.encode(Some(&model), max_context, wanted.add_special_tokens, false)?;
        let strings: Option<Vec<_>> =
            wanted.token_strings.then(|| encoded.ids.iter().map(|id| model.token_text(*id)).collect());
        Ok(
            json!({"count": encoded.ids.len(), "max_model_len": max_context, "tokens": encoded.ids, "token_strs": strings}),
        )
    };
    Ok(json_response(&call.app.text_pool.run(bytes, work).await?))
}

/// Ids → text.
pub(crate) async fn detokenize(mut call: Call) -> Result<Response<Body>, ApiError> {
    let parse = |_: &App, fields: &mut Fields<'_>| Ok((fields.take("model")?, fields.require("tokens")?));
    let ((name, tokens), bytes, _reservation) = read::<(Option<String>, Vec<u32>)>(&mut call, parse).await?;
    model_name::resolve(&call.app, &call.caller, name)?;
    let model = text_model(&call.app)?;
    let work = move || model.decode(&tokens, false).map_err(|error| text_error(&error));
    let prompt = call.app.text_pool.run(bytes, work).await?;
    Ok(json_response(&json!({"prompt": prompt})))
}

/// What an evaluation harness needs to make prompts itself.
pub(crate) async fn info(call: Call) -> Result<Response<Body>, ApiError> {
    let model = text_model(&call.app)?;
    let mut info = json!({
        "vocab_size": model.vocab_size(),
        "model_max_length": call.app.runtime.config().max_context,
        "eos_token_id": model.eos_token_id(),
        "chat_template": model.chat_template().and_then(|template| template.source(false)),
    });
    for (name, token) in model.special_tokens() {
        info[name] = json!(token);
    }
    Ok(json_response(&info))
}
