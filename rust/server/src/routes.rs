//! The one table of routes: what each asks of its caller, takes and answers.

use std::future::Future;
use std::pin::Pin;

use axum::routing::MethodFilter;

use crate::auth::Level;
use crate::router::{Answer, Call};
use crate::schema::Body;
use crate::{adapters, chat, completions, exposition, health, models, openapi, page, sampling, status, tokenize};

pub(crate) type Handler = fn(Call) -> Pin<Box<dyn Future<Output = Answer> + Send>>;

/// A method of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Get,
    Post,
    Put,
    Delete,
}

impl Verb {
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }

    pub fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Post => MethodFilter::POST,
            Self::Put => MethodFilter::PUT,
            Self::Delete => MethodFilter::DELETE,
        }
    }

    pub fn has_body(self) -> bool {
        matches!(self, Self::Post | Self::Put)
    }
}

/// What a route answers when all is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// JSON, by its schema in `answers.json`.
    Json(&'static str),
    /// The same, or server-sent events whose data is JSON by the second schema.
    JsonOrEvents(&'static str, &'static str),
    /// Text of this media type.
    Text(&'static str),
    /// 200 without content.
    Empty,
    /// 204.
    NoContent,
}

/// A route cannot be written down without its level, its body's fields and its answers.
pub(crate) struct Route {
    pub verb: Verb,
    pub path: &'static str,
    pub level: Level,
    pub handler: Handler,
    pub about: &'static str,
    pub body: Body,
    pub reply: Reply,
    /// Statuses of errors beside those that its level and its body bring.
    pub errors: &'static [u16],
}

macro_rules! route {
    ($verb:ident $path:literal, $level:ident, $handler:path, $about:literal, $body:expr, $reply:expr, $errors:expr) => {
        Route {
            verb: Verb::$verb,
            path: $path,
            level: Level::$level,
            handler: |call| Box::pin($handler(call)),
            about: $about,
            body: $body,
            reply: $reply,
            errors: &$errors,
        }
    };
}

use Reply::{Empty, Json, JsonOrEvents, NoContent, Text};

const PLAIN: &str = "text/plain; charset=utf-8";
const CHAT: Body = &[chat::FIELDS, chat::TEMPLATE_FIELDS, sampling::FIELDS];
const COMPLETION: Body = &[completions::FIELDS, sampling::FIELDS];
const TOKENIZE: Body = &[tokenize::TOKENIZE_FIELDS, chat::TEMPLATE_FIELDS];
const DETOKENIZE: Body = &[tokenize::DETOKENIZE_FIELDS];
const LOAD: Body = &[adapters::LOAD_FIELDS];
const UNLOAD: Body = &[adapters::UNLOAD_FIELDS];
const PUT: Body = &[adapters::PUT_FIELDS];
const VALIDATE: Body = &[adapters::VALIDATE_FIELDS];

#[rustfmt::skip]
pub(crate) static ROUTES: &[Route] = &[
    route!(Post "/v1/chat/completions", User, chat::complete, "Continue a conversation.", CHAT, JsonOrEvents("ChatCompletion", "ChatCompletionChunk"), [404]),
    route!(Post "/v1/completions", User, completions::complete, "Continue a text.", COMPLETION, JsonOrEvents("Completion", "CompletionChunk"), [404]),
    route!(Get "/v1/models", User, models::list, "The base first, then the adapters.", &[], Json("Models"), [503]),
    route!(Get "/v1/models/{*id}", User, models::get, "The base or an adapter.", &[], Json("Model"), [404, 503]),
    route!(Post "/tokenize", User, tokenize::tokenize, "Text or a conversation to token ids.", TOKENIZE, Json("Tokens"), [404]),
    route!(Post "/detokenize", User, tokenize::detokenize, "Token ids to text.", DETOKENIZE, Json("Text"), [404]),
    route!(Get "/tokenizer_info", User, tokenize::info, "Special tokens and the chat template.", &[], Json("Tokenizer"), [400]),
    route!(Post "/v1/load_lora_adapter", Admin, adapters::load_vllm, "Register an adapter.", LOAD, Text(PLAIN), []),
    route!(Post "/v1/unload_lora_adapter", Admin, adapters::unload_vllm, "Unload an adapter.", UNLOAD, Text(PLAIN), [404]),
    route!(Get "/v1/adapters", Admin, adapters::list, "All adapters.", &[], Json("Adapters"), [503]),
    route!(Post "/v1/adapters/validate", Admin, adapters::validate, "Account for an adapter's tensors.", VALIDATE, Json("Report"), []),
    route!(Get "/v1/adapters/validate", Admin, adapters::get, "The adapter of that name.", &[], Json("Adapter"), [404, 503]),
    route!(Put "/v1/adapters/validate", Admin, adapters::put, "The adapter of that name.", PUT, Json("Adapter"), [404]),
    route!(Delete "/v1/adapters/validate", Admin, adapters::delete, "The adapter of that name.", &[], NoContent, [404, 503]),
    route!(Get "/v1/adapters/{name}", Admin, adapters::get, "One adapter.", &[], Json("Adapter"), [404, 503]),
    route!(Put "/v1/adapters/{name}", Admin, adapters::put, "Register, replace, pin or unpin.", PUT, Json("Adapter"), [404]),
    route!(Delete "/v1/adapters/{name}", Admin, adapters::delete, "Unload an adapter.", &[], NoContent, [404, 503]),
    route!(Get "/", Open, page::html, "The page.", &[], Text(page::HTML), []),
    route!(Get "/page.css", Open, page::css, "Its style.", &[], Text(page::CSS), []),
    route!(Get "/page.js", Open, page::script, "Its script.", &[], Text(page::SCRIPT), []),
    route!(Get "/status", User, status::status, "What the page shows.", &[], Json("Status"), [503]),
    route!(Get "/health", Open, health::live, "Alive.", &[], Empty, [503]),
    route!(Get "/health/ready", Open, health::ready, "Takes requests.", &[], Json("Ready"), [503]),
    route!(Get "/ready", Open, health::ready, "Takes requests.", &[], Json("Ready"), [503]),
    route!(Get "/ping", Open, health::live, "Alive.", &[], Empty, [503]),
    route!(Get "/version", User, health::version, "The version.", &[], Json("Version"), []),
    route!(Get "/load", User, health::load, "What is unfinished.", &[], Json("Load"), []),
    route!(Get "/metrics", User, exposition::expose, "Prometheus exposition.", &[], Text("text/plain; version=0.0.4; charset=utf-8"), [503]),
    route!(Get "/openapi.json", User, openapi::document, "This document.", &[], Json("Document"), []),
];

/// A route as it is known outside.
#[derive(Clone, Copy, Debug)]
pub struct RouteInfo {
    /// `GET`, `POST`, `PUT` or `DELETE`.
    pub method: &'static str,
    /// The path; `{name}` stands for one segment, `{*id}` for all that follow.
    pub path: &'static str,
    /// What it asks of its caller.
    pub level: Level,
}

/// Every route that the server has.
pub fn routes() -> impl Iterator<Item = RouteInfo> {
    ROUTES.iter().map(|route| RouteInfo { method: route.verb.name(), path: route.path, level: route.level })
}
