//! `POST /v1/completions`: text or token ids, one prompt or several.

use serde_json::value::RawValue;
use slora_text::TextModel;

use crate::errors::{ApiError, text_error};
use crate::fields::{Fields, Whole, type_error, values};
use crate::inference::{Admitted, Inference, admit, check_text_len, fit, run};
use crate::reply::{Echo, Prompt, Shape};
use crate::router::{Answer, Call};
use crate::sampling::{self, take_streaming};
use crate::schema::{Field, MODEL, any_of, boolean, list, text, token_id};

/// Tokens that a completion has when it does not say how many.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// The route's own fields.
pub(crate) const FIELDS: &[Field] = &[
    MODEL,
    Field::required("prompt", "Text, token ids, or a list of either.", |bounds| {
        let ids = list(token_id(bounds));
        any_of(&[text(bounds), list(text(bounds)), ids.clone(), list(ids)])
    }),
    Field::optional("echo", "Whether the prompt comes before the text.", boolean),
    Field::optional("logprobs", "Log-probabilities, with so many best tokens for each.", sampling::logprobs),
    Field::optional("add_special_tokens", "Whether the tokenizer adds its special tokens to a text.", boolean),
];

/// A prompt as it was sent.
enum Given {
    Text(String),
    Ids(Vec<u32>),
}

impl Given {
    /// At most so many tokens; a special token may come before a text.
    fn max_tokens(&self) -> usize {
        match self {
            Self::Text(text) => text.len() + 1,
            Self::Ids(ids) => ids.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Ids(_) => 0,
        }
    }

    fn check_ids(&self, vocab_size: u32) -> Result<(), ApiError> {
        let Self::Ids(ids) = self else { return Ok(()) };
        ids.iter().find(|id| **id >= vocab_size).map_or(Ok(()), |id| {
            let message = format!("the prompt holds token {id}, the vocabulary has {vocab_size} tokens");
            Err(ApiError::invalid("prompt", message))
        })
    }
}

/// The route.
pub(crate) async fn complete(call: Call) -> Answer {
    let (call, asked) = call.read(read).await?;
    let Asked { inference, admitted, given, keep, add_special_tokens } = asked;
    let (app, echo, max_tokens) = (call.app.clone(), inference.echo, inference.sampling.max_tokens);
    let has_text = echo || given.iter().any(|prompt| matches!(prompt, Given::Text(_)));
    let bytes = given.iter().map(Given::bytes).sum();
    let text = call.app.runtime.text().cloned();
    let work = move || {
        let prompt = |given| {
            let mut ids = ids(text.as_deref(), given, add_special_tokens)?;
            fit(&app, &mut ids, keep, max_tokens)?;
            let echo = if echo { Echo::new(text.as_ref(), &ids) } else { Ok(Echo::default()) };
            Ok(Prompt { ids, echo: echo.map_err(|error| text_error(&error))? })
        };
        given.into_iter().map(prompt).collect::<Result<Vec<Prompt>, ApiError>>()
    };
    // Ids need no work that is worth a thread's while.
    let prompts = if has_text { call.app.text_pool.run(&call.caller.tenant.name, bytes, work).await? } else { work()? };
    run(call, admitted, inference, prompts).await
}

/// A request that was understood and let in.
struct Asked {
    inference: Inference,
    admitted: Admitted,
    given: Vec<Given>,
    /// So many of each prompt's last tokens.
    keep: usize,
    add_special_tokens: bool,
}

fn read(call: &mut Call) -> Result<Asked, ApiError> {
    let app = call.app.clone();
    let body = call.body.clone();
    let fields = call.fields(&body)?;
    let target = app.resolve(&call.caller, fields.take("model")?)?;
    call.record.facts().adapter = target.adapter.clone();
    let streaming = take_streaming(&fields)?;
    let given = take_prompt(&fields)?;
    let echo = fields.take("echo")?.unwrap_or(false);
    let logprobs: Option<u32> = fields.take_whole("logprobs")?;
    let add_special_tokens = fields.take("add_special_tokens")?.unwrap_or(true);
    let return_token_ids = fields.take("return_token_ids")?.unwrap_or(false);
    let n = sampling::take_n(&fields, &app.config.limits)?;
    let mut sampling = sampling::take(&fields, &app.config.sampling_defaults)?;
    sampling.max_tokens.get_or_insert(app.config.sampling_defaults.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
    let config = app.runtime.config();
    let keep = sampling::take_truncation(&fields, &sampling, config.max_context)?;
    app.note_unknown(&fields)?;
    sampling.params.logprobs = logprobs;
    let prompt_logprobs = sampling.params.prompt_logprobs.is_some();
    if echo && logprobs.is_some() {
        sampling.params.prompt_logprobs = sampling.params.prompt_logprobs.max(logprobs);
    }
    sampling.check(config.vocab_size)?;
    given.iter().try_for_each(|prompt| prompt.check_ids(config.vocab_size))?;
    given.iter().try_for_each(|prompt| check_text_len(&app, prompt.bytes()))?;
    let bounds: Vec<usize> = given.iter().map(Given::max_tokens).collect();
    let admitted = admit(call, &bounds, n)?;
    let shape = Shape::Completion;
    let inference =
        Inference { shape, target, n, sampling, streaming, echo, logprobs, prompt_logprobs, return_token_ids };
    Ok(Asked { inference, admitted, given, keep, add_special_tokens })
}

/// A string, a list of strings, ids, or a list of lists of ids.
fn take_prompt(fields: &Fields) -> Result<Vec<Given>, ApiError> {
    let Some(raw) = fields.raw("prompt") else {
        let message = "prompt is missing";
        return Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "missing_required_parameter", message)
            .with_param("prompt"));
    };
    let given = parse_prompt(raw).map_err(|error| type_error("prompt", &error))?;
    if given.is_empty() || given.iter().any(|prompt| matches!(prompt, Given::Ids(ids) if ids.is_empty())) {
        return Err(ApiError::invalid("prompt", "the prompt is empty, it must hold at least 1 token"));
    }
    Ok(given)
}

fn parse_prompt(raw: &RawValue) -> Result<Vec<Given>, serde_json::Error> {
    let text = raw.get();
    // The first character that is neither blank nor the outer bracket tells which of the four it is.
    let inner = text.trim_start_matches(['[', ' ', '\t', '\n', '\r']).chars().next();
    let brackets = text.chars().take_while(|c| !matches!(c, '0'..='9' | '"' | ']')).filter(|c| *c == '[').count();
    match (brackets, inner) {
        (0, _) => Ok(vec![Given::Text(serde_json::from_str(text)?)]),
        (1, Some('"')) => Ok(serde_json::from_str::<Vec<String>>(text)?.into_iter().map(Given::Text).collect()),
        (1, _) => Ok(vec![Given::Ids(values(serde_json::from_str(text)?))]),
        _ => {
            let lists: Vec<Vec<Whole<u32>>> = serde_json::from_str(text)?;
            Ok(lists.into_iter().map(|ids| Given::Ids(values(ids))).collect())
        }
    }
}

fn ids(text: Option<&TextModel>, given: Given, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
    match (given, text) {
        (Given::Ids(ids), _) => Ok(ids),
        (Given::Text(prompt), Some(model)) => {
            model.encode(&prompt, add_special_tokens).map_err(|error| text_error(&error))
        }
        (Given::Text(_), None) => Err(no_tokenizer()),
    }
}

/// The model folder has no tokenizer.
pub(crate) fn no_tokenizer() -> ApiError {
    let message = "the model folder has no tokenizer.json; hint: send token ids";
    ApiError::new(axum::http::StatusCode::BAD_REQUEST, "no_tokenizer", message).with_param("prompt")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(json: &str) -> Option<(usize, bool)> {
        let raw: Box<RawValue> = serde_json::from_str(json).unwrap();
        let given = parse_prompt(&raw).ok()?;
        Some((given.len(), given.iter().all(|prompt| matches!(prompt, Given::Ids(_)))))
    }

    #[test]
    fn a_prompt_has_four_shapes() {
        assert_eq!(parsed(r#""[1]""#), Some((1, false)));
        assert_eq!(parsed(r#" ["a", "b"] "#), Some((2, false)));
        assert_eq!(parsed("[1, 2, 3]"), Some((1, true)));
        assert_eq!(parsed("[ [1], [2, 3] ]"), Some((2, true)));
        for bad in ["1", "{}", "[\"a\", 1]", "[1, \"a\"]", "[[1], 2]", "[-1]", "[1.5]", "[[[1]]]", "true"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }
}
