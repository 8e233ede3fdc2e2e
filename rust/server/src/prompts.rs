//! Prompts as they come, and as token ids.

use serde_json::value::RawValue;
use slora_text::{ChatInput, TextModel};

use crate::errors::{ApiError, text_error};
use crate::fields::type_error;

/// One prompt of a request.
pub(crate) enum PromptInput {
    Text(String),
    Ids(Vec<u32>),
    Chat(Box<ChatInput>),
}

/// A prompt with its ids, and its text if that is wanted.
pub(crate) struct Encoded {
    pub ids: Vec<u32>,
    pub text: String,
}

/// `prompt`: a string, a list of strings, token ids, or a list of token id lists.
pub(crate) fn parse(raw: &RawValue) -> Result<Vec<PromptInput>, ApiError> {
    let text = raw.get();
    let wrong = |error: serde_json::Error| type_error("prompt", &error);
    if text.starts_with('"') {
        return Ok(vec![PromptInput::Text(serde_json::from_str(text).map_err(wrong)?)]);
    }
    let Some(list) = text.strip_prefix('[') else {
        let message = "prompt must be a string, a list of strings, token ids, or a list of token id lists";
        return Err(ApiError::invalid("prompt", message).with_param("prompt"));
    };
    match list.trim_start().chars().next() {
        Some('"') => {
            let texts: Vec<String> = serde_json::from_str(text).map_err(wrong)?;
            Ok(texts.into_iter().map(PromptInput::Text).collect())
        }
        Some('[') => {
            let lists: Vec<Vec<u32>> = serde_json::from_str(text).map_err(wrong)?;
            Ok(lists.into_iter().map(PromptInput::Ids).collect())
        }
        Some(']') => Err(ApiError::invalid("prompt", "prompt is an empty list, it must hold at least 1 entry")),
        _ => Ok(vec![PromptInput::Ids(serde_json::from_str(text).map_err(wrong)?)]),
    }
}

impl PromptInput {
    /// Bytes of text that must be worked on; ids need no work.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Ids(_) => 0,
            Self::Chat(input) => {
                input.messages.as_array().map_or(0, |messages| messages.iter().map(message_bytes).sum())
            }
        }
    }

    /// No prompt has more tokens, whatever is in it.
    pub fn max_tokens(&self, max_context: u32) -> u64 {
        let bound = match self {
            Self::Ids(ids) => ids.len(),
            _ => self.text_bytes(),
        };
        (bound as u64).min(u64::from(max_context))
    }

    /// Makes ids. Text that cannot fit the context, however its tokens fall, is refused as it is.
    pub fn encode(
        self,
        model: Option<&TextModel>,
        max_context: u32,
        add_special_tokens: Option<bool>,
        wants_text: bool,
    ) -> Result<Encoded, ApiError> {
        let no_tokenizer = || ApiError::from(slora_runtime::RequestError::NoTokenizer("text cannot be tokenized"));
        let encode = |text: String, special: bool| {
            let model = model.ok_or_else(no_tokenizer)?;
            check_fits(&text, model, max_context)?;
            let ids = model.encode(&text, special).map_err(|error| text_error(&error))?;
            Ok(Encoded { ids, text })
        };
        match self {
            Self::Text(text) => encode(text, add_special_tokens.unwrap_or(true)),
            Self::Chat(input) => {
                let model = model.ok_or_else(no_tokenizer)?;
                let text = model.render_chat(&input).map_err(|error| text_error(&error))?;
                encode(text, add_special_tokens.unwrap_or(false))
            }
            Self::Ids(ids) => {
                let text = match model.filter(|_| wants_text) {
                    Some(model) => model.decode(&ids, false).map_err(|error| text_error(&error))?,
                    None => String::new(),
                };
                Ok(Encoded { ids, text })
            }
        }
    }
}

fn message_bytes(message: &serde_json::Value) -> usize {
    match &message["content"] {
        serde_json::Value::String(text) => text.len() + 16,
        other => other.to_string().len() + 16,
    }
}

fn check_fits(text: &str, model: &TextModel, max_context: u32) -> Result<(), ApiError> {
    let limit = (max_context as usize).saturating_mul(model.longest_token_bytes());
    if text.len() <= limit {
        return Ok(());
    }
    let message = format!(
        "this model's maximum context length is {max_context} tokens, but the prompt has {} bytes, \
         more than so many tokens hold",
        text.len()
    );
    Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "context_length_exceeded", message))
}
