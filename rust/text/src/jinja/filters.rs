//! Jinja2's filters: those that chat templates use, and those that make no HTML.

use super::args::Args;
use super::ast::Name;
use super::eval::Renderer;
use super::json::tojson;
use super::meter::{Fault, Meter, Outcome};
use super::printf::printf;
use super::sorting::{dictsort, reduce};
use super::text::{capitalize, split_lines, to_str};
use super::value::Value;
use super::{methods, ops, predicates};

const NAMES: [&str; 38] = [
    "tojson",
    "trim",
    "default",
    "d",
    "join",
    "length",
    "count",
    "first",
    "last",
    "list",
    "string",
    "int",
    "float",
    "abs",
    "round",
    "upper",
    "lower",
    "capitalize",
    "title",
    "replace",
    "reverse",
    "indent",
    "items",
    "dictsort",
    "sort",
    "unique",
    "min",
    "max",
    "sum",
    "select",
    "reject",
    "selectattr",
    "rejectattr",
    "map",
    "attr",
    "format",
    "safe",
    "wordcount",
];

pub(super) fn exists(name: &str) -> bool {
    NAMES.contains(&name)
}

pub(super) fn apply(renderer: &mut Renderer, name: &str, value: Value, mut args: Args) -> Outcome<Value> {
    let meter = &mut renderer.meter;
    let result = match name {
        "tojson" => return tojson(&value, args, meter),
        "default" | "d" => {
            let default = args.next("default_value").unwrap_or_else(|| "".into());
            let falsy_too = args.flag("boolean", false);
            if value.is_undefined() || (falsy_too && !value.is_true()) { default } else { value }
        }
        "select" | "reject" | "selectattr" | "rejectattr" => return select(renderer, name, &value, args),
        "map" => return map(renderer, &value, args),
        "attr" => {
            let attr = args.text("name")?;
            // Attributes only: a dict's entries are none.
            if matches!(value, Value::Dict(_)) && !methods::exists(&value, &attr) {
                Value::Undefined(attr)
            } else {
                renderer.attr(&value, &attr)?
            }
        }
        "join" => join(renderer, &value, &mut args)?,
        "format" => {
            let values =
                if args.keyword.is_empty() { Value::tuple(args.positional.drain(..).collect())? } else { Value::None };
            printf(&to_str(&value, meter)?, &values, meter)?
        }
        "length" | "count" => ops::length(&value, meter)?.into(),
        "list" => Value::list(ops::iterate(&value, meter)?)?,
        "first" => ops::iterate(&value, meter)?.into_iter().next().unwrap_or_else(|| missing("the first of nothing")),
        "last" => ops::iterate(&value, meter)?.pop().unwrap_or_else(|| missing("the last of nothing")),
        "reverse" => reverse(&value, meter)?,
        "items" => match &value {
            Value::Undefined(_) => Value::list(Vec::new())?,
            Value::Dict(dict) => {
                meter.charge(dict.entries.len())?;
                methods::items(dict)?
            }
            other => return Fault::invalid(format!("items needs a dict, not {}", other.type_name())),
        },
        "dictsort" => dictsort(&value, &mut args, meter)?,
        "sort" | "unique" | "min" | "max" | "sum" => return reduce(renderer, name, &value, args),
        "safe" => value,
        "int" | "float" | "abs" | "round" => number(name, &value, &mut args, meter)?,
        _ if exists(name) => text_filter(name, &to_str(&value, meter)?, &mut args, meter)?,
        _ => return Fault::invalid(format!("there is no filter named '{name}'")),
    };
    args.finish()?;
    Ok(result)
}

pub(super) fn missing(what: &str) -> Value {
    Value::Undefined(Name::from(what))
}

/// Filters that see their value as text, as Jinja2's `soft_str` does.
fn text_filter(name: &str, text: &str, args: &mut Args, meter: &mut Meter) -> Outcome<Value> {
    meter.charge_bytes(text.len())?;
    Ok(match name {
        "trim" => methods::strip(text, "strip", args)?.into(),
        "string" => text.into(),
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "capitalize" => capitalize(text).into(),
        "title" => title_words(text).into(),
        "wordcount" => {
            text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty()).count().into()
        }
        "replace" => {
            let old = to_str(&args.require("old")?, meter)?;
            let new = to_str(&args.require("new")?, meter)?;
            let count = args.int("count")?;
            methods::replace(text, &old, &new, count, meter)?.into()
        }
        _ => indent(text, args, meter)?,
    })
}

/// Jinja2's `title`: words begin after whitespace, dashes and opening brackets.
fn title_words(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut begins = true;
    for c in text.chars() {
        if begins {
            out.extend(c.to_uppercase())
        } else {
            out.extend(c.to_lowercase())
        }
        begins = c.is_whitespace() || matches!(c, '-' | '(' | '{' | '[' | '<');
    }
    out
}

fn indent(text: &str, args: &mut Args, meter: &mut Meter) -> Outcome<Value> {
    let indention = match args.next("width") {
        Some(Value::Str(s)) => s.to_string(),
        width => {
            let width = width.map_or(Some(4), |w| w.as_int()).map(|w| usize::try_from(w.max(0)).unwrap_or(usize::MAX));
            let Some(width) = width else { return Fault::invalid("indent: width must be int or str") };
            meter.charge_bytes(width)?;
            " ".repeat(width)
        }
    };
    let (first, blank) = (args.flag("first", false), args.flag("blank", false));
    let terminated = format!("{text}\n");
    let lines = split_lines(&terminated, false);
    meter.charge_bytes(lines.len().saturating_mul(indention.len() + 1).saturating_add(text.len()))?;
    let mut out = String::new();
    for (i, line) in lines.into_iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(out.into())
}

fn reverse(value: &Value, meter: &mut Meter) -> Outcome<Value> {
    if let Value::Str(s) = value {
        meter.charge_bytes(s.len())?;
        return Ok(s.chars().rev().collect::<String>().into());
    }
    let mut items = ops::iterate(value, meter)?;
    items.reverse();
    Value::list(items)
}

fn number(name: &str, value: &Value, args: &mut Args, meter: &mut Meter) -> Outcome<Value> {
    match name {
        "int" => {
            let default = args.next("default").unwrap_or(Value::Int(0));
            let parsed = match &value.clone().defined()? {
                Value::Str(s) => {
                    let text = s.trim().replace('_', "");
                    text.parse().ok().or_else(|| text.parse::<f64>().ok().and_then(whole))
                }
                Value::Float(f) => whole(*f),
                other => other.as_int(),
            };
            Ok(parsed.map_or(default, Value::Int))
        }
        "float" => {
            let default = args.next("default").unwrap_or(Value::Float(0.0));
            let parsed = match &value.clone().defined()? {
                Value::Str(s) => s.trim().parse().ok(),
                other => other.as_float(),
            };
            Ok(parsed.map_or(default, Value::Float))
        }
        "abs" => match (value, value.as_int()) {
            (Value::Float(f), _) => Ok(Value::Float(f.abs())),
            (_, Some(i)) => Ok(Value::Int(i.saturating_abs())),
            _ => Fault::invalid(format!("abs needs a number, not {}", value.type_name())),
        },
        _ => round(value, args, meter),
    }
}

fn whole(value: f64) -> Option<i128> {
    value.is_finite().then_some(value as i128)
}

fn round(value: &Value, args: &mut Args, meter: &mut Meter) -> Outcome<Value> {
    let precision = args.int("precision")?.unwrap_or(0).clamp(0, 300) as usize;
    let method = args.next("method").map_or_else(|| Ok("common".to_owned()), |m| to_str(&m, meter))?;
    let Some(number) = value.as_float() else {
        return Fault::invalid(format!("round needs a number, not {}", value.type_name()));
    };
    if !number.is_finite() || method == "common" {
        return Ok(match value.as_int() {
            Some(i) => Value::Int(i),
            None => Value::Float(format!("{number:.precision$}").parse().unwrap_or(number)),
        });
    }
    let scale = 10f64.powi(precision as i32);
    match method.as_str() {
        "ceil" => Ok(Value::Float((number * scale).ceil() / scale)),
        "floor" => Ok(Value::Float((number * scale).floor() / scale)),
        _ => Fault::invalid("round: method must be common, ceil or floor"),
    }
}

/// `a.b.0` of a value; a path that ends in nothing is undefined.
pub(super) fn attribute(renderer: &mut Renderer, value: &Value, path: &Value) -> Outcome<Value> {
    let Value::Str(path) = path else {
        let found = ops::item(value, path, &mut renderer.meter)?;
        return Ok(found.unwrap_or_else(|| missing("an item of 'attribute'")));
    };
    let mut value = value.clone();
    for part in path.split('.') {
        renderer.meter.charge(1)?;
        let key = part.parse().map_or_else(|_| Value::from(part), Value::Int);
        value = match (ops::item(&value, &key, &mut renderer.meter)?, &value) {
            (Some(found), _) => found,
            (None, Value::Dict(_)) => missing(part),
            (None, object) => renderer.attr(object, &Name::from(part))?,
        };
    }
    Ok(value)
}

fn join(renderer: &mut Renderer, value: &Value, args: &mut Args) -> Outcome<Value> {
    let separator = args.next("d").map_or_else(|| Ok(String::new()), |d| to_str(&d, &mut renderer.meter))?;
    let path = args.next("attribute");
    let mut parts = Vec::new();
    for item in ops::iterate(value, &mut renderer.meter)? {
        let item = match &path {
            Some(path) => attribute(renderer, &item, path)?,
            None => item,
        };
        parts.push(match item {
            Value::Str(_) => item,
            other => to_str(&other, &mut renderer.meter)?.into(),
        });
    }
    methods::join(&separator, &parts, &mut renderer.meter)
}

/// Jinja2's `select` and `map` find nothing in anything false, iterable or not.
fn iterate_if_true(value: &Value, meter: &mut Meter) -> Outcome<Vec<Value>> {
    if value.is_true() { ops::iterate(value, meter) } else { Ok(Vec::new()) }
}

fn select(renderer: &mut Renderer, name: &str, value: &Value, mut args: Args) -> Outcome<Value> {
    let path = if name.ends_with("attr") { Some(args.require("attribute")?) } else { None };
    let test = args.positional.pop_front();
    let mut kept = Vec::new();
    for item in iterate_if_true(value, &mut renderer.meter)? {
        let subject = match &path {
            Some(path) => attribute(renderer, &item, path)?,
            None => item.clone(),
        };
        let holds = match &test {
            None => subject.is_true(),
            Some(Value::Str(test)) => {
                let args = Args { positional: args.positional.clone(), keyword: args.keyword.clone() };
                let test = match &**test {
                    "==" => "eq",
                    "!=" => "ne",
                    "<" => "lt",
                    "<=" => "le",
                    ">" => "gt",
                    ">=" => "ge",
                    other => other,
                };
                predicates::holds(test, &subject, args, &mut renderer.meter)?
            }
            Some(other) => {
                return Fault::invalid(format!("{name}: the test must be a name, not {}", other.type_name()));
            }
        };
        if holds == name.starts_with("select") {
            kept.push(item);
        }
    }
    Value::list(kept)
}

fn map(renderer: &mut Renderer, value: &Value, mut args: Args) -> Outcome<Value> {
    let mut mapped = Vec::new();
    let items = iterate_if_true(value, &mut renderer.meter)?;
    if args.positional.is_empty() {
        let Some(path) = args.named("attribute") else { return Fault::invalid("map needs a filter or attribute=") };
        let default = args.named("default");
        args.finish()?;
        for item in items {
            let found = attribute(renderer, &item, &path)?;
            mapped.push(if found.is_undefined() { default.clone().unwrap_or(found) } else { found });
        }
        return Value::list(mapped);
    }
    let filter = args.text("filter")?;
    if matches!(&*filter, "map" | "select" | "reject" | "selectattr" | "rejectattr") {
        return Fault::invalid(format!("map: '{filter}' cannot be mapped"));
    }
    for item in items {
        let args = Args { positional: args.positional.clone(), keyword: args.keyword.clone() };
        mapped.push(apply(renderer, &filter, item, args)?);
    }
    Value::list(mapped)
}
