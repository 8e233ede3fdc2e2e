//! The file of users' keys.
//!
//! ```json
//! {"keys": [{"sha256": "…64 hex digits…", "tenant": "acme", "adapters": ["sql-*", "base"],
//!            "concurrency": 8, "requests_per_minute": 600, "tokens_per_minute": 100000}]}
//! ```

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use crate::auth::{Key, KeyHash};
use crate::quota::Quota;

/// Bytes of a keys file at most.
const MAX_BYTES: u64 = 16 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    keys: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    sha256: String,
    tenant: String,
    #[serde(default)]
    adapters: Option<Vec<String>>,
    #[serde(default)]
    concurrency: Option<u32>,
    #[serde(default)]
    requests_per_minute: Option<u32>,
    #[serde(default)]
    tokens_per_minute: Option<u32>,
    #[serde(default)]
    weight: Option<f64>,
    #[serde(default)]
    priority: Option<i64>,
}

/// Reads and checks the whole file: a file with one bad entry changes nothing.
pub(crate) fn read(path: &Path) -> Result<Vec<Key>, String> {
    let shown = path.display();
    let bytes = std::fs::metadata(path).map_err(|error| format!("{shown}: {error}"))?.len();
    if bytes > MAX_BYTES {
        return Err(format!("{shown}: {bytes} bytes, the limit is {MAX_BYTES}"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{shown}: {error}"))?;
    parse(&text).map_err(|error| format!("{shown}: {error}"))
}

fn parse(text: &str) -> Result<Vec<Key>, String> {
    let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
    file.keys
        .into_iter()
        .enumerate()
        .map(|(index, entry)| key(entry).map_err(|e| format!("keys[{index}]: {e}")))
        .collect()
}

fn key(entry: Entry) -> Result<Key, String> {
    if entry.tenant.is_empty() || entry.tenant.len() > 128 {
        return Err(format!("tenant has {} bytes, it must have 1 to 128", entry.tenant.len()));
    }
    if entry.weight.is_some_and(|weight| weight != 1.0) || entry.priority.is_some_and(|priority| priority != 0) {
        return Err("weight and priority need a fair queue, which the engine does not have yet; leave them out".into());
    }
    let Entry { concurrency, requests_per_minute, tokens_per_minute, .. } = entry;
    let limits = [concurrency, requests_per_minute, tokens_per_minute];
    if limits.contains(&Some(0)) {
        return Err("a limit is 0, it must be at least 1; hint: leave the key out of the file instead".into());
    }
    Ok(Key {
        hash: hex(&entry.sha256).ok_or("sha256 must be 64 hex digits")?,
        tenant: entry.tenant.into(),
        adapters: entry.adapters,
        quota: Quota { concurrency, requests_per_minute, tokens_per_minute },
        usage: Arc::default(),
    })
}

fn hex(text: &str) -> Option<KeyHash> {
    let mut hash = KeyHash::default();
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_entry_is_named() {
        let sha256 = "ab".repeat(32);
        let good = format!(r#"{{"keys": [{{"sha256": "{sha256}", "tenant": "a", "adapters": ["x-*"]}}]}}"#);
        assert_eq!(parse(&good).unwrap()[0].hash, [0xab; 32]);
        let bad = [
            r#"{"keys": [{"sha256": "zz", "tenant": "a"}]}"#.to_owned(),
            good.replace("\"tenant\": \"a\"", "\"tenant\": \"\""),
            good.replace("\"tenant\"", "\"weight\": 2, \"tenant\""),
            good.replace("\"tenant\"", "\"concurrency\": 0, \"tenant\""),
            good.replace("\"tenant\"", "\"role\": 1, \"tenant\""),
        ];
        assert!(bad.iter().all(|text| parse(text).is_err()));
    }
}
