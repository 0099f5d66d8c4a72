//! The manifest: what a checkpoint consists of.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The version of the format that this code writes; older ones are read.
pub(crate) const FORMAT: u32 = 1;

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
    /// The number of the shard each tensor is in, by the tensor's global name.
    pub tensors: BTreeMap<String, usize>,
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
