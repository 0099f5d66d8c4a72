//! The part of a run's state that is no tensor: a checkpoint's manifest contains it.

use serde::{Deserialize, Serialize};

/// Position of a run, expert placement and configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunState {
    /// Number of completed optimizer steps.
    pub(crate) step: u64,
    /// Samples drawn: the position in the data.
    pub(crate) samples: u64,
    /// Tokens trained on so far.
    pub(crate) tokens: u64,
    /// Number of ranks that saved.
    pub(crate) ranks: usize,
    /// Routed tokens from which least-loaded dispatch lends an expert.
    #[serde(default)]
    pub(crate) min_tokens: Option<i64>,
    #[serde(default)]
    pub(crate) placement: Option<PlacementState>,
    pub(crate) config: serde_json::Value,
}

/// Physical slots and loads of all experts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PlacementState {
    /// For each MoE layer of the model, the physical slot of each expert.
    #[serde(alias = "positions")]
    pub(crate) physical_slots: Vec<Vec<i64>>,
    /// For each MoE layer, the smoothed routed tokens of each expert per step.
    pub(crate) loads: Vec<Vec<f64>>,
}
