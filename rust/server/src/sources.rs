//! Where adapters came from: what the engine does not know of them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::log::unix_time_s;

/// Who made a name known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    CommandLine,
    Folder,
    Api,
}

impl Origin {
    pub fn name(self) -> &'static str {
        match self {
            Self::CommandLine => "command_line",
            Self::Folder => "adapter_dir",
            Self::Api => "api",
        }
    }
}

/// One name's source.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub origin: Origin,
    pub created: u64,
}

/// Sources by name, and folders that could not be registered.
#[derive(Default)]
pub(crate) struct Sources {
    known: Mutex<HashMap<String, Source>>,
    failed: Mutex<HashMap<String, Failure>>,
}

/// A folder of the watched ones that is no adapter that can be served.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub path: PathBuf,
    pub message: String,
    pub code: String,
}

impl Sources {
    fn known(&self) -> MutexGuard<'_, HashMap<String, Source>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self) -> MutexGuard<'_, HashMap<String, Failure>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, name: &str, origin: Origin) {
        let source = Source { origin, created: unix_time_s() as u64 };
        self.known().insert(name.to_owned(), source);
        self.failed().remove(name);
    }

    pub fn remove(&self, name: &str) {
        self.known().remove(name);
    }

    pub fn get(&self, name: &str) -> Option<Source> {
        self.known().get(name).cloned()
    }

    pub fn created(&self, name: &str) -> Option<u64> {
        self.known().get(name).map(|source| source.created)
    }

    pub fn set_failed(&self, name: &str, failure: Failure) {
        self.failed().insert(name.to_owned(), failure);
    }

    pub fn clear_failed(&self, name: &str) {
        self.failed().remove(name);
    }

    /// Folders that could not be registered, by name.
    pub fn failures(&self) -> Vec<(String, Failure)> {
        let mut all: Vec<_> = self.failed().iter().map(|(name, failure)| (name.clone(), failure.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}
