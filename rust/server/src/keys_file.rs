//! The file of users' keys.
//!
//! ```json
//! {"keys": [{"sha256": "…64 hex digits…", "tenant": "acme", "adapters": ["sql-*", "base"],
//!            "weight": 2, "priority": 1, "concurrency": 8, "requests_per_minute": 600, "tokens_per_minute": 100000}]}
//! ```

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use slora_core::{Account, QueueOrder};

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
    priority: Option<i32>,
}

/// What tells a file from the one that is there next: a key that replaces another leaves the size as it is, and a file that
/// is copied, unpacked or mounted in another's place may have the same modification time.
pub(crate) type Stamp = (u64, u64, u64, [i64; 4]);

/// `None`: there is no file.
pub(crate) fn stamp(path: &Path) -> Option<Stamp> {
    let file = std::fs::metadata(path).ok()?;
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
    Some((file.dev(), file.ino(), file.len(), times))
}

/// Reads and checks the whole file: a file with one bad entry changes nothing. `queue`: the engine's order, without which
/// weights would do nothing.
pub(crate) fn read(path: &Path, queue: QueueOrder) -> Result<Vec<Key>, String> {
    let shown = path.display();
    let bytes = std::fs::metadata(path).map_err(|error| format!("{shown}: {error}"))?.len();
    if bytes > MAX_BYTES {
        return Err(format!("{shown}: {bytes} bytes, the limit is {MAX_BYTES}"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{shown}: {error}"))?;
    parse(&text, queue).map_err(|error| format!("{shown}: {error}"))
}

fn parse(text: &str, queue: QueueOrder) -> Result<Vec<Key>, String> {
    let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let keys = file.keys.into_iter().enumerate();
    let keys: Vec<Key> = keys
        .map(|(index, entry)| key(entry, queue).map_err(|e| format!("keys[{index}]: {e}")))
        .collect::<Result<_, _>>()?;
    check_weights(&keys)?;
    Ok(keys)
}

/// A tenant has one share, however many keys.
fn check_weights(keys: &[Key]) -> Result<(), String> {
    let mut weights = HashMap::new();
    for (index, key) in keys.iter().enumerate() {
        let (first, weight) = *weights.entry(&key.tenant).or_insert((index, key.account.weight));
        if weight != key.account.weight {
            return Err(format!(
                "keys[{index}]: tenant {:?} has weight {} here and {weight} in keys[{first}]; hint: give all keys of a \
                 tenant one weight",
                key.tenant, key.account.weight
            ));
        }
    }
    Ok(())
}

fn key(entry: Entry, queue: QueueOrder) -> Result<Key, String> {
    if entry.tenant.is_empty() || entry.tenant.len() > 128 {
        return Err(format!("tenant has {} bytes, it must have 1 to 128", entry.tenant.len()));
    }
    let tenant: Arc<str> = entry.tenant.into();
    let (weight, priority) = (entry.weight.unwrap_or(1.0), entry.priority.unwrap_or(0));
    let account = Account { tenant: Some(tenant.clone()), weight, priority };
    account.check().map_err(|error| error.to_string())?;
    if weight != 1.0 && queue == QueueOrder::Fcfs {
        return Err(format!(
            "weight is {weight}, but requests are served in the order of their arrival, where it would do nothing; \
             hint: start the server with --queue fair"
        ));
    }
    let Entry { concurrency, requests_per_minute, tokens_per_minute, .. } = entry;
    let limits = [concurrency, requests_per_minute, tokens_per_minute];
    if limits.contains(&Some(0)) {
        return Err("a limit is 0, it must be at least 1; hint: leave the key out of the file instead".into());
    }
    Ok(Key {
        hash: hex(&entry.sha256).ok_or("sha256 must be 64 hex digits")?,
        tenant,
        account,
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
        let parse = |text: &str| parse(text, QueueOrder::Fair);
        assert_eq!(parse(&good).unwrap()[0].hash, [0xab; 32]);
        let bad = [
            r#"{"keys": [{"sha256": "zz", "tenant": "a"}]}"#.to_owned(),
            good.replace("\"tenant\": \"a\"", "\"tenant\": \"\""),
            good.replace("\"tenant\"", "\"weight\": 0, \"tenant\""),
            good.replace("\"tenant\"", "\"priority\": 1.5, \"tenant\""),
            good.replace("\"tenant\"", "\"concurrency\": 0, \"tenant\""),
            good.replace("\"tenant\"", "\"role\": 1, \"tenant\""),
        ];
        assert!(bad.iter().all(|text| parse(text).is_err()));
    }

    /// A file of keys with these fields, each key another's.
    fn file(keys: &[&str]) -> String {
        let key = |(i, fields): (usize, &&str)| format!(r#"{{"sha256": "{i:064x}", {fields}}}"#);
        format!(r#"{{"keys": [{}]}}"#, keys.iter().enumerate().map(key).collect::<Vec<_>>().join(", "))
    }

    #[test]
    fn a_key_brings_its_tenants_weight_and_its_own_priority() {
        let text = file(&[
            r#""tenant": "a", "weight": 2.5, "priority": -3"#,
            r#""tenant": "a", "weight": 2.5"#,
            r#""tenant": "b""#,
        ]);
        let keys = parse(&text, QueueOrder::Fair).unwrap();
        let account = |tenant: &str, weight, priority| Account { tenant: Some(tenant.into()), weight, priority };
        let accounts: Vec<&Account> = keys.iter().map(|key| &key.account).collect();
        assert_eq!(accounts, [&account("a", 2.5, -3), &account("a", 2.5, 0), &account("b", 1.0, 0)]);
    }

    #[test]
    fn weights_and_priorities_that_cannot_be_are_refused_with_a_reason() {
        let refused = |keys: &[&str], queue| parse(&file(keys), queue).unwrap_err();
        for (fields, reason) in [
            (r#""weight": 1000"#, "keys[0]: weight is 1000, it must be 0.01 to 100"),
            (r#""weight": -1"#, "keys[0]: weight is -1, it must be 0.01 to 100"),
            (r#""priority": 101"#, "keys[0]: priority is 101, it must be -100 to 100"),
        ] {
            assert_eq!(refused(&[&format!(r#""tenant": "a", {fields}"#)], QueueOrder::Fair), reason);
        }
        let two = [r#""tenant": "b""#, r#""tenant": "a", "weight": 2"#, r#""tenant": "a""#];
        let reason = refused(&two, QueueOrder::Fair);
        assert!(reason.starts_with("keys[2]: tenant \"a\" has weight 1 here and 2 in keys[1]; hint: "), "{reason}");
    }

    #[test]
    fn in_the_order_of_arrival_a_weight_is_refused_and_a_priority_works() {
        let weighted = file(&[r#""tenant": "a", "weight": 2"#]);
        let reason = parse(&weighted, QueueOrder::Fcfs).unwrap_err();
        assert!(
            reason.contains("weight is 2") && reason.ends_with("hint: start the server with --queue fair"),
            "{reason}"
        );
        let urgent = file(&[r#""tenant": "a", "weight": 1.0, "priority": 7"#]);
        assert_eq!(parse(&urgent, QueueOrder::Fcfs).unwrap()[0].account.priority, 7);
    }
}
