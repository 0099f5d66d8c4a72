//! Combining shards: every element of every tensor has to be there exactly once.

use crate::{
    Error, TensorSlice,
    format::Shard,
    manifest::{FORMAT, FileEntry, Manifest, TensorEntry},
    slice::SliceEntry,
    tiling::check_tiling,
};
use std::{collections::BTreeMap, path::Path};

/// The files and tensors of a complete checkpoint.
pub(crate) struct Contents {
    files: Vec<FileEntry>,
    tensors: BTreeMap<String, TensorEntry>,
}

impl Contents {
    /// Combines `shards` and checks that they hold `expected` tensors. Errors name `path`.
    ///
    /// # Errors
    /// If a tensor is missing, incomplete, or in several shards.
    pub(crate) fn assemble(
        path: &Path,
        shards: Vec<Shard>,
        expected: usize,
    ) -> Result<Contents, Error> {
        let mut contents = Contents {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let refused = |reason| Error::mismatch(path, reason);
        for shard in shards {
            for slice in shard.slices {
                contents.add_slice(slice).map_err(refused)?;
            }
            contents.files.push(shard.file);
        }
        contents.check_complete(expected).map_err(refused)?;
        Ok(contents)
    }

    /// Adds a slice that is stored in the next file.
    fn add_slice(&mut self, slice: TensorSlice) -> Result<(), String> {
        let file = self.files.len();
        let name = &slice.name;
        let new_entry = || TensorEntry {
            shape: slice.global_shape.clone(),
            slices: Vec::new(),
        };
        let entry = self.tensors.entry(name.clone()).or_insert_with(new_entry);
        if entry.shape != slice.global_shape {
            return Err(format!(
                "{name} has shape {:?} in shard {file}, {:?} in others",
                slice.global_shape, entry.shape
            ));
        }
        entry.slices.push(SliceEntry {
            file,
            offset: slice.offset,
            shape: slice.shape,
        });
        Ok(())
    }

    fn check_complete(&self, expected: usize) -> Result<(), String> {
        for (name, entry) in &self.tensors {
            check_tiling(&entry.shape, &entry.slices)
                .map_err(|reason| format!("{name} {reason}"))?;
        }
        let found = self.tensors.len();
        if found != expected {
            return Err(format!(
                "{found} tensors were written, {expected} are expected"
            ));
        }
        Ok(())
    }

    pub(crate) fn into_manifest(self, step: u64, state: serde_json::Value) -> Manifest {
        Manifest {
            format: FORMAT,
            step,
            state,
            files: self.files,
            tensors: self.tensors,
        }
    }
}
