//! What a request has brought so far, between the delivery thread and the request's reader.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use slora_core::{AdapterId, EndReason, RequestId};
use slora_text::{Detokenizer, StopStrings, TextError};

use crate::error::RequestError;
use crate::inbox::{Command, Inbox};
use crate::mailbox::Wake;

/// Log-probabilities of one position, of the raw model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// The token that stands there.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The best tokens, best first, as many as were asked for.
    pub best: Vec<(u32, f32)>,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Its id.
    pub token: u32,
    /// Text that is complete and safe to show with it: whole characters, and nothing that may begin a stop string.
    pub text: String,
    /// Characters of the text that the token completed, also where some are held back: a stop string may begin there.
    pub num_chars: usize,
    /// If asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// When the step that made it was delivered, however late the reader looks.
    pub at: Instant,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub enum End {
    /// An end-of-sequence or stop token, the last one of the output.
    StopToken(u32),
    /// A stop string, by its index.
    StopString(usize),
    /// As many tokens as were asked for.
    Length,
    /// Its reader's wish.
    Cancelled,
    /// It was refused, or something failed.
    Error(RequestError),
}

/// What is new since the last [`Output::take`].
#[derive(Clone, Debug, Default)]
pub struct Delta {
    /// The engine has taken the request into its queue.
    pub is_accepted: bool,
    /// The version of the adapter that it was bound to then; 0: the base model.
    pub version: u32,
    /// That adapter's weights have reached the host tier, then or since; true for the base model.
    pub is_loaded: bool,
    /// When it began to run for the first time.
    pub admitted_at: Option<Instant>,
    /// New tokens.
    pub pieces: Vec<Piece>,
    /// With the end: text that was held back and belongs to no single token.
    pub tail: String,
    /// New log-probabilities of prompt tokens, from the second one on.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// The end, if it came. Nothing comes after it.
    pub end: Option<End>,
}

/// Text of a request, made from its ids when they are taken, or at once where stop strings are looked for.
pub(crate) struct TextState {
    detokenizer: Detokenizer,
    stops: StopStrings,
}

impl TextState {
    pub fn new(detokenizer: Detokenizer, stops: StopStrings) -> Self {
        Self { detokenizer, stops }
    }

    /// The text that may be shown with a token, the characters that the token completes, and the stop string that ends it.
    fn push(&mut self, token: u32) -> Result<(String, usize, Option<usize>), TextError> {
        let text = self.detokenizer.push(token)?;
        let num_chars = text.chars().count();
        if self.stops.is_empty() {
            return Ok((text, num_chars, None));
        }
        let progress = self.stops.push(&text);
        Ok((progress.text, num_chars, progress.stopped))
    }

    fn finish(&mut self) -> (String, Option<usize>) {
        let rest = self.detokenizer.finish();
        let mut progress = self.stops.push(&rest);
        if progress.stopped.is_none() {
            progress.text.push_str(&self.stops.finish());
        }
        (progress.text, progress.stopped)
    }
}

/// What is known of a request's output before it begins.
pub(crate) struct ChannelSpec {
    pub id: RequestId,
    pub adapter: Option<Arc<str>>,
    pub prompt: Vec<u32>,
    pub num_logprobs: Option<u32>,
    pub num_prompt_logprobs: Option<u32>,
    pub wake: Arc<dyn Wake>,
    pub wakes_on_token: bool,
}

/// What the delivery thread and the reader share.
pub(crate) struct Channel {
    pub spec: ChannelSpec,
    /// Text is made at once, because the engine waits for what the stop strings say.
    has_stops: bool,
    state: Mutex<ChannelState>,
}

/// A generated token that nobody has looked at yet. A slow reader has many of them.
struct Token {
    id: u32,
    at: Instant,
}

#[derive(Default)]
struct ChannelState {
    text: Option<TextState>,
    /// What is new, but for these tokens and their log-probabilities, if asked for.
    delta: Delta,
    /// The request's adapter, while it is not loaded.
    awaited: Option<AdapterId>,
    tokens: VecDeque<Token>,
    logprobs: VecDeque<TokenLogprobs>,
    num_tokens: u32,
    /// The end comes right behind what is being pushed.
    is_ending: bool,
    /// The token of the running step ends the request and is no text.
    hides_last: bool,
    /// The last token is such a one.
    is_last_hidden: bool,
    /// The reader was told and has not looked yet.
    is_signalled: bool,
}

/// What a token meant for the request's text.
pub(crate) enum TextProgress {
    /// Nothing that the engine must know.
    Quiet,
    /// This many tokens hold no stop string.
    Checked(u32),
    /// The text has ended: the engine need not go on.
    Ended,
}

impl Channel {
    pub fn new(spec: ChannelSpec, text: Option<TextState>) -> Self {
        let has_stops = text.as_ref().is_some_and(|text| !text.stops.is_empty());
        Self { spec, has_stops, state: Mutex::new(ChannelState { text, ..ChannelState::default() }) }
    }

    pub fn id(&self) -> RequestId {
        self.spec.id
    }

    fn lock(&self) -> MutexGuard<'_, ChannelState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, mut state: MutexGuard<'_, ChannelState>) {
        if !std::mem::replace(&mut state.is_signalled, true) {
            drop(state);
            self.spec.wake.wake(self.spec.id);
        }
    }

    /// `awaited`: the adapter that is not loaded yet.
    pub fn accept(&self, version: u32, awaited: Option<AdapterId>) {
        let mut state = self.lock();
        state.delta.is_accepted = true;
        state.delta.version = version;
        state.delta.is_loaded = awaited.is_none();
        state.awaited = awaited;
        if self.spec.wakes_on_token {
            self.signal(state);
        }
    }

    /// An adapter has been loaded.
    pub fn loaded(&self, adapter: AdapterId) {
        let mut state = self.lock();
        if state.awaited == Some(adapter) {
            state.awaited = None;
            state.delta.is_loaded = true;
            if self.spec.wakes_on_token {
                self.signal(state);
            }
        }
    }

    /// Nobody is woken for it.
    pub fn admit(&self, at: Instant) {
        self.lock().delta.admitted_at.get_or_insert(at);
    }

    /// The request ends in this step: readers are woken for its last token and its end together. `hides_last`: that token
    /// is no text.
    pub fn begin_end(&self, hides_last: bool) {
        let mut state = self.lock();
        state.is_ending = true;
        state.hides_last = hides_last;
    }

    pub fn push(&self, token: u32, logprobs: Option<TokenLogprobs>, at: Instant) -> TextProgress {
        let mut state = self.lock();
        if state.delta.end.is_some() {
            return TextProgress::Quiet;
        }
        state.num_tokens += 1;
        state.is_last_hidden = state.hides_last;
        state.tokens.push_back(Token { id: token, at });
        state.logprobs.extend(logprobs);
        let mut progress = TextProgress::Quiet;
        if self.has_stops {
            state.decode(usize::MAX);
            let is_over = state.delta.end.is_some();
            progress = if is_over { TextProgress::Ended } else { TextProgress::Checked(state.num_tokens) };
        }
        if (self.spec.wakes_on_token && !state.is_ending) || state.delta.end.is_some() {
            self.signal(state);
        }
        progress
    }

    pub fn push_prompt_logprobs(&self, logprobs: impl Iterator<Item = TokenLogprobs>) {
        self.lock().delta.prompt_logprobs.extend(logprobs);
    }

    /// The first end stands: what the engine says after a stop string was found comes too late.
    pub fn end(&self, end: End) {
        let mut state = self.lock();
        if state.delta.end.is_none() {
            state.delta.end = Some(end);
            self.signal(state);
        }
    }

    pub fn end_by(&self, reason: EndReason) {
        self.end(match reason {
            EndReason::Stop(token) => End::StopToken(token),
            EndReason::Length => End::Length,
            EndReason::Cancelled => End::Cancelled,
            EndReason::AdapterFailed(failure) => {
                let name = self.spec.adapter.clone().unwrap_or_default();
                End::Error(RequestError::AdapterFailed { name, failure })
            }
            _ => End::Error(RequestError::NotFinite),
        });
    }
}

impl ChannelState {
    /// Makes pieces with their text of the first `limit` tokens that came. A stop string or an error ends the request: tokens
    /// behind it are not part of the output.
    fn decode(&mut self, limit: usize) {
        for _ in 0..limit {
            let Some(Token { id: token, at }) = self.tokens.pop_front() else { break };
            let is_hidden = self.tokens.is_empty() && std::mem::take(&mut self.is_last_hidden);
            let mut piece = Piece { token, text: String::new(), num_chars: 0, logprobs: self.logprobs.pop_front(), at };
            match self.text.as_mut().filter(|_| !is_hidden).map(|text| text.push(token)) {
                Some(Ok((text, num_chars, stopped))) => {
                    (piece.text, piece.num_chars) = (text, num_chars);
                    self.delta.end = stopped.map(End::StopString).or(self.delta.end.take());
                }
                Some(Err(error)) => self.delta.end = Some(End::Error(error.into())),
                None => {}
            }
            self.delta.pieces.push(piece);
            if matches!(self.delta.end, Some(End::StopString(_) | End::Error(_))) {
                self.tokens.clear();
            }
        }
    }

    /// Shows what was held back.
    fn finish(&mut self) {
        let Some(mut text) = self.text.take() else { return };
        let is_natural = matches!(self.delta.end, Some(End::StopToken(_) | End::Length | End::Cancelled));
        if is_natural {
            let (tail, stopped) = text.finish();
            self.delta.tail = tail;
            if let Some(index) = stopped {
                self.delta.end = Some(End::StopString(index));
            }
        }
    }
}

/// The reader's end of a request. Dropping it cancels the request.
pub struct Output {
    pub(crate) channel: Arc<Channel>,
    pub(crate) inbox: Arc<Inbox>,
}

impl Output {
    pub(crate) fn new(channel: Arc<Channel>, inbox: Arc<Inbox>) -> Self {
        Self { channel, inbox }
    }

    /// The request's id, as its [`Wake`] is told.
    pub fn id(&self) -> RequestId {
        self.channel.id()
    }

    /// The adapter's name; `None`: the base model.
    pub fn adapter(&self) -> Option<&Arc<str>> {
        self.channel.spec.adapter.as_ref()
    }

    /// The prompt's token ids.
    pub fn prompt(&self) -> &[u32] {
        &self.channel.spec.prompt
    }

    /// What is new. Text is made here, on the reader's time.
    pub fn take(&self) -> Delta {
        self.take_up_to(usize::MAX)
    }

    /// The same, with text of so many tokens at most, unless stop strings were looked for in more: what is left stays as
    /// it is, a token in few bytes, and the reader is woken for it again. The end comes with the last of it.
    pub fn take_up_to(&self, max_tokens: usize) -> Delta {
        let mut state = self.channel.lock();
        state.is_signalled = false;
        state.decode(max_tokens);
        let is_whole = state.tokens.is_empty();
        if is_whole && state.delta.end.is_some() {
            state.finish();
        }
        let next = Delta {
            is_accepted: state.delta.is_accepted,
            version: state.delta.version,
            is_loaded: state.delta.is_loaded,
            admitted_at: state.delta.admitted_at,
            end: state.delta.end.clone(),
            ..Delta::default()
        };
        let mut delta = std::mem::replace(&mut state.delta, next);
        if is_whole {
            drop(state);
        } else {
            delta.end = None;
            self.channel.signal(state);
        }
        if matches!(delta.end, Some(End::StopString(_) | End::Error(_))) {
            self.cancel();
        }
        delta
    }

    /// Ends the request within one step, wherever it is; does nothing if it has ended.
    pub fn cancel(&self) {
        // A closed inbox: every request has ended.
        let _ = self.inbox.push(Command::Cancel(self.channel.id()));
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.channel.lock().delta.end.is_none() {
            self.cancel();
        }
    }
}
