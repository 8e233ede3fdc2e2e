//! What the field `model` means.

use std::sync::Arc;

use slora_runtime::Runtime;

use crate::app::App;
use crate::auth::Caller;
use crate::errors::ApiError;

/// The base, or the base with an adapter.
pub(crate) struct Target {
    pub adapter: Option<Arc<str>>,
    /// As the client wrote it.
    pub shown: String,
}

/// Base, adapter, or `base:adapter`; nothing: the base. Whether the adapter exists, the engine tells.
pub(crate) fn resolve(app: &App, caller: &Caller, model: Option<String>) -> Result<Target, ApiError> {
    let shown = model.filter(|model| !model.is_empty()).unwrap_or_else(|| app.base_names[0].clone());
    if app.base_names.contains(&shown) {
        return if caller.may_use(&shown) { Ok(Target { adapter: None, shown }) } else { Err(not_found(&shown)) };
    }
    let name = adapter_part(&app.base_names, &shown);
    if !is_adapter_name(name) || !caller.may_use(name) {
        return Err(not_found(&shown));
    }
    Ok(Target { adapter: Some(name.into()), shown })
}

/// The adapter's name in `base:adapter`, or all of it.
pub(crate) fn adapter_part<'a>(base_names: &[String], model: &'a str) -> &'a str {
    let behind = |base: &String| model.strip_prefix(base.as_str())?.strip_prefix(':');
    base_names.iter().find_map(behind).unwrap_or(model)
}

fn not_found(model: &str) -> ApiError {
    ApiError::model_not_found(&crate::fields::shown(model))
}

/// Whether an adapter may have this name.
pub(crate) fn is_adapter_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= Runtime::MAX_NAME_LEN && name.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_may_be_written_before_the_adapter() {
        let bases = ["org/base".to_owned(), "b".to_owned()];
        assert_eq!(adapter_part(&bases, "org/base:sql"), "sql");
        assert_eq!(adapter_part(&bases, "b:sql"), "sql");
        assert_eq!(adapter_part(&bases, "sql"), "sql");
        assert_eq!(adapter_part(&bases, "other:sql"), "other:sql");
        assert!(!is_adapter_name("other:sql") && !is_adapter_name("") && !is_adapter_name(&"x".repeat(129)));
        assert!(is_adapter_name(&"x".repeat(128)) && is_adapter_name("A.b_c-1"));
    }
}
