//! `'…' % args` and `'…'.format(…)`, as far as chat templates use them.

use super::args::Args;
use super::meter::{Fault, Meter, Outcome};
use super::text::{to_str, write_repr, write_str};
use super::value::Value;

/// Widest field and longest precision: no template needs more.
const MAX_FIELD: usize = 1000;

/// Python's `%` on a string: `%s %r %d %i %f %x %%` with `-`, `0`, width and precision.
pub(super) fn printf(format: &str, args: &Value, meter: &mut Meter) -> Outcome<Value> {
    meter.charge_bytes(format.len())?;
    let mut values = match args {
        Value::List(list) if list.is_tuple => list.items.clone(),
        other => vec![other.clone()],
    };
    values.reverse();
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        if chars.next_if_eq(&'%').is_some() {
            out.push('%');
            continue;
        }
        let mut flags = (false, false);
        while let Some(flag) = chars.next_if(|c| matches!(c, '-' | '0')) {
            if flag == '-' { flags.0 = true } else { flags.1 = true }
        }
        let width = number(&mut chars)?;
        let precision = if chars.next_if_eq(&'.').is_some() { Some(number(&mut chars)?) } else { None };
        let Some(conversion) = chars.next() else { return Fault::invalid("incomplete format") };
        let Some(value) = values.pop() else { return Fault::invalid("not enough arguments for the format") };
        let field = convert(conversion, &value.defined()?, precision, meter)?;
        pad(&mut out, &field, width, flags, meter)?;
    }
    // Python lets a list or dict go unused: it might have been the argument of a named field.
    let may_be_unused = matches!(args, Value::Dict(_)) || matches!(args, Value::List(list) if !list.is_tuple);
    if !values.is_empty() && !may_be_unused {
        return Fault::invalid("not all arguments were used by the format");
    }
    Ok(Value::from(out))
}

fn number(chars: &mut std::iter::Peekable<std::str::Chars>) -> Outcome<usize> {
    let mut number = 0;
    while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
        chars.next();
        number = number * 10 + digit as usize;
        if number > MAX_FIELD {
            return Err(Fault::Limit { what: "characters in a format field", limit: MAX_FIELD as u64 });
        }
    }
    Ok(number)
}

fn convert(conversion: char, value: &Value, precision: Option<usize>, meter: &mut Meter) -> Outcome<String> {
    let cut = |text: String| match precision {
        Some(limit) => text.chars().take(limit).collect(),
        None => text,
    };
    match (conversion, value.as_int(), value.as_float()) {
        ('s', ..) => Ok(cut(to_str(value, meter)?)),
        ('r', ..) => {
            let mut text = String::new();
            write_repr(value, &mut text, meter)?;
            Ok(cut(text))
        }
        ('d' | 'i' | 'u', Some(int), _) => Ok(int.to_string()),
        ('d' | 'i' | 'u', None, Some(float)) => Ok((float.trunc() as i128).to_string()),
        ('x', Some(int), _) if int >= 0 => Ok(format!("{int:x}")),
        ('f' | 'F', _, Some(float)) => Ok(format!("{float:.*}", precision.unwrap_or(6))),
        _ => Fault::invalid(format!("format '%{conversion}' does not take a {}", value.type_name())),
    }
}

fn pad(out: &mut String, field: &str, width: usize, (left, zero): (bool, bool), meter: &mut Meter) -> Outcome<()> {
    meter.charge_bytes(field.len() + width)?;
    let missing = width.saturating_sub(field.chars().count());
    let (sign, digits) = if zero && !left { field.split_at(usize::from(field.starts_with('-'))) } else { ("", field) };
    out.push_str(sign);
    if !left {
        out.extend(std::iter::repeat_n(if zero { '0' } else { ' ' }, missing));
    }
    out.push_str(digits);
    if left {
        out.extend(std::iter::repeat_n(' ', missing));
    }
    Ok(())
}

/// `str.format` with `{}`, `{0}` and `{name}`; attributes, conversions and format specs are refused.
pub(super) fn str_format(format: &str, args: &Args, meter: &mut Meter) -> Outcome<Value> {
    meter.charge_bytes(format.len())?;
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    let mut next_index = 0;
    while let Some(c) = chars.next() {
        match c {
            '{' | '}' if chars.next_if_eq(&c).is_some() => out.push(c),
            '}' => return Fault::invalid("single '}' in a format"),
            '{' => {
                let field: String = chars.by_ref().take_while(|c| *c != '}').collect();
                let value = if field.is_empty() {
                    next_index += 1;
                    args.positional.get(next_index - 1)
                } else if let Ok(index) = field.parse::<usize>() {
                    args.positional.get(index)
                } else {
                    args.keyword.iter().find(|(name, _)| **name == *field).map(|(_, value)| value)
                };
                match value {
                    Some(value) => write_str(value, &mut out, meter)?,
                    None => return Fault::invalid(format!("format field '{{{field}}}' has no argument")),
                }
            }
            c => out.push(c),
        }
    }
    Ok(Value::from(out))
}
