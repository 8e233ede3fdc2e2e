//! A JSON object, field by field: each one is taken by its name in the body's table.

use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, Unexpected, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::errors::ApiError;
use crate::schema::{self, Role};

/// Fields of one object at most.
const MAX_FIELDS: usize = 256;

struct Field<'a> {
    name: String,
    value: &'a RawValue,
}

/// The fields of a request's body, in its order.
pub(crate) struct Fields<'a> {
    fields: Vec<Field<'a>>,
    body: schema::Body,
}

impl<'a> Fields<'a> {
    /// Parses the outermost level. Nesting deeper than `max_depth`, names that come twice and fields that `known` calls
    /// unsupported are refused.
    pub fn parse(body: &'a [u8], max_depth: usize, known: schema::Body) -> Result<Self, ApiError> {
        let malformed = |what: String| {
            ApiError::new(axum::http::StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not JSON: {what}"))
        };
        let text = std::str::from_utf8(body).map_err(|error| malformed(error.to_string()))?;
        check_depth(body, max_depth)?;
        let mut fields: Self = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        fields.body = known;
        if fields.fields.len() > MAX_FIELDS {
            let message = format!("the body has {} fields, the limit is {MAX_FIELDS}", fields.fields.len());
            return Err(ApiError::new(axum::http::StatusCode::BAD_REQUEST, "invalid_value", message));
        }
        let mut names: Vec<&str> = fields.fields.iter().map(|field| field.name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ApiError::invalid(pair[0], format!("{} is there twice", shown(pair[0])))),
            None => fields.refuse_unsupported().map(|()| fields),
        }
    }

    fn known(&self, name: &str) -> Option<&'static schema::Field> {
        self.body.iter().copied().flatten().find(|field| field.name == name)
    }

    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        for field in &self.fields {
            if let Some(Role::Unsupported(idle)) = self.known(&field.name).map(|known| known.role)
                && !says_nothing(field.value, idle)
            {
                return Err(ApiError::unsupported(&field.name, format!("{} is not supported", field.name)));
            }
        }
        Ok(())
    }

    /// The raw value of a field; `None`: absent or null.
    pub fn raw(&self, name: &str) -> Option<&'a RawValue> {
        debug_assert!(self.known(name).is_some(), "{name} is in the body's table");
        let field = self.fields.iter().find(|field| field.name == name)?;
        (field.value.get() != "null").then_some(field.value)
    }

    /// A field's value; `None`: absent or null.
    pub fn take<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|error| type_error(name, &error))
    }

    /// An integer; `None`: absent or null.
    pub fn take_whole<T: TryFrom<i64>>(&self, name: &str) -> Result<Option<T>, ApiError> {
        Ok(self.take(name)?.map(|Whole(value)| value))
    }

    /// A list of integers; `None`: absent or null.
    pub fn take_wholes<T: TryFrom<i64>>(&self, name: &str) -> Result<Option<Vec<T>>, ApiError> {
        Ok(self.take(name)?.map(values))
    }

    /// A field that must be there.
    pub fn require<T: DeserializeOwned>(&self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| {
            let message = format!("{name} is missing");
            ApiError::new(axum::http::StatusCode::BAD_REQUEST, "missing_required_parameter", message).with_param(name)
        })
    }

    /// Names that the body's table does not have.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().map(|field| field.name.as_str()).filter(|name| self.known(name).is_none())
    }
}

/// An integer. One that is written with a point or an exponent is an integer too, as in JSON Schema: `5.0`, `1e3`.
pub(crate) struct Whole<T>(pub T);

impl<'de, T: TryFrom<i64>> Deserialize<'de> for Whole<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_i64(ReadWhole(PhantomData))
    }
}

struct ReadWhole<T>(PhantomData<T>);

impl<T: TryFrom<i64>> Visitor<'_> for ReadWhole<T> {
    type Value = Whole<T>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match T::try_from(i64::MAX) {
            Ok(_) => "an integer of 64 bits",
            Err(_) => "an integer from 0 to 4294967295",
        })
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
        let out_of_range = |_| E::invalid_value(Unexpected::Signed(value), &self);
        T::try_from(value).map(Whole).map_err(out_of_range)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
        match i64::try_from(value) {
            Ok(value) => self.visit_i64(value),
            Err(_) => Err(E::invalid_value(Unexpected::Unsigned(value), &self)),
        }
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
        // -2⁶³ and 2⁶³ are floats, the integers next to them are not.
        let is_whole = value.fract() == 0.0 && (i64::MIN as f64..-(i64::MIN as f64)).contains(&value);
        if is_whole { self.visit_i64(value as i64) } else { Err(E::invalid_type(Unexpected::Float(value), &self)) }
    }
}

/// Whether a value is null, or one of `idle`, as JSON.
fn says_nothing(value: &RawValue, idle: &[&str]) -> bool {
    let parse = |text: &str| serde_json::from_str::<Value>(text).ok();
    let is = |idle: &&str| value.get() == *idle || (value.get().len() < 256 && parse(value.get()) == parse(idle));
    value.get() == "null" || idle.iter().any(is)
}

/// Integers as what they are.
pub(crate) fn values<T>(wholes: Vec<Whole<T>>) -> Vec<T> {
    wholes.into_iter().map(|Whole(value)| value).collect()
}

/// A wrong type, without the parser's position, since the field is named, and without Rust's names of types.
pub(crate) fn type_error(name: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    let what = message.split(" at line ").next().unwrap_or_default();
    let code = if error.is_data() { "invalid_type" } else { "invalid_json" };
    let what: String = what.replace("expected f32", "expected a number").chars().take(200).collect();
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
                    fields.push(Field { name, value });
                }
                Ok(Fields { fields, body: &[] })
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

    const BODY: schema::Body = &[&[
        schema::Field::optional("n", "", schema::boolean),
        schema::Field::optional("top_p", "", schema::boolean),
        schema::Field::optional("empty", "", schema::boolean),
        schema::Field::unsupported("tools", &["[]"]),
        schema::Field::unsupported("format", &[r#"{"type":"text"}"#]),
    ]];

    #[test]
    fn a_wrong_type_names_its_field() {
        let fields = Fields::parse(br#"{"n": "three", "top_p": 0.5, "empty": null}"#, 64, BODY).unwrap();
        let error = fields.take::<u32>("n").unwrap_err();
        assert_eq!((error.status.as_u16(), error.param.as_deref(), error.code), (400, Some("n"), "invalid_type"));
        assert_eq!(fields.take::<f32>("top_p").unwrap(), Some(0.5));
        assert_eq!(fields.take::<f32>("empty").unwrap(), None);
    }

    #[test]
    fn an_integer_may_be_written_with_a_point() {
        let parsed = |json: &str| serde_json::from_str(json).ok().map(values::<u32>);
        assert_eq!(parsed("[1.0, 2, 3e2, -0.0]"), Some(vec![1, 2, 300, 0]));
        assert_eq!(parsed(&format!("[{}1.0]", "1.0, ".repeat(100_000))).map(|list| list.len()), Some(100_001));
        for wrong in ["[1.5]", "[-1.0]", "[4294967296.0]", "[1e30]", "[\"1.0\"]", "[true]", "[null]", "1.0"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
        let ends = |json: &str| serde_json::from_str(json).ok().map(|Whole::<i64>(value)| value);
        assert_eq!(ends("-9.223372036854775808e18"), Some(i64::MIN));
        assert_eq!([ends("9.223372036854775808e18"), ends("9223372036854775808")], [None, None]);
        let fields = Fields::parse(br#"{"n": 1.5}"#, 64, BODY).unwrap();
        let error = fields.take_whole::<u32>("n").unwrap_err();
        assert_eq!(
            (error.code, &*error.message),
            ("invalid_type", "n: invalid type: floating point `1.5`, expected an integer from 0 to 4294967295")
        );
        let texts = Fields::parse(br#"{"n": "x", "top_p": "x"}"#, 64, BODY).unwrap();
        let messages = [texts.take_whole::<i64>("n").err(), texts.take::<f32>("top_p").err()];
        for (error, expected) in messages.into_iter().zip(["an integer of 64 bits", "a number"]) {
            assert!(error.is_some_and(|error| error.message.ends_with(&format!("expected {expected}"))), "{expected}");
        }
    }

    #[test]
    fn what_is_not_in_the_table_is_unknown() {
        let fields = Fields::parse(br#"{"n": 1, "tools": [], "odd": 1}"#, 64, BODY).unwrap();
        assert_eq!(fields.unknown().collect::<Vec<_>>(), ["odd"]);
    }

    #[test]
    fn an_unsupported_field_may_say_nothing() {
        let code = |body: &str| Fields::parse(body.as_bytes(), 64, BODY).err().map(|error| error.code);
        for idle in [r#"{"tools": []}"#, r#"{"tools": null}"#, r#"{"format": {"type" : "text"}}"#] {
            assert_eq!(code(idle), None, "{idle}");
        }
        for loud in [r#"{"tools": [1]}"#, r#"{"tools": {}}"#, r#"{"format": {"type": "json_object"}}"#] {
            assert_eq!(code(loud), Some("unsupported_parameter"), "{loud}");
        }
    }

    #[test]
    fn deep_and_doubled_bodies_are_refused() {
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(Fields::parse(nested(63).as_bytes(), 64, &[]).is_ok());
        assert!(Fields::parse(nested(64).as_bytes(), 64, &[]).is_err());
        assert!(Fields::parse(br#"{"a": "[[[[", "b": "\"[["}"#, 2, &[]).is_ok());
        assert!(Fields::parse(br#"{"a": 1, "a": 2}"#, 64, &[]).is_err());
        for bad in [&b"[]"[..], b"", b"{", b"\xff", b"{} {}"] {
            assert_eq!(Fields::parse(bad, 64, &[]).err().map(|error| error.status.as_u16()), Some(400));
        }
    }
}
