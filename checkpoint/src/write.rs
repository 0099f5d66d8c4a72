//! Writing checkpoints: each rank writes a shard, then one rank writes the manifest and renames
//! the folder.

use crate::{
    Error, TensorSlice,
    assemble::Contents,
    checksum::FileChecksum,
    format::{ImageHeader, Shard, TensorIndex, dtype_of},
    manifest::FileEntry,
};
use safetensors::{
    SafeTensorError,
    tensor::{Dtype, View},
};
use std::{
    borrow::Cow,
    fs::File,
    path::{Path, PathBuf},
};
use tch::{Device, Tensor};

/// A checkpoint that is being written to the folder `step-NNNNNNNN.writing`.
#[derive(Debug, Clone)]
pub struct Staging {
    folder: PathBuf,
    target: PathBuf,
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
        let target = root.join(format!("step-{step:08}"));
        Staging {
            folder: target.with_extension("writing"),
            target,
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
    /// If the folder cannot be created.
    pub fn begin(&self) -> Result<(), Error> {
        self.discard();
        std::fs::create_dir_all(&self.folder).map_err(Error::io("cannot create", &self.folder))
    }

    /// Removes everything that was written.
    pub fn discard(&self) {
        // Readers ignore a folder with this name, so a failure does no harm.
        let _ = std::fs::remove_dir_all(&self.folder);
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
        sync(&path)?;
        let written = FileChecksum::read(&path)?;
        // A header that reads back proves that the lengths in it fit the file.
        TensorIndex::from_file(&path)?;
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
        let path = self.folder.join("manifest.json");
        let text = serde_json::to_vec_pretty(&manifest).expect("plain data");
        std::fs::write(&path, text).map_err(Error::io("cannot write", &path))?;
        sync(&path)?;
        sync(&self.folder)?;
        if self.target.exists() {
            // A run that resumed from an older checkpoint saves the step a second time.
            std::fs::remove_dir_all(&self.target)
                .map_err(Error::io("cannot replace", &self.target))?;
        }
        std::fs::rename(&self.folder, &self.target)
            .map_err(Error::io("cannot rename to", &self.target))?;
        if let Some(parent) = self.target.parent() {
            sync(parent)?;
        }
        Ok(self.target.clone())
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
        let header = ImageHeader::from_file(&self.folder.join(&first.file.name))?;
        self.commit(shards, header.tensors, header.state)
    }
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io("cannot write", path))
}
