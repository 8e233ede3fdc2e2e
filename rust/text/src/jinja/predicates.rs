//! Jinja's tests: `value is name(args)`.

use super::args::Args;
use super::ast::{BinaryOp, CompareOp};
use super::meter::{Fault, Meter, Outcome};
use super::value::Value;
use super::{filters, ops};

pub(super) const NAMES: [&str; 34] = [
    "defined",
    "undefined",
    "none",
    "boolean",
    "true",
    "false",
    "integer",
    "float",
    "number",
    "string",
    "mapping",
    "sequence",
    "iterable",
    "callable",
    "odd",
    "even",
    "divisibleby",
    "lower",
    "upper",
    "sameas",
    "escaped",
    "filter",
    "test",
    "eq",
    "equalto",
    "ne",
    "lt",
    "lessthan",
    "le",
    "gt",
    "greaterthan",
    "ge",
    "in",
    "not",
];

pub(super) fn holds(name: &str, value: &Value, mut args: Args, meter: &mut Meter) -> Outcome<bool> {
    let comparison = match name {
        "eq" | "equalto" => Some(CompareOp::Eq),
        "ne" => Some(CompareOp::Ne),
        "lt" | "lessthan" => Some(CompareOp::Lt),
        "le" => Some(CompareOp::Le),
        "gt" | "greaterthan" => Some(CompareOp::Gt),
        "ge" => Some(CompareOp::Ge),
        "in" => Some(CompareOp::In),
        _ => None,
    };
    if let Some(op) = comparison {
        let other = args.require("other")?;
        args.finish()?;
        return ops::compare(op, value, &other, meter);
    }
    let result = match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => value.as_float().is_some(),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" | "iterable" => {
            matches!(value, Value::Str(_) | Value::List(_) | Value::Dict(_) | Value::Undefined(_))
        }
        "callable" => matches!(value, Value::Function(_) | Value::Macro(_) | Value::Method(_) | Value::Loop(_)),
        "odd" => remainder(value, &Value::Int(2), meter)? == Some(1.0),
        "even" => remainder(value, &Value::Int(2), meter)? == Some(0.0),
        "divisibleby" => remainder(value, &args.require("num")?, meter)? == Some(0.0),
        "lower" | "upper" => {
            let text = super::text::to_str(value, meter)?;
            let (has_lower, has_upper) = (text.chars().any(char::is_lowercase), text.chars().any(char::is_uppercase));
            if name == "lower" { has_lower && !has_upper } else { has_upper && !has_lower }
        }
        "sameas" => {
            let other = args.require("other")?;
            value.type_name() == other.type_name() && ops::equal(value, &other, meter)?
        }
        "escaped" => false,
        "filter" => value.as_str().is_some_and(filters::exists),
        "test" => value.as_str().is_some_and(|s| NAMES.contains(&s)),
        _ => return Fault::invalid(format!("there is no test named '{name}'")),
    };
    args.finish()?;
    Ok(result)
}

fn remainder(value: &Value, by: &Value, meter: &mut Meter) -> Outcome<Option<f64>> {
    Ok(ops::binary(BinaryOp::Rem, value.clone(), by.clone(), meter)?.as_float())
}
