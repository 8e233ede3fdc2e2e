//! All adapters as they were after the last change, for everybody but the step thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rpds::RedBlackTreeMapSync;

use crate::runtime::AdapterDetails;

type Names = RedBlackTreeMapSync<Arc<str>, AdapterDetails>;

/// What every name means. The map shares its nodes with its copies: a reader takes one at once, however many names there
/// are, and the step thread, which writes changes only, waits for no reader.
#[derive(Default)]
pub(crate) struct Directory(Mutex<Names>);

impl Directory {
    fn lock(&self) -> MutexGuard<'_, Names> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names with what they mean from now on; `None`: nothing.
    pub fn update(&self, changes: impl Iterator<Item = (Arc<str>, Option<AdapterDetails>)>) {
        let mut changes = changes.peekable();
        if changes.peek().is_none() {
            return;
        }
        let mut names = self.lock();
        for (name, details) in changes {
            match details {
                Some(details) => names.insert_mut(name, details),
                None => drop(names.remove_mut(&name)),
            }
        }
    }

    pub fn get(&self, name: &str) -> Option<AdapterDetails> {
        self.lock().get(name).cloned()
    }

    /// In alphabetical order.
    pub fn all(&self) -> Vec<AdapterDetails> {
        let names = self.lock().clone();
        names.values().cloned().collect()
    }
}
