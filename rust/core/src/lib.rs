//! The part of slora that decides: which request runs, on which pages, with which adapter, in which step.
//!
//! The whole surface is [`Engine`]: [`submit`](Engine::submit), [`cancel`](Engine::cancel), [`schedule`](Engine::schedule),
//! [`commit`](Engine::commit), [`load_finished`](Engine::load_finished), [`load_failed`](Engine::load_failed),
//! [`copies_done`](Engine::copies_done), and the adapters' [`register`](Engine::register) and [`unload`](Engine::unload).
//! It does no I/O, reads no clock (time is an argument), starts no thread and is deterministic: the same calls give the same plans.
#![forbid(unsafe_code)]

mod account;
mod adapter;
mod adapters;
mod admit;
mod check;
mod commit;
mod config;
mod engine;
mod event;
mod fair;
mod load_shares;
mod lru;
mod pages;
mod plan;
mod plan_writer;
mod queue;
mod reclaim;
mod registry;
mod request;
mod sampling;
mod schedule;
mod stats;

pub use account::{Account, AccountError};
pub use adapter::{AdapterError, AdapterId, AdapterInfo, AdapterSpec, AdapterState, Load, LoadFailure};
pub use config::{ConfigError, EngineConfig, Eviction, QueueOrder};
pub use engine::Engine;
pub use event::{EndEvent, EndReason, Events, PromptEvent, TokenEvent};
pub use pages::{Owner, PagePool};
pub use plan::{Array, Counts, PlanLayout};
pub use request::{NewRequest, RequestId, SubmitError};
pub use sampling::{SamplingError, SamplingParams, uniform};
pub use stats::Stats;
