//! A JSON object, field by field: each one is taken by name, and what nobody took is known.

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::errors::ApiError;

/// Fields of one object at most.
const MAX_FIELDS: usize = 256;

struct Field<'a> {
    name: String,
    value: &'a RawValue,
    is_taken: bool,
}

/// The fields of a request's body, in its order.
pub(crate) struct Fields<'a> {
    fields: Vec<Field<'a>>,
}

impl<'a> Fields<'a> {
    /// Parses the outermost level. Nesting deeper than `max_depth` and names that come twice are refused.
    pub fn parse(body: &'a [u8], max_depth: usize) -> Result<Self, ApiError> {
        let malformed = |what: String| {
            ApiError::new(axum::http::StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not JSON: {what}"))
        };
        let text = std::str::from_utf8(body).map_err(|error| malformed(error.to_string()))?;
        check_depth(body, max_depth)?;
        let fields: Self = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        if fields.fields.len() > MAX_FIELDS {
            let message = format!("the body has {} fields, the limit is {MAX_FIELDS}", fields.fields.len());
            return Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "invalid_value", message));
        }
        let mut names: Vec<&str> = fields.fields.iter().map(|field| field.name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ApiError::invalid(pair[0], format!("{} is there twice", shown(pair[0])))),
            None => Ok(fields),
        }
    }

    /// The raw value of a field; `None`: absent or null.
    pub fn raw(&mut self, name: &str) -> Option<&'a RawValue> {
        let field = self.fields.iter_mut().find(|field| field.name == name)?;
        field.is_taken = true;
        (field.value.get() != "null").then_some(field.value)
    }

    /// A field's value; `None`: absent or null.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|error| type_error(name, &error))
    }

    /// A field that must be there.
    pub fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| {
            let message = format!("{name} is missing");
            ApiError::new(axum::http::StatusCode::BAD_REQUEST, "missing_required_parameter", message).with_param(name)
        })
    }

    /// Fields that are known and do nothing here.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.raw(name);
        }
    }

    /// Refuses a field that is not supported, unless its value says nothing: null, or one of `idle`, as JSON.
    pub fn refuse(&mut self, name: &str, idle: &[&str]) -> Result<(), ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(()) };
        let same = |idle: &&str| {
            let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
            raw.get() == *idle || (raw.get().len() < 256 && parse(raw.get()) == parse(idle))
        };
        if idle.iter().any(same) {
            return Ok(());
        }
        Err(ApiError::unsupported(name, format!("{name} is not supported")))
    }

    /// Names that nobody took.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().filter(|field| !field.is_taken).map(|field| field.name.as_str())
    }
}

/// A wrong type, without the parser's position: the field is named instead.
pub(crate) fn type_error(name: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    let what = message.split(" at line ").next().unwrap_or_default();
    let code = if error.is_data() { "invalid_type" } else { "invalid_json" };
    let what: String = what.chars().take(200).collect();
    ApiError::new(axum::http::StatusCode::BAD_REQUEST, code, format!("{name}: {what}")).with_param(name)
}

/// A name from a request, fit for a message.
pub(crate) fn shown(name: &str) -> String {
    name.chars().take(64).flat_map(char::escape_debug).collect()
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    fields.push(Field { name, value, is_taken: false });
                }
                Ok(Fields { fields })
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Counts brackets outside strings, before any parser recurses.
fn check_depth(body: &[u8], max_depth: usize) -> Result<(), ApiError> {
    let (mut depth, mut in_string, mut is_escaped) = (0usize, false, false);
    for byte in body {
        if in_string {
            match (is_escaped, byte) {
                (true, _) => is_escaped = false,
                (false, b'\\') => is_escaped = true,
                (false, b'"') => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > max_depth {
            let message = format!("the body nests deeper than {max_depth} levels, which is the limit");
            return Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "invalid_json", message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_type_names_its_field() {
        let mut fields = Fields::parse(br#"{"n": "three", "top_p": 0.5}"#, 64).unwrap();
        let error = fields.take::<u32>("n").unwrap_err();
        assert_eq!((error.status.as_u16(), error.param.as_deref(), error.code), (400, Some("n"), "invalid_type"));
        assert_eq!(fields.take::<f32>("top_p").unwrap(), Some(0.5));
    }

    #[test]
    fn what_nobody_took_is_known() {
        let mut fields = Fields::parse(br#"{"a": 1, "b": null, "c": []}"#, 64).unwrap();
        assert_eq!(fields.take::<u32>("a").unwrap(), Some(1));
        assert_eq!(fields.take::<u32>("b").unwrap(), None);
        assert_eq!(fields.unknown().collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn an_unsupported_field_may_say_nothing() {
        let mut fields = Fields::parse(br#"{"tools": [], "best_of": 2, "a": {"type" : "text"}}"#, 64).unwrap();
        fields.refuse("tools", &["[]"]).unwrap();
        fields.refuse("absent", &[]).unwrap();
        fields.refuse("a", &[r#"{"type":"text"}"#]).unwrap();
        assert_eq!(fields.refuse("best_of", &["1"]).unwrap_err().code, "unsupported_parameter");
    }

    #[test]
    fn deep_and_doubled_bodies_are_refused() {
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(Fields::parse(nested(63).as_bytes(), 64).is_ok());
        assert!(Fields::parse(nested(64).as_bytes(), 64).is_err());
        assert!(Fields::parse(br#"{"a": "[[[[", "b": "\"[["}"#, 2).is_ok());
        assert!(Fields::parse(br#"{"a": 1, "a": 2}"#, 64).is_err());
        for bad in [&b"[]"[..], b"", b"{", b"\xff", b"{} {}"] {
            assert_eq!(Fields::parse(bad, 64).err().map(|error| error.status.as_u16()), Some(400));
        }
    }
}
