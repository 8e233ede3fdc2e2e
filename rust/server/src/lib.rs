//! The OpenAI-compatible HTTP server, with the adapters' lifecycle.
//!
//! It runs on tokio threads of its own beside the engine: requests go straight into the runtime's inbox, and tokens come
//! straight out to each request's task, which makes text of them when its socket takes it. No thread here ever calls
//! Python, and no signal handler is installed: whoever starts the [`Server`] tells it to drain.
#![forbid(unsafe_code)]

mod adapters;
mod admission;
mod app;
mod auth;
mod body;
mod chat;
mod complete;
mod completions;
mod config;
mod connections;
mod errors;
mod exposition;
mod fields;
mod generation;
mod health;
mod histogram;
mod keys_file;
mod lifecycle;
mod log;
mod logprobs;
mod metrics;
mod model_name;
mod models;
mod page;
mod paths;
mod prompts;
mod quota;
mod record;
mod reply;
mod residency;
mod routes;
mod sampling;
mod server;
mod sources;
mod sse;
mod text_pool;
mod tokens;
mod vllm_adapters;
mod watch;

pub use config::{AdapterFlag, Limits, SamplingDefaults, Secret, ServerConfig};
pub use server::{ServeError, Server};
