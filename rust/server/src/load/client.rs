//! One client at a time: a completion asked for, read and written down.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Observer;
use super::connection::{Connection, Head};
use super::events::{Event, Events, completion_tokens};
use super::recorder::Recorder;
use crate::Secret;

/// Bytes of a refusal that are shown.
const SHOWN_BYTES: usize = 400;

/// Whom to ask, with which key, and who listens.
pub(super) struct Target {
    pub address: SocketAddr,
    pub key: Option<Secret>,
    pub timeout: Duration,
    pub observer: Option<Observer>,
}

/// A request as it is sent, and when its client leaves.
pub(super) struct Question {
    pub body: Vec<u8>,
    pub leaves: Option<Leave>,
    /// Held for as long as it may be asked for.
    pub _model: Arc<str>,
}

/// When a client leaves before the end.
#[derive(Clone, Copy, Debug)]
pub(super) enum Leave {
    /// It has seen so many tokens.
    Tokens(u32),
    /// No token is seen before the whole answer is: it leaves after a while.
    Time(Duration),
}

/// What came of one request.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The answer's status; 0: there was none.
    pub status: u16,
    /// To the first token of a stream.
    pub first: Option<Duration>,
    /// To the last byte.
    pub total: Duration,
    pub tokens: u32,
    /// The client left, as it was told to.
    pub has_left: bool,
    /// The answer is whole.
    pub is_whole: bool,
    /// What was wrong.
    pub error: Option<String>,
}

/// A client with its connection, which is opened when it is needed.
#[derive(Default)]
pub(super) struct Client(Option<Connection>);

impl Client {
    /// Sends one completion and reads its answer, or leaves.
    pub async fn complete(&mut self, target: &Target, question: &Question, recorder: &Recorder) -> Outcome {
        let sent = Instant::now();
        let mut outcome = Outcome::default();
        let leave = async {
            match question.leaves {
                Some(Leave::Time(time)) => tokio::time::sleep(time).await,
                _ => std::future::pending().await,
            }
        };
        let mut connection = self.0.take();
        let exchange = exchange(&mut connection, target, question, sent, &mut outcome, recorder);
        let ended = tokio::select! {
            ended = tokio::time::timeout(target.timeout, exchange) => Some(ended),
            () = leave => None,
        };
        outcome.total = sent.elapsed();
        match ended {
            Some(Ok(Ok(true))) => self.0 = connection,
            Some(Ok(Ok(false))) => {}
            Some(Ok(Err(error))) => outcome.error = Some(error.to_string()),
            Some(Err(_)) => outcome.error = Some(format!("no whole answer within {:?}", target.timeout)),
            None => outcome.has_left = true,
        }
        outcome
    }
}

/// Whether the connection can be used again.
async fn exchange(
    connection: &mut Option<Connection>,
    target: &Target,
    question: &Question,
    sent: Instant,
    outcome: &mut Outcome,
    recorder: &Recorder,
) -> io::Result<bool> {
    let bytes = request("POST", "/v1/completions", target.address, target.key.as_ref(), &question.body);
    let (connection, head) = ask(connection, target.address, &bytes).await?;
    let (status, closes) = (head.status, head.closes);
    outcome.status = status;
    if status != 200 {
        let body = connection.whole(head.body).await?;
        let shown = String::from_utf8_lossy(&body[..body.len().min(SHOWN_BYTES)]);
        outcome.error = Some(format!("{status}: {shown}"));
        return Ok(!closes);
    }
    let mut body = head.body;
    let mut reader = Reader { events: Events::default(), sent, last: None, target, outcome, recorder };
    loop {
        let data = connection.data(&mut body).await?;
        if data.is_empty() {
            reader.end();
            return Ok(!closes);
        }
        reader.read(data);
        if matches!(question.leaves, Some(Leave::Tokens(tokens)) if reader.outcome.tokens >= tokens) {
            reader.outcome.has_left = true;
            return Ok(false);
        }
    }
}

/// Sends a request and reads the head of its answer. A server may have closed a connection that was idle: then the request
/// goes out once more, on a new one.
pub(super) async fn ask<'a>(
    connection: &'a mut Option<Connection>,
    address: SocketAddr,
    request: &[u8],
) -> io::Result<(&'a mut Connection, Head)> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => Connection::open(address).await?,
    };
    let answered = match open.send(request).await {
        Ok(()) => open.head().await,
        Err(error) => Err(error),
    };
    let head = match answered {
        Ok(head) => head,
        Err(_) if open.num_sent > 1 && !open.has_bytes() => {
            open = Connection::open(address).await?;
            open.send(request).await?;
            open.head().await?
        }
        Err(error) => return Err(error),
    };
    Ok((connection.insert(open), head))
}

/// A request's bytes.
pub(super) fn request(method: &str, path: &str, host: SocketAddr, key: Option<&Secret>, body: &[u8]) -> Vec<u8> {
    let key = key.map(|Secret(key)| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
    let len = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host}\r\n{key}content-type: application/json\r\ncontent-length: {len}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// Reads an answer with status 200, whole or streamed.
struct Reader<'a> {
    events: Events,
    sent: Instant,
    last: Option<Instant>,
    target: &'a Target,
    outcome: &'a mut Outcome,
    recorder: &'a Recorder,
}

impl Reader<'_> {
    fn read(&mut self, data: &[u8]) {
        let now = Instant::now();
        let Self { events, sent, last, target, outcome, recorder } = self;
        events.feed(data, |data| match Event::of(data) {
            Event::Text => {
                outcome.tokens += 1;
                if let Some(observer) = &target.observer {
                    observer(data, now);
                }
                match last.replace(now) {
                    None => {
                        outcome.first = Some(now - *sent);
                        recorder.first_token(now, now - *sent);
                    }
                    Some(last) => recorder.next_token(now, now - last),
                }
            }
            // Some tokens have no text of their own.
            Event::Usage(tokens) => outcome.tokens = tokens,
            Event::Error => outcome.error = Some(String::from_utf8_lossy(data).into_owned()),
            Event::Done => outcome.is_whole = outcome.error.is_none(),
            Event::Other => {}
        });
    }

    fn end(self) {
        let outcome = self.outcome;
        if outcome.is_whole || outcome.error.is_some() {
            return;
        }
        // An answer that does not stream is one line of JSON, and its end has not been seen.
        match completion_tokens(self.events.rest()) {
            Some(tokens) => (outcome.tokens, outcome.is_whole) = (tokens, true),
            None => outcome.error = Some("the stream ended without [DONE]".into()),
        }
    }
}
