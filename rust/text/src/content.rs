//! Contents of messages that are lists of parts.
//!
//! Some templates read such lists; others print them as Python would, refuse them or leave them out. Those get text.

use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::error::TextError;

/// Roles that a template may read lists of; the first one stands for those that are not here.
const ROLES: [&str; 3] = ["user", "system", "assistant"];
/// What each role is tried with; nothing that templates would change.
const PROBES: [&str; 2] = ["slora-part-a", "slora-part-b"];

/// The text of a part: of `{"type": "text", "text": …}`, or of a plain string. `None`: it is no text.
pub fn part_text(part: &Value) -> Option<&str> {
    match part {
        Value::String(text) => Some(text),
        Value::Object(part) if part.get("type").is_some_and(|kind| kind == "text") => part.get("text")?.as_str(),
        _ => None,
    }
}

fn parts(message: &Value) -> Option<&Vec<Value>> {
    message.get("content")?.as_array()
}

/// Refuses parts that are not text.
pub(crate) fn check_parts(messages: &Value) -> Result<(), TextError> {
    let is_text = |message| parts(message).is_none_or(|parts| parts.iter().all(|part| part_text(part).is_some()));
    let odd = messages.as_array().into_iter().flatten().position(|message| !is_text(message));
    odd.map_or(Ok(()), |message| Err(TextError::Part { message }))
}

/// The roles whose lists a template reads, found out when first there is one.
#[derive(Default)]
pub(crate) struct ListRoles(OnceLock<[bool; ROLES.len()]>);

impl ListRoles {
    /// Makes text of lists that the template does not read, each part on a line. `render`: renders messages.
    pub fn adapt(&self, messages: &mut Value, render: impl Fn(&Value) -> Option<String>) {
        for message in messages.as_array_mut().into_iter().flatten() {
            let Some(parts) = parts(message) else { continue };
            let reads = self.0.get_or_init(|| ROLES.map(|role| reads_lists(role, &render)));
            let role = ROLES.iter().position(|role| message["role"] == *role).unwrap_or(0);
            if reads[role] {
                let part = |part: &Value| part.as_str().map_or_else(|| part.clone(), text_part);
                message["content"] = parts.iter().map(part).collect();
            } else if let Some(texts) = parts.iter().map(part_text).collect::<Option<Vec<_>>>() {
                message["content"] = texts.join("\n").into();
            }
        }
    }
}

fn text_part(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

/// Whether all parts of such a message are shown, and none as an item of a printed list.
fn reads_lists(role: &str, render: impl Fn(&Value) -> Option<String>) -> bool {
    let probe = json!({"role": role, "content": PROBES.map(text_part)});
    let user = json!({"role": "user", "content": "-"});
    let conversation = match role {
        "user" => json!([probe]),
        "system" => json!([probe, user]),
        _ => json!([user, probe]),
    };
    let is_shown = |text: &str, part: &str| {
        text.contains(part) && !['\'', '"'].iter().any(|q| text.contains(&format!("{q}{part}{q}")))
    };
    render(&conversation).is_some_and(|text| PROBES.iter().all(|part| is_shown(&text, part)))
}
