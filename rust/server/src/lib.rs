//! The OpenAI-compatible HTTP server around a [`Runtime`](slora_runtime::Runtime), with the adapters' lifecycle.
//!
//! Threads of its own do HTTP: they put requests into the runtime's inbox and make text from the ids that come back, so the
//! thread that runs steps never waits for a client. `docs/http.md` says what each route does.
//!
//! ```text
//!  connection ──▶ router (level, body, limits) ──▶ route ──▶ text pool ──▶ Runtime::submit
//!  client ◀── sse / whole answer ◀── generation (all choices of one request) ◀── Output
//! ```
#![forbid(unsafe_code)]

mod adapters;
mod admission;
mod app;
mod auth;
mod chat;
mod completions;
mod config;
mod connection;
mod cors;
mod errors;
mod exposition;
mod fields;
mod generation;
mod generation_config;
mod health;
mod histogram;
mod inference;
mod keys_file;
pub mod load;
mod log;
mod logprobs;
mod metrics;
mod models;
mod openapi;
mod page;
mod process;
mod quota;
mod record;
mod reply;
mod router;
mod routes;
mod sampling;
mod schema;
mod server;
mod sse;
mod stall;
mod status;
mod text_pool;
mod tokenize;
mod turns;
mod watch;

pub use auth::Level;
pub use config::{AdapterFlag, Limits, SamplingDefaults, Secret, ServerConfig};
pub use routes::{RouteInfo, routes};
pub use server::{ServeError, Server};
