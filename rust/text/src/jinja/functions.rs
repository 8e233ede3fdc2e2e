//! The functions a template may call.

use indexmap::IndexMap;

use super::args::Args;
use super::ast::Name;
use super::eval::Renderer;
use super::meter::{Fault, Outcome};
use super::strftime::strftime;
use super::text::to_str;
use super::value::{Key, Value};

/// Jinja2's sandbox has the same limit.
const MAX_RANGE: i128 = 100_000;

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Function {
    Range,
    Dict,
    Namespace,
    RaiseException,
    StrftimeNow,
}

impl Function {
    pub(super) const ALL: [Self; 5] =
        [Self::Range, Self::Dict, Self::Namespace, Self::RaiseException, Self::StrftimeNow];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Range => "range",
            Self::Dict => "dict",
            Self::Namespace => "namespace",
            Self::RaiseException => "raise_exception",
            Self::StrftimeNow => "strftime_now",
        }
    }
}

pub(super) fn call(renderer: &mut Renderer, function: Function, mut args: Args) -> Outcome<Value> {
    match function {
        Function::Range => range(renderer, args),
        Function::Dict => {
            let entries = entries(args)?;
            renderer.meter.charge(entries.len())?;
            Value::dict(entries)
        }
        Function::Namespace => {
            let entries = entries(args)?;
            renderer.meter.charge(entries.len() + 1)?;
            let mut namespace: IndexMap<Name, Value> = IndexMap::new();
            for (key, value) in entries {
                match key {
                    Key::Str(name) if !name.starts_with('_') => namespace.insert(name, value),
                    _ => return Fault::invalid("namespace attributes must be names that do not begin with '_'"),
                };
            }
            renderer.namespaces.push(namespace);
            Ok(Value::Namespace(renderer.namespaces.len() - 1))
        }
        Function::RaiseException => {
            let message = args.require("message")?;
            Err(Fault::Raised(to_str(&message, &mut renderer.meter)?))
        }
        Function::StrftimeNow => {
            let format = args.text("format")?;
            args.finish()?;
            renderer.meter.charge_bytes(format.len() * 16)?;
            Ok(Value::from(strftime(&format, renderer.clock)))
        }
    }
}

/// The arguments of `dict(…)`: a mapping or pairs, then keywords.
fn entries(mut args: Args) -> Outcome<IndexMap<Key, Value>> {
    let mut entries = match args.positional.pop_front() {
        None => IndexMap::new(),
        Some(Value::Dict(dict)) => dict.entries.clone(),
        Some(Value::List(pairs)) => {
            let mut entries = IndexMap::new();
            for pair in &pairs.items {
                match pair {
                    Value::List(pair) if pair.items.len() == 2 => {
                        entries.insert(pair.items[0].as_key()?, pair.items[1].clone());
                    }
                    _ => return Fault::invalid("dict needs pairs"),
                }
            }
            entries
        }
        Some(other) => return Fault::invalid(format!("a {} is neither a mapping nor pairs", other.type_name())),
    };
    entries.extend(args.keyword.drain(..).map(|(name, value)| (Key::Str(name), value)));
    args.finish()?;
    Ok(entries)
}

fn range(renderer: &mut Renderer, mut args: Args) -> Outcome<Value> {
    let first = args.int("start")?;
    let (start, stop) = match (first, args.int("stop")?) {
        (Some(start), Some(stop)) => (start, stop),
        (Some(stop), None) => (0, stop),
        _ => return Fault::invalid("range needs an int"),
    };
    let step = args.int("step")?.unwrap_or(1);
    args.finish()?;
    let (distance, stride) =
        if step > 0 { (stop.saturating_sub(start), step) } else { (start.saturating_sub(stop), step.saturating_neg()) };
    if stride == 0 {
        return Fault::invalid("range's step cannot be zero");
    }
    let len = if distance <= 0 { 0 } else { (distance - 1) / stride + 1 };
    if len > MAX_RANGE {
        return Err(Fault::Limit { what: "numbers in a range", limit: MAX_RANGE as u64 });
    }
    renderer.meter.charge(len as usize)?;
    Value::list((0..len).map(|i| Value::Int(start.saturating_add(step.saturating_mul(i)))).collect())
}
