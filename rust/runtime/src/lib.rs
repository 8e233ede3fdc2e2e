//! The threads around the engine.
//!
//! One thread, the caller's *step thread*, owns the [`Stepper`] and with it the engine. Everybody else holds a [`Runtime`]:
//! its commands go through a bounded inbox, of which the step thread drains some before each step. A pool of loader threads
//! packs adapters from their files into host pages. A delivery thread hands each step's tokens to their requests, looks for
//! stop strings and wakes readers, so that neither text nor a slow reader ever holds up a step.
//!
//! ```text
//!  Runtime ──submit, cancel, call──▶ inbox ──▶ Stepper (engine) ──loads──▶ loader pool ──▶ inbox
//!  Output ◀──tokens, end── delivery thread ◀──events of a step──┘
//! ```
#![deny(unsafe_code)]

mod delivery;
mod directory;
mod error;
#[allow(unsafe_code, reason = "the one place that hands out raw host pages; its contract is stated there")]
mod host;
mod inbox;
mod loader;
mod mailbox;
mod output;
mod runtime;
mod sampling;
mod stepper;
mod submission;
mod timings;

pub use error::{RegisterError, RequestError};
pub use host::HostMemory;
pub use mailbox::{Mailbox, Wake};
pub use output::{Delta, End, Output, Piece, TokenLogprobs};
pub use runtime::{AdapterDetails, Runtime, RuntimeConfig, Snapshot, State};
pub use sampling::Sampling;
pub use stepper::{StepLogprobs, Stepper};
pub use submission::Submission;
pub use timings::{Distribution, Lookups, Timings};
