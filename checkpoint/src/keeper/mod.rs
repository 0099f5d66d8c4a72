//! The keeper: a snapshot daemon, one per node, that outlives the ranks and owns the memory of
//! their snapshots.
//!
//! It is the snapshot management process of REFT (arXiv 2310.12670). Ranks copy their state into
//! slots of its memory and continue, and the keepers of a group hold parity of each other's slots
//! (see [`StripeLayout`](crate::StripeLayout)). A part of a snapshot is a safetensors image. The
//! code that reads checkpoints therefore reads snapshots too, and a keeper writes a part to disk
//! unchanged.
//!
//! - [`serve::run`] is the daemon, [`KeeperClient`] the side of a rank, and [`Peer`] that of the
//!   launcher and of other keepers.
//! - [`recover`] decides what can be restored, as a pure function.
//! - Inside, `protocol` has the messages. `decide` has the state, a plain value with a function
//!   for each thing that can happen. `daemon` puts it behind a lock and carries out what it
//!   decides, and `handlers` and `rank_handlers` do the work that moves bytes. Connections are
//!   [`secure`](crate::secure).
//!
//! Invariants:
//! - A rank never waits for a keeper. A snapshot that finds no free slot is skipped and counted.
//! - A snapshot is used only if every rank's part matches its checksums, or can be rebuilt.
//! - A keeper serves only peers that know the run's secret.

#![deny(clippy::too_many_lines)]

mod checksums;
mod client;
mod connection;
mod daemon;
mod decide;
mod digest;
mod fault;
#[cfg(test)]
mod fuzz;
mod handlers;
mod identity;
mod inject;
mod inventory_pool;
mod layout;
mod memory_limit;
mod memory_size;
pub mod message_bytes;
mod persist;
mod protect;
mod protocol;
mod rank_handlers;
mod rebuild;
pub mod recover;
mod report;
mod restore;
pub mod serve;
mod shared;
mod sizes;
mod snapshot;
mod topology;
mod verify;

pub use crate::secure::{Error, RefusalCounts, Secret};
pub use client::{FillReporter, KeeperClient, SlotMemory};
pub use connection::{Closer, EventStream, Peer};
pub use digest::ChecksumDigest;
pub use fault::Fault;
pub use identity::{Identity, MachineIdentity};
pub use inventory_pool::InventoryPool;
pub use memory_limit::{available_bytes, total_bytes};
pub use memory_size::format_mib;
pub use report::{Damage, Event, Inventory, KeeperRefusals, RankStatus, Status};
pub use shared::Shared;
pub use sizes::{DEFAULT_CHUNK_BYTES, chunk_bytes};
pub use snapshot::{PartInfo, Snapshot, SnapshotContents, SnapshotId};
pub use topology::{Node, Topology};
