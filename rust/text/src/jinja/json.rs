//! `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`, without HTML escapes.

use super::args::Args;
use super::meter::{Fault, Meter, Outcome};
use super::text::float_repr;
use super::value::{Key, Value};

pub(super) fn tojson(value: &Value, mut args: Args, meter: &mut Meter) -> Outcome<Value> {
    let ensure_ascii = args.next("ensure_ascii").is_some_and(|v| v.is_true());
    let indent = match args.next("indent") {
        None | Some(Value::None) => None,
        Some(Value::Str(s)) => Some(s.to_string()),
        Some(other) => match other.as_int() {
            Some(width) => {
                let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
                meter.charge_bytes(width)?;
                Some(" ".repeat(width))
            }
            None => return Fault::invalid("tojson: indent must be a number or a string"),
        },
    };
    let (item_separator, key_separator) = match args.next("separators") {
        Some(Value::List(pair)) => match pair.items.as_slice() {
            [Value::Str(item), Value::Str(key)] => (item.to_string(), key.to_string()),
            _ => return Fault::invalid("tojson: separators must be two strings"),
        },
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let sort_keys = args.next("sort_keys").is_some_and(|v| v.is_true());
    args.finish()?;
    let mut writer =
        Writer { out: String::new(), meter, ensure_ascii, indent, item_separator, key_separator, sort_keys };
    writer.value(value, 0)?;
    Ok(Value::from(writer.out))
}

struct Writer<'m> {
    out: String,
    meter: &'m mut Meter,
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, level: usize) -> Outcome<()> {
        self.meter.charge(1)?;
        match value {
            Value::None => self.out.push_str("null"),
            Value::Bool(b) => self.out.push_str(if *b { "true" } else { "false" }),
            Value::Int(i) => self.out.push_str(&i.to_string()),
            Value::Float(f) => self.out.push_str(&float(*f)),
            Value::Str(s) => self.string(s)?,
            Value::List(list) if list.items.is_empty() => self.out.push_str("[]"),
            Value::List(list) => {
                self.out.push('[');
                for (i, item) in list.items.iter().enumerate() {
                    self.separate(i, level + 1)?;
                    self.value(item, level + 1)?;
                }
                self.newline(level)?;
                self.out.push(']');
            }
            Value::Dict(dict) if dict.entries.is_empty() => self.out.push_str("{}"),
            Value::Dict(dict) => {
                let mut entries: Vec<_> = dict.entries.iter().map(|(k, v)| (key_text(k), v)).collect();
                if self.sort_keys {
                    self.meter.charge(entries.len() * 16)?;
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.out.push('{');
                for (i, (key, item)) in entries.into_iter().enumerate() {
                    self.separate(i, level + 1)?;
                    self.string(&key)?;
                    self.text(&self.key_separator.clone())?;
                    self.value(item, level + 1)?;
                }
                self.newline(level)?;
                self.out.push('}');
            }
            Value::Undefined(name) => return Fault::invalid(format!("tojson: '{name}' is undefined")),
            other => return Fault::invalid(format!("tojson: a {} is not JSON", other.type_name())),
        }
        Ok(())
    }

    fn text(&mut self, text: &str) -> Outcome<()> {
        self.meter.charge_bytes(text.len())?;
        self.out.push_str(text);
        Ok(())
    }

    fn separate(&mut self, index: usize, level: usize) -> Outcome<()> {
        if index > 0 {
            self.text(&self.item_separator.clone())?;
        }
        self.newline(level)
    }

    fn newline(&mut self, level: usize) -> Outcome<()> {
        let Some(indent) = self.indent.clone() else { return Ok(()) };
        self.meter.charge_bytes(indent.len() * level)?;
        self.out.push('\n');
        (0..level).for_each(|_| self.out.push_str(&indent));
        Ok(())
    }

    fn string(&mut self, text: &str) -> Outcome<()> {
        self.meter.charge_bytes(text.len())?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 => self.out.push_str(&format!("\\u{:04x}", c as u32)),
                c if self.ensure_ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }
}

fn key_text(key: &Key) -> String {
    match key {
        Key::None => "null".to_owned(),
        Key::Bool(b) => b.to_string(),
        Key::Int(i) => i.to_string(),
        Key::Str(s) => s.to_string(),
    }
}

fn float(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
    } else {
        float_repr(value)
    }
}
