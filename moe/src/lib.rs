//! Which expert works on which token, and where.
//!
//! - [`Router`] chooses experts for every token;
//! - [`balance`] keeps them evenly used;
//! - [`lending::assignment`] says who works on which of an expert's choices: its home, or as [`lending::least_loaded`] plans it;
//! - [`plan`] says, as plain numbers, which row goes where; [`dispatch`] carries it out;
//! - [`experts`] computes; [`MoeLayer`] puts the parts together.
//!
//! Invariants:
//! - Routing is dropless and exact: every (token, choice) pair reaches its expert, wherever that sits.
//! - Plans are pure functions of plain data; they know no tensors.
//! - A rank, an expert or a whole group without tokens still takes part in every collective and in backward.

pub mod balance;
pub mod consistency;
pub mod dispatch;
pub mod experts;
mod fp8;
mod hierarchy;
mod layer;
pub mod lending;
mod permute;
pub mod placement;
pub mod plan;
mod router;

pub use layer::{
    MoeLayer, MoeOutput, MoeStats, MoeWeights, RoutedOutput, RoutingReplay, SavePolicy,
};
pub use router::{Router, Routing, Score};
