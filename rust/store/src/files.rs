//! Finding a checkpoint's two files, and knowing them again.

use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::AdapterError;

const CONFIG_NAME: &str = "adapter_config.json";
const WEIGHTS_NAME: &str = "adapter_model.safetensors";
const PICKLE_NAME: &str = "adapter_model.bin";

/// Folder entries that are looked at when the config lies one level down.
const MAX_FOLDER_ENTRIES: usize = 4096;
/// Candidates that the message about an ambiguous folder lists.
const MAX_CANDIDATES_SHOWN: usize = 8;

/// A file at a path, with what it takes to notice that another one lies there now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RegisteredFile {
    pub(crate) path: PathBuf,
    identity: Identity,
}

/// No change time: a new hard link to the same content would count as a change.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    mtime: (i64, i64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    fn difference(&self, now: &Identity) -> Option<&'static str> {
        if self.bytes != now.bytes {
            Some("size")
        } else if (self.device, self.inode) != (now.device, now.inode) {
            Some("inode")
        } else if self.mtime != now.mtime {
            Some("modification time")
        } else {
            None
        }
    }
}

impl RegisteredFile {
    /// Opens a file for the first time; with `roots`, only beneath one of them. Only regular files are opened, so nothing
    /// can block.
    pub(crate) fn register(path: PathBuf, roots: Option<&[PathBuf]>) -> Result<(File, RegisteredFile), AdapterError> {
        let (file, identity) = open_regular(&path)?;
        if let Some(roots) = roots {
            require_beneath(&file, &path, roots)?;
        }
        Ok((file, RegisteredFile { path, identity }))
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.identity.bytes
    }

    /// Opens the file again, if it is still the registered one.
    pub(crate) fn reopen(&self) -> Result<File, AdapterError> {
        let (file, now) = open_regular(&self.path).map_err(|error| self.gone(error))?;
        self.compare(&now)?;
        Ok(file)
    }

    /// The file at the path must still be the registered one.
    pub(crate) fn check_unchanged(&self) -> Result<(), AdapterError> {
        let now = regular_metadata(&self.path).map_err(|error| self.gone(error))?;
        self.compare(&Identity::of(&now))
    }

    /// Reads at a byte offset, into the whole of `out`.
    pub(crate) fn read_at(&self, file: &File, out: &mut [u8], offset: u64) -> Result<(), AdapterError> {
        file.read_exact_at(out, offset).map_err(|source| match source.kind() {
            ErrorKind::UnexpectedEof => AdapterError::Truncated {
                path: self.path.clone(),
                actual: file.metadata().map_or(0, |m| m.len()),
                needed: offset.saturating_add(out.len() as u64),
            },
            _ => AdapterError::Io { path: self.path.clone(), source },
        })
    }

    fn compare(&self, now: &Identity) -> Result<(), AdapterError> {
        match self.identity.difference(now) {
            Some(what) => Err(AdapterError::Changed { path: self.path.clone(), what }),
            None => Ok(()),
        }
    }

    fn gone(&self, error: AdapterError) -> AdapterError {
        let what = match &error {
            AdapterError::Io { source, .. } if is_absent(source) => "removed",
            AdapterError::NotRegular { .. } => "kind",
            _ => return error,
        };
        AdapterError::Changed { path: self.path.clone(), what }
    }
}

/// The config and the weights of the adapter at `path`: there, or in its only sub-folder that has a config, as PEFT
/// saves adapters that are not named `default`.
pub(crate) fn locate(path: &Path) -> Result<(PathBuf, PathBuf), AdapterError> {
    let folder = if exists(&path.join(CONFIG_NAME))? { path.to_path_buf() } else { only_sub_folder(path)? };
    let weights = folder.join(WEIGHTS_NAME);
    if exists(&weights)? {
        Ok((folder.join(CONFIG_NAME), weights))
    } else if exists(&folder.join(PICKLE_NAME))? {
        Err(AdapterError::PickleOnly { path: folder })
    } else {
        Err(AdapterError::MissingWeights { path: folder })
    }
}

fn only_sub_folder(path: &Path) -> Result<PathBuf, AdapterError> {
    let io_error = |source| AdapterError::Io { path: path.to_path_buf(), source };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if is_absent(&error) => return Err(AdapterError::NotFound { path: path.to_path_buf() }),
        Err(error) => return Err(io_error(error)),
    };
    if !metadata.is_dir() {
        return Err(AdapterError::NotAFolder { path: path.to_path_buf(), kind: kind(metadata.file_type()) });
    }
    let mut candidates = Vec::new();
    for entry in fs::read_dir(path).map_err(io_error)?.take(MAX_FOLDER_ENTRIES) {
        let sub_folder = entry.map_err(io_error)?.path();
        if exists(&sub_folder.join(CONFIG_NAME))? {
            candidates.push(sub_folder);
        }
    }
    match candidates.len() {
        0 => Err(AdapterError::MissingConfig { path: path.to_path_buf() }),
        1 => Ok(candidates.swap_remove(0)),
        _ => {
            candidates.sort();
            let names = candidates.iter().take(MAX_CANDIDATES_SHOWN).filter_map(|p| p.file_name());
            let mut shown: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
            if candidates.len() > MAX_CANDIDATES_SHOWN {
                shown.push("…".into());
            }
            Err(AdapterError::AmbiguousFolder { path: path.to_path_buf(), candidates: shown })
        }
    }
}

fn exists(path: &Path) -> Result<bool, AdapterError> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(source) => Err(AdapterError::Io { path: path.to_path_buf(), source }),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn regular_metadata(path: &Path) -> Result<Metadata, AdapterError> {
    let metadata = fs::metadata(path).map_err(|source| AdapterError::Io { path: path.to_path_buf(), source })?;
    require_regular(path, &metadata)?;
    Ok(metadata)
}

fn require_regular(path: &Path, metadata: &Metadata) -> Result<(), AdapterError> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(AdapterError::NotRegular { path: path.to_path_buf(), kind: kind(metadata.file_type()) })
}

/// Looks before opening, since to open a device may already do something, and again at what was opened. Between the
/// two the path may become a FIFO, which `O_NONBLOCK` opens without waiting for a writer.
fn open_regular(path: &Path) -> Result<(File, Identity), AdapterError> {
    let io_error = |source| AdapterError::Io { path: path.to_path_buf(), source };
    regular_metadata(path)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(io_error)?;
    let metadata = file.metadata().map_err(io_error)?;
    require_regular(path, &metadata)?;
    Ok((file, Identity::of(&metadata)))
}

/// Asks where the opened file lies, since a folder of its path may have become a link after anybody looked at the path.
fn require_beneath(file: &File, path: &Path, roots: &[PathBuf]) -> Result<(), AdapterError> {
    let place = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(|source| AdapterError::Io { path: path.to_path_buf(), source })?;
    if roots.iter().any(|root| place.starts_with(root)) {
        return Ok(());
    }
    Err(AdapterError::OutsideRoots { path: path.to_path_buf() })
}

fn kind(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        "a folder"
    } else if file_type.is_file() {
        "a regular file"
    } else if file_type.is_fifo() {
        "a fifo"
    } else if file_type.is_socket() {
        "a socket"
    } else if file_type.is_block_device() || file_type.is_char_device() {
        "a device"
    } else {
        "a special file"
    }
}
