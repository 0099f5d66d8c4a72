//! The folder of a run's checkpoints: listing the complete ones and removing old ones.

use crate::Error;
use std::cmp::Reverse;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Returns the complete checkpoints under `root`, newest first. A missing folder holds none.
///
/// # Errors
/// If the folder cannot be read.
pub fn list(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("cannot read", root)(error)),
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| step_of(path).is_some())
        .filter(|path| path.join("manifest.json").exists())
        .collect();
    found.sort_by_key(|path| Reverse(step_of(path)));
    Ok(found)
}

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix("step-")?
        .parse()
        .ok()
}

/// Removes all but the newest `keep` checkpoints under `root`, and never the newest one.
///
/// # Errors
/// If the folder cannot be read, or a checkpoint cannot be removed.
pub fn retain(root: &Path, keep: usize) -> Result<(), Error> {
    let all = list(root)?;
    for path in all.iter().skip(keep.max(1)) {
        // A folder without a manifest is no checkpoint, should the rest not be removed.
        let _ = std::fs::remove_file(path.join("manifest.json"));
        std::fs::remove_dir_all(path).map_err(Error::io("cannot remove", path))?;
    }
    Ok(())
}
