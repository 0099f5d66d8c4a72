//! Writing checkpoints: each rank writes a shard, then one rank writes the manifest and renames
//! the folder.

use crate::{
    Error, TensorSlice,
    assemble::Contents,
    checksum::FileChecksum,
    folder::{self, Inspection, set_aside},
    format::{ImageHeader, Shard, TensorIndex, dtype_of},
    manifest::FileEntry,
    names::{KEEPERS_WRITING, MANIFEST, REMOVING, WRITING, checkpoint_name},
    page_cache,
    run_folder::{EntryKind, RunFolder},
    shard_names::{self, shard_name},
};
use safetensors::{
    SafeTensorError,
    tensor::{Dtype, View},
};
use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};
use tch::{Device, Tensor};

/// A checkpoint that is being written to the folder `step-NNNNNNNN.writing`, by keepers to
/// `step-NNNNNNNN.keepers-writing`.
#[derive(Debug, Clone)]
pub struct Staging {
    folder: PathBuf,
    root: PathBuf,
    /// The final name of the folder.
    name: String,
    /// Its name until then.
    folder_name: String,
    step: u64,
}

/// A tensor that is copied out of libtorch's memory when it is written, one at a time.
struct TensorBytes {
    dtype: Dtype,
    shape: Vec<usize>,
    tensor: Tensor,
}

impl View for TensorBytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let tensor = self.tensor.to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0u8; self.data_len()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

impl Staging {
    /// Names the folders for step `step` under `root`, and creates nothing.
    pub fn new(root: &Path, step: u64) -> Staging {
        Staging::with_suffix(root, step, WRITING)
    }

    /// Names the folders for a checkpoint that keepers write, and creates nothing.
    pub fn of_keepers(root: &Path, step: u64) -> Staging {
        Staging::with_suffix(root, step, KEEPERS_WRITING)
    }

    fn with_suffix(root: &Path, step: u64, suffix: &str) -> Staging {
        let name = checkpoint_name(step);
        let folder_name = format!("{name}.{suffix}");
        Staging {
            folder: root.join(&folder_name),
            root: root.to_path_buf(),
            name,
            folder_name,
            step,
        }
    }

    /// Returns the folder to which shards are written.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Creates the folder, empty. One rank calls this before any rank writes.
    ///
    /// # Errors
    /// If the folder cannot be created, or `root` is a link.
    pub fn begin(&self) -> Result<(), Error> {
        let root = RunFolder::create_inside(&self.root)?;
        let name = &self.folder_name;
        if root.kind(name)? != Some(EntryKind::File) {
            root.remove(name)?;
        }
        root.create_subfolder(name).map(drop)
    }

    /// Removes everything that was written.
    pub fn discard(&self) {
        // Readers ignore a folder with this name, so a failure does no harm.
        if let Ok(Some(root)) = RunFolder::open_inside(&self.root)
            && let Ok(Some(EntryKind::Folder)) = root.kind(&self.folder_name)
        {
            let _ = root.remove(&self.folder_name);
        }
    }

    fn open_folder(&self) -> Result<RunFolder, Error> {
        let opened = RunFolder::open_inside(&self.folder)?;
        opened.ok_or_else(|| Error::mismatch(&self.folder, "the folder was removed"))
    }

    /// Writes the shard of rank `rank`, syncs it to disk and reads it back from there.
    ///
    /// # Errors
    /// If the disk is full, or returns other bytes than were written.
    pub fn write_shard(
        &self,
        rank: usize,
        tensors: Vec<(TensorSlice, Tensor)>,
    ) -> Result<Shard, Error> {
        let folder = self.open_folder()?;
        let name = shard_name(rank);
        shard_names::create_folder_of(&folder, &name)?;
        let path = self.folder.join(&name);
        let mut slices = Vec::with_capacity(tensors.len());
        let mut views = Vec::with_capacity(tensors.len());
        for (slice, tensor) in tensors {
            let key = slice.key();
            let kind = tensor.kind();
            let unsupported = || {
                let reason = format!("{key}: values of dtype {kind:?} cannot be saved");
                Error::mismatch(&path, reason)
            };
            let dtype = dtype_of(kind).ok_or_else(unsupported)?;
            let shape = tensor.size().iter().map(|&size| size as usize).collect();
            let view = TensorBytes {
                dtype,
                shape,
                tensor,
            };
            views.push((key, view));
            slices.push(slice);
        }
        let failed = |error| match error {
            SafeTensorError::IoError(source) => Error::io("cannot write", &path)(source),
            other => Error::mismatch(&path, other.to_string()),
        };
        safetensors::serialize_to_file(views, None, &path).map_err(failed)?;
        let file = shard_names::open(&folder, &name)?;
        page_cache::sync_and_drop(&file, &path)?;
        let written = FileChecksum::of(&file, &path)?;
        // A header that reads back proves that the lengths in it fit the file.
        TensorIndex::from_file(&file, &path)?;
        let file = FileEntry {
            name,
            bytes: written.bytes,
            crc32c: written.crc32c,
        };
        Ok(Shard { file, slices })
    }

    /// Writes the manifest, syncs everything to disk and gives the checkpoint its final name.
    /// One rank calls this after all have written. `tensors` is the number of expected tensors.
    ///
    /// # Errors
    /// If a tensor is missing, incomplete, or in several shards, or the file system fails.
    pub fn commit(
        &self,
        shards: Vec<Shard>,
        tensors: usize,
        state: serde_json::Value,
    ) -> Result<PathBuf, Error> {
        let files = shards
            .iter()
            .map(|shard| (shard.file.clone(), shard.slices.as_slice()));
        let contents = Contents::assemble(&self.folder, files, tensors)?;
        let manifest = contents.into_manifest(self.step, state);
        let folder = self.open_folder()?;
        let (text, written) = manifest.encode();
        folder.write_file(MANIFEST, &text)?;
        let names = shards.iter().map(|shard| shard.file.name.as_str());
        shard_names::sync_folders(&folder, names)?;
        // Ranks and keepers on other machines may have written to another disk.
        let inspection = Inspection::of_written(&self.folder, written)?;
        let root = RunFolder::create_inside(&self.root)?;
        self.publish(&root)?;
        let target = self.root.join(&self.name);
        inspection.remember_written(&target);
        Ok(target)
    }

    /// Gives the folder its final name. An earlier checkpoint of the step, which a run wrote before
    /// it resumed from an older one, is removed afterwards. One that is damaged is set aside.
    fn publish(&self, root: &RunFolder) -> Result<(), Error> {
        if root.kind(&self.name)?.is_some() {
            match folder::check_lengths(&self.root.join(&self.name)) {
                Ok(()) => return self.replace(root),
                Err(error) => {
                    let aside = set_aside(root, &self.name)?;
                    tracing::warn!("{error}; it is now {}", aside.display());
                }
            }
        }
        root.rename(&self.folder_name, &self.name)?;
        root.sync()
    }

    /// Replaces the earlier checkpoint of the step. At any time, also after a failure, a checkpoint
    /// with all its files has the final name, or one that [`folder::clean`] gives the name back.
    fn replace(&self, root: &RunFolder) -> Result<(), Error> {
        let writing = &self.folder_name;
        if !root.exchange(writing, &self.name)? {
            return self.replace_in_two_steps(root);
        }
        if let Err(error) = root.sync() {
            // The caller discards the folder that is being written: it must be the new one again.
            root.exchange(writing, &self.name)?;
            return Err(error);
        }
        remove_replaced(root, writing);
        Ok(())
    }

    /// Replaces the earlier checkpoint on a file system that cannot exchange two names.
    fn replace_in_two_steps(&self, root: &RunFolder) -> Result<(), Error> {
        let replaced = format!("{}.{REMOVING}", self.name);
        root.remove(&replaced)?;
        root.rename(&self.name, &replaced)?;
        if let Err(error) = root.rename(&self.folder_name, &self.name) {
            root.rename(&replaced, &self.name)?;
            return Err(error);
        }
        root.sync()?;
        remove_replaced(root, &replaced);
        Ok(())
    }

    /// Calls [`Staging::commit`] for shards that are images. The header of the first one holds
    /// the state and the number of tensors.
    ///
    /// # Errors
    /// As [`Staging::commit`].
    pub fn commit_images(&self, shards: Vec<Shard>) -> Result<PathBuf, Error> {
        let first = shards
            .first()
            .ok_or_else(|| Error::mismatch(&self.folder, "no shard was written"))?;
        let name = &first.file.name;
        let file = shard_names::open(&self.open_folder()?, name)?;
        let header = ImageHeader::from_open_file(&file, &self.folder.join(name))?;
        self.commit(shards, header.tensors, header.state)
    }
}

/// Removes a checkpoint that another one of its step replaced. The new one is complete, so a
/// failure only leaves a folder that the next start removes.
fn remove_replaced(root: &RunFolder, name: &str) {
    if let Err(error) = root.remove(name) {
        tracing::warn!("the checkpoint that was replaced stays: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::clean;
    use serde_json::Value;

    fn staged(root: &Path, value: f32) -> (Staging, Vec<Shard>) {
        let staging = Staging::new(root, 20);
        staging.begin().unwrap();
        let values = Tensor::from_slice(&[value]);
        let tensors = vec![(TensorSlice::whole("w", &[1]), values)];
        let shard = staging.write_shard(0, tensors).unwrap();
        (staging, vec![shard])
    }

    fn commit(root: &Path, value: f32) -> Staging {
        let (staging, shards) = staged(root, value);
        staging.commit(shards, 1, Value::Null).unwrap();
        staging
    }

    fn saved_value(root: &Path) -> f64 {
        let found = folder::newest(root, folder::Depth::Data).unwrap();
        let mut checkpoint = crate::Checkpoint::open(&found.verified[0].path).unwrap();
        let tensor = checkpoint.tensor(&TensorSlice::whole("w", &[1])).unwrap();
        tensor.double_value(&[0])
    }

    fn names(root: &Path) -> Vec<String> {
        RunFolder::open(root).unwrap().names().unwrap()
    }

    #[test]
    fn a_replacement_that_fails_leaves_the_earlier_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let staging = commit(root.path(), 1.0);
        let folder = RunFolder::open(root.path()).unwrap();
        // The new folder is missing, so its rename fails.
        staging.publish(&folder).unwrap_err();
        staging.replace_in_two_steps(&folder).unwrap_err();
        staging.discard();
        assert_eq!(names(root.path()), ["step-00000020"]);
        assert_eq!(saved_value(root.path()), 1.0);
    }

    #[test]
    fn a_replacement_is_complete_with_and_without_an_exchange() {
        let root = tempfile::tempdir().unwrap();
        commit(root.path(), 1.0);
        commit(root.path(), 2.0);
        assert_eq!(names(root.path()), ["step-00000020"]);
        assert_eq!(saved_value(root.path()), 2.0);
        let other = tempfile::tempdir().unwrap();
        let staging = commit(other.path(), 3.0);
        std::fs::rename(other.path().join("step-00000020"), staging.folder()).unwrap();
        std::fs::rename(
            root.path().join("step-00000020"),
            other.path().join("step-00000020"),
        )
        .unwrap();
        let folder = RunFolder::open(other.path()).unwrap();
        staging.replace_in_two_steps(&folder).unwrap();
        assert_eq!(names(other.path()), ["step-00000020"]);
        assert_eq!(saved_value(other.path()), 3.0);
    }

    /// A crash between the two renames leaves two complete folders and no checkpoint.
    #[test]
    fn a_checkpoint_that_was_not_replaced_gets_its_name_back() {
        let root = tempfile::tempdir().unwrap();
        commit(root.path(), 1.0);
        let path = root.path().join("step-00000020");
        let removing = path.with_extension(REMOVING);
        std::fs::rename(&path, &removing).unwrap();
        staged(root.path(), 2.0);
        let removed = clean(root.path()).unwrap();
        assert_eq!(removed.len(), 1);
        assert_eq!(names(root.path()), ["step-00000020"]);
        assert_eq!(saved_value(root.path()), 1.0);

        // A removal that a crash interrupted is completed.
        std::fs::rename(&path, &removing).unwrap();
        std::fs::remove_file(removing.join("shard-00000.safetensors")).unwrap();
        assert_eq!(clean(root.path()).unwrap().len(), 1);
        assert!(names(root.path()).is_empty());
    }
}
