//! The watched folder: each sub-folder is an adapter of its name. Polled, since network file systems tell nobody.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use crate::app::App;
use crate::errors::ApiError;
use crate::model_name::is_adapter_name;
use crate::sources::{Failure, Origin};

/// Folders that are looked at.
const MAX_FOLDERS: usize = 100_000;

/// Size, time and inode of the two files; what tells one content from another.
type Stamp = [Option<(u64, i64, i64, u64)>; 2];

/// What the last looks saw.
#[derive(Default)]
pub(crate) struct Watch {
    seen: HashMap<String, Seen>,
}

struct Seen {
    stamp: Stamp,
    /// It was registered, or refused, as it is.
    is_settled: bool,
}

/// Looks again and again.
pub(crate) async fn run(app: Arc<App>, mut watch: Watch) {
    loop {
        tokio::time::sleep(crate::server::seconds(app.config.adapter_poll_s)).await;
        let looking = app
            .on_runtime({
                let watching = app.clone();
                move |_| {
                    watch.look(&watching, false);
                    watch
                }
            })
            .await;
        match looking {
            Ok(looked) => watch = looked,
            Err(_) => return,
        }
    }
}

fn stamp(folder: &Path) -> Stamp {
    ["adapter_config.json", "adapter_model.safetensors"].map(|file| {
        let file = std::fs::metadata(folder.join(file)).ok()?;
        Some((file.len(), file.mtime(), file.mtime_nsec(), file.ino()))
    })
}

impl Watch {
    /// One look: new and changed folders are registered, removed ones forgotten.
    /// `is_start`: what is there is taken as whole.
    pub fn look(&mut self, app: &Arc<App>, is_start: bool) {
        let Some(dir) = &app.config.adapter_dir else { return };
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) => {
                // A file system that is away for a while takes no adapter with it.
                app.log.line("adapter_dir_unreadable", json!({"error": error.to_string()}));
                return;
            }
        };
        let folders: Vec<(String, PathBuf)> = entries.flatten().take(MAX_FOLDERS).filter_map(named_folder).collect();
        self.forget_removed(app, &folders);
        for (name, folder) in folders {
            self.look_at(app, &name, &folder, is_start);
        }
    }

    fn forget_removed(&mut self, app: &Arc<App>, folders: &[(String, PathBuf)]) {
        let here: std::collections::HashSet<&str> = folders.iter().map(|(name, _)| name.as_str()).collect();
        let gone: Vec<String> = self.seen.keys().filter(|name| !here.contains(name.as_str())).cloned().collect();
        for name in gone {
            self.seen.remove(&name);
            app.sources.clear_failed(&name);
            if is_ours(app, &name) {
                app.sources.remove(&name);
                let _ = app.runtime.unload(&name);
                app.log.line("adapter_removed", json!({"adapter": name}));
            }
        }
    }

    fn look_at(&mut self, app: &Arc<App>, name: &str, folder: &Path, is_start: bool) {
        let now = stamp(folder);
        let (is_same, is_settled) =
            self.seen.get(name).map_or((false, false), |seen| (seen.stamp == now, seen.is_settled));
        if is_same && is_settled {
            return;
        }
        // Half-written ones wait: two looks must see the same, but for what lay there when the server started.
        let is_settled = (is_same || is_start) && !is_half(&now);
        if is_settled {
            register(app, name, folder);
        }
        self.seen.insert(name.to_owned(), Seen { stamp: now, is_settled });
    }
}

/// One file is there and the other is not.
fn is_half(stamp: &Stamp) -> bool {
    stamp[0].is_some() != stamp[1].is_some()
}

/// Makes the folder's content what its name means. One that is refused is tried again when its files change.
fn register(app: &App, name: &str, folder: &Path) {
    if let Some(source) = app.sources.get(name).filter(|source| source.origin != Origin::Folder) {
        let reason = format!("the name was given by {}", source.origin.name());
        app.log.line("adapter_skipped", json!({"adapter": name, "reason": reason}));
        return;
    }
    match app.runtime.register(name, folder, true, false) {
        Ok(details) => {
            app.sources.set(name, Origin::Folder);
            app.log.line("adapter_registered", json!({"adapter": name, "version": details.info.version}));
        }
        Err(error) => {
            let error = ApiError::from(error);
            let code = error.reason.clone().unwrap_or_else(|| error.code.to_owned());
            app.metrics.count_load_failure(&code);
            app.log.line("adapter_refused", json!({"adapter": name, "reason": error.message, "code": code}));
            app.sources.set_failed(name, Failure { path: folder.to_owned(), message: error.message, code });
        }
    }
}

fn is_ours(app: &App, name: &str) -> bool {
    app.sources.get(name).is_some_and(|source| source.origin == Origin::Folder)
}

/// Sub-folders whose name an adapter may have; hidden ones are somebody's scratch.
fn named_folder(entry: std::fs::DirEntry) -> Option<(String, PathBuf)> {
    let name = entry.file_name().into_string().ok()?;
    let is_named = is_adapter_name(&name) && !name.starts_with('.');
    let path = entry.path();
    (is_named && path.is_dir()).then_some((name, path))
}
