//! A stream of server-sent events: one for each token.
//!
//! Text is made here, when the socket takes it; what the engine produces meanwhile waits as token ids.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use bytes::Bytes;
use http_body::Frame;
use slora_runtime::{Delta, End, Piece, TokenLogprobs};
use tokio::time::{Instant, Sleep};

use crate::connection::Unsent;
use crate::errors::ApiError;
use crate::generation::{Generation, OpenStream};
use crate::record::Record;
use crate::reply::{Event, Reply, Shape};

/// Bytes of events after which the socket gets its turn.
const MAX_FRAME_BYTES: usize = 16 << 10;

/// Where a stream's events go, and who is told of them.
pub(crate) struct Outlet {
    /// Between comments in a silent stream.
    pub keep_alive: Duration,
    pub unsent: Arc<Unsent>,
    pub record: Arc<Record>,
    /// Open for as long as this lives.
    pub _open: OpenStream,
}

/// What the stream knows of one choice.
#[derive(Default)]
struct Progress {
    /// The prompt was echoed, or is not to be.
    is_begun: bool,
    prompt_logprobs: Vec<TokenLogprobs>,
    /// Characters shown, where log-probabilities count them.
    offset: usize,
}

/// What is left to write of what was read from the engine of one choice.
struct Part {
    index: usize,
    pieces: std::vec::IntoIter<Piece>,
    tail: String,
    end: Option<End>,
}

impl Part {
    fn is_written(&self) -> bool {
        self.pieces.len() == 0 && self.end.is_none()
    }
}

/// The body of a streamed answer.
pub(crate) struct EventStream {
    reply: Reply,
    head: Vec<u8>,
    stops: Vec<String>,
    generation: Option<Generation>,
    progress: Vec<Progress>,
    parts: VecDeque<Part>,
    scratch: Vec<(usize, Delta)>,
    /// Where events are written; what it grew to is used again.
    out: Vec<u8>,
    /// Tokens shown, of all choices.
    num_shown: u64,
    outlet: Outlet,
    timer: Pin<Box<Sleep>>,
    last_written: Instant,
    is_begun: bool,
    is_over: bool,
}

impl EventStream {
    /// `early`: what was read before the headers.
    pub fn new(
        reply: Reply,
        stops: Vec<String>,
        generation: Generation,
        early: Vec<(usize, Delta)>,
        outlet: Outlet,
    ) -> Self {
        let now = Instant::now();
        let progress = (0..generation.len()).map(|_| Progress { is_begun: !reply.echo, ..Progress::default() });
        let mut stream = Self {
            head: reply.head(),
            progress: progress.collect(),
            reply,
            stops,
            generation: Some(generation),
            parts: VecDeque::new(),
            scratch: early,
            out: Vec::new(),
            num_shown: 0,
            timer: Box::pin(tokio::time::sleep_until(now + outlet.keep_alive)),
            outlet,
            last_written: now,
            is_begun: false,
            is_over: false,
        };
        stream.take_read();
        stream
    }

    /// What was read is to be written.
    fn take_read(&mut self) {
        for (index, delta) in self.scratch.drain(..) {
            let Delta { pieces, tail, prompt_logprobs, end, .. } = delta;
            self.progress[index].prompt_logprobs.extend(prompt_logprobs);
            self.parts.push_back(Part { index, pieces: pieces.into_iter(), tail, end });
        }
    }

    /// The answer with its headers.
    pub fn response(self) -> Response<Body> {
        let mut response = Response::new(Body::new(self));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        std::task::ready!(self.outlet.unsent.poll_room(context));
        let mut out = std::mem::take(&mut self.out);
        out.clear();
        if !std::mem::replace(&mut self.is_begun, true) && self.reply.shape == Shape::Chat {
            (0..self.progress.len()).for_each(|index| self.reply.write_role(&mut out, &self.head, index));
        }
        self.write_new(&mut out, context);
        let events = Bytes::copy_from_slice(&out);
        self.out = out;
        if events.is_empty() {
            return self.poll_keep_alive(context);
        }
        self.last_written = Instant::now();
        self.outlet.unsent.add(events.len());
        Poll::Ready(Some(events))
    }

    /// Writes events until nothing is new or the socket should get its turn.
    fn write_new(&mut self, out: &mut Vec<u8>, context: &mut Context<'_>) {
        while out.len() < MAX_FRAME_BYTES && !self.is_over {
            if let Some(mut part) = self.parts.pop_front() {
                self.write_part(out, &mut part);
                if !part.is_written() {
                    self.parts.push_front(part);
                }
                continue;
            }
            let Some(generation) = &mut self.generation else { break };
            if generation.is_over() {
                self.finish(out);
                break;
            }
            if generation.poll_deltas(context, &mut self.scratch).is_pending() {
                break;
            }
            self.take_read();
        }
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        self.reply.write_done(out, &self.head, self.num_shown);
        self.end();
    }

    fn end(&mut self) {
        self.generation = None;
        self.is_over = true;
        self.outlet.record.facts().is_done = true;
    }

    /// A comment now and then: proxies cut silent connections.
    fn poll_keep_alive(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        use std::future::Future;
        while self.timer.as_mut().poll(context).is_ready() {
            let due = self.last_written + self.outlet.keep_alive;
            let now = Instant::now();
            if due <= now {
                self.last_written = now;
                self.timer.as_mut().reset(now + self.outlet.keep_alive);
                // Registers the timer with this task.
                let _ = self.timer.as_mut().poll(context);
                return Poll::Ready(Some(Bytes::from_static(b": keep-alive\n\n")));
            }
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }

    fn write_part(&mut self, out: &mut Vec<u8>, part: &mut Part) {
        let index = part.index;
        if let Some(End::Error(error)) = &part.end {
            return self.fail(out, &ApiError::from(error.clone()));
        }
        if matches!(part.end, Some(End::Cancelled)) {
            return self.fail(out, &ApiError::unavailable("the request was cancelled by the server"));
        }
        if !self.progress[index].is_begun && !part.is_written() {
            self.write_echo(out, index);
        }
        while out.len() < MAX_FRAME_BYTES {
            let piece = part.pieces.next();
            // The end goes out with the last token, unless text is left for an event of its own.
            let is_last = part.pieces.len() == 0 && (piece.is_none() || part.tail.is_empty());
            let end = if is_last { part.end.take() } else { None };
            match (piece, end) {
                (Some(piece), end) => self.write_piece(out, index, &piece, end.as_ref()),
                (None, Some(end)) => self.write(out, index, &part.tail, None, None, Some(&end)),
                (None, None) => return,
            }
        }
    }

    fn write_piece(&mut self, out: &mut Vec<u8>, index: usize, piece: &Piece, end: Option<&End>) {
        self.num_shown += 1;
        let logprobs = self.reply.piece_logprobs(piece, &mut self.progress[index].offset);
        self.write(out, index, &piece.text, Some(&[piece.token]), logprobs, end);
    }

    fn write(
        &self,
        out: &mut Vec<u8>,
        index: usize,
        text: &str,
        tokens: Option<&[u32]>,
        logprobs: Option<serde_json::Value>,
        end: Option<&End>,
    ) {
        let usage = self.reply.streaming.continuous_usage.then_some(self.num_shown);
        let event = Event { index, text, tokens, logprobs, end, stops: &self.stops, usage };
        self.reply.write_event(out, &self.head, &event);
    }

    fn write_echo(&mut self, out: &mut Vec<u8>, index: usize) {
        let progress = &mut self.progress[index];
        progress.is_begun = true;
        let found = std::mem::take(&mut progress.prompt_logprobs);
        let (text, logprobs) = self.reply.echo(index, found, &mut progress.offset);
        let usage = self.reply.streaming.continuous_usage.then_some(self.num_shown);
        let event = Event { index, text, tokens: None, logprobs, end: None, stops: &self.stops, usage };
        self.reply.write_event(out, &self.head, &event);
    }

    /// An error inside the stream: the client must not take what it has for the whole answer.
    fn fail(&mut self, out: &mut Vec<u8>, error: &ApiError) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(error.json().as_bytes());
        out.extend_from_slice(b"\n\n");
        self.outlet.record.facts().error = Some(error.code);
        self.end();
    }
}

impl http_body::Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let polled = catch_unwind(AssertUnwindSafe(|| self.poll(context)));
        let bytes = match polled {
            Ok(polled) => std::task::ready!(polled),
            Err(_) => {
                let mut out = Vec::new();
                self.fail(&mut out, &ApiError::internal("the stream broke on an internal error"));
                Some(out.into())
            }
        };
        Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}
