//! Methods of Python's str, list and dict. Values are immutable, as in transformers' sandbox.

use super::args::Args;
use super::meter::{Fault, Meter, Outcome};
use super::ops;
use super::printf::str_format;
use super::text::{capitalize, is_space, split_lines, title};
use super::value::{Dict, List, Value};

const STR: [&str; 39] = [
    "strip",
    "lstrip",
    "rstrip",
    "split",
    "rsplit",
    "splitlines",
    "partition",
    "rpartition",
    "replace",
    "startswith",
    "endswith",
    "removeprefix",
    "removesuffix",
    "upper",
    "lower",
    "casefold",
    "title",
    "capitalize",
    "swapcase",
    "find",
    "rfind",
    "index",
    "rindex",
    "count",
    "join",
    "format",
    "zfill",
    "ljust",
    "rjust",
    "center",
    "isdigit",
    "isdecimal",
    "isnumeric",
    "isalpha",
    "isalnum",
    "isspace",
    "isupper",
    "islower",
    "isascii",
];
const LIST: [&str; 11] =
    ["index", "count", "copy", "append", "extend", "insert", "pop", "remove", "sort", "reverse", "clear"];
const TUPLE: [&str; 2] = ["index", "count"];
const DICT: [&str; 10] = ["get", "items", "keys", "values", "copy", "pop", "popitem", "setdefault", "update", "clear"];

pub(super) fn exists(object: &Value, name: &str) -> bool {
    match object {
        Value::Str(_) => STR.contains(&name),
        Value::List(list) if list.is_tuple => TUPLE.contains(&name),
        Value::List(_) => LIST.contains(&name),
        Value::Dict(_) => DICT.contains(&name),
        _ => false,
    }
}

pub(super) fn call(object: &Value, name: &str, args: Args, meter: &mut Meter) -> Outcome<Value> {
    match object {
        Value::Str(text) => {
            meter.charge_bytes(text.len())?;
            str_method(text, name, args, meter)
        }
        Value::List(list) => list_method(object, list, name, args, meter),
        Value::Dict(dict) => dict_method(object, dict, name, args, meter),
        other => Fault::invalid(format!("a {} has no method '{name}'", other.type_name())),
    }
}

fn list_method(object: &Value, list: &List, name: &str, mut args: Args, meter: &mut Meter) -> Outcome<Value> {
    match name {
        "index" | "count" => {
            let wanted = args.require("value")?;
            args.finish()?;
            let mut count = 0usize;
            for (i, item) in list.items.iter().enumerate() {
                if ops::equal(item, &wanted, meter)? {
                    if name == "index" {
                        return Ok(i.into());
                    }
                    count += 1;
                }
            }
            if name == "index" { Fault::invalid("list.index: the value is not in the list") } else { Ok(count.into()) }
        }
        "copy" => Ok(object.clone()),
        _ => Fault::invalid(format!(
            "list.{name} would change a list: values are immutable; hint: use a namespace and +"
        )),
    }
}

fn dict_method(object: &Value, dict: &Dict, name: &str, mut args: Args, meter: &mut Meter) -> Outcome<Value> {
    if name == "get" {
        let key = args.require("key")?.as_key()?;
        let default = args.next("default").unwrap_or(Value::None);
        args.finish()?;
        return Ok(dict.entries.get(&key).cloned().unwrap_or(default));
    }
    meter.charge(dict.entries.len())?;
    let result = match name {
        "keys" => Value::list(dict.entries.keys().map(|k| k.to_value()).collect()),
        "values" => Value::list(dict.entries.values().cloned().collect()),
        "items" => items(dict),
        "copy" => Ok(object.clone()),
        _ => return Fault::invalid(format!("dict.{name} would change a dict: values are immutable")),
    };
    args.finish()?;
    result
}

/// The pairs of a dict, as tuples.
pub(super) fn items(dict: &Dict) -> Outcome<Value> {
    let pairs = dict.entries.iter().map(|(k, v)| Value::tuple(vec![k.to_value(), v.clone()]));
    Value::list(pairs.collect::<Outcome<_>>()?)
}

fn str_method(text: &str, name: &str, mut args: Args, meter: &mut Meter) -> Outcome<Value> {
    let result = match name {
        "strip" | "lstrip" | "rstrip" => strip(text, name, &mut args)?.into(),
        "split" | "rsplit" => return split(text, name == "rsplit", args, meter),
        "splitlines" => {
            let keep = args.flag("keepends", false);
            let lines = split_lines(text, keep);
            meter.charge(lines.len())?;
            Value::strings(lines.into_iter().map(str::to_owned))?
        }
        "partition" | "rpartition" => {
            let sep = args.text("sep")?;
            let found = if name == "partition" { text.split_once(&*sep) } else { text.rsplit_once(&*sep) };
            let parts = match found {
                Some((before, after)) => [before, &sep, after],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            Value::tuple(parts.into_iter().map(Value::from).collect())?
        }
        "replace" => {
            let (old, new) = (args.text("old")?, args.text("new")?);
            let count = args.int("count")?;
            replace(text, &old, &new, count, meter)?.into()
        }
        "startswith" | "endswith" => {
            let affixes = args.require("affix")?;
            let found = any_affix(text, &affixes, name == "startswith", meter)?;
            Value::Bool(found)
        }
        "removeprefix" => {
            let affix = args.text("prefix")?;
            text.strip_prefix(&*affix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let affix = args.text("suffix")?;
            text.strip_suffix(&*affix).unwrap_or(text).into()
        }
        "upper" => text.to_uppercase().into(),
        "lower" | "casefold" => text.to_lowercase().into(),
        "title" => title(text).into(),
        "capitalize" => capitalize(text).into(),
        "swapcase" => {
            let swap = |c: char| {
                if c.is_uppercase() { c.to_lowercase().collect::<String>() } else { c.to_uppercase().collect() }
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "find" | "rfind" | "index" | "rindex" => {
            let sub = args.text("sub")?;
            let at = if name.starts_with('r') { text.rfind(&*sub) } else { text.find(&*sub) };
            match at {
                Some(at) => text[..at].chars().count().into(),
                None if name.ends_with("find") => Value::Int(-1),
                None => return Fault::invalid(format!("str.{name}: substring not found")),
            }
        }
        "count" => {
            let sub = args.text("sub")?;
            if sub.is_empty() { (text.chars().count() + 1).into() } else { text.matches(&*sub).count().into() }
        }
        "join" => {
            let parts = args.require("iterable")?;
            join(text, &ops::iterate(&parts, meter)?, meter)?
        }
        "format" => return str_format(text, &args, meter),
        "zfill" | "ljust" | "rjust" | "center" => justify(text, name, &mut args, meter)?,
        _ => Value::Bool(is_all(text, name)),
    };
    args.finish()?;
    Ok(result)
}

/// `str.strip` and its one-sided kin.
pub(super) fn strip<'t>(text: &'t str, name: &str, args: &mut Args) -> Outcome<&'t str> {
    let chars = match args.next("chars") {
        None | Some(Value::None) => None,
        Some(Value::Str(chars)) => Some(chars),
        Some(other) => return Fault::invalid(format!("strip needs a str, not {}", other.type_name())),
    };
    let strips = |c: char| chars.as_ref().map_or_else(|| is_space(c), |set| set.contains(c));
    Ok(match name {
        "lstrip" => text.trim_start_matches(strips),
        "rstrip" => text.trim_end_matches(strips),
        _ => text.trim_matches(strips),
    })
}

fn split(text: &str, from_right: bool, mut args: Args, meter: &mut Meter) -> Outcome<Value> {
    let sep = match args.next("sep") {
        None | Some(Value::None) => None,
        Some(Value::Str(sep)) if sep.is_empty() => return Fault::invalid("split: empty separator"),
        Some(Value::Str(sep)) => Some(sep),
        Some(other) => return Fault::invalid(format!("split needs a str, not {}", other.type_name())),
    };
    let limit = args.int("maxsplit")?.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX - 1);
    args.finish()?;
    let mut parts: Vec<&str> = match (&sep, from_right) {
        (Some(sep), false) => text.splitn(limit + 1, &**sep).collect(),
        (Some(sep), true) => text.rsplitn(limit + 1, &**sep).collect(),
        (None, false) => split_spaces(text, limit),
        (None, true) => rsplit_spaces(text, limit),
    };
    if from_right {
        parts.reverse();
    }
    meter.charge(parts.len())?;
    Value::strings(parts.into_iter().map(str::to_owned))
}

fn split_spaces(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        if parts.len() == limit {
            parts.push(rest);
            break;
        }
        let end = rest.find(is_space).unwrap_or(rest.len());
        parts.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    parts
}

/// The words from the right, last first.
fn rsplit_spaces(text: &str, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        if parts.len() == limit {
            parts.push(rest);
            break;
        }
        let start = rest.char_indices().rev().find(|(_, c)| is_space(*c)).map_or(0, |(at, c)| at + c.len_utf8());
        parts.push(&rest[start..]);
        rest = rest[..start].trim_end_matches(is_space);
    }
    parts
}

/// `str.replace`, paid by the size of its result.
pub(super) fn replace(text: &str, old: &str, new: &str, count: Option<i128>, meter: &mut Meter) -> Outcome<String> {
    let limit = count.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    meter.charge_bytes(text.len())?;
    let hits = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() }.min(limit);
    meter.charge_bytes(hits.saturating_mul(new.len()).saturating_add(text.len()))?;
    Ok(text.replacen(old, new, limit))
}

/// The strings of a list with a separator between them.
pub(super) fn join(separator: &str, parts: &[Value], meter: &mut Meter) -> Outcome<Value> {
    let mut out = String::new();
    for (i, part) in parts.iter().enumerate() {
        match part {
            Value::Str(part) => {
                meter.charge_bytes(part.len() + separator.len())?;
                out.push_str(if i > 0 { separator } else { "" });
                out.push_str(part);
            }
            other => return Fault::invalid(format!("join: item {i} is {}, not str", other.type_name())),
        }
    }
    Ok(out.into())
}

fn any_affix(text: &str, affixes: &Value, at_start: bool, meter: &mut Meter) -> Outcome<bool> {
    let list = match affixes {
        Value::List(list) if list.is_tuple => list.items.as_slice(),
        one => std::slice::from_ref(one),
    };
    meter.charge(list.len())?;
    for affix in list {
        let Some(affix) = affix.as_str() else {
            return Fault::invalid(format!("startswith and endswith need a str or a tuple, not {}", affix.type_name()));
        };
        if if at_start { text.starts_with(affix) } else { text.ends_with(affix) } {
            return Ok(true);
        }
    }
    Ok(false)
}

fn justify(text: &str, name: &str, args: &mut Args, meter: &mut Meter) -> Outcome<Value> {
    let width = args.int("width")?.map_or(0, |w| usize::try_from(w.max(0)).unwrap_or(usize::MAX));
    let fill = if name == "zfill" {
        "0".into()
    } else {
        match args.next("fillchar") {
            Some(Value::Str(fill)) if fill.chars().count() == 1 => fill,
            None => " ".into(),
            Some(_) => return Fault::invalid("the fill must be one character"),
        }
    };
    meter.charge_bytes(width.saturating_mul(fill.len()))?;
    let len = text.chars().count();
    let missing = width.saturating_sub(len);
    let left = match name {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, body) = text.split_at(usize::from(name == "zfill" && text.starts_with(['+', '-'])));
    Ok(format!("{sign}{}{body}{}", fill.repeat(left), fill.repeat(missing - left)).into())
}

fn is_all(text: &str, name: &str) -> bool {
    let all = |is: fn(char) -> bool| !text.is_empty() && text.chars().all(is);
    match name {
        "isdigit" | "isdecimal" => all(|c| c.is_ascii_digit()),
        "isnumeric" => all(char::is_numeric),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isspace" => all(is_space),
        "isupper" => text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase),
        "islower" => text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase),
        _ => text.is_ascii(),
    }
}
