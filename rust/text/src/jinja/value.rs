//! Values of a template: Python's JSON types, immutable, and handles to what a renderer owns.

use std::sync::Arc;

use indexmap::IndexMap;

use super::ast::Name;
use super::functions::Function;
use super::meter::{Fault, Outcome};

/// Deepest list of lists: comparing, printing and dropping recurse.
const MAX_DEPTH: u32 = 128;

#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// What a missing name or key gives, with the name: prints as nothing, fails when used.
    Undefined(Name),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Arc<str>),
    List(Arc<List>),
    Dict(Arc<Dict>),
    /// Index into the renderer's namespaces, the only mutable things.
    Namespace(usize),
    /// Index into the renderer's macros.
    Macro(usize),
    /// Serial number of a running loop.
    Loop(usize),
    Function(Function),
    /// A method taken from its object but not called yet.
    Method(Arc<(Value, Name)>),
}

#[derive(Debug)]
pub(crate) struct List {
    pub(super) items: Vec<Value>,
    pub(super) is_tuple: bool,
    depth: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Dict {
    pub(super) entries: IndexMap<Key, Value>,
    depth: u32,
}

/// What may be a key. JSON has strings only; template literals may have the others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    None,
    Bool(bool),
    Int(i128),
    Str(Name),
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(Arc::from(text))
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(Arc::from(text))
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::Int(number as i128)
    }
}

impl Value {
    pub(super) fn list(items: Vec<Value>) -> Outcome<Self> {
        Self::sequence(items, false)
    }

    pub(super) fn tuple(items: Vec<Value>) -> Outcome<Self> {
        Self::sequence(items, true)
    }

    fn sequence(items: Vec<Value>, is_tuple: bool) -> Outcome<Self> {
        let depth = depth_over(items.iter())?;
        Ok(Self::List(Arc::new(List { items, is_tuple, depth })))
    }

    /// The list of one value's characters, keys or items, as Python's `iter` gives them.
    pub(super) fn strings(parts: impl Iterator<Item = String>) -> Outcome<Self> {
        Self::list(parts.map(Value::from).collect())
    }

    pub(super) fn dict(entries: IndexMap<Key, Value>) -> Outcome<Self> {
        let depth = depth_over(entries.values())?;
        Ok(Self::Dict(Arc::new(Dict { entries, depth })))
    }

    pub(super) fn method(object: Value, name: Name) -> Outcome<Self> {
        depth_over(std::iter::once(&object))?;
        Ok(Self::Method(Arc::new((object, name))))
    }

    fn depth(&self) -> u32 {
        match self {
            Self::List(list) => list.depth,
            Self::Dict(dict) => dict.depth,
            Self::Method(method) => method.0.depth() + 1,
            _ => 0,
        }
    }

    pub(crate) fn from_json(json: &serde_json::Value) -> Result<Self, Fault> {
        Self::from_json_at(json, 0)
    }

    fn from_json_at(json: &serde_json::Value, depth: u32) -> Outcome<Self> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        Ok(match json {
            serde_json::Value::Null => Self::None,
            serde_json::Value::Bool(b) => Self::Bool(*b),
            serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
                (Some(n), _, _) => Self::Int(n.into()),
                (_, Some(n), _) => Self::Int(n.into()),
                (_, _, n) => Self::Float(n.unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(s) => Self::from(s.as_str()),
            serde_json::Value::Array(items) => {
                Self::list(items.iter().map(|i| Self::from_json_at(i, depth + 1)).collect::<Outcome<_>>()?)?
            }
            serde_json::Value::Object(map) => Self::dict(
                map.iter()
                    .map(|(k, v)| Ok((Key::Str(Arc::from(k.as_str())), Self::from_json_at(v, depth + 1)?)))
                    .collect::<Outcome<_>>()?,
            )?,
        })
    }

    pub(super) fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Int(i) => *i != 0,
            Self::Float(f) => *f != 0.0,
            Self::Str(s) => !s.is_empty(),
            Self::List(l) => !l.items.is_empty(),
            Self::Dict(d) => !d.entries.is_empty(),
            Self::Namespace(_) | Self::Macro(_) | Self::Loop(_) | Self::Function(_) | Self::Method(_) => true,
        }
    }

    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Bool(b) => Some(i128::from(*b)),
            Self::Int(i) => Some(*i),
            _ => None,
        }
    }

    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(f) => Some(*f),
            other => other.as_int().map(|i| i as f64),
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        if let Self::Str(s) = self { Some(s) } else { None }
    }

    pub(super) fn as_key(&self) -> Outcome<Key> {
        match self {
            Self::None => Ok(Key::None),
            Self::Bool(b) => Ok(Key::Bool(*b)),
            Self::Int(i) => Ok(Key::Int(*i)),
            Self::Str(s) => Ok(Key::Str(s.clone())),
            other => Fault::invalid(format!("a {} cannot be a key", other.type_name())),
        }
    }

    /// Python's name of the type, for messages.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::List(l) if l.is_tuple => "tuple",
            Self::List(_) => "list",
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "namespace",
            Self::Macro(_) => "macro",
            Self::Loop(_) => "loop",
            Self::Function(_) => "function",
            Self::Method(_) => "method",
        }
    }

    /// An undefined value is an error wherever Jinja2 makes it one.
    pub(super) fn defined(self) -> Outcome<Self> {
        match self {
            Self::Undefined(name) => Fault::invalid(format!("'{name}' is undefined")),
            value => Ok(value),
        }
    }
}

impl Key {
    pub(super) fn to_value(&self) -> Value {
        match self {
            Self::None => Value::None,
            Self::Bool(b) => Value::Bool(*b),
            Self::Int(i) => Value::Int(*i),
            Self::Str(s) => Value::Str(s.clone()),
        }
    }
}

fn depth_over<'a>(children: impl Iterator<Item = &'a Value>) -> Outcome<u32> {
    let depth = children.map(|v| v.depth() + 1).max().unwrap_or(1);
    if depth > MAX_DEPTH { Err(too_deep()) } else { Ok(depth) }
}

fn too_deep() -> Fault {
    Fault::Limit { what: "levels of nested values", limit: u64::from(MAX_DEPTH) }
}
