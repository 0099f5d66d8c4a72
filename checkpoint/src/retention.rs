//! Removal of old checkpoints, possibly while a new one is written.

use crate::{
    Error,
    folder::{Depth, listing, summarize},
    names::REMOVING,
    run_folder::RunFolder,
    verified,
};
use std::path::{Path, PathBuf};

/// Removes checkpoints under `root` but for the newest `keep` of those up to step `step`, of which
/// one was just written.
///
/// Only verified checkpoints count, so that a damaged one never makes a good one go. Later ones,
/// which another run left in the folder, neither count nor are removed. A checkpoint whose tensors
/// that `counts` selects by name have more elements than those of all newer ones stays: it has
/// parameters that no other has. Returns these, newest first.
///
/// # Errors
/// If the folder cannot be read, or a checkpoint cannot be removed.
pub fn retain(
    root: &Path,
    keep: usize,
    step: u64,
    counts: impl Fn(&str) -> bool,
) -> Result<Vec<PathBuf>, Error> {
    let mut candidates = listing(root)?.candidates;
    candidates.retain(|(candidate, _)| *candidate <= step);
    let mut spared = Vec::new();
    let mut kept = 0;
    let mut most = 0;
    for (_, path) in candidates {
        let counted = kept < keep.max(1);
        // A checkpoint to remove need not be read: enough newer ones were verified.
        let depth = if counted { Depth::Data } else { Depth::Lengths };
        let Ok(summary) = summarize(&path, depth) else {
            continue;
        };
        let elements = summary.elements(&counts);
        if counted {
            kept += 1;
            most = most.max(elements);
        } else if elements > most {
            most = elements;
            spared.push(path);
        } else {
            remove(root, &path)?;
        }
    }
    Ok(spared)
}

/// Removes a checkpoint. It first gets the name of a leftover, so that it is never a checkpoint of
/// which a part is missing.
fn remove(root: &Path, path: &Path) -> Result<(), Error> {
    let name = path.file_name().and_then(|name| name.to_str());
    let Some((folder, name)) = RunFolder::open_inside(root)?.zip(name) else {
        return Ok(());
    };
    let removing = format!("{name}.{REMOVING}");
    verified::forget(path);
    folder.remove(&removing)?;
    folder.rename(name, &removing)?;
    folder.remove(&removing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Staging, TensorSlice,
        folder::{clean, survey},
    };
    use serde_json::Value;
    use std::{sync::Arc, time::Duration};
    use tch::Tensor;

    fn stage(root: &Path, step: u64, ranks: usize) -> (Staging, Vec<crate::Shard>) {
        let staging = Staging::new(root, step);
        staging.begin().unwrap();
        let shard = |rank: usize| {
            let slice = TensorSlice::whole(format!("w{rank}"), &[1]);
            let values = Tensor::from_slice(&[step as f32]);
            staging.write_shard(rank, vec![(slice, values)]).unwrap()
        };
        let shards = (0..ranks).map(shard).collect();
        (staging, shards)
    }

    fn save(root: &Path, step: u64, ranks: usize) -> PathBuf {
        let (staging, shards) = stage(root, step, ranks);
        staging.commit(shards, ranks, Value::Null).unwrap()
    }

    fn steps(root: &Path) -> Vec<u64> {
        let found = survey(root, Depth::Lengths).unwrap();
        assert_eq!(found.refused, [], "a checkpoint is complete or absent");
        found
            .verified
            .iter()
            .map(|verified| verified.step)
            .collect()
    }

    #[test]
    fn the_right_ones_go_while_another_is_being_written() {
        let root = tempfile::tempdir().unwrap();
        for step in [10, 20, 30] {
            save(root.path(), step, 2);
        }
        let (staging, shards) = stage(root.path(), 40, 2);
        retain(root.path(), 2, 30, |_| true).unwrap();
        assert_eq!(steps(root.path()), [30, 20]);
        staging.commit(shards, 2, Value::Null).unwrap();
        // An order that waited while the run saved again.
        retain(root.path(), 2, 30, |_| true).unwrap();
        assert_eq!(steps(root.path()), [40, 30, 20]);
        retain(root.path(), 2, 40, |_| true).unwrap();
        assert_eq!(steps(root.path()), [40, 30]);
    }

    /// Times of files show whether a checkpoint that this process wrote has changed.
    #[test]
    fn a_known_checkpoint_is_not_read_again() {
        let root = tempfile::tempdir().unwrap();
        let path = save(root.path(), 10, 2);
        let known = verified::recall(&path).unwrap();
        for depth in [Depth::Lengths, Depth::Data] {
            assert!(Arc::ptr_eq(&summarize(&path, depth).unwrap(), &known));
        }
        let shard = path.join("shard-00001.safetensors");
        let bytes = std::fs::read(&shard).unwrap();
        std::thread::sleep(Duration::from_millis(60));
        std::fs::write(&shard, &bytes).unwrap();
        assert!(verified::recall(&path).is_none(), "it may have changed");
        std::thread::sleep(Duration::from_millis(60));
        let read = summarize(&path, Depth::Data).unwrap();
        assert!(!Arc::ptr_eq(&read, &known));
        assert!(Arc::ptr_eq(&verified::recall(&path).unwrap(), &read));
    }

    /// A removal that a crash ends after any number of its steps.
    #[test]
    fn an_interrupted_removal_leaves_no_part_of_a_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        save(root.path(), 20, 3);
        for removed in 0..=4 {
            let path = save(root.path(), 10, 3);
            let removing = path.with_extension(REMOVING);
            std::fs::rename(&path, &removing).unwrap();
            let files = std::fs::read_dir(&removing).unwrap();
            let files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
            assert_eq!(files.len(), 4);
            for file in &files[..removed] {
                std::fs::remove_file(file).unwrap();
            }
            assert_eq!(steps(root.path()), [20], "{removed} files were removed");
            clean(root.path()).unwrap();
            // Only a whole one gets its name back.
            let expected: &[u64] = if removed == 0 { &[20, 10] } else { &[20] };
            assert_eq!(steps(root.path()), expected, "{removed} files were removed");
            retain(root.path(), 1, 20, |_| true).unwrap();
            assert_eq!(steps(root.path()), [20]);
            assert!(!removing.exists());
        }
    }
}
