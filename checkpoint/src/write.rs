//! Writing checkpoints: each rank writes a shard, then one rank writes the manifest and renames
//! the folder.

use crate::{
    Error, TensorSlice,
    assemble::Contents,
    checksum::FileChecksum,
    folder::{self, set_aside},
    format::{ImageHeader, Shard, TensorIndex, dtype_of},
    manifest::{FileEntry, MANIFEST},
    names::{REMOVING, WRITING, checkpoint_name},
    run_folder::{EntryKind, RunFolder},
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

/// A checkpoint that is being written to the folder `step-NNNNNNNN.writing`.
#[derive(Debug, Clone)]
pub struct Staging {
    folder: PathBuf,
    root: PathBuf,
    /// The final name of the folder.
    name: String,
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
        let name = checkpoint_name(step);
        Staging {
            folder: root.join(format!("{name}.{WRITING}")),
            root: root.to_path_buf(),
            name,
            step,
        }
    }

    /// Returns the folder to which shards are written.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn folder_name(&self) -> String {
        format!("{}.{WRITING}", self.name)
    }

    /// Creates the folder, empty. One rank calls this before any rank writes.
    ///
    /// # Errors
    /// If the folder cannot be created, or `root` is a link.
    pub fn begin(&self) -> Result<(), Error> {
        let root = RunFolder::create_inside(&self.root)?;
        let name = self.folder_name();
        if root.kind(&name)? != Some(EntryKind::File) {
            root.remove(&name)?;
        }
        root.create_subfolder(&name).map(drop)
    }

    /// Removes everything that was written.
    pub fn discard(&self) {
        // Readers ignore a folder with this name, so a failure does no harm.
        if let Ok(Some(root)) = RunFolder::open_inside(&self.root)
            && let Ok(Some(EntryKind::Folder)) = root.kind(&self.folder_name())
        {
            let _ = root.remove(&self.folder_name());
        }
    }

    fn open_folder(&self) -> Result<RunFolder, Error> {
        let opened = RunFolder::open_inside(&self.folder)?;
        opened.ok_or_else(|| Error::mismatch(&self.folder, "the folder was removed"))
    }

    /// Writes the shard of rank `rank`, syncs it to disk and reads it back.
    ///
    /// # Errors
    /// If the disk is full, or returns other bytes than were written.
    pub fn write_shard(
        &self,
        rank: usize,
        tensors: Vec<(TensorSlice, Tensor)>,
    ) -> Result<Shard, Error> {
        let folder = self.open_folder()?;
        let name = format!("shard-{rank:05}.safetensors");
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
        let file = folder.open_file(&name)?;
        file.sync_all().map_err(Error::io("cannot write", &path))?;
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
        let contents = Contents::assemble(&self.folder, shards, tensors)?;
        let manifest = contents.into_manifest(self.step, state);
        let folder = self.open_folder()?;
        folder.write_file(MANIFEST, &manifest.encode())?;
        folder.sync()?;
        // Ranks and keepers on other machines may have written to another disk.
        folder::check_lengths(&self.folder)?;
        let root = RunFolder::create_inside(&self.root)?;
        self.publish(&root)?;
        root.sync()?;
        let target = self.root.join(&self.name);
        folder::remember_verified(&target);
        Ok(target)
    }

    /// Gives the folder its final name. An earlier checkpoint of the step, which a run wrote before
    /// it resumed from an older one, is removed afterwards. One that is damaged is set aside.
    fn publish(&self, root: &RunFolder) -> Result<(), Error> {
        let target = self.root.join(&self.name);
        let replaced = format!("{}.{REMOVING}", self.name);
        if root.kind(&self.name)?.is_some() {
            match folder::check_lengths(&target) {
                Ok(()) => {
                    root.remove(&replaced)?;
                    root.rename(&self.name, &replaced)?;
                }
                Err(error) => {
                    let aside = set_aside(root, &self.name)?;
                    tracing::warn!("{error}; it is now {}", aside.display());
                }
            }
        }
        root.rename(&self.folder_name(), &self.name)?;
        root.remove(&replaced)
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
        let file = self.open_folder()?.open_file(name)?;
        let header = ImageHeader::from_open_file(&file, &self.folder.join(name))?;
        self.commit(shards, header.tensors, header.state)
    }
}
