//! A world around one engine: clients, loaders and a fake executor, all at random from one seed.
//!
//! Worlds are tiny, so that conflicts are frequent. After every operation all invariants are asserted.
#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::expect_used, reason = "shared by several tests")]

pub mod executor;
pub mod model;
pub mod plan;
pub mod random;
mod rules;
mod world;

pub use world::World;
