//! The checkpoints that this process has verified, which it need not read again.

use crate::{
    Checkpoint, Error, file_identity::FileIdentity, names::MANIFEST, run_folder::RunFolder,
    shard_names,
};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Nanoseconds after which a change of a file has another time.
const TICK_NS: i128 = 50_000_000;

/// The checkpoints whose files all had the right checksums, by their folders.
static VERIFIED: Mutex<BTreeMap<PathBuf, Arc<Summary>>> = Mutex::new(BTreeMap::new());

/// A checkpoint without its slices, and its files as they were when it was read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) step: u64,
    /// A note for the user, see [`Checkpoint::note`].
    pub(crate) note: Option<String>,
    /// The names and identities of all files, the manifest first.
    files: Vec<(String, FileIdentity)>,
    /// The names and numbers of elements of all tensors.
    tensors: Vec<(String, u64)>,
}

impl Summary {
    /// Summarizes a checkpoint, and compares the lengths of its files with the manifest.
    ///
    /// # Errors
    /// If a file is missing, has another length, or is no regular file of the folder.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Result<Summary, Error> {
        let manifest = checkpoint.manifest();
        let mut files = vec![(MANIFEST.to_string(), checkpoint.manifest_identity()?)];
        for (number, file) in manifest.files.iter().enumerate() {
            files.push((file.name.clone(), checkpoint.file_identity(number)?));
        }
        let tensors = manifest.tensors.iter();
        let tensors = tensors.map(|(name, entry)| (name.clone(), entry.elements()));
        Ok(Summary {
            step: manifest.step,
            note: checkpoint.note(),
            files,
            tensors: tensors.collect(),
        })
    }

    /// Returns the number of elements of the tensors that `counts` selects by name.
    pub(crate) fn elements(&self, counts: impl Fn(&str) -> bool) -> u64 {
        let counted = self.tensors.iter().filter(|(name, _)| counts(name));
        counted.map(|(_, elements)| elements).sum()
    }

    /// True if all files under `path` are as they were.
    fn is_current(&self, path: &Path) -> bool {
        let Ok(folder) = RunFolder::open(path) else {
            return false;
        };
        self.files.iter().all(|(name, identity)| {
            let found = shard_names::status(&folder, name);
            found.is_ok_and(|status| FileIdentity::of(&status) == *identity)
        })
    }

    /// True if a file has only just changed: another change in the same tick would not show.
    fn is_recent(&self) -> bool {
        let times = self.files.iter().map(|(_, identity)| identity.changed_ns());
        let newest = times.max().unwrap_or(0);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = since_epoch.map_or(0, |time| time.as_nanos() as i128);
        now - newest <= TICK_NS
    }
}

/// Returns the summary of a checkpoint that this process verified and of which no file has changed
/// since. Opens none of its files.
pub(crate) fn recall(path: &Path) -> Option<Arc<Summary>> {
    let known = VERIFIED.lock().get(&key(path)).cloned();
    known.filter(|summary| summary.is_current(path))
}

/// True if this process verified the files of `summary`, and they are the same now.
pub(crate) fn is_known(path: &Path, summary: &Summary) -> bool {
    let verified = VERIFIED.lock();
    verified
        .get(&key(path))
        .is_some_and(|known| known.files == summary.files)
}

/// Remembers a checkpoint whose files were read and had the right checksums, unless one has only
/// just changed.
pub(crate) fn remember_read(path: &Path, summary: &Arc<Summary>) {
    if !summary.is_recent() {
        remember_written(path, summary.clone());
    }
}

/// Remembers a checkpoint whose files were read back when they were written.
pub(crate) fn remember_written(path: &Path, summary: Arc<Summary>) {
    VERIFIED.lock().insert(key(path), summary);
}

/// Forgets a checkpoint that is being removed.
pub(crate) fn forget(path: &Path) {
    VERIFIED.lock().remove(&key(path));
}

fn key(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}
