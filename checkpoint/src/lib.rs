//! Checkpoints on disk and erasure-coded snapshots in memory, for a state that many ranks share.
//!
//! A [`Checkpoint`] is a folder `step-NNNNNNNN` of safetensors shards and a [`Manifest`]. The
//! manifest lists every tensor by its global name, and every file with its length and checksum.
//! Readers request a [`TensorSlice`], so any parallel layout loads what any other saved.
//! [`Staging`] writes a checkpoint.
//!
//! A snapshot is a checkpoint in the memory of keepers: the [`keeper`] module has the daemon and
//! its clients, [`ImageLayout`] the layout of a rank's part, [`StripeLayout`] and [`ErasureCode`]
//! the redundancy, and [`survival`] the probability that it suffices. The terms are those of
//! `docs/glossary.md`.
//!
//! Invariants:
//! - A checkpoint is written under a temporary name, synced to disk and then renamed. A folder with
//!   the final name is complete.
//! - Every element of every tensor is saved exactly once. A missing or doubled one is an error.
//! - No bytes are used without a matching checksum. A damaged checkpoint is refused by name, and an
//!   older one is used. Only [`folder`] decides which checkpoint is the newest.
//! - Files of a run are created, replaced and removed through [`run_folder`], which follows no
//!   links.
//!
//! # Example
//!
//! ```
//! use checkpoint::{Checkpoint, Staging, TensorSlice, list};
//! use tch::Tensor;
//!
//! let root = tempfile::tempdir()?;
//! let weight = TensorSlice::whole("weight", &[2, 2]);
//! let values = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]).view([2, 2]);
//!
//! // Each rank writes a shard, and one of them commits the checkpoint.
//! let staging = Staging::new(root.path(), 10);
//! staging.begin()?;
//! let shard = staging.write_shard(0, vec![(weight.clone(), values)])?;
//! staging.commit(vec![shard], 1, serde_json::json!({"samples": 80}))?;
//!
//! // A rank that needs only the second row reads only that.
//! let mut checkpoint = Checkpoint::open(&list(root.path())?[0])?;
//! let second_row = TensorSlice {
//!     offset: vec![1, 0],
//!     shape: vec![1, 2],
//!     ..weight
//! };
//! let row = checkpoint.tensor(&second_row)?;
//! assert_eq!(row, Tensor::from_slice(&[3.0f32, 4.0]).view([1, 2]));
//! assert_eq!(checkpoint.manifest().state["samples"], 80);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod assemble;
mod checksum;
mod erasure;
mod error;
mod file_identity;
pub mod folder;
mod format;
mod image;
pub mod keeper;
mod manifest;
mod memory;
mod names;
mod own_parts;
mod page_cache;
mod read;
mod retention;
pub mod run_folder;
mod shard_names;
mod slice;
mod stripes;
pub mod survival;
mod tiling;
mod verified;
mod write;

pub use checksum::crc32c;
pub use erasure::{CodeError, ErasureCode, xor};
pub use error::Error;
pub use folder::list;
pub use format::{ImageHeader, Shard, TensorIndex};
pub use image::ImageLayout;
pub use manifest::{FileEntry, Manifest, TensorEntry};
pub use memory::{Region, advise_huge_pages, with_tensor_bytes};
pub use own_parts::{OwnParts, PartSource};
pub use read::{Checkpoint, PartOpener};
pub use retention::retain;
pub use secure_link as secure;
pub use slice::{SliceEntry, TensorSlice};
pub use stripes::{Redundancy, StripeLayout, redundancy_groups};
pub use write::Staging;
