//! Server-sent events of a completion, told apart without parsing them: there may be hundreds of thousands a second.

use std::sync::LazyLock;

use memchr::memmem::Finder;

static TEXT: LazyLock<Finder> = LazyLock::new(|| Finder::new("\"text\":"));
static TOKENS: LazyLock<Finder> = LazyLock::new(|| Finder::new("\"completion_tokens\":"));

/// What an event says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Text, of which clients show something.
    Text,
    /// How many tokens the answer has.
    Usage(u32),
    /// The answer has failed.
    Error,
    /// The answer is whole.
    Done,
    /// An event without text.
    Other,
}

impl Event {
    pub fn of(data: &[u8]) -> Self {
        if data.starts_with(b"[DONE]") {
            Self::Done
        } else if data.starts_with(b"{\"error\"") {
            Self::Error
        } else if has_text(data) {
            Self::Text
        } else {
            completion_tokens(data).map_or(Self::Other, Self::Usage)
        }
    }
}

/// Quotation marks inside JSON strings are escaped, so a key is never found in a text.
fn has_text(data: &[u8]) -> bool {
    value(&TEXT, data).is_some_and(|value| value.starts_with(b"\"") && !value.starts_with(b"\"\""))
}

/// Tokens of an answer, from its usage.
pub(super) fn completion_tokens(data: &[u8]) -> Option<u32> {
    let value = value(&TOKENS, data)?;
    let len = value.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&value[..len]).ok()?.parse().ok()
}

fn value<'a>(key: &Finder, data: &'a [u8]) -> Option<&'a [u8]> {
    Some(data[key.find(data)? + key.needle().len()..].trim_ascii_start())
}

/// Cuts a stream into events, however its pieces are cut.
#[derive(Default)]
pub(super) struct Events {
    /// A line whose end has not come.
    partial: Vec<u8>,
}

impl Events {
    /// Hands over the data of each event that these bytes complete.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(&[u8])) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let line = &bytes[..end];
            bytes = &bytes[end + 1..];
            if self.partial.is_empty() {
                data(line).map(&mut each);
            } else {
                self.partial.extend_from_slice(line);
                data(&self.partial).map(&mut each);
                self.partial.clear();
            }
        }
        self.partial.extend_from_slice(bytes);
    }

    /// What came behind the last line.
    pub fn rest(&self) -> &[u8] {
        &self.partial
    }
}

fn data(line: &[u8]) -> Option<&[u8]> {
    line.strip_prefix(b"data:").map(<[u8]>::trim_ascii)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_apart() {
        assert_eq!(Event::of(br#"{"choices":[{"index":0,"text":"a","logprobs":null}]}"#), Event::Text);
        assert_eq!(Event::of(br#"{"choices": [{"text": "a"}], "usage": {"completion_tokens": 3}}"#), Event::Text);
        assert_eq!(Event::of(br#"{"choices":[{"text":"","finish_reason":"length"}]}"#), Event::Other);
        assert_eq!(Event::of(br#"{"choices":[],"usage":{"completion_tokens":17,"x":1}}"#), Event::Usage(17));
        assert_eq!(Event::of(br#"{"choices":[],"usage":{"completion_tokens": 0}}"#), Event::Usage(0));
        assert_eq!(Event::of(br#"{"choices":[],"usage":{"completion_tokens":"x"}}"#), Event::Other);
        assert_eq!(Event::of(br#"{"error":{"message":"\"text\":\"a\""}}"#), Event::Error);
        assert_eq!(Event::of(b"[DONE]"), Event::Done);
    }

    #[test]
    fn events_are_whole_however_the_stream_is_cut() {
        let stream = b": keep-alive\n\ndata: one\n\ndata:two\r\n\r\nevent: x\ndata: three\n\n";
        for piece in 1..stream.len() {
            let (mut events, mut found) = (Events::default(), Vec::new());
            for piece in stream.chunks(piece) {
                events.feed(piece, |data| found.push(String::from_utf8_lossy(data).into_owned()));
            }
            assert_eq!(found, ["one", "two", "three"], "in pieces of {piece}");
        }
    }
}
