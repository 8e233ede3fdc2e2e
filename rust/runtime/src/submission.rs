//! A request, before the engine knows of it.

use std::sync::Arc;

use slora_core::Account;

use crate::mailbox::Wake;
use crate::sampling::Sampling;

/// One request, as a client gives it.
pub struct Submission {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// The adapter's name; `None`: the base model.
    pub adapter: Option<Arc<str>>,
    /// Whose share of the machine it uses.
    pub account: Account,
    /// How its tokens are chosen and made text.
    pub sampling: Sampling,
    /// Told when there is something new.
    pub wake: Arc<dyn Wake>,
    /// Whether each token is something new, or only the end.
    pub wakes_on_token: bool,
}
