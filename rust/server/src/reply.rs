//! Answers of the two completion routes, whole and in pieces.

use std::io::Write;
use std::sync::Arc;

use serde_json::{Value, json};
use slora_runtime::{Delta, End, Piece, TokenLogprobs};
use slora_text::{Detokenizer, TextError, TextModel};

use crate::logprobs::{self, Position};
use crate::sampling::Streaming;

/// Which route answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

/// A prompt as the answer may show it.
pub(crate) struct Prompt {
    pub ids: Vec<u32>,
    /// Empty, unless the prompt is to be echoed.
    pub echo: Echo,
}

/// A prompt's text, special tokens left out.
#[derive(Default)]
pub(crate) struct Echo {
    text: String,
    /// Characters that each token adds to it.
    num_chars: Vec<usize>,
}

impl Echo {
    /// `model`: without one no token has text.
    pub fn new(model: Option<&Arc<TextModel>>, ids: &[u32]) -> Result<Self, TextError> {
        let Some(model) = model else { return Ok(Self { text: String::new(), num_chars: vec![0; ids.len()] }) };
        let mut detokenizer = Detokenizer::new(model, true);
        let mut echo = Self::default();
        for id in ids {
            let text = detokenizer.push(*id)?;
            echo.num_chars.push(text.chars().count());
            echo.text.push_str(&text);
        }
        let rest = detokenizer.finish();
        if let Some(last) = echo.num_chars.last_mut() {
            *last += rest.chars().count();
        }
        echo.text.push_str(&rest);
        Ok(echo)
    }
}

/// What all parts of an answer share.
pub(crate) struct Reply {
    pub shape: Shape,
    pub id: String,
    pub created: u64,
    /// As the client wrote it.
    pub model: String,
    pub text: Option<Arc<TextModel>>,
    pub prompts: Vec<Prompt>,
    /// Choices of each prompt.
    pub n: usize,
    pub echo: bool,
    /// Best tokens to show with each; `None`: no log-probabilities.
    pub logprobs: Option<u32>,
    pub prompt_logprobs: bool,
    pub return_token_ids: bool,
    pub streaming: Streaming,
}

/// Everything of one choice.
#[derive(Default)]
pub(crate) struct Collected {
    pub text: String,
    pub tokens: Vec<u32>,
    /// Characters that each token adds to the text.
    pub num_chars: Vec<usize>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Vec<TokenLogprobs>,
    pub end: Option<End>,
}

impl Collected {
    pub fn add(&mut self, delta: Delta) {
        for piece in delta.pieces {
            self.text.push_str(&piece.text);
            self.tokens.push(piece.token);
            self.num_chars.push(piece.num_chars);
            self.logprobs.extend(piece.logprobs);
        }
        self.text.push_str(&delta.tail);
        self.prompt_logprobs.extend(delta.prompt_logprobs);
        self.end = delta.end;
    }

    fn positions(&self) -> impl Iterator<Item = Position<'_>> {
        positions(&self.tokens, &self.num_chars, self.logprobs.iter().map(Some))
    }
}

fn positions<'a>(
    tokens: &[u32],
    num_chars: &[usize],
    found: impl Iterator<Item = Option<&'a TokenLogprobs>>,
) -> impl Iterator<Item = Position<'a>> {
    let tokens = tokens.iter().zip(num_chars).zip(found);
    tokens.map(|((token, num_chars), found)| Position { token: *token, num_chars: *num_chars, found })
}

/// Why a choice ended, as clients read it, and what stopped it.
fn finish(end: Option<&End>, stops: &[String]) -> (Option<&'static str>, Value) {
    match end {
        Some(End::StopToken(token)) => (Some("stop"), json!(token)),
        Some(End::StopString(index)) => (Some("stop"), json!(stops.get(*index))),
        Some(End::Length) => (Some("length"), Value::Null),
        _ => (None, Value::Null),
    }
}

impl Reply {
    fn object(&self, is_chunk: bool) -> &'static str {
        match (self.shape, is_chunk) {
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Chat, false) => "chat.completion",
            (Shape::Completion, _) => "text_completion",
        }
    }

    fn prompt(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.n]
    }

    /// Prompt tokens of the request: each prompt counts once.
    pub fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.ids.len()).sum()
    }

    pub fn usage(&self, completion_tokens: u64) -> Value {
        let prompt_tokens = self.prompt_tokens() as u64;
        json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        })
    }

    /// The whole answer.
    pub fn whole(&self, choices: &[Collected], stops: &[String]) -> Value {
        let completion_tokens = choices.iter().map(|choice| choice.tokens.len() as u64).sum();
        let list: Vec<Value> =
            choices.iter().enumerate().map(|(index, choice)| self.choice(index, choice, stops)).collect();
        let mut answer = json!({
            "id": self.id, "object": self.object(false), "created": self.created, "model": self.model,
            "system_fingerprint": concat!("slora-", env!("CARGO_PKG_VERSION")),
            "choices": list, "usage": self.usage(completion_tokens),
        });
        if self.shape == Shape::Chat && self.prompt_logprobs {
            answer["prompt_logprobs"] = self.prompt_map(0, &choices[0]);
        }
        if self.shape == Shape::Chat && self.return_token_ids {
            answer["prompt_token_ids"] = json!(self.prompts[0].ids);
        }
        answer
    }

    fn prompt_map(&self, index: usize, choice: &Collected) -> Value {
        logprobs::prompt(self.text.as_deref(), &self.prompt(index).ids, &choice.prompt_logprobs)
    }

    fn choice(&self, index: usize, choice: &Collected, stops: &[String]) -> Value {
        let (reason, stopped_by) = finish(choice.end.as_ref(), stops);
        let mut value = json!({"index": index, "finish_reason": reason, "stop_reason": stopped_by});
        match self.shape {
            Shape::Chat => {
                value["message"] = json!({"role": "assistant", "content": choice.text, "refusal": null});
                value["logprobs"] = self.logprobs.map_or(Value::Null, |top| {
                    let positions: Vec<Position> = choice.positions().collect();
                    logprobs::chat(self.text.as_deref(), &positions, top)
                });
            }
            Shape::Completion => {
                let prompt = self.prompt(index);
                let text = format!("{}{}", prompt.echo.text, choice.text);
                value["logprobs"] = self.logprobs.map_or(Value::Null, |top| {
                    let mut all = if self.echo { self.prompt_positions(index, choice) } else { Vec::new() };
                    all.extend(choice.positions());
                    let text_len = Some(text.chars().count());
                    logprobs::completion(self.text.as_deref(), &all, top, &mut 0, text_len)
                });
                value["text"] = json!(text);
                if self.prompt_logprobs {
                    value["prompt_logprobs"] = self.prompt_map(index, choice);
                }
                if self.return_token_ids {
                    value["prompt_token_ids"] = json!(prompt.ids);
                }
            }
        }
        if self.return_token_ids {
            value["token_ids"] = json!(choice.tokens);
        }
        value
    }

    fn prompt_positions<'a>(&self, index: usize, choice: &'a Collected) -> Vec<Position<'a>> {
        let Prompt { ids, echo } = self.prompt(index);
        let found = std::iter::once(None).chain(choice.prompt_logprobs.iter().map(Some));
        positions(ids, &echo.num_chars, found).collect()
    }

    /// How every event begins.
    pub fn head(&self) -> Vec<u8> {
        let fields = json!({
            "id": self.id, "object": self.object(true), "created": self.created, "model": self.model, "choices": [],
        });
        // `choices` comes last among the keys, whatever order a map keeps: it is cut off and written by hand.
        let (id, object) = (&fields["id"], &fields["object"]);
        let (created, model) = (&fields["created"], &fields["model"]);
        format!("data: {{\"id\":{id},\"object\":{object},\"created\":{created},\"model\":{model},\"choices\":[")
            .into_bytes()
    }

    /// The first event of a chat's choice.
    pub fn write_role(&self, out: &mut Vec<u8>, head: &[u8], index: usize) {
        out.extend_from_slice(head);
        let _ = write!(
            out,
            "{{\"index\":{index},\"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\"logprobs\":null,\
             \"finish_reason\":null}}]}}\n\n"
        );
    }

    /// One event. `usage`: tokens so far, if asked for.
    pub fn write_event(&self, out: &mut Vec<u8>, head: &[u8], event: &Event<'_>) {
        out.extend_from_slice(head);
        let _ = write!(out, "{{\"index\":{},", event.index);
        out.extend_from_slice(if self.shape == Shape::Chat { b"\"delta\":{\"content\":" } else { b"\"text\":" });
        // Writing to memory does not fail, and a string is always JSON.
        let _ = serde_json::to_writer(&mut *out, event.text);
        out.extend_from_slice(if self.shape == Shape::Chat { b"},\"logprobs\":" } else { b",\"logprobs\":" });
        match &event.logprobs {
            Some(logprobs) => drop(serde_json::to_writer(&mut *out, logprobs)),
            None => out.extend_from_slice(b"null"),
        }
        match finish(event.end, event.stops) {
            (Some(reason), stopped_by) => {
                let _ = write!(out, ",\"finish_reason\":\"{reason}\",\"stop_reason\":{stopped_by}");
            }
            (None, _) => out.extend_from_slice(b",\"finish_reason\":null"),
        }
        if let Some(tokens) = event.tokens.filter(|_| self.return_token_ids) {
            let _ = write!(out, ",\"token_ids\":{}", json!(tokens));
        }
        out.extend_from_slice(b"}]");
        if let Some(tokens) = event.usage {
            let _ = write!(out, ",\"usage\":{}", self.usage(tokens));
        }
        out.extend_from_slice(b"}\n\n");
    }

    /// The event with the usage, and the end of the stream.
    pub fn write_done(&self, out: &mut Vec<u8>, head: &[u8], completion_tokens: u64) {
        if self.streaming.include_usage {
            out.extend_from_slice(head);
            let _ = write!(out, "],\"usage\":{}}}\n\n", self.usage(completion_tokens));
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// Log-probabilities of one generated token, for an event. `offset`: characters of the choice so far.
    pub fn piece_logprobs(&self, piece: &Piece, offset: &mut usize) -> Option<Value> {
        let (token, num_chars) = (piece.token, piece.num_chars);
        let positions = [Position { token, num_chars, found: piece.logprobs.as_ref() }];
        self.logprobs.map(|top| match self.shape {
            Shape::Chat => logprobs::chat(self.text.as_deref(), &positions, top),
            Shape::Completion => logprobs::completion(self.text.as_deref(), &positions, top, offset, None),
        })
    }

    /// The echoed prompt of a choice as an event's text and log-probabilities.
    pub fn echo(&self, index: usize, found: Vec<TokenLogprobs>, offset: &mut usize) -> (&str, Option<Value>) {
        let choice = Collected { prompt_logprobs: found, ..Collected::default() };
        let positions = self.prompt_positions(index, &choice);
        let text = self.text.as_deref();
        let logprobs = self.logprobs.map(|top| logprobs::completion(text, &positions, top, offset, None));
        (&self.prompt(index).echo.text, logprobs)
    }
}

/// What one event of a stream says.
pub(crate) struct Event<'a> {
    pub index: usize,
    pub text: &'a str,
    pub tokens: Option<&'a [u32]>,
    pub logprobs: Option<Value>,
    pub end: Option<&'a End>,
    pub stops: &'a [String],
    pub usage: Option<u64>,
}
