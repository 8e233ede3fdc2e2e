//! An adapter as callers see it.

use std::sync::Arc;

/// A version of an adapter: names one content of one name, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId {
    /// Place in the registry.
    pub index: u32,
    /// Which of the place's occupants.
    pub generation: u32,
}

/// What the engine must know of an adapter's image.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    /// Pages of the image.
    pub num_pages: u32,
    /// Bytes of weights in it.
    pub bytes: u64,
    /// The descriptor: [`EngineConfig::descriptor_words`](crate::EngineConfig::descriptor_words) words.
    pub words: Arc<[i32]>,
    /// For each page, the first layer that has weights in it.
    pub page_layers: Arc<[u16]>,
}

/// Where an adapter's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterState {
    /// On disk only.
    Registered,
    /// On the way from disk to the host tier.
    Loading,
    /// In the host tier.
    Host,
    /// On the device, perhaps still being copied.
    Resident,
    /// Could not be loaded.
    Failed,
}

/// Why an adapter could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadFailure {
    /// For programs: stable.
    pub code: &'static str,
    /// For people.
    pub message: Arc<str>,
}

impl std::fmt::Display for LoadFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// What [`Engine::adapter_info`](crate::Engine::adapter_info) tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterInfo {
    /// Which version.
    pub id: AdapterId,
    /// The name.
    pub name: Arc<str>,
    /// 1 for the first content of the name, then counted up.
    pub version: u32,
    /// Where its weights are.
    pub state: AdapterState,
    /// Why it failed, or why its replacement did.
    pub failure: Option<LoadFailure>,
    /// Pages of its image.
    pub num_pages: u32,
    /// Bytes of weights.
    pub bytes: u64,
    /// Running requests that use it.
    pub pins: u32,
    /// Unfinished requests that use it, waiting ones included.
    pub unfinished: u32,
    /// Whether the operator keeps it on the device.
    pub pinned: bool,
    /// Whether a new version is being loaded.
    pub replacing: bool,
}

/// An adapter to read from disk into these host pages, which belong to the loader until
/// [`load_finished`](crate::Engine::load_finished) or [`load_failed`](crate::Engine::load_failed).
#[derive(Clone, Debug)]
pub struct Load {
    /// Which.
    pub adapter: AdapterId,
    /// Host page of each image page.
    pub pages: Arc<[u32]>,
}

/// Why an adapter was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The name is taken.
    #[error("an adapter named {0:?} exists already; hint: replace it, or remove it first")]
    Exists(Arc<str>),
    /// No such name.
    #[error("no adapter is named {0:?}")]
    Unknown(Arc<str>),
    /// Its image does not fit.
    #[error(
        "the adapter's image needs {num_pages} pages, the limit is {limit}; hint: give the pool or the host tier more memory"
    )]
    TooLarge {
        /// Pages needed.
        num_pages: u32,
        /// The smaller of the two pools, or of what the tables hold.
        limit: u32,
    },
    /// The descriptor is not of this model.
    #[error(
        "the descriptor has {words} words and {page_layers} page layers, the engine wants {expected} and {num_pages}"
    )]
    Descriptor {
        /// Words given.
        words: usize,
        /// Page layers given.
        page_layers: usize,
        /// Words wanted.
        expected: u32,
        /// Page layers wanted.
        num_pages: u32,
    },
}
