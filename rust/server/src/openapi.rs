//! `GET /openapi.json`: the server's own OpenAPI 3.1 document, made from the table of routes and their bodies' tables.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::auth::Level;
use crate::router::{Answer, Call, json_response};
use crate::routes::{ROUTES, Reply, Route};
use crate::schema::{self, Bounds};

/// Schemas of the answers.
const ANSWERS: &str = include_str!("answers.json");

/// The route.
pub(crate) async fn document(call: Call) -> Answer {
    let (app, bounds) = (&call.app, call.app.bounds());
    let schemas: Value = serde_json::from_str(ANSWERS)
        .map_err(|error| crate::errors::ApiError::internal(format!("answers.json: {error}")))?;
    let is_keyed = app.auth.has_keys();
    let mut paths = Map::new();
    for route in ROUTES {
        let path = paths.entry(route.path.replace("{*", "{")).or_insert_with(|| json!({}));
        path[route.verb.name().to_lowercase()] = operation(route, &bounds, app.config.strict_fields, is_keyed);
    }
    let bearer = |about: &str| json!({"type": "http", "scheme": "bearer", "description": about});
    Ok(json_response(&json!({
        "openapi": "3.1.0",
        "info": {
            "title": "slora", "version": env!("CARGO_PKG_VERSION"),
            "description": "One base model with many LoRA adapters, behind OpenAI's API.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"user": bearer("A user's key, or an admin's."), "admin": bearer("An admin's key.")},
        },
    })))
}

fn operation(route: &Route, bounds: &Bounds, is_strict: bool, is_keyed: bool) -> Value {
    let (verb, path) = (route.verb.name().to_lowercase(), route.path);
    let words = path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let id = std::iter::once(verb.as_str()).chain(words).collect::<Vec<_>>().join("_");
    let security = match route.level {
        Level::Open => json!([]),
        // Without keys, whoever is on the same machine may ask.
        Level::User if !is_keyed => json!([]),
        Level::User => json!([{"user": []}]),
        Level::Admin => json!([{"admin": []}]),
    };
    let mut operation = json!({
        "operationId": id, "summary": route.about, "security": security, "responses": responses(route),
    });
    if let Some((_, param)) = path.split_once('{') {
        let name = param.trim_start_matches('*').trim_end_matches('}');
        let mut value =
            if name == "name" { schema::adapter_name(bounds) } else { json!({"type": "string", "minLength": 1}) };
        // A path that is written out goes before one with a name in it, and has methods of its own.
        let parent = path.split('{').next().unwrap_or_default();
        let others = ROUTES.iter().filter_map(|route| route.path.strip_prefix(parent));
        let taken: BTreeSet<&str> = others.filter(|rest| !rest.is_empty() && !rest.contains(['{', '/'])).collect();
        if !taken.is_empty() {
            value["not"] = json!({"enum": taken});
        }
        operation["parameters"] = json!([{"name": name, "in": "path", "required": true, "schema": value}]);
    }
    if route.verb.has_body() {
        let body = schema::body_schema(route.body, bounds, is_strict);
        operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": body}}});
    }
    operation
}

fn responses(route: &Route) -> Value {
    let mut responses = Map::new();
    let reference = |name: &str| json!({"schema": {"$ref": format!("#/components/schemas/{name}")}});
    let text = || json!({"schema": {"type": "string"}});
    let (status, content) = match route.reply {
        Reply::Json(name) => ("200", json!({"application/json": reference(name)})),
        // OpenAPI 3.1 has no word for the items of a stream: as in OpenAI's own document, the schema is that of an event's data.
        Reply::JsonOrEvents(name, event) => {
            ("200", json!({"application/json": reference(name), "text/event-stream": reference(event)}))
        }
        Reply::Text(kind) => ("200", json!({kind: text()})),
        Reply::Empty => ("200", Value::Null),
        Reply::NoContent => ("204", Value::Null),
    };
    let mut well = json!({"description": "It went well."});
    if content.is_object() {
        well["content"] = content;
    }
    responses.insert(status.into(), well);
    for status in errors(route) {
        let answer = json!({"description": meaning(status), "content": {"application/json": reference("Error")}});
        responses.insert(status.to_string(), answer);
    }
    Value::Object(responses)
}

/// Statuses of a route's errors, those that come before it included.
fn errors(route: &Route) -> Vec<u16> {
    let by_level: &[u16] = match route.level {
        Level::Open => &[],
        Level::User => &[401],
        Level::Admin => &[401, 403],
    };
    let by_body: &[u16] = if route.verb.has_body() { &[400, 413, 415, 429, 503] } else { &[] };
    [by_level, by_body, route.errors, &[431]].concat()
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "The request is not what it must be; `param` names the field.",
        401 => "No key, or a wrong one.",
        403 => "The key may not do this.",
        404 => "There is no such model or adapter, or the key may not use it.",
        413 => "The body is too large.",
        415 => "The body is not declared JSON.",
        429 => "A limit of the key's own, or its tenant's share; see `Retry-After`.",
        431 => "The headers are too large.",
        _ => "Too much is unfinished, or the server is shutting down or has failed.",
    }
}
