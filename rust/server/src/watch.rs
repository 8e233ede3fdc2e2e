//! The watched folder: each of its folders is an adapter. It is looked at now and then, because network file systems tell
//! nobody of changes.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::json;

use crate::app::App;

/// Files of one adapter's folder that are looked at.
const MAX_FILES: usize = 1024;

/// The files of a folder as they lie there: names, sizes and times of change, sorted.
type Stamp = Vec<(PathBuf, u64, SystemTime)>;

/// What the folder held when it was looked at.
pub(crate) struct Watch {
    folder: PathBuf,
    /// What was last done about each name.
    known: HashMap<String, Known>,
    /// Changed since the last look: half-written, until they stay the same.
    settling: HashMap<String, Stamp>,
    is_readable: bool,
}

struct Known {
    stamp: Stamp,
    /// The name is the watch's own: registered by it, and not refused.
    is_registered: bool,
}

impl Watch {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, known: HashMap::new(), settling: HashMap::new(), is_readable: true }
    }

    /// The first look takes what is there, before anybody is listened to.
    pub fn begin(&mut self, app: &App) {
        self.look(app, true);
    }

    /// Looks for ever.
    pub async fn run(mut self, app: Arc<App>) {
        let pause = Duration::from_secs_f64(app.config.adapter_poll_s);
        loop {
            tokio::time::sleep(pause).await;
            let app = app.clone();
            let look = tokio::task::spawn_blocking(move || {
                self.look(&app, false);
                self
            });
            match look.await {
                Ok(watch) => self = watch,
                Err(_) => return,
            }
        }
    }

    fn look(&mut self, app: &App, is_first: bool) {
        let names = match names(&self.folder) {
            Ok(names) => names,
            Err(error) => {
                // What cannot be read is not gone.
                if std::mem::replace(&mut self.is_readable, false) {
                    app.log.line("adapter_dir_unreadable", json!({"error": error.to_string()}));
                }
                return;
            }
        };
        self.is_readable = true;
        for name in &names {
            let path = self.folder.join(name);
            if let Some(stamp) = stamp(&path) {
                self.notice(app, name, &path, stamp, is_first);
            }
        }
        self.forget(app, &names);
    }

    fn notice(&mut self, app: &App, name: &str, path: &Path, stamp: Stamp, is_first: bool) {
        let known = self.known.get(name);
        if known.is_some_and(|known| known.stamp == stamp) {
            return;
        }
        if !is_first && self.settling.get(name) != Some(&stamp) {
            self.settling.insert(name.to_owned(), stamp);
            return;
        }
        self.settling.remove(name);
        let was_registered = known.is_some_and(|known| known.is_registered);
        let result = match app.base_names.iter().any(|base| base == name) {
            true => Err("is the base model's name".to_owned()),
            false => app.runtime.register(name, path, was_registered, false).map_err(|error| error.to_string()),
        };
        let is_registered = was_registered || result.is_ok();
        match result {
            Ok(details) => {
                app.log.line("adapter_found", json!({"adapter": name, "version": details.info.version}));
                app.log_warnings(&details);
            }
            Err(error) => app.log.line("adapter_refused", json!({"adapter": name, "error": error})),
        }
        self.known.insert(name.to_owned(), Known { stamp, is_registered });
    }

    /// Removed folders are removed adapters; what somebody else registered stays.
    fn forget(&mut self, app: &App, names: &HashSet<String>) {
        self.settling.retain(|name, _| names.contains(name));
        self.known.retain(|name, known| {
            let is_gone = !names.contains(name);
            if is_gone && known.is_registered && app.runtime.unload(name).is_ok() {
                app.log.line("adapter_gone", json!({"adapter": name}));
            }
            !is_gone
        });
    }
}

fn names(folder: &Path) -> std::io::Result<HashSet<String>> {
    let mut names = HashSet::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().filter(|name| !name.starts_with('.'));
        names.extend(name.filter(|_| entry.path().is_dir()));
    }
    Ok(names)
}

/// `None`: nothing that looks like an adapter yet.
fn stamp(path: &Path) -> Option<Stamp> {
    let mut stamp = Stamp::new();
    add_files(path, 1, &mut stamp);
    stamp.sort();
    stamp.iter().any(|(path, ..)| path.ends_with("adapter_config.json")).then_some(stamp)
}

fn add_files(folder: &Path, levels: usize, stamp: &mut Stamp) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten().take(MAX_FILES) {
        let path = entry.path();
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        if metadata.is_dir() && levels > 0 {
            add_files(&path, levels - 1, stamp);
        } else if let (true, Ok(modified)) = (metadata.is_file(), metadata.modified()) {
            stamp.push((path, metadata.len(), modified));
        }
    }
}
