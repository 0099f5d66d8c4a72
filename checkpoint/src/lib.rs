//! What survives: durable checkpoints.
//!
//! A checkpoint is a folder `step-NNNNNNNN` of safetensors shards and a `manifest.json`, which names every tensor by
//! its global name and every file with its length and checksum. Which rank wrote a tensor matters to nobody who
//! reads it, so any layout loads what any other saved.
//!
//! Invariants:
//! - A checkpoint is written under a temporary name, made durable, and renamed: it is whole or not there.
//! - Every element of every tensor is in it exactly once; a missing or doubled one is an error when saving.
//! - Nothing is believed without its checksum; a damaged checkpoint is refused by name, and an older one is used.

mod checksum;
mod erasure;
mod error;
mod image;
pub mod keeper;
mod manifest;
mod memory;
mod plan;
mod read;
mod slice;
mod stripes;
pub mod survival;
mod write;

pub use checksum::crc32c;
pub use erasure::{ErasureCode, xor};
pub use error::Error;
pub use image::{ImageHeader, ImageLayout};
pub use manifest::{FileEntry, Manifest, SliceEntry, TensorEntry};
pub use memory::Region;
pub use plan::assign_owners;
pub use read::{Checkpoint, PartOpener, list};
pub use slice::TensorSlice;
pub use stripes::{Redundancy, Stripes, redundancy_groups};
pub use write::{Shard, Staging, retain};
