//! `rank_pattern` and `alpha_pattern`: values for some modules, looked up as PEFT does.
//!
//! PEFT (`peft.utils.other.get_pattern_key`) takes the first key, in file order, for which
//! `re.match(rf"(.*\.)?({key})$", module_name)` matches. Most keys are plain names, which need no regular expression;
//! the others run on a linear-time engine, and those that it reads differently from Python are refused.

use regex::bytes::{Regex, RegexBuilder};

use crate::AdapterError;

/// Keys of one table. EVA writes one for every module.
const MAX_KEYS: usize = 4096;
/// Keys of one table that need the regex engine; with the size limit this bounds the time to look all modules up.
const MAX_EXPRESSIONS: usize = 64;
const MAX_KEY_BYTES: usize = 1024;
const MAX_EXPRESSION_BYTES: usize = 32 << 10;

/// An ordered table of patterns with a value each.
#[derive(Debug)]
pub(crate) struct Patterns<T> {
    entries: Vec<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    key: String,
    matcher: Matcher,
    value: T,
    used: bool,
}

#[derive(Debug)]
enum Matcher {
    /// A dotted suffix; a byte of 0 stands for any character.
    Suffix(Vec<u8>),
    Expression(Regex),
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Patterns { entries: Vec::new() }
    }
}

impl<T: Copy> Patterns<T> {
    /// Compiles the table `field` of the config.
    pub(crate) fn compile(field: &'static str, table: Vec<(String, T)>) -> Result<Patterns<T>, AdapterError> {
        let check_count = |what, count, limit| {
            let error = AdapterError::TooManyPatterns { field, what, count, limit };
            if count > limit { Err(error) } else { Ok(()) }
        };
        check_count("keys", table.len(), MAX_KEYS)?;
        let mut entries = Vec::with_capacity(table.len());
        let mut num_expressions = 0;
        for (key, value) in table {
            let matcher = match plain_suffix(&key) {
                Some(suffix) => Matcher::Suffix(suffix),
                None => {
                    num_expressions += 1;
                    check_count("regular expressions", num_expressions, MAX_EXPRESSIONS)?;
                    let compiled = compile_as_python(&key, &format!(r"(.*\.)?({key})$"));
                    Matcher::Expression(compiled.map_err(|reason| AdapterError::BadPattern {
                        field,
                        pattern: key.clone(),
                        reason,
                    })?)
                }
            };
            entries.push(Entry { key, matcher, value, used: false });
        }
        Ok(Patterns { entries })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The first entry that matches any of the names, and its key. All entries that match count as used, as in PEFT's
    /// own warning.
    pub(crate) fn lookup(&mut self, names: &[&str]) -> Option<(&str, T)> {
        let mut found = None;
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if (found.is_none() || !entry.used) && names.iter().any(|name| entry.matcher.matches(name)) {
                entry.used = true;
                found = found.or(Some(index));
            }
        }
        let entry = &self.entries[found?];
        Some((&entry.key, entry.value))
    }

    /// Keys that have matched no name so far.
    pub(crate) fn unused(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter(|entry| !entry.used).map(|entry| entry.key.as_str())
    }
}

impl Matcher {
    fn matches(&self, name: &str) -> bool {
        match self {
            Matcher::Suffix(suffix) => has_dotted_suffix(name.as_bytes(), suffix),
            // Leftmost-first search finds a match at 0 if there is one, which is what `re.match` asks.
            Matcher::Expression(regex) => regex.find(name.as_bytes()).is_some_and(|found| found.start() == 0),
        }
    }
}

/// A key made of letters, digits, `_`, `-`, `.` and `\.` only.
fn plain_suffix(key: &str) -> Option<Vec<u8>> {
    let mut suffix = Vec::with_capacity(key.len());
    let mut bytes = key.bytes();
    while let Some(byte) = bytes.next() {
        suffix.push(match byte {
            b'.' => 0,
            b'\\' if bytes.next() == Some(b'.') => b'.',
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => byte,
            _ => return None,
        });
    }
    Some(suffix)
}

fn has_dotted_suffix(name: &[u8], suffix: &[u8]) -> bool {
    let Some(start) = name.len().checked_sub(suffix.len()) else { return false };
    (start == 0 || name[start - 1] == b'.') && name[start..].iter().zip(suffix).all(|(&c, &s)| s == c || s == 0)
}

/// Compiles `expression`, whose untrusted part is `key`, if Python's `re` would read it the same way.
pub(crate) fn compile_as_python(key: &str, expression: &str) -> Result<Regex, String> {
    if key.len() > MAX_KEY_BYTES {
        return Err(format!("has {} bytes, the limit is {MAX_KEY_BYTES}", key.len()));
    }
    if let Some(reason) = reads_differently_in_python(key) {
        return Err(reason.into());
    }
    RegexBuilder::new(expression)
        .unicode(false)
        .size_limit(MAX_EXPRESSION_BYTES)
        .dfa_size_limit(8 * MAX_EXPRESSION_BYTES)
        .nest_limit(32)
        .build()
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(limit) => format!("compiles to more than {limit} bytes"),
            _ => "is not a regular expression that a linear-time engine can run".into(),
        })
}

/// Syntax that both engines accept and take for different things: set operations in classes (Python: plain
/// characters), doubled quantifiers (Python: possessive), inline flags, and escapes that only one of them knows.
fn reads_differently_in_python(key: &str) -> Option<&'static str> {
    let mut in_class = false;
    let mut after_quantifier = false;
    let mut chars = key.chars().peekable();
    while let Some(c) = chars.next() {
        let quantifier = !in_class && matches!(c, '*' | '+' | '?' | '}');
        if quantifier && after_quantifier && c != '?' {
            return Some("doubles a quantifier, which is possessive in Python");
        }
        match c {
            '\\' => match chars.next() {
                Some('b' | 'B') if !in_class && chars.peek() != Some(&'{') => {}
                Some('<' | '>' | 'z' | 'Z' | 'p' | 'P' | 'b' | 'B') => {
                    return Some("has an escape that Python reads differently");
                }
                _ => {}
            },
            '(' if !in_class && chars.next_if_eq(&'?').is_some() && !matches!(chars.peek(), Some(':' | 'P')) => {
                return Some("uses look-around or inline flags");
            }
            '[' if in_class => return Some("has `[` in a class, which Python reads differently"),
            '[' => {
                in_class = true;
                chars.next_if_eq(&'^');
                chars.next_if_eq(&']');
            }
            ']' => in_class = false,
            '&' | '-' | '~' if in_class && chars.peek() == Some(&c) => {
                return Some("has a set operation in a class, which Python reads differently");
            }
            _ => {}
        }
        after_quantifier = quantifier;
    }
    None
}
