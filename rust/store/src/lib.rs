//! PEFT LoRA checkpoints, checked and packed.
//!
//! A checkpoint folder becomes an [`Adapter`] when its `adapter_config.json` and the header of its
//! `adapter_model.safetensors` have been read and **every** tensor in the file is accounted for; no weights are read
//! until [`Adapter::pack_part`] writes the adapter's page image (`docs/architecture.md`, "The adapter image") into host
//! pages that somebody else allocated. An adapter that cannot be served exactly is refused with an [`AdapterError`]
//! that names the key or tensor: nothing is dropped silently and nothing is half applied.
//!
//! The crate knows nothing of scheduling, starts no threads, maps no files and unpickles nothing.
#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("safetensors and page images are little-endian; slora-store has no byte swapping");

mod accounting;
mod adapter;
mod base;
mod config;
mod convert;
mod error;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod layout;
mod names;
mod pack;
#[allow(unsafe_code, reason = "the one place that writes through raw pointers; its contract is stated there")]
mod pages;
mod pattern;
mod report;

pub use adapter::Adapter;
pub use base::{BaseSpec, Dtype, MODULES};
pub use error::{AdapterError, Feature};
pub use layout::MODULE_WORDS;
pub use pack::PackStats;
pub use pages::HostPages;
pub use report::{Fate, Matrix, ModuleReport, Report, Scaling, TensorReport, Warning};
