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
    /// The boxes it consists of.
    pub pieces: Vec<PieceEntry>,
}

/// A box of a tensor, in one file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PieceEntry {
    /// Number of the shard.
    pub file: usize,
    /// Where the box begins in the tensor.
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
