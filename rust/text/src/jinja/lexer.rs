//! Source text → tokens, with Jinja2's whitespace rules under `trim_blocks` and `lstrip_blocks`.

use std::sync::Arc;

use super::meter::{Fault, Outcome};
use super::text::is_space;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Data(String),
    VarBegin,
    VarEnd,
    BlockBegin,
    BlockEnd,
    Name(Arc<str>),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
}

/// Longest first, so that the first match is the right one.
const OPS: [&str; 26] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";",
];

pub(super) fn tokenize(source: &str) -> Result<Vec<(Token, u32)>, (Fault, u32)> {
    let mut normalized = source.replace("\r\n", "\n").replace('\r', "\n");
    if normalized.ends_with('\n') {
        normalized.pop();
    }
    let mut lexer = Lexer { src: &normalized, pos: 0, line: 1, line_starting: true, tokens: Vec::new() };
    match lexer.run() {
        Ok(()) => Ok(lexer.tokens),
        Err(fault) => Err((fault, lexer.line)),
    }
}

struct Lexer<'a> {
    src: &'a str,
    pos: usize,
    line: u32,
    /// What was consumed last ended a line, so that `lstrip_blocks` may strip up to here.
    line_starting: bool,
    tokens: Vec<(Token, u32)>,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.src[self.pos..]
    }

    fn advance(&mut self, len: usize) {
        self.line += self.src[self.pos..self.pos + len].bytes().filter(|&b| b == b'\n').count() as u32;
        self.pos += len;
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn run(&mut self) -> Outcome<()> {
        while self.pos < self.src.len() {
            let rest = self.rest();
            let Some((at, opener)) = next_opener(rest) else {
                self.push_data(rest);
                self.advance(rest.len());
                break;
            };
            let sign = rest[at + 2..].chars().next().filter(|c| matches!(c, '-' | '+'));
            self.push_data(strip_before(&rest[..at], sign, opener != "{{", self.line_starting));
            self.advance(at + 2 + sign.map_or(0, char::len_utf8));
            match opener {
                "{#" => self.comment()?,
                "{{" => {
                    self.push(Token::VarBegin);
                    self.tag("}}", Token::VarEnd)?;
                }
                _ if self.raw_follows() => self.raw()?,
                _ => {
                    self.push(Token::BlockBegin);
                    self.tag("%}", Token::BlockEnd)?;
                }
            }
        }
        Ok(())
    }

    fn push_data(&mut self, data: &str) {
        if !data.is_empty() {
            self.push(Token::Data(data.to_owned()));
        }
    }

    /// Consumes a closing delimiter of `len` bytes and the whitespace that its sign, or `trim_blocks`, takes with it.
    fn close(&mut self, len: usize, sign: Option<char>, trim_newline: bool) {
        self.advance(len);
        let rest = self.rest();
        let taken = match sign {
            Some('-') => rest.len() - rest.trim_start_matches(is_space).len(),
            None if trim_newline && rest.starts_with('\n') => 1,
            _ => 0,
        };
        self.line_starting = rest[..taken].ends_with('\n');
        self.advance(taken);
    }

    fn comment(&mut self) -> Outcome<()> {
        let Some(end) = self.rest().find("#}") else {
            return Fault::invalid("a comment is not closed with '#}'");
        };
        let sign = self.rest()[..end].chars().next_back().filter(|c| matches!(c, '-' | '+'));
        self.close(end + 2, sign, true);
        Ok(())
    }

    fn raw_follows(&self) -> bool {
        word_tag(self.rest(), "raw").is_some()
    }

    fn raw(&mut self) -> Outcome<()> {
        let (len, sign) = word_tag(self.rest(), "raw").unwrap_or((0, None));
        self.close(len, sign, false);
        let body = self.rest();
        let mut from = 0;
        while let Some(found) = body[from..].find("{%") {
            let at = from + found;
            let after = &body[at + 2..];
            let sign = after.chars().next().filter(|c| matches!(c, '-' | '+'));
            let skip = 2 + sign.map_or(0, char::len_utf8);
            if let Some((len, end_sign)) = word_tag(&body[at + skip..], "endraw") {
                self.push_data(strip_before(&body[..at], sign, true, self.line_starting));
                self.advance(at);
                self.close(skip + len, end_sign, true);
                return Ok(());
            }
            from = at + 2;
        }
        Fault::invalid("'raw' is not closed with '{% endraw %}'")
    }

    /// Tokens of one tag up to its closing delimiter; brackets inside hide it, as in `{{ {'a': {}} }}`.
    fn tag(&mut self, closer: &str, end: Token) -> Outcome<()> {
        let mut open: Vec<u8> = Vec::new();
        loop {
            let rest = self.rest();
            let rest = rest.trim_start_matches(is_space);
            self.advance(self.rest().len() - rest.len());
            let Some(c) = rest.chars().next() else {
                return Fault::invalid(format!("a tag is not closed with '{closer}'"));
            };
            if open.is_empty() {
                let sign = Some(c).filter(|c| *c == '-' || (*c == '+' && closer == "%}"));
                let skip = sign.map_or(0, char::len_utf8);
                if rest[skip..].starts_with(closer) {
                    self.push(end);
                    self.close(skip + closer.len(), sign, closer == "%}");
                    return Ok(());
                }
            }
            if c.is_ascii_digit() {
                self.number(rest)?;
            } else if c == '_' || c.is_alphanumeric() {
                let len = rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len());
                self.push(Token::Name(Arc::from(&rest[..len])));
                self.advance(len);
            } else if c == '"' || c == '\'' {
                self.string(rest, c)?;
            } else if let Some(op) = OPS.iter().find(|op| rest.starts_with(**op)) {
                match *op {
                    "(" | "[" | "{" => open.push(op.as_bytes()[0]),
                    ")" | "]" | "}" => {
                        let expected = open.pop().map(|o| if o == b'(' { b')' } else { o + 2 });
                        if expected != Some(op.as_bytes()[0]) {
                            return Fault::invalid(format!("unexpected '{op}'"));
                        }
                    }
                    _ => {}
                }
                self.push(Token::Op(op));
                self.advance(op.len());
            } else {
                return Fault::invalid(format!("unexpected character {c:?} in a tag"));
            }
        }
    }

    fn number(&mut self, rest: &str) -> Outcome<()> {
        let radix = match rest.get(..2).map(str::to_ascii_lowercase).as_deref() {
            Some("0x") => 16,
            Some("0o") => 8,
            Some("0b") => 2,
            _ => 10,
        };
        let digits = |s: &str| s.find(|c: char| !(c.is_digit(radix) || c == '_')).unwrap_or(s.len());
        let skip = if radix == 10 { 0 } else { 2 };
        let mut len = skip + digits(&rest[skip..]);
        let mut float = false;
        if radix == 10 {
            if rest[len..].starts_with('.') && rest[len + 1..].starts_with(|c: char| c.is_ascii_digit()) {
                len += 1 + digits(&rest[len + 1..]);
                float = true;
            }
            if rest[len..].starts_with(['e', 'E']) {
                let sign = usize::from(rest[len + 1..].starts_with(['+', '-']));
                let exponent = digits(&rest[len + 1 + sign..]);
                if exponent > 0 {
                    len += 1 + sign + exponent;
                    float = true;
                }
            }
        }
        let text = rest[skip..len].replace('_', "");
        let token = if float {
            text.parse().ok().map(Token::Float)
        } else {
            i128::from_str_radix(&text, radix).ok().map(Token::Int)
        };
        let Some(token) = token else {
            return Fault::invalid(format!("'{}' is not a number this renderer can hold", &rest[..len.min(60)]));
        };
        self.push(token);
        self.advance(len);
        Ok(())
    }

    fn string(&mut self, rest: &str, quote: char) -> Outcome<()> {
        let mut text = String::new();
        let mut chars = rest[1..].char_indices();
        while let Some((at, c)) = chars.next() {
            if c == quote {
                self.push(Token::Str(text));
                self.advance(1 + at + 1);
                return Ok(());
            }
            if c != '\\' {
                text.push(c);
                continue;
            }
            let Some((_, escape)) = chars.next() else { break };
            let mut hex = |len: usize| -> Option<char> {
                let digits = chars.as_str().get(..len)?;
                let code = u32::from_str_radix(digits, 16).ok()?;
                chars.nth(len - 1);
                char::from_u32(code)
            };
            match escape {
                '\n' => {}
                'n' => text.push('\n'),
                't' => text.push('\t'),
                'r' => text.push('\r'),
                'a' => text.push('\x07'),
                'b' => text.push('\x08'),
                'f' => text.push('\x0c'),
                'v' => text.push('\x0b'),
                '0' => text.push('\0'),
                '\\' | '\'' | '"' => text.push(escape),
                'x' | 'u' | 'U' => match hex(match escape {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                }) {
                    Some(c) => text.push(c),
                    None => return Fault::invalid(format!("bad '\\{escape}' escape in a string")),
                },
                other => {
                    text.push('\\');
                    text.push(other);
                }
            }
        }
        Fault::invalid("a string is not closed")
    }
}

fn next_opener(text: &str) -> Option<(usize, &'static str)> {
    let mut from = 0;
    while let Some(found) = text[from..].find('{') {
        let at = from + found;
        for opener in ["{{", "{%", "{#"] {
            if text[at..].starts_with(opener) {
                return Some((at, opener));
            }
        }
        from = at + 1;
    }
    None
}

/// Data before a tag, less what the tag's sign or `lstrip_blocks` takes.
fn strip_before(data: &str, sign: Option<char>, is_block: bool, line_starting: bool) -> &str {
    match sign {
        Some('-') => data.trim_end_matches(is_space),
        None if is_block => {
            let start = data.rfind('\n').map_or(0, |at| at + 1);
            let on_own_line = start > 0 || line_starting;
            if on_own_line && data[start..].chars().all(is_space) { &data[..start] } else { data }
        }
        _ => data,
    }
}

/// Matches `\s* word \s* [-+]? %}` and returns its length and sign.
fn word_tag(text: &str, word: &str) -> Option<(usize, Option<char>)> {
    let rest = text.trim_start_matches(is_space).strip_prefix(word)?.trim_start_matches(is_space);
    let sign = rest.chars().next().filter(|c| matches!(c, '-' | '+'));
    let rest = rest[sign.map_or(0, char::len_utf8)..].strip_prefix("%}")?;
    Some((text.len() - rest.len(), sign))
}
