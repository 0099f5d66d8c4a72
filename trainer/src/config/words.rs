//! Values that are a number or a word.

use super::limits::MAX_RANKS;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A number of ranks, or `auto`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number of ranks, or auto")]
pub enum AxisSize {
    /// A fixed number of ranks.
    Size(#[schemars(range(min = 1, max = MAX_RANKS))] usize),
    /// All ranks that the other axes leave.
    Auto(Auto),
}

/// The word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    /// Chosen when the run starts.
    Auto,
}

/// The word `none` or `all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoneOrAll {
    /// None of the layers.
    None,
    /// All of the layers.
    All,
}

/// The word `measured`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MeasuredKeyword {
    /// Measured when the run starts.
    Measured,
}
