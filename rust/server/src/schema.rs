//! What a body may hold, in tables that the parser and the OpenAPI document share: neither knows a field that the other does
//! not.

use serde_json::{Value, json};

use crate::config::SamplingDefaults;

/// What depends on the server rather than on the code.
pub(crate) struct Bounds {
    pub max_n: usize,
    pub max_messages: usize,
    pub max_context: u32,
    pub vocab_size: u32,
    /// Names of the base model.
    pub base_names: Vec<String>,
    /// For fields that are left out.
    pub defaults: SamplingDefaults,
}

/// What a field's value may be, as JSON Schema.
pub(crate) type Schema = fn(&Bounds) -> Value;

/// What happens to a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Must be there.
    Required,
    /// May be left out, or null.
    Optional,
    /// Is accepted and does nothing here, by its own meaning.
    Ignored,
    /// Means something to other servers: refused unless it is null or one of these, as JSON.
    Unsupported(&'static [&'static str]),
}

/// A field of a body.
#[derive(Debug)]
pub(crate) struct Field {
    pub name: &'static str,
    pub role: Role,
    pub about: &'static str,
    pub schema: Schema,
}

/// All fields of a body; some are shared by several.
pub(crate) type Body = &'static [&'static [Field]];

impl Field {
    pub const fn required(name: &'static str, about: &'static str, schema: Schema) -> Self {
        Self { name, role: Role::Required, about, schema }
    }

    pub const fn optional(name: &'static str, about: &'static str, schema: Schema) -> Self {
        Self { name, role: Role::Optional, about, schema }
    }

    pub const fn ignored(name: &'static str) -> Self {
        Self { name, role: Role::Ignored, about: "Accepted, and does nothing here.", schema: |_| json!({}) }
    }

    /// `idle`: values that say nothing, as JSON.
    pub const fn unsupported(name: &'static str, idle: &'static [&'static str]) -> Self {
        let about = "Not supported: refused unless its value says nothing.";
        Self { name, role: Role::Unsupported(idle), about, schema: |_| json!({}) }
    }

    /// The field as a property of its body's schema.
    pub fn property(&self, bounds: &Bounds) -> Value {
        let mut schema = match self.role {
            Role::Required => (self.schema)(bounds),
            Role::Optional => nullable((self.schema)(bounds)),
            Role::Ignored => json!({}),
            Role::Unsupported(idle) => {
                let idle = idle.iter().filter_map(|text| serde_json::from_str(text).ok());
                json!({"enum": std::iter::once(Value::Null).chain(idle).collect::<Vec<_>>()})
            }
        };
        schema["description"] = json!(self.about);
        schema
    }
}

/// A body as JSON Schema. Further fields are allowed: they do nothing, or a strict server refuses them.
pub(crate) fn body_schema(body: Body, bounds: &Bounds, is_strict: bool) -> Value {
    let fields = || body.iter().copied().flatten();
    let properties = fields().map(|field| (field.name.to_owned(), field.property(bounds)));
    let required: Vec<&str> = fields().filter(|field| field.role == Role::Required).map(|field| field.name).collect();
    json!({
        "type": "object", "properties": properties.collect::<serde_json::Map<_, _>>(), "required": required,
        "additionalProperties": !is_strict,
    })
}

fn nullable(mut schema: Value) -> Value {
    if let Some(kind) = schema.get_mut("type") {
        *kind = json!([kind.take(), "null"]);
    } else if let Some(choices) = schema.get_mut("anyOf").and_then(Value::as_array_mut) {
        choices.push(json!({"type": "null"}));
    }
    schema
}

pub(crate) fn boolean(_: &Bounds) -> Value {
    json!({"type": "boolean"})
}

pub(crate) fn text(_: &Bounds) -> Value {
    json!({"type": "string"})
}

pub(crate) fn integer(least: impl Into<i64>, most: impl Into<i64>) -> Value {
    json!({"type": "integer", "minimum": least.into(), "maximum": most.into()})
}

pub(crate) fn number(least: f64, most: f64) -> Value {
    json!({"type": "number", "minimum": least, "maximum": most})
}

/// A number above `least`.
pub(crate) fn number_above(least: f64, most: f64) -> Value {
    json!({"type": "number", "exclusiveMinimum": least, "maximum": most})
}

/// With what is taken if the field is left out, as a number that JSON shows as it was written.
pub(crate) fn or_default(mut schema: Value, default: Option<impl ToString>) -> Value {
    if let Some(default) = default.and_then(|default| serde_json::from_str(&default.to_string()).ok()) {
        schema["default"] = default;
    }
    schema
}

/// A list of at least one.
pub(crate) fn list(items: Value) -> Value {
    json!({"type": "array", "items": items, "minItems": 1})
}

pub(crate) fn any_of(choices: &[Value]) -> Value {
    json!({"anyOf": choices})
}

/// An id of the vocabulary.
pub(crate) fn token_id(bounds: &Bounds) -> Value {
    integer(0, bounds.vocab_size - 1)
}

/// The base, an adapter, or `base:adapter`.
pub(crate) fn model(bounds: &Bounds) -> Value {
    any_of(&[json!({"enum": bounds.base_names}), json!({"type": "string"})])
}

pub(crate) fn adapter_name(_: &Bounds) -> Value {
    json!({"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"})
}

/// The model of a request.
pub(crate) const MODEL: Field =
    Field::optional("model", "The base, an adapter, or `base:adapter`; absent: the base.", model);
