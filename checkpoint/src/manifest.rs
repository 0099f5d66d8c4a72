//! The manifest, which lists the files of a checkpoint and the tensors in them.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The version of the format that this code writes and reads.
pub(crate) const FORMAT: u32 = 2;

/// The contents of `manifest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of the format.
    pub format: u32,
    /// Optimizer steps that were done.
    pub step: u64,
    /// Whatever the writer needs when it resumes, such as its configuration.
    pub state: serde_json::Value,
    /// The shards, in the order of their numbers.
    pub files: Vec<FileEntry>,
    /// The tensors by their global names.
    pub tensors: BTreeMap<String, TensorEntry>,
}

impl Manifest {
    /// Returns the number of elements of the tensors that `counts` selects by name.
    pub fn elements(&self, counts: impl Fn(&str) -> bool) -> u64 {
        let counted = self.tensors.iter().filter(|(name, _)| counts(name));
        counted
            .map(|(_, entry)| entry.shape.iter().map(|&size| size as u64).product::<u64>())
            .sum()
    }
}

/// A tensor and the slices in which it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TensorEntry {
    pub shape: Vec<i64>,
    /// Disjoint slices that cover the tensor. The serialized name is that of format 2.
    #[serde(rename = "pieces")]
    pub slices: Vec<SliceEntry>,
}

/// A slice of a tensor in one file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SliceEntry {
    /// The number of the shard.
    pub file: usize,
    /// The first index of the slice in each dim.
    pub offset: Vec<i64>,
    /// The size of the slice in each dim.
    pub shape: Vec<i64>,
}

/// A shard of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileEntry {
    /// The file's name in the folder of the checkpoint.
    pub name: String,
    pub bytes: u64,
    /// The CRC-32C of the whole file.
    pub crc32c: u32,
}
