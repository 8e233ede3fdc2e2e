//! What can go wrong with a request or an adapter.

use std::sync::Arc;

use slora_core::{LoadFailure, SubmitError};
use slora_text::TextError;

/// Why a request was refused or ended by an error.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The engine refused it.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// Its text, stop strings or messages were refused.
    #[error(transparent)]
    Text(#[from] Arc<TextError>),
    /// It needs text, but the model folder has no tokenizer.
    #[error("the model folder has no tokenizer.json, so {0}; hint: send token ids")]
    NoTokenizer(&'static str),
    /// Its adapter could not be loaded.
    #[error("adapter {name:?} could not be loaded: {failure}")]
    AdapterFailed {
        /// The adapter's name.
        name: Arc<str>,
        /// Why.
        failure: LoadFailure,
    },
    /// The model computed NaN or infinity for it.
    #[error("the model's logits are not finite for this request; hint: check the adapter's and the base's weights")]
    NotFinite,
    /// The engine has stopped on an error.
    #[error("the engine has stopped: {0}")]
    EngineFailed(Arc<str>),
    /// The engine was closed.
    #[error("the engine is closed")]
    Closed,
}

impl From<TextError> for RequestError {
    fn from(error: TextError) -> Self {
        Self::Text(Arc::new(error))
    }
}

/// Why an adapter was not registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// Names are part of URLs and metrics.
    #[error("adapter name {0:?} must be 1 to {max} of A-Z a-z 0-9 . _ -", max = crate::Runtime::MAX_NAME_LEN)]
    Name(String),
    /// The checkpoint cannot be served exactly.
    #[error(transparent)]
    Checkpoint(#[from] slora_store::AdapterError),
    /// The name is taken, or the adapter does not fit.
    #[error(transparent)]
    Engine(#[from] slora_core::AdapterError),
    /// The engine has stopped.
    #[error(transparent)]
    Stopped(RequestError),
}
