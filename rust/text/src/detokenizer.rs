//! Token ids → text, one at a time.

use std::sync::Arc;

use crate::TextModel;
use crate::byte_level::take_text;
use crate::error::TextError;
use crate::model::TokenKind;

/// Context of whitespace kept before new ids: a decoder may strip the spaces it begins with.
const MAX_BLANK_CONTEXT: usize = 32;
/// Pending ids up to which a broken tail is looked at again with each new id; beyond, only as they double.
const MAX_EAGER_PENDING: usize = 8;

/// The text of one growing request, without ever showing half a character.
///
/// All outputs together equal [`TextModel::decode`] of all ids. Decoders are not local (the first piece loses its
/// space, a run of byte tokens is text only as a whole), so each id is decoded behind the ids of the previous output,
/// whose text is then cut away. That window is short: time is linear in the number of ids. Where text is that of the ids'
/// bytes alone, no decoder is asked.
pub struct Detokenizer {
    model: Arc<TextModel>,
    skip_special_tokens: bool,
    /// Bytes that are no whole character yet, where ids are bytes; then the fields below are not used.
    bytes: Vec<u8>,
    /// `ids[..num_context]` is text already shown, kept as context; the others are pending.
    ids: Vec<u32>,
    num_context: usize,
    /// Bytes that the context alone decodes to.
    context_bytes: usize,
    /// Bytes of the pending ids' text that were shown already.
    shown_bytes: usize,
    /// A broken tail is looked at again when this many ids are pending.
    next_look: usize,
}

impl Detokenizer {
    /// Begins a text. `skip_special_tokens` leaves special tokens out of it.
    pub fn new(model: &Arc<TextModel>, skip_special_tokens: bool) -> Self {
        Self {
            model: model.clone(),
            skip_special_tokens,
            bytes: Vec::new(),
            ids: Vec::new(),
            num_context: 0,
            context_bytes: 0,
            shown_bytes: 0,
            next_look: 0,
        }
    }

    /// Adds one id and returns the text that is complete with it; empty while a character is incomplete.
    ///
    /// A run of byte tokens (SentencePiece's byte fallback) is text or not as a whole and is held until it ends.
    ///
    /// # Errors
    /// The tokenizer's decoder failed. Unknown ids are no text and no error, as in [`TextModel::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        let kind = self.model.kind(id);
        if kind == TokenKind::Unknown || (kind == TokenKind::Special && self.skip_special_tokens) {
            return Ok(String::new());
        }
        if let Some(table) = self.model.token_bytes() {
            self.bytes.extend_from_slice(table.get(id));
            return Ok(take_text(&mut self.bytes));
        }
        self.ids.push(id);
        if kind == TokenKind::Byte || self.is_hopeless(id)? {
            return Ok(String::new());
        }
        let text = self.model.decode(&self.ids, false)?;
        let tail = text.get(self.context_bytes..).unwrap_or_default();
        let complete = self.complete_bytes(tail);
        let new = tail.get(self.shown_bytes..complete).unwrap_or_default().to_owned();
        if complete == tail.len() {
            self.advance(tail.trim().is_empty())?;
        } else {
            self.shown_bytes = self.shown_bytes.max(complete);
            self.next_look = 2 * (self.ids.len() - self.num_context);
        }
        Ok(new)
    }

    /// What was held back, with U+FFFD for a broken tail; empty the second time.
    pub fn finish(&mut self) -> String {
        if self.model.token_bytes().is_some() {
            return String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        }
        let text = self.model.decode(&self.ids, false).unwrap_or_default();
        let rest = text.get(self.context_bytes + self.shown_bytes..).unwrap_or_default().to_owned();
        self.ids.clear();
        (self.num_context, self.context_bytes, self.shown_bytes) = (0, 0, 0);
        rest
    }

    /// Whether a long broken tail stays broken with this id, so that decoding all of it again would be in vain.
    fn is_hopeless(&self, id: u32) -> Result<bool, TextError> {
        let num_pending = self.ids.len() - self.num_context;
        if !self.model.joins_bytes() || num_pending <= MAX_EAGER_PENDING || num_pending >= self.next_look {
            return Ok(false);
        }
        Ok(self.model.decode(&[id], false)?.ends_with(char::REPLACEMENT_CHARACTER))
    }

    /// Bytes of the tail that later ids cannot change: where ids are bytes, a final U+FFFD may yet become a character.
    fn complete_bytes(&self, tail: &str) -> usize {
        match tail.strip_suffix(char::REPLACEMENT_CHARACTER) {
            Some(before) if self.model.joins_bytes() => before.len(),
            _ => tail.len(),
        }
    }

    /// All pending ids are shown: they become the context.
    fn advance(&mut self, is_blank: bool) -> Result<(), TextError> {
        if !is_blank || self.ids.len() > MAX_BLANK_CONTEXT {
            self.ids.drain(..self.num_context);
        }
        self.num_context = self.ids.len();
        self.context_bytes = self.model.decode(&self.ids, false)?.len();
        self.shown_bytes = 0;
        self.next_look = 0;
        Ok(())
    }
}
