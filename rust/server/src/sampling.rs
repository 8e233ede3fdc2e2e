//! Request fields → how tokens are chosen.

use std::collections::HashMap;

use serde_json::{Value, json};
use slora_core::SamplingParams;
use slora_runtime::Sampling;
use slora_text::{MAX_STOP_CHARS, MAX_STOPS};

use crate::config::{Limits, SamplingDefaults};
use crate::errors::ApiError;
use crate::fields::{Fields, type_error};
use crate::schema::{Bounds, Field, any_of, boolean, integer, number, number_above, or_default, token_id};

/// Fields that both routes have, `stream` and what is ignored or refused included.
pub(crate) const FIELDS: &[Field] = &[
    Field::optional("max_tokens", "Most tokens to generate; `max_completion_tokens` goes before it.", max_tokens),
    Field::optional("max_completion_tokens", "Most tokens to generate.", max_tokens),
    Field::optional("n", "Choices for each prompt; over all prompts no more than the maximum.", |bounds| {
        integer(1, bounds.max_n as i64)
    }),
    Field::optional("temperature", "0: the likeliest token.", |bounds| {
        or_default(number(0.0, 100.0), bounds.defaults.temperature)
    }),
    Field::optional("top_p", "Keeps the likeliest tokens that together have this probability.", |bounds| {
        or_default(number_above(0.0, 1.0), bounds.defaults.top_p)
    }),
    Field::optional("top_k", "Keeps so many of the likeliest tokens; 0 and -1: all.", |bounds| {
        or_default(integer(-1, i64::MAX), bounds.defaults.top_k)
    }),
    Field::optional("min_p", "Drops tokens less likely than this share of the likeliest.", |bounds| {
        or_default(number(0.0, 1.0), bounds.defaults.min_p)
    }),
    Field::optional("presence_penalty", "For tokens that the output holds.", |_| number(-2.0, 2.0)),
    Field::optional("frequency_penalty", "For every time that the output holds a token.", |_| number(-2.0, 2.0)),
    Field::optional("repetition_penalty", "For tokens in prompt or output; 1: off.", |bounds| {
        or_default(number_above(0.0, 100.0), bounds.defaults.repetition_penalty)
    }),
    Field::optional("logit_bias", "From token ids to what is added to their logits.", |_| {
        json!({
            "type": "object", "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
            "additionalProperties": number(-100.0, 100.0), "maxProperties": SamplingParams::MAX_BIAS,
        })
    }),
    Field::optional("seed", "The same seed and request: the same tokens.", |_| integer(i64::MIN, i64::MAX)),
    Field::optional("stop", "Strings that end the text.", |_| {
        let stop = json!({"type": "string", "maxLength": MAX_STOP_CHARS});
        any_of(&[stop.clone(), json!({"type": "array", "items": stop, "maxItems": MAX_STOPS})])
    }),
    Field::optional(
        "stop_token_ids",
        "Further tokens that end the text.",
        |bounds| json!({"type": "array", "items": token_id(bounds), "maxItems": SamplingParams::MAX_STOP_TOKENS}),
    ),
    Field::optional("include_stop_str_in_output", "Whether a stop string is part of the text.", boolean),
    Field::optional("min_tokens", "Tokens before which nothing stops.", max_tokens),
    Field::optional("ignore_eos", "Whether end-of-sequence tokens are tokens like any other.", boolean),
    Field::optional("skip_special_tokens", "Whether special tokens are left out of the text.", boolean),
    Field::optional("truncate_prompt_tokens", "Keeps so many of the prompt's last tokens; -1: what fits.", |_| {
        any_of(&[integer(-1, -1), integer(1, i64::MAX)])
    }),
    Field::optional("prompt_logprobs", "Log-probabilities of the prompt, with so many best tokens.", logprobs),
    Field::optional("return_token_ids", "Whether the answer has token ids too.", boolean),
    Field::optional("stream", "Whether the answer is a stream of events.", boolean),
    Field::optional("stream_options", "What a stream carries besides; only with `stream`.", |_| {
        let flag = json!({"type": ["boolean", "null"]});
        let flags = json!({"include_usage": flag, "continuous_usage_stats": flag, "include_obfuscation": flag});
        json!({"type": "object", "properties": flags})
    }),
    Field::ignored("user"),
    Field::ignored("metadata"),
    Field::ignored("service_tier"),
    Field::ignored("parallel_tool_calls"),
    Field::ignored("safety_identifier"),
    Field::ignored("prompt_cache_key"),
    Field::ignored("verbosity"),
    Field::ignored("request_id"),
    Field::unsupported("best_of", &["1"]),
    Field::unsupported("suffix", &["\"\""]),
    Field::unsupported("tools", &["[]"]),
    Field::unsupported("tool_choice", &["\"none\"", "\"auto\""]),
    Field::unsupported("functions", &["[]"]),
    Field::unsupported("function_call", &["\"none\"", "\"auto\""]),
    Field::unsupported("response_format", &["{\"type\":\"text\"}"]),
    Field::unsupported("structured_outputs", &["{}"]),
    Field::unsupported("guided_json", &[]),
    Field::unsupported("guided_regex", &[]),
    Field::unsupported("guided_choice", &["[]"]),
    Field::unsupported("guided_grammar", &[]),
    Field::unsupported("guided_json_object", &["false"]),
    Field::unsupported("allowed_token_ids", &["[]"]),
    Field::unsupported("bad_words", &["[]"]),
    Field::unsupported("use_beam_search", &["false"]),
    Field::unsupported("length_penalty", &["1", "1.0"]),
    Field::unsupported("early_stopping", &["false"]),
    Field::unsupported("modalities", &["[\"text\"]", "[]"]),
    Field::unsupported("audio", &[]),
    Field::unsupported("prediction", &[]),
    Field::unsupported("web_search_options", &[]),
    Field::unsupported("store", &["false"]),
    Field::unsupported("priority", &["0"]),
    Field::unsupported("cache_salt", &["\"\""]),
    Field::unsupported("spaces_between_special_tokens", &["true"]),
    Field::unsupported("return_tokens_as_token_ids", &["false"]),
    Field::unsupported("lora_path", &["[]"]),
    Field::unsupported("kv_transfer_params", &["{}"]),
    Field::unsupported("logits_processors", &["[]"]),
    Field::unsupported("mm_processor_kwargs", &["{}"]),
];

fn max_tokens(bounds: &Bounds) -> Value {
    integer(0, bounds.max_context)
}

/// How many log-probabilities a position may have.
pub(crate) fn logprobs(_: &Bounds) -> Value {
    integer(0, SamplingParams::MAX_LOGPROBS)
}

/// Choices for each prompt.
pub(crate) fn take_n(fields: &Fields, limits: &Limits) -> Result<u32, ApiError> {
    let n: u32 = fields.take_whole("n")?.unwrap_or(1);
    if n == 0 || n as usize > limits.max_n {
        return Err(ApiError::invalid("n", format!("n is {n}, it must be 1 to {}", limits.max_n)));
    }
    Ok(n)
}

/// Takes the fields of sampling. `prompt` and what only one route has are taken by the route before.
pub(crate) fn take(fields: &Fields, defaults: &SamplingDefaults) -> Result<Sampling, ApiError> {
    let max_completion: Option<u32> = fields.take_whole("max_completion_tokens")?;
    let max_tokens: Option<u32> = fields.take_whole("max_tokens")?;
    let top_k: i64 = fields.take_whole("top_k")?.or(defaults.top_k).unwrap_or(0);
    let params = SamplingParams {
        temperature: fields.take("temperature")?.or(defaults.temperature).unwrap_or(1.0),
        top_p: fields.take("top_p")?.or(defaults.top_p).unwrap_or(1.0),
        top_k: top_k_tokens(top_k)?,
        min_p: fields.take("min_p")?.or(defaults.min_p).unwrap_or(0.0),
        presence_penalty: fields.take("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: fields.take("frequency_penalty")?.unwrap_or(0.0),
        repetition_penalty: fields.take("repetition_penalty")?.or(defaults.repetition_penalty).unwrap_or(1.0),
        logit_bias: logit_bias(fields)?,
        min_tokens: fields.take_whole("min_tokens")?.unwrap_or(0),
        ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
        stop_token_ids: fields.take_wholes("stop_token_ids")?.unwrap_or_default(),
        prompt_logprobs: fields.take_whole("prompt_logprobs")?,
        ..SamplingParams::default()
    };
    Ok(Sampling {
        params,
        max_tokens: max_completion.or(max_tokens),
        seed: fields.take_whole::<i64>("seed")?.map(|seed| seed as u64),
        stops: stops(fields)?,
        include_stop: fields.take("include_stop_str_in_output")?.unwrap_or(false),
        skip_special_tokens: fields.take("skip_special_tokens")?.unwrap_or(true),
    })
}

fn top_k_tokens(top_k: i64) -> Result<u32, ApiError> {
    match top_k {
        -1 => Ok(0),
        0.. => Ok(u32::try_from(top_k).unwrap_or(u32::MAX).min(i32::MAX as u32)),
        _ => Err(ApiError::invalid("top_k", format!("top_k is {top_k}, it must be -1, 0 or a number of tokens"))),
    }
}

/// How many of a prompt's last tokens are kept. -1: what the context holds beside the output.
pub(crate) fn take_truncation(fields: &Fields, sampling: &Sampling, max_context: u32) -> Result<usize, ApiError> {
    match fields.take_whole::<i64>("truncate_prompt_tokens")? {
        None => Ok(usize::MAX),
        Some(-1) => Ok(max_context.saturating_sub(sampling.max_tokens.unwrap_or(1)) as usize),
        Some(keep @ 1..) => Ok(keep as usize),
        Some(keep) => {
            let message = format!("truncate_prompt_tokens is {keep}, it must be -1 or at least 1");
            Err(ApiError::invalid("truncate_prompt_tokens", message))
        }
    }
}

/// A map from token ids, as strings, to numbers.
fn logit_bias(fields: &Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.take::<HashMap<String, f32>>("logit_bias")? else { return Ok(Vec::new()) };
    let mut bias = Vec::with_capacity(map.len());
    for (token, value) in map {
        let Some(id) = token.parse::<u32>().ok().filter(|id| id.to_string() == token) else {
            let message = format!("logit_bias: {:?} is not a token id", crate::fields::shown(&token));
            return Err(ApiError::invalid("logit_bias", message));
        };
        if !(-100.0..=100.0).contains(&value) {
            let message = format!("logit_bias is {value} for token {id}, it must be between -100 and 100");
            return Err(ApiError::invalid("logit_bias", message));
        }
        bias.push((id, value));
    }
    bias.sort_unstable_by_key(|(id, _)| *id);
    Ok(bias)
}

/// A string, or a list of them.
fn stops(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let Some(raw) = fields.raw("stop") else { return Ok(Vec::new()) };
    let parsed = if raw.get().starts_with('"') {
        serde_json::from_str(raw.get()).map(|stop| vec![stop])
    } else {
        serde_json::from_str::<Vec<String>>(raw.get())
    };
    let stops: Vec<String> = parsed.map_err(|error| type_error("stop", &error))?;
    if stops.len() > MAX_STOPS {
        return Err(ApiError::invalid("stop", format!("stop has {} entries, the limit is {MAX_STOPS}", stops.len())));
    }
    // An empty string stops nothing: clients send it for "none".
    Ok(stops.into_iter().filter(|stop| !stop.is_empty()).collect())
}

/// What a stream is asked to carry.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Streaming {
    pub is_on: bool,
    pub include_usage: bool,
    pub continuous_usage: bool,
}

/// `stream` and `stream_options`.
pub(crate) fn take_streaming(fields: &Fields) -> Result<Streaming, ApiError> {
    let is_on = fields.take("stream")?.unwrap_or(false);
    let Some(options) = fields.take::<Value>("stream_options")? else {
        return Ok(Streaming { is_on, ..Streaming::default() });
    };
    if !is_on {
        return Err(ApiError::invalid("stream_options", "stream_options is only allowed when stream is true"));
    }
    let Some(options) = options.as_object() else {
        return Err(ApiError::invalid("stream_options", "stream_options must be an object"));
    };
    let flag = |name: &str| match options.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(_) => Err(ApiError::invalid("stream_options", format!("stream_options.{name} must be true or false"))),
    };
    let continuous_usage = flag("continuous_usage_stats")?;
    flag("include_obfuscation")?;
    Ok(Streaming { is_on, include_usage: flag("include_usage")? || continuous_usage, continuous_usage })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(body: &str) -> Result<Fields<'_>, ApiError> {
        Fields::parse(body.as_bytes(), 64, &[FIELDS])
    }

    fn taken(body: &str) -> Result<Sampling, ApiError> {
        take(&parsed(body)?, &SamplingDefaults::default())
    }

    #[test]
    fn values_that_say_nothing_pass_and_others_are_refused_by_name() {
        assert!(taken(r#"{"tools": [], "response_format": {"type": "text"}, "best_of": 1, "suffix": null}"#).is_ok());
        let refused = [
            r#"{"tools": [{}]}"#,
            r#"{"best_of": 2}"#,
            r#"{"response_format": {"type": "json_object"}}"#,
            r#"{"guided_json": {}}"#,
            r#"{"suffix": "x"}"#,
            r#"{"priority": 1}"#,
        ];
        for body in refused {
            let error = taken(body).unwrap_err();
            assert_eq!(error.code, "unsupported_parameter", "{body}");
            assert!(body.contains(error.param.as_deref().unwrap()), "{body}");
        }
    }

    #[test]
    fn limits_hold_at_their_edges() {
        let n = |body: &str| take_n(&parsed(body).unwrap(), &Limits::default());
        assert!(n(r#"{"n": 128}"#).is_ok());
        assert!(n(r#"{"n": 129}"#).is_err());
        assert!(n(r#"{"n": 0}"#).is_err());
        assert_eq!(taken(r#"{"top_k": -1}"#).unwrap().params.top_k, 0);
        assert!(taken(r#"{"top_k": -2}"#).is_err());
        let stops = |count: usize, len: usize| {
            let stops = vec!["x".repeat(len); count];
            let body = serde_json::json!({"stop": stops}).to_string();
            taken(&body).is_ok_and(|sampling| sampling.check(100).is_ok())
        };
        assert_eq!([stops(16, 256), stops(17, 256), stops(16, 257)], [true, false, false]);
        assert_eq!(taken(r#"{"stop": ""}"#).unwrap().stops.len(), 0);
        assert!(taken(r#"{"logit_bias": {"1": 101}}"#).is_err());
        for token in ["x", "+1", "01", "-1", ""] {
            assert!(taken(&format!("{{\"logit_bias\": {{\"{token}\": 1}}}}")).is_err(), "{token}");
        }
    }

    #[test]
    fn both_names_of_the_token_limit_work() {
        assert_eq!(taken(r#"{"max_tokens": 5}"#).unwrap().max_tokens, Some(5));
        assert_eq!(taken(r#"{"max_tokens": 5, "max_completion_tokens": 7}"#).unwrap().max_tokens, Some(7));
        assert!(taken(r#"{"max_tokens": -1}"#).is_err());
    }
}
