//! Filters that order or fold a list.

use std::cmp::Ordering;

use super::args::Args;
use super::ast::BinaryOp;
use super::eval::Renderer;
use super::filters::{attribute, missing};
use super::meter::{Fault, Meter, Outcome};
use super::ops;
use super::value::{Key, Value};

/// The value a comparison sees: text without case, unless asked otherwise.
fn folded(value: Value, case_sensitive: bool, meter: &mut Meter) -> Outcome<Value> {
    match &value {
        Value::Str(s) if !case_sensitive => {
            meter.charge_bytes(s.len())?;
            Ok(s.to_lowercase().into())
        }
        _ => Ok(value),
    }
}

/// Merges upwards, stably: `slice::sort_by` may panic on keys without a total order, and cannot end at a fault.
fn sort_pairs(pairs: Vec<(Value, Value)>, descending: bool, meter: &mut Meter) -> Outcome<Vec<(Value, Value)>> {
    if pairs.len() < 2 {
        return Ok(pairs);
    }
    let mut left = pairs;
    let right = left.split_off(left.len() / 2);
    let mut left = sort_pairs(left, descending, meter)?.into_iter().peekable();
    let mut right = sort_pairs(right, descending, meter)?.into_iter().peekable();
    let mut merged = Vec::with_capacity(left.len() + right.len());
    while let (Some(l), Some(r)) = (left.peek(), right.peek()) {
        let order = ops::order(&r.0, &l.0, meter)?;
        let right_first = order == Some(if descending { Ordering::Greater } else { Ordering::Less });
        merged.extend(if right_first { right.next() } else { left.next() });
    }
    merged.extend(left);
    merged.extend(right);
    Ok(merged)
}

pub(super) fn reduce(renderer: &mut Renderer, name: &str, value: &Value, mut args: Args) -> Outcome<Value> {
    let descending = name == "sort" && args.flag("reverse", false);
    let case_sensitive = name != "sum" && args.flag("case_sensitive", false);
    let path = args.next("attribute").filter(|p| !matches!(p, Value::None));
    let start = if name == "sum" { args.next("start") } else { None }.unwrap_or(Value::Int(0));
    args.finish()?;
    let mut pairs = Vec::new();
    for item in ops::iterate(value, &mut renderer.meter)? {
        let key = match &path {
            Some(path) => attribute(renderer, &item, path)?,
            None => item.clone(),
        };
        pairs.push((folded(key, case_sensitive || name == "sum", &mut renderer.meter)?, item));
    }
    let meter = &mut renderer.meter;
    match name {
        "sum" => {
            let mut sum = start;
            for (key, _) in pairs {
                sum = ops::binary(BinaryOp::Add, sum, key, meter)?;
            }
            Ok(sum)
        }
        "sort" => {
            let sorted = sort_pairs(pairs, descending, meter)?;
            Value::list(sorted.into_iter().map(|p| p.1).collect())
        }
        "unique" => {
            let mut seen: Vec<(Value, Value)> = Vec::new();
            'next: for pair in pairs {
                for earlier in &seen {
                    if ops::equal(&earlier.0, &pair.0, meter)? {
                        continue 'next;
                    }
                }
                seen.push(pair);
            }
            Value::list(seen.into_iter().map(|p| p.1).collect())
        }
        _ => {
            let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
            let mut best: Option<(Value, Value)> = None;
            for pair in pairs {
                let better = match &best {
                    Some(best) => ops::order(&pair.0, &best.0, meter)? == Some(wanted),
                    None => true,
                };
                if better {
                    best = Some(pair);
                }
            }
            Ok(best.map_or_else(|| missing("the least or greatest of nothing"), |b| b.1))
        }
    }
}

pub(super) fn dictsort(value: &Value, args: &mut Args, meter: &mut Meter) -> Outcome<Value> {
    let Value::Dict(dict) = value else {
        return Fault::invalid(format!("dictsort needs a dict, not {}", value.type_name()));
    };
    let case_sensitive = args.flag("case_sensitive", false);
    let by_value = args.next("by").is_some_and(|by| by.as_str() == Some("value"));
    let descending = args.flag("reverse", false);
    meter.charge(dict.entries.len())?;
    let mut pairs = Vec::new();
    for (key, value) in &dict.entries {
        let subject = if by_value { value.clone() } else { Key::to_value(key) };
        let item = Value::tuple(vec![key.to_value(), value.clone()])?;
        pairs.push((folded(subject, case_sensitive, meter)?, item));
    }
    let sorted = sort_pairs(pairs, descending, meter)?;
    Value::list(sorted.into_iter().map(|p| p.1).collect())
}
