//! One keep-alive connection.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Observer, Outcome};

/// Whom to ask, with which key, and who listens.
pub(super) struct Target {
    pub address: SocketAddr,
    pub api_key: Option<String>,
    pub observer: Option<Observer>,
}

/// A connection, opened when it is needed.
#[derive(Default)]
pub(super) struct Client {
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

/// An answer's head.
struct Head {
    status: u16,
    /// `None`: chunked.
    content_len: Option<usize>,
    closes: bool,
    bytes: usize,
}

impl Client {
    /// Sends one completion and reads its answer, or leaves after `leaves` tokens of it.
    pub async fn complete(&mut self, target: &Target, body: &str, is_stream: bool, leaves: Option<u32>) -> Outcome {
        let sent = Instant::now();
        let mut outcome = Outcome::default();
        let read = self.exchange(target, body, is_stream, leaves, sent, &mut outcome).await;
        outcome.total = sent.elapsed();
        if read.is_err() {
            outcome.is_broken = true;
            self.stream = None;
        }
        if !is_stream {
            outcome.first = outcome.total;
        }
        outcome
    }

    async fn exchange(
        &mut self,
        target: &Target,
        body: &str,
        is_stream: bool,
        leaves: Option<u32>,
        sent: Instant,
        outcome: &mut Outcome,
    ) -> io::Result<()> {
        if self.stream.is_none() {
            let stream = TcpStream::connect(target.address).await?;
            stream.set_nodelay(true)?;
            self.stream = Some(stream);
        }
        let key = target.api_key.as_ref().map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n{key}content-length: {}\r\n\r\n{body}",
            target.address,
            body.len()
        );
        self.write(request.as_bytes()).await?;
        self.buffer.clear();
        if let (Some(after), false) = (leaves, is_stream) {
            // No token is seen before the answer: the client leaves after a while instead.
            tokio::time::sleep(std::time::Duration::from_micros(u64::from(after) * 200)).await;
            outcome.has_left = true;
            self.stream = None;
            return Ok(());
        }
        let head = self.head().await?;
        outcome.status = head.status;
        self.buffer.drain(..head.bytes);
        match head.content_len {
            Some(len) => self.whole(len, outcome).await?,
            None => self.events(target, leaves, sent, outcome).await?,
        }
        if head.closes || outcome.has_left {
            self.stream = None;
        }
        Ok(())
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Some(stream) => stream.write_all(bytes).await,
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    async fn fill(&mut self) -> io::Result<()> {
        let Some(stream) = &mut self.stream else { return Err(io::ErrorKind::NotConnected.into()) };
        if stream.read_buf(&mut self.buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    async fn head(&mut self) -> io::Result<Head> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                return parse_head(&self.buffer[..end], end + 4);
            }
            self.fill().await?;
        }
    }

    /// A whole answer: its usage says how many tokens it has.
    async fn whole(&mut self, len: usize, outcome: &mut Outcome) -> io::Result<()> {
        while self.buffer.len() < len {
            self.fill().await?;
        }
        let name = b"\"completion_tokens\":";
        let digits = find(&self.buffer, name).map(|at| &self.buffer[at + name.len()..]).unwrap_or_default();
        let digits = digits.iter().take_while(|byte| byte.is_ascii_digit());
        outcome.tokens = digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
        Ok(())
    }

    /// A stream: events that have text count as tokens.
    async fn events(
        &mut self,
        target: &Target,
        leaves: Option<u32>,
        sent: Instant,
        outcome: &mut Outcome,
    ) -> io::Result<()> {
        let (mut at, mut last, mut is_done) = (0, None, false);
        loop {
            let Some((chunk, next)) = chunk(&self.buffer[at..]) else {
                self.buffer.drain(..at);
                at = 0;
                self.fill().await?;
                continue;
            };
            if chunk.is_empty() {
                outcome.is_broken = !is_done;
                return Ok(());
            }
            let now = Instant::now();
            for event in chunk.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(b"data: ")) {
                if event.starts_with(b"[DONE]") {
                    is_done = true;
                } else if has_text(event) {
                    outcome.tokens += 1;
                    if let Some(observer) = &target.observer {
                        observer(event, now);
                    }
                    match last.replace(now) {
                        None => outcome.first = now.duration_since(sent),
                        Some(last) => outcome.gaps.push(now.duration_since(last)),
                    }
                }
            }
            at += next;
            if leaves.is_some_and(|leaves| outcome.tokens >= leaves) {
                outcome.has_left = true;
                return Ok(());
            }
        }
    }
}

/// Whether an event of a completion says something.
fn has_text(event: &[u8]) -> bool {
    // An `x` is rare in an event, a quotation mark is not.
    let name = b"xt\":\"";
    find(event, name).and_then(|at| event.get(at + name.len())).is_some_and(|byte| *byte != b'"')
}

/// One chunk of a chunked body, and where the next begins.
fn chunk(buffer: &[u8]) -> Option<(&[u8], usize)> {
    let line = find(buffer, b"\r\n")?;
    let len = usize::from_str_radix(std::str::from_utf8(&buffer[..line]).ok()?, 16).ok()?;
    let (start, end) = (line + 2, line + 2 + len);
    (buffer.len() >= end + 2).then(|| (&buffer[start..end], end + 2))
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = *wanted.first()?;
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|byte| *byte == first) {
        if bytes[from + at..].starts_with(wanted) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

fn parse_head(bytes: &[u8], end: usize) -> io::Result<Head> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let text = std::str::from_utf8(bytes).map_err(|_| bad())?.to_ascii_lowercase();
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).ok_or_else(bad)?;
    let mut head = Head { status, content_len: None, closes: false, bytes: end };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        match (name, value.trim()) {
            ("content-length", value) => head.content_len = Some(value.parse().map_err(|_| bad())?),
            ("connection", "close") => head.closes = true,
            _ => {}
        }
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_taken_when_they_are_whole() {
        assert_eq!(chunk(b"5\r\nhello\r\n0\r\n\r\n"), Some((&b"hello"[..], 10)));
        assert_eq!(chunk(b"0\r\n\r\n"), Some((&b""[..], 5)));
        assert!(chunk(b"5\r\nhel").is_none() && chunk(b"5").is_none());
        assert_eq!(find(b"aab", b"ab"), Some(1));
        let head = parse_head(b"HTTP/1.1 503 X\r\nContent-Length: 7\r\nConnection: close", 9).unwrap();
        assert_eq!((head.status, head.content_len, head.closes), (503, Some(7), true));
    }
}
