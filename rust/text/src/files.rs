//! The JSON files of a model folder.

use std::path::Path;

use serde_json::{Map, Value};

use crate::TextError;

/// A file's text, or `None` when there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<String>, TextError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(fault(path, error)),
    }
}

/// A JSON object; an absent file is an empty one.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, TextError> {
    let Some(text) = read(path)? else { return Ok(Map::new()) };
    serde_json::from_str(&text).map_err(|error| fault(path, error))
}

pub(crate) fn fault(path: &Path, reason: impl ToString) -> TextError {
    TextError::File { path: path.to_owned(), reason: reason.to_string() }
}

/// A special token as these files spell it: a string, or an object with its `content`.
pub(crate) fn token_content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}
