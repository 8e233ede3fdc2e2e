//! Paths that come over HTTP: absolute, and beneath a configured root once links are resolved.

use std::path::{Component, Path, PathBuf};

use axum::http::StatusCode;

use crate::config::ServerConfig;
use crate::errors::{ApiError, checkpoint_error};
use slora_store::{Adapter, BaseSpec, Report};

fn refused(message: String) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "path_not_allowed", message).with_param("lora_path")
}

/// The folder that a path means, if a stranger may name it, and what is in it.
///
/// What is there is read from the resolved folder, whose two files must lie beneath a root as well. Afterwards the folder
/// is resolved again: one that was swapped for a link meanwhile is refused.
pub(crate) fn open(config: &ServerConfig, base: &BaseSpec, given: &str) -> Result<(PathBuf, Report), ApiError> {
    let roots = roots(config);
    let folder = confine(&roots, given)?;
    let report = Adapter::open(&folder, base).map_err(|error| checkpoint_error(&error))?.report().clone();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let resolved = report.folder.join(file).canonicalize();
        if !resolved.is_ok_and(|path| is_beneath(&roots, &path)) {
            return Err(refused(format!("{file} leads out of the folders that adapters may be loaded from")));
        }
    }
    if confine(&roots, given)? != folder {
        return Err(refused("the path changed while it was read".into()));
    }
    Ok((folder, report))
}

/// The folders beneath which paths must lie, resolved.
fn roots(config: &ServerConfig) -> Vec<PathBuf> {
    config.adapter_dir.iter().chain(&config.adapter_roots).filter_map(|root| root.canonicalize().ok()).collect()
}

fn is_beneath(roots: &[PathBuf], path: &Path) -> bool {
    roots.iter().any(|root| path.starts_with(root) && path != root)
}

/// The path with its links resolved.
fn confine(roots: &[PathBuf], given: &str) -> Result<PathBuf, ApiError> {
    if roots.is_empty() {
        return Err(refused("no folder is configured; hint: start the server with --adapter-root".into()));
    }
    let path = Path::new(given);
    let is_plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || given.contains('\0') || !is_plain {
        return Err(refused("the path must be absolute, without . and .. in it".into()));
    }
    // What does not exist and what may not be named look the same from outside the roots.
    let outside = || refused("the path is not beneath a folder that adapters may be loaded from".into());
    let Ok(resolved) = path.canonicalize() else {
        let is_inside = roots.iter().any(|root| path.starts_with(root));
        let missing = slora_store::AdapterError::NotFound { path: path.to_owned() };
        return Err(if is_inside { checkpoint_error(&missing) } else { outside() });
    };
    if is_beneath(roots, &resolved) { Ok(resolved) } else { Err(outside()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_what_lies_beneath_a_root_is_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let (root, other) = (top.join("root"), top.join("root-2"));
        for folder in [root.join("a/b"), other.clone()] {
            std::fs::create_dir_all(folder).unwrap();
        }
        symlink(&other, root.join("out")).unwrap();
        symlink(root.join("a"), other.join("in")).unwrap();
        symlink(root.join("loop"), root.join("loop")).unwrap();
        let roots = [root.clone()];
        let allowed = |path: &Path| confine(&roots, path.to_str().unwrap()).is_ok();
        assert!(allowed(&root.join("a")) && allowed(&root.join("a/b")) && allowed(&other.join("in")));
        let bad = [
            root.clone(),
            other.clone(),
            root.join("out"),
            root.join("a/../a"),
            root.join("a/../../root-2"),
            root.join("loop"),
            root.join("absent"),
            "/".into(),
            "a".into(),
            "".into(),
            "/etc/passwd".into(),
            "/proc/self/cwd".into(),
            top.join("roo"),
            root.join("a\0"),
        ];
        for path in bad {
            let error = confine(&roots, path.to_str().unwrap()).unwrap_err();
            assert_eq!(error.status.as_u16(), 400, "{path:?}");
        }
        assert!(confine(&[], root.join("a").to_str().unwrap()).is_err());
    }
}
