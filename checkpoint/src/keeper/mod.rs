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
//! - Inside, `protocol` has the messages and `wire` their encoding. `state` is a plain value with a
//!   method per change, `daemon` puts it behind a lock, and `handlers` and `rank_handlers` have a
//!   function per request.
//!
//! Invariants:
//! - A rank never waits for a keeper. A snapshot that finds no free slot is skipped and counted.
//! - A snapshot is used only if every rank's part matches its checksums, or can be rebuilt.
//! - A keeper serves only peers that know the run's secret.

mod client;
mod connection;
mod daemon;
mod error;
mod fault;
mod handlers;
mod inject;
mod layout;
mod memory_limit;
mod parity_store;
mod persist;
mod protect;
mod protocol;
mod rank_handlers;
mod rank_table;
mod rebuild;
pub mod recover;
mod report;
mod restore;
pub mod serve;
mod slots;
mod snapshot;
mod state;
mod topology;
mod verify;
mod wire;

pub use client::{FillReporter, KeeperClient, SlotMemory};
pub use connection::{EventStream, Peer};
pub use error::Error;
pub use fault::Fault;
pub use memory_limit::{format_mib, total_bytes};
pub use report::{Damage, Event, Inventory, RankStatus, Status};
pub use snapshot::{PartInfo, Snapshot, SnapshotId};
pub use topology::{DEFAULT_CHUNK_BYTES, Node, Topology};
pub use wire::Secret;
