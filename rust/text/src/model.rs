//! What a model folder says about text.

use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::byte_level::TokenBytes;
use crate::chat::{ChatInput, ChatTemplate};
use crate::content::check_parts;
use crate::error::TextError;
use crate::files::{fault, read_object, token_content};

/// Highest token id: ids index a table.
const MAX_TOKEN_ID: u32 = 1 << 24;

/// How a token takes part in decoding.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum TokenKind {
    /// The id names no token.
    Unknown,
    /// Left out of text on demand.
    Special,
    /// One byte of text (`<0x0A>`), joined with its neighbours by the decoder.
    Byte,
    Text,
}

/// Tokenizer, special tokens and chat template of one model folder; immutable, shared by all requests.
pub struct TextModel {
    tokenizer: Tokenizer,
    /// By id.
    kinds: Vec<TokenKind>,
    longest_token_bytes: usize,
    /// The decoder joins the bytes of neighbouring tokens to characters.
    joins_bytes: bool,
    /// Where text is that of the tokens' bytes and nothing more.
    token_bytes: Option<TokenBytes>,
    /// A token that is a word, as context for showing others.
    word_id: Option<u32>,
    /// `bos_token`, `eos_token`, …: what chat templates see, in the files' order.
    special_tokens: IndexMap<String, String>,
    eos_token_id: Option<u32>,
    stop_token_ids: Vec<u32>,
    chat_template: Option<ChatTemplate>,
}

impl TextModel {
    /// Reads `tokenizer.json` (required) and, where present, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json` and the chat template. Truncation and padding that a tokenizer was saved with are off.
    ///
    /// A chat template that cannot be parsed is reported when it is used: the model still serves text.
    ///
    /// # Errors
    /// [`TextError::File`] names the file and what is wrong with it.
    pub fn from_dir(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| fault(&path, error))?;
        let tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|error| fault(&path, format!("is no tokenizer: {error}; hint: was it downloaded whole?")))?;
        let config = read_object(&dir.join("tokenizer_config.json"))?;
        let special_tokens = special_tokens(&config, &read_object(&dir.join("special_tokens_map.json"))?);
        let generation = read_object(&dir.join("generation_config.json"))?;
        let chat_template = ChatTemplate::from_dir(dir, &config)?;
        Self::new(tokenizer, special_tokens, &generation, chat_template).map_err(|reason| fault(&path, reason))
    }

    fn new(
        mut tokenizer: Tokenizer,
        special_tokens: IndexMap<String, String>,
        generation: &Map<String, Value>,
        chat_template: Option<ChatTemplate>,
    ) -> Result<Self, String> {
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        let decoder = tokenizer.get_decoder().map(serde_json::to_string).transpose().map_err(|e| e.to_string())?;
        let decodes_with = |name: &str| decoder.as_ref().is_some_and(|d| d.contains(&format!("\"type\":\"{name}\"")));
        let joins_bytes = decodes_with("ByteLevel");
        let is_bytes = decoder.as_ref().is_some_and(|decoder| decoder.starts_with("{\"type\":\"ByteLevel\""));
        let has_byte_tokens = decodes_with("ByteFallback");

        let vocab = tokenizer.get_vocab(true);
        let num_ids = vocab.values().max().map_or(0, |id| *id as usize + 1);
        if num_ids > MAX_TOKEN_ID as usize {
            return Err(format!("token id {} is above the limit of {MAX_TOKEN_ID}", num_ids - 1));
        }
        let mut kinds = vec![TokenKind::Unknown; num_ids];
        let added = tokenizer.get_added_vocabulary();
        for (token, id) in &vocab {
            kinds[*id as usize] = if added.is_special_token(token) {
                TokenKind::Special
            } else if has_byte_tokens && is_byte_token(token) {
                TokenKind::Byte
            } else {
                TokenKind::Text
            };
        }
        let longest_token_bytes = vocab.keys().map(|token| text_bytes(token)).max().unwrap_or(0);
        let word_id = vocab
            .iter()
            .filter(|(token, id)| {
                kinds[**id as usize] == TokenKind::Text && token.chars().all(|c| c.is_ascii_lowercase())
            })
            .filter(|(token, _)| !token.is_empty())
            .map(|(_, id)| *id)
            .min();

        let eos = special_tokens.get("eos_token").and_then(|token| tokenizer.token_to_id(token));
        let mut stop_token_ids = token_ids(generation.get("eos_token_id"));
        stop_token_ids.extend(eos);
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        Ok(Self {
            token_bytes: is_bytes.then(|| TokenBytes::new(&tokenizer, num_ids)),
            kinds,
            longest_token_bytes,
            joins_bytes,
            word_id,
            eos_token_id: eos.or_else(|| token_ids(generation.get("eos_token_id")).first().copied()),
            stop_token_ids,
            special_tokens,
            chat_template,
            tokenizer,
        })
    }

    /// Refuses text of so many bytes that no tokens of it fit the context, before anything is spent on it.
    ///
    /// # Errors
    /// [`TextError::TooLong`].
    pub fn check_len(&self, bytes: usize, max_context: u32) -> Result<(), TextError> {
        let limit = (max_context as usize).saturating_mul(self.longest_token_bytes);
        if bytes <= limit { Ok(()) } else { Err(TextError::TooLong { bytes, limit, max_context }) }
    }

    /// Text → ids. With `add_special_tokens`, those that the tokenizer puts around a text prompt.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] where the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(tokenizer_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids → text; ids that name no token are left out.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] where the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        self.tokenizer.decode(ids, skip_special_tokens).map_err(tokenizer_error)
    }

    /// Number of ids, added tokens included: the highest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.kinds.len()
    }

    /// Upper bound of the bytes of text that one token adds, for limits on text by tokens.
    pub fn longest_token_bytes(&self) -> usize {
        self.longest_token_bytes
    }

    /// A token's text as it stands inside a sentence, for showing log-probabilities; `None` for an unknown id.
    /// Part of a character shows as U+FFFD.
    pub fn token_text(&self, id: u32) -> Option<String> {
        match (self.kind(id), self.word_id) {
            (TokenKind::Unknown, _) => None,
            (TokenKind::Text | TokenKind::Byte, Some(word)) => {
                let before = self.decode(&[word], false).ok()?;
                self.decode(&[word, id], false).ok()?.strip_prefix(&before).map(str::to_owned)
            }
            _ => self.decode(&[id], false).ok(),
        }
    }

    /// The token that ends a text, as the folder's files name it.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token").map(String::as_str)
    }

    /// The token that begins a text, as the folder's files name it.
    pub fn bos_token(&self) -> Option<&str> {
        self.special_tokens.get("bos_token").map(String::as_str)
    }

    /// All special tokens the folder names, as (`bos_token`, its text): the variables of chat templates.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, &str)> {
        self.special_tokens.iter().map(|(name, token)| (name.as_str(), token.as_str()))
    }

    /// Id of [`Self::eos_token`], else the first of `generation_config.json`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_id
    }

    /// All ids that end a generation: those of `generation_config.json` and the end-of-text token; sorted.
    pub fn stop_token_ids(&self) -> &[u32] {
        &self.stop_token_ids
    }

    /// Whether the id is a special token, which decoding can leave out.
    pub fn is_special(&self, id: u32) -> bool {
        self.kind(id) == TokenKind::Special
    }

    /// The chat template, if the folder has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Messages → prompt text.
    ///
    /// # Errors
    /// No template, messages of the wrong shape or with content that is no text, or a template that refuses them or goes
    /// beyond its limits.
    pub fn render_chat(&self, input: &ChatInput) -> Result<String, TextError> {
        check_parts(&input.messages)?;
        self.chat_template.as_ref().ok_or(TextError::NoChatTemplate)?.render(self.special_tokens(), input)
    }

    /// Messages → prompt ids. The template writes the special tokens, so none are added.
    ///
    /// # Errors
    /// Those of [`Self::render_chat`], [`Self::check_len`] and [`Self::encode`].
    pub fn encode_chat(&self, input: &ChatInput, max_context: u32) -> Result<Vec<u32>, TextError> {
        let text = self.render_chat(input)?;
        self.check_len(text.len(), max_context)?;
        self.encode(&text, false)
    }

    pub(crate) fn kind(&self, id: u32) -> TokenKind {
        self.kinds.get(id as usize).copied().unwrap_or(TokenKind::Unknown)
    }

    pub(crate) fn token_bytes(&self) -> Option<&TokenBytes> {
        self.token_bytes.as_ref()
    }

    pub(crate) fn joins_bytes(&self) -> bool {
        self.joins_bytes
    }
}

fn tokenizer_error(error: tokenizers::Error) -> TextError {
    TextError::Tokenizer(error.to_string())
}

fn is_byte_token(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// Most bytes of text: a character may stand for a byte, a broken byte becomes three, and a space may come before.
fn text_bytes(token: &str) -> usize {
    let as_bytes: usize = token.chars().map(|c| if c.is_ascii() { 1 } else { 3 }).sum();
    as_bytes.max(token.len()) + 1
}

/// One id or a list of ids.
fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The `…_token` entries; `tokenizer_config.json` goes before the older `special_tokens_map.json`.
fn special_tokens(config: &Map<String, Value>, older: &Map<String, Value>) -> IndexMap<String, String> {
    let mut tokens = IndexMap::new();
    for (name, value) in older.iter().chain(config) {
        if name.ends_with("_token")
            && let Some(content) = token_content(value)
        {
            tokens.insert(name.clone(), content.to_owned());
        }
    }
    tokens
}
