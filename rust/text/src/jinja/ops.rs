//! Operators with Python's meaning. Everything that allocates or walks pays first.

use std::cmp::Ordering;
use std::sync::Arc;

use super::ast::{BinaryOp, CompareOp};
use super::meter::{Fault, Meter, Outcome};
use super::printf::printf;
use super::value::Value;

pub(super) fn binary(op: BinaryOp, a: Value, b: Value, meter: &mut Meter) -> Outcome<Value> {
    let (a, b) = (a.defined()?, b.defined()?);
    match (op, &a, &b) {
        (BinaryOp::Add, Value::Str(x), Value::Str(y)) => {
            meter.charge_bytes(x.len() + y.len())?;
            return Ok(Value::Str(Arc::from([&**x, &**y].concat())));
        }
        (BinaryOp::Add, Value::List(x), Value::List(y)) if x.is_tuple == y.is_tuple => {
            meter.charge(x.items.len() + y.items.len())?;
            let items = [x.items.as_slice(), y.items.as_slice()].concat();
            return if x.is_tuple { Value::tuple(items) } else { Value::list(items) };
        }
        (BinaryOp::Rem, Value::Str(format), args) => return printf(format, args, meter),
        (BinaryOp::Mul, Value::Str(_) | Value::List(_), times)
        | (BinaryOp::Mul, times, Value::Str(_) | Value::List(_)) => {
            if let Some(times) = times.as_int() {
                let value = if matches!(a, Value::Str(_) | Value::List(_)) { &a } else { &b };
                return repeat(value, usize::try_from(times.max(0)).unwrap_or(usize::MAX), meter);
            }
        }
        _ => {}
    }
    let result = match (a.as_int(), b.as_int()) {
        (Some(x), Some(y)) => integers(op, x, y)?,
        _ => match (a.as_float(), b.as_float()) {
            (Some(x), Some(y)) => Some(Value::Float(floats(op, x, y)?)),
            _ => {
                return Fault::invalid(format!(
                    "unsupported operand types for {}: '{}' and '{}'",
                    op.symbol(),
                    a.type_name(),
                    b.type_name()
                ));
            }
        },
    };
    match result {
        Some(value) => Ok(value),
        None => Fault::invalid(format!("the result of {} is too large for this renderer", op.symbol())),
    }
}

fn repeat(value: &Value, times: usize, meter: &mut Meter) -> Outcome<Value> {
    match value {
        Value::Str(s) => {
            meter.charge_bytes(s.len().saturating_mul(times))?;
            Ok(Value::from(s.repeat(times)))
        }
        Value::List(list) => {
            meter.charge(list.items.len().saturating_mul(times))?;
            let total = list.items.len().saturating_mul(times);
            let items = list.items.iter().cycle().take(total).cloned().collect();
            if list.is_tuple { Value::tuple(items) } else { Value::list(items) }
        }
        other => Fault::invalid(format!("a {} cannot be repeated", other.type_name())),
    }
}

/// `None` when the result does not fit.
fn integers(op: BinaryOp, x: i128, y: i128) -> Outcome<Option<Value>> {
    if y == 0 && matches!(op, BinaryOp::Div | BinaryOp::FloorDiv | BinaryOp::Rem) {
        return Fault::invalid("division by zero");
    }
    let result = match op {
        BinaryOp::Add => x.checked_add(y),
        BinaryOp::Sub => x.checked_sub(y),
        BinaryOp::Mul => x.checked_mul(y),
        BinaryOp::Div => return Ok(Some(Value::Float(x as f64 / y as f64))),
        BinaryOp::FloorDiv => x.checked_div(y).map(|q| if x % y != 0 && (x < 0) != (y < 0) { q - 1 } else { q }),
        BinaryOp::Rem => x.checked_rem(y).map(|r| if r != 0 && (r < 0) != (y < 0) { r + y } else { r }),
        BinaryOp::Pow if y < 0 => return Ok(Some(Value::Float(floats(op, x as f64, y as f64)?))),
        BinaryOp::Pow => u32::try_from(y).ok().and_then(|y| x.checked_pow(y)),
    };
    Ok(result.map(Value::Int))
}

fn floats(op: BinaryOp, x: f64, y: f64) -> Outcome<f64> {
    if y == 0.0 && matches!(op, BinaryOp::Div | BinaryOp::FloorDiv | BinaryOp::Rem) {
        return Fault::invalid("division by zero");
    }
    Ok(match op {
        BinaryOp::Add => x + y,
        BinaryOp::Sub => x - y,
        BinaryOp::Mul => x * y,
        BinaryOp::Div => x / y,
        BinaryOp::FloorDiv => (x / y).floor(),
        BinaryOp::Rem => x - (x / y).floor() * y,
        BinaryOp::Pow if x == 0.0 && y < 0.0 => return Fault::invalid("0.0 cannot be raised to a negative power"),
        BinaryOp::Pow => x.powf(y),
    })
}

pub(super) fn compare(op: CompareOp, a: &Value, b: &Value, meter: &mut Meter) -> Outcome<bool> {
    Ok(match op {
        CompareOp::Eq => equal(a, b, meter)?,
        CompareOp::Ne => !equal(a, b, meter)?,
        CompareOp::In => contains(b, a, meter)?,
        CompareOp::NotIn => !contains(b, a, meter)?,
        CompareOp::Lt => order(a, b, meter)? == Some(Ordering::Less),
        CompareOp::Gt => order(a, b, meter)? == Some(Ordering::Greater),
        CompareOp::Le => matches!(order(a, b, meter)?, Some(Ordering::Less | Ordering::Equal)),
        CompareOp::Ge => matches!(order(a, b, meter)?, Some(Ordering::Greater | Ordering::Equal)),
    })
}

pub(super) fn equal(a: &Value, b: &Value, meter: &mut Meter) -> Outcome<bool> {
    meter.charge(1)?;
    Ok(match (a, b) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Str(x), Value::Str(y)) => {
            meter.charge_bytes(x.len().min(y.len()))?;
            x == y
        }
        (Value::List(x), Value::List(y)) => {
            if x.is_tuple != y.is_tuple || x.items.len() != y.items.len() {
                return Ok(false);
            }
            for (x, y) in x.items.iter().zip(&y.items) {
                if !equal(x, y, meter)? {
                    return Ok(false);
                }
            }
            true
        }
        (Value::Dict(x), Value::Dict(y)) => {
            if x.entries.len() != y.entries.len() {
                return Ok(false);
            }
            for (key, x) in &x.entries {
                match y.entries.get(key) {
                    Some(y) if equal(x, y, meter)? => {}
                    _ => return Ok(false),
                }
            }
            true
        }
        (Value::Namespace(x), Value::Namespace(y))
        | (Value::Macro(x), Value::Macro(y))
        | (Value::Loop(x), Value::Loop(y)) => x == y,
        (Value::Function(x), Value::Function(y)) => x == y,
        _ => match (a.as_int(), b.as_int()) {
            (Some(x), Some(y)) => x == y,
            _ => matches!((a.as_float(), b.as_float()), (Some(x), Some(y)) if x == y),
        },
    })
}

/// `None` where Python finds no order between numbers (NaN).
pub(super) fn order(a: &Value, b: &Value, meter: &mut Meter) -> Outcome<Option<Ordering>> {
    meter.charge(1)?;
    match (a, b) {
        (Value::Str(x), Value::Str(y)) => {
            meter.charge_bytes(x.len().min(y.len()))?;
            return Ok(Some(x.cmp(y)));
        }
        (Value::List(x), Value::List(y)) if x.is_tuple == y.is_tuple => {
            for (x, y) in x.items.iter().zip(&y.items) {
                if !equal(x, y, meter)? {
                    return order(x, y, meter);
                }
            }
            return Ok(Some(x.items.len().cmp(&y.items.len())));
        }
        (Value::Undefined(name), _) | (_, Value::Undefined(name)) => {
            return Fault::invalid(format!("'{name}' is undefined"));
        }
        _ => {}
    }
    if let (Some(x), Some(y)) = (a.as_int(), b.as_int()) {
        return Ok(Some(x.cmp(&y)));
    }
    match (a.as_float(), b.as_float()) {
        (Some(x), Some(y)) => Ok(x.partial_cmp(&y)),
        _ => Fault::invalid(format!("'{}' and '{}' have no order", a.type_name(), b.type_name())),
    }
}

pub(super) fn contains(container: &Value, item: &Value, meter: &mut Meter) -> Outcome<bool> {
    match container {
        Value::Undefined(_) => Ok(false),
        Value::Str(text) => match item {
            Value::Str(part) => {
                meter.charge_bytes(text.len())?;
                Ok(text.contains(&**part))
            }
            Value::Undefined(name) => Fault::invalid(format!("'{name}' is undefined")),
            other => Fault::invalid(format!("'in <str>' needs a str, not {}", other.type_name())),
        },
        Value::List(list) => {
            for candidate in &list.items {
                if equal(candidate, item, meter)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        Value::Dict(dict) => Ok(!item.is_undefined() && dict.entries.contains_key(&item.as_key()?)),
        other => Fault::invalid(format!("a {} holds nothing to be 'in'", other.type_name())),
    }
}

/// What a loop over the value visits.
pub(super) fn iterate(value: &Value, meter: &mut Meter) -> Outcome<Vec<Value>> {
    match value {
        Value::Undefined(_) => Ok(Vec::new()),
        Value::Str(s) => {
            meter.charge(s.len())?;
            let mut buffer = [0; 4];
            Ok(s.chars().map(|c| Value::from(&*c.encode_utf8(&mut buffer))).collect())
        }
        Value::List(list) => {
            meter.charge(list.items.len())?;
            Ok(list.items.clone())
        }
        Value::Dict(dict) => {
            meter.charge(dict.entries.len())?;
            Ok(dict.entries.keys().map(super::value::Key::to_value).collect())
        }
        other => Fault::invalid(format!("a {} cannot be iterated", other.type_name())),
    }
}

/// `len(value)`.
pub(super) fn length(value: &Value, meter: &mut Meter) -> Outcome<usize> {
    match value {
        Value::Undefined(_) => Ok(0),
        Value::Str(s) => {
            meter.charge_bytes(s.len())?;
            Ok(s.chars().count())
        }
        Value::List(list) => Ok(list.items.len()),
        Value::Dict(dict) => Ok(dict.entries.len()),
        other => Fault::invalid(format!("a {} has no length", other.type_name())),
    }
}

/// `value[index]`; what is not there is undefined.
pub(super) fn item(value: &Value, index: &Value, meter: &mut Meter) -> Outcome<Option<Value>> {
    match (value, index) {
        (Value::Dict(dict), key) => Ok(dict.entries.get(&key.as_key()?).cloned()),
        (Value::List(list), _) => {
            Ok(index.as_int().and_then(|i| position(i, list.items.len())).map(|i| list.items[i].clone()))
        }
        (Value::Str(s), _) => {
            let Some(index) = index.as_int() else { return Ok(None) };
            let len = length(value, meter)?;
            let c = position(index, len).and_then(|i| s.chars().nth(i));
            Ok(c.map(|c| Value::from(&*c.encode_utf8(&mut [0; 4]))))
        }
        _ => Ok(None),
    }
}

fn position(index: i128, len: usize) -> Option<usize> {
    let index = if index < 0 { index.checked_add(len as i128)? } else { index };
    usize::try_from(index).ok().filter(|i| *i < len)
}

/// `value[start:stop:step]`.
pub(super) fn slice(value: &Value, bounds: [Value; 3], meter: &mut Meter) -> Outcome<Value> {
    let mut numbers = [None; 3];
    for (number, bound) in numbers.iter_mut().zip(bounds) {
        *number = match bound {
            Value::None => None,
            other => match other.as_int() {
                Some(i) => Some(i),
                None => return Fault::invalid(format!("slice bounds must be int, not {}", other.type_name())),
            },
        };
    }
    match value {
        Value::Str(s) => {
            meter.charge_bytes(s.len() * 4)?;
            let chars: Vec<char> = s.chars().collect();
            Ok(Value::from(slice_indices(chars.len(), numbers)?.map(|i| chars[i]).collect::<String>()))
        }
        Value::List(list) => {
            meter.charge(list.items.len())?;
            let items = slice_indices(list.items.len(), numbers)?.map(|i| list.items[i].clone()).collect();
            if list.is_tuple { Value::tuple(items) } else { Value::list(items) }
        }
        Value::Undefined(name) => Fault::invalid(format!("'{name}' is undefined")),
        other => Fault::invalid(format!("a {} cannot be sliced", other.type_name())),
    }
}

fn slice_indices(len: usize, [start, stop, step]: [Option<i128>; 3]) -> Outcome<impl Iterator<Item = usize>> {
    let len = len as i128;
    let step = step.unwrap_or(1).clamp(-(len + 1), len + 1);
    if step == 0 {
        return Fault::invalid("a slice's step cannot be zero");
    }
    // Indices run from `low` to `high` inclusive of the ends a backward slice needs: -1 means "before the first".
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let bound = |value: Option<i128>, default: i128| match value {
        None => default,
        Some(v) if v < 0 => v.saturating_add(len).clamp(low, high),
        Some(v) => v.clamp(low, high),
    };
    let (start, stop) =
        if step > 0 { (bound(start, low), bound(stop, high)) } else { (bound(start, high), bound(stop, low)) };
    let inside = move |i: &i128| if step > 0 { *i < stop } else { *i > stop };
    Ok(std::iter::successors(Some(start), move |i| Some(i + step)).take_while(inside).map(|i| i as usize))
}
