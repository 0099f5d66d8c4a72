//! The folder of a run's checkpoints: listing the complete ones and removing old ones.

use crate::{Checkpoint, Error};
use std::{
    cmp::Reverse,
    io::ErrorKind,
    path::{Path, PathBuf},
};

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
/// A checkpoint whose tensors that `counts` selects by name have more elements than those of all
/// newer ones stays: it has parameters that no other has. Returns these, newest first.
///
/// # Errors
/// If the folder cannot be read, or a checkpoint cannot be removed.
pub fn retain(
    root: &Path,
    keep: usize,
    counts: impl Fn(&str) -> bool,
) -> Result<Vec<PathBuf>, Error> {
    let mut spared = Vec::new();
    let mut most = 0;
    for (index, path) in list(root)?.iter().enumerate() {
        // A manifest that cannot be read proves nothing about newer checkpoints.
        let elements = Checkpoint::open(path).map_or(0, |open| open.manifest().elements(&counts));
        if index < keep.max(1) {
            most = most.max(elements);
        } else if elements > most {
            most = elements;
            spared.push(path.clone());
        } else {
            // A folder without a manifest is no checkpoint, should the rest not be removed.
            let _ = std::fs::remove_file(path.join("manifest.json"));
            std::fs::remove_dir_all(path).map_err(Error::io("cannot remove", path))?;
        }
    }
    Ok(spared)
}
