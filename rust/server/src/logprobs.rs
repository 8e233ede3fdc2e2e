//! Log-probabilities in the shapes that clients know.

use serde_json::{Map, Value, json};
use slora_runtime::TokenLogprobs;
use slora_text::TextModel;

/// What stands for minus infinity, which JSON does not have.
const LEAST: f32 = -9999.0;

/// One position of a text.
pub(crate) struct Position<'a> {
    pub token: u32,
    /// Characters that it adds to the text: none where the text leaves it out.
    pub num_chars: usize,
    /// What is known of it: nothing, for the first one.
    pub found: Option<&'a TokenLogprobs>,
}

/// A token as text; a model without a tokenizer shows its number.
fn shown(text: Option<&TextModel>, token: u32) -> String {
    match text {
        Some(model) => model.token_text(token).unwrap_or_default(),
        None => format!("token_id:{token}"),
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LEAST }
}

/// OpenAI's completions: parallel lists, and a map of the best tokens with the chosen one among them.
/// `offset`: characters before the first token; it moves on. `text_len`: characters of the text, if it is known: the tokens of
/// a stop string that was cut off lie at its end.
pub(crate) fn completion(
    text: Option<&TextModel>,
    positions: &[Position],
    top: u32,
    offset: &mut usize,
    text_len: Option<usize>,
) -> Value {
    let (mut tokens, mut chosen, mut best, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Position { token, num_chars, found } in positions {
        let name = shown(text, *token);
        offsets.push(text_len.map_or(*offset, |len| len.min(*offset)));
        *offset += num_chars;
        chosen.push(found.map(|found| finite(found.logprob)));
        best.push(match found {
            Some(found) if top > 0 => best_map(text, &name, found),
            _ => Value::Null,
        });
        tokens.push(name);
    }
    let best = if top > 0 { json!(best) } else { Value::Null };
    json!({"tokens": tokens, "token_logprobs": chosen, "top_logprobs": best, "text_offset": offsets})
}

/// Two ids may look the same as text: the better one stands.
fn best_map(text: Option<&TextModel>, chosen: &str, found: &TokenLogprobs) -> Value {
    let mut map = Map::new();
    for (token, logprob) in &found.best {
        map.entry(shown(text, *token)).or_insert_with(|| json!(finite(*logprob)));
    }
    map.entry(chosen.to_owned()).or_insert_with(|| json!(finite(found.logprob)));
    Value::Object(map)
}

/// OpenAI's chat: a list of tokens with the best ones of each.
pub(crate) fn chat(text: Option<&TextModel>, positions: &[Position], top: u32) -> Value {
    let entry = |token: u32, logprob: f32| {
        let name = shown(text, token);
        json!({"token": name, "logprob": finite(logprob), "bytes": name.as_bytes()})
    };
    let content = positions.iter().filter_map(|position| {
        let found = position.found?;
        let mut line = entry(position.token, found.logprob);
        let best = found.best.iter().take(top as usize).map(|(token, logprob)| entry(*token, *logprob));
        line["top_logprobs"] = best.collect();
        Some(line)
    });
    json!({"content": content.collect::<Value>()})
}

/// The extension `prompt_logprobs`: a map from token ids for each prompt token, null for the first.
pub(crate) fn prompt(text: Option<&TextModel>, prompt: &[u32], found: &[TokenLogprobs]) -> Value {
    let entry = |token: u32, logprob: f32, rank: Option<usize>| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": shown(text, token)});
    let maps = prompt.iter().skip(1).zip(found).map(|(token, found)| {
        let mut map = Map::new();
        for (rank, (best, logprob)) in found.best.iter().enumerate() {
            map.insert(best.to_string(), entry(*best, *logprob, Some(rank + 1)));
        }
        map.entry(token.to_string()).or_insert_with(|| entry(*token, found.logprob, None));
        Value::Object(map)
    });
    std::iter::once(Value::Null).chain(maps).collect()
}
