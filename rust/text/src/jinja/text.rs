//! Python's string rules where Rust's differ, and `str` and `repr` of values.

use super::meter::{Meter, Outcome};
use super::value::{Key, Value};

/// `str.isspace`: Unicode whitespace and the four ASCII separators.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.splitlines`.
pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if !matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}') {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|n| n.1 == '\n').is_some() {
            end += 1;
        }
        lines.push(&text[start..if keep_ends { end } else { at }]);
        start = end;
    }
    if start < text.len() {
        lines.push(&text[start..]);
    }
    lines
}

/// `str.capitalize`.
pub(super) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars.as_str().to_lowercase().chars()).collect(),
        None => String::new(),
    }
}

/// `str.title`: a letter after anything but a letter is upper case, the others lower.
pub(super) fn title(text: &str) -> String {
    let mut after_letter = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if after_letter {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        after_letter = c.is_alphabetic();
    }
    out
}

/// `repr(float)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(super) fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// `str(value)`.
pub(super) fn to_str(value: &Value, meter: &mut Meter) -> Outcome<String> {
    let mut out = String::new();
    write_str(value, &mut out, meter)?;
    Ok(out)
}

/// Appends `str(value)`, paying as it goes.
pub(super) fn write_str(value: &Value, out: &mut String, meter: &mut Meter) -> Outcome<()> {
    match value {
        Value::Str(s) => {
            meter.charge_bytes(s.len())?;
            out.push_str(s);
            Ok(())
        }
        Value::Undefined(_) => Ok(()),
        other => write_repr(other, out, meter),
    }
}

pub(super) fn write_repr(value: &Value, out: &mut String, meter: &mut Meter) -> Outcome<()> {
    meter.charge(1)?;
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
        Value::Int(i) => out.push_str(&i.to_string()),
        Value::Float(f) => out.push_str(&float_repr(*f)),
        Value::Str(s) => {
            meter.charge_bytes(s.len())?;
            quote(s, out);
        }
        Value::List(list) => {
            out.push(if list.is_tuple { '(' } else { '[' });
            for (i, item) in list.items.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(item, out, meter)?;
            }
            out.push_str(match (list.is_tuple, list.items.len()) {
                (false, _) => "]",
                (true, 1) => ",)",
                (true, _) => ")",
            });
        }
        Value::Dict(dict) => {
            out.push('{');
            for (i, (key, item)) in dict.entries.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                match key {
                    Key::Str(s) => {
                        meter.charge_bytes(s.len())?;
                        quote(s, out);
                    }
                    other => write_repr(&other.to_value(), out, meter)?,
                }
                out.push_str(": ");
                write_repr(item, out, meter)?;
            }
            out.push('}');
        }
        other => {
            out.push('<');
            out.push_str(other.type_name());
            out.push('>');
        }
    }
    Ok(())
}

/// `repr(str)`.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => {
                out.push('\\');
                out.push(c);
            }
            c if c == ' ' || !(c.is_control() || c.is_whitespace()) => out.push(c),
            c if (c as u32) < 0x100 => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push_str(&format!("\\u{:04x}", c as u32)),
        }
    }
    out.push(mark);
}
