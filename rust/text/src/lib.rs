//! Text of one model folder: tokenizer, incremental detokenizer, stop strings, chat templates.
//!
//! The crate knows nothing of requests, HTTP or Python, reads no clock and starts no threads. It does not panic on any
//! input: model folders come from anywhere, and messages from strangers.
//!
//! * [`TextModel`] – what a folder says about text; read once, shared by all requests.
//! * [`Detokenizer`] – token ids of one request → text, without broken characters and in linear time.
//! * [`StopStrings`] – finds stop strings in that text, across token borders.
//! * [`ChatTemplate`], [`ChatInput`] – messages → prompt, as transformers renders them, with bounded work and output.
#![forbid(unsafe_code)]

mod byte_level;
mod chat;
mod content;
mod detokenizer;
mod error;
mod files;
mod jinja;
mod model;
mod stop;

pub use chat::{ChatInput, ChatTemplate};
pub use content::part_text;
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use model::TextModel;
pub use stop::{MAX_STOP_CHARS, MAX_STOPS, StopProgress, StopStrings};
