//! The manifest: what a checkpoint consists of.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The version of the format that this code writes and reads.
pub(crate) const FORMAT: u32 = 2;

/// Contents of `manifest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// Steps done.
    pub step: u64,
    /// What the writer wants to know again, such as the configuration.
    pub state: serde_json::Value,
    /// The shards.
    pub files: Vec<FileEntry>,
    /// Where each tensor is, by its global name.
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// One tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its shape.
    pub shape: Vec<i64>,
    /// The slices it consists of.
    #[serde(rename = "pieces")]
    pub slices: Vec<SliceEntry>,
}

/// A slice of a tensor, in one file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SliceEntry {
    /// Number of the shard.
    pub file: usize,
    /// Where the slice begins in the tensor.
    pub offset: Vec<i64>,
    /// Its size.
    pub shape: Vec<i64>,
}

/// One shard.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in the checkpoint's folder.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// CRC-32C of the whole file.
    pub crc32c: u32,
}
