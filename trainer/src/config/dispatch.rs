//! The sections of `model.moe` on dispatch, lending and placement.

use super::words::MeasuredKeyword;
use config_derive::ResumeKeys;
use moe::lending::least_loaded::{Imbalance, Planner};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Stands in for `min_tokens: measured` until the measurement: the paper's value of m.
const DEFAULT_MIN_TOKENS: i64 = 1024;

/// Transfer of routed tokens to their experts. All values compute the same result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    /// Each routed token goes to the rank that holds its expert.
    #[default]
    Standard,
    /// Overloaded ranks lend experts to others (LLEP, arXiv 2601.17111). See `least_loaded`.
    LeastLoaded,
    /// A token crosses to each node once, whatever the number of its experts there, and is
    /// distributed within the node.
    Hierarchical,
    /// Both `hierarchical` and `least_loaded`.
    HierarchicalLeastLoaded,
}

impl Dispatch {
    /// Returns true if ranks lend experts.
    pub fn least_loaded(self) -> bool {
        matches!(
            self,
            Dispatch::LeastLoaded | Dispatch::HierarchicalLeastLoaded
        )
    }

    /// Returns true if a token crosses to a node once and is distributed there.
    pub fn hierarchical(self) -> bool {
        matches!(
            self,
            Dispatch::Hierarchical | Dispatch::HierarchicalLeastLoaded
        )
    }
}

/// Parameters of least-loaded dispatch (LLEP, arXiv 2601.17111). The defaults are the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct LeastLoadedConfig {
    /// Routed tokens that a rank accepts before the planner lends, over the mean (alpha).
    #[on_resume(free)]
    #[schemars(range(min = 1.0, max = 1e9))]
    pub capacity: f64,
    /// Smallest number of routed tokens for which an expert is lent (m): a number, or `measured` on
    /// this machine when the run starts. Checkpoints keep the measured number. Give a number for
    /// bit-identical runs.
    #[on_resume(free)]
    pub min_tokens: MinTokens,
    /// Imbalance up to which nothing is lent (lambda): the largest load over the mean load.
    #[on_resume(free)]
    #[schemars(range(min = 1.0, max = 1e9))]
    pub threshold: f64,
    /// Loads whose imbalance `threshold` limits.
    #[on_resume(free)]
    pub threshold_over: Imbalance,
    /// Plans exactly as the paper's algorithm does, flaws included, for comparison.
    #[on_resume(free)]
    pub strict_paper: bool,
}

impl Default for LeastLoadedConfig {
    fn default() -> LeastLoadedConfig {
        LeastLoadedConfig {
            capacity: 1.0,
            min_tokens: MinTokens::Measured(MeasuredKeyword::Measured),
            threshold: 1.3,
            threshold_over: Imbalance::Device,
            strict_paper: false,
        }
    }
}

impl LeastLoadedConfig {
    /// Returns a planner for owners on these nodes.
    ///
    /// Its `min_tokens` is the paper's 1024 if the configuration says `measured`.
    pub fn planner(&self, nodes: Vec<usize>) -> Planner {
        let min_tokens = match self.min_tokens {
            MinTokens::Tokens(tokens) => i64::from(tokens),
            MinTokens::Measured(_) => DEFAULT_MIN_TOKENS,
        };
        Planner {
            capacity: self.capacity,
            min_tokens,
            threshold: self.threshold,
            over: self.threshold_over,
            strict_paper: self.strict_paper,
            nodes,
        }
    }
}

/// A number of tokens, or `measured`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number of tokens, or measured")]
pub enum MinTokens {
    /// A fixed number of routed tokens.
    Tokens(u32),
    /// The cost of one transfer on this machine, in routed tokens.
    Measured(MeasuredKeyword),
}

/// Placement: moving experts between ranks, with their optimizer state, to even out the load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct PlacementConfig {
    /// Steps between moves.
    #[on_resume(reported)]
    #[schemars(range(min = 1))]
    pub every: u64,
    /// Weight of earlier steps in an expert's smoothed load, from 0 to below 1.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    #[serde(default = "default_smoothing")]
    pub smoothing: f64,
    /// Smallest relative reduction of the most loaded rank's load for which experts move, from 0 to
    /// below 1.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    #[serde(default = "default_min_gain")]
    pub min_gain: f64,
}

fn default_smoothing() -> f64 {
    0.9
}

fn default_min_gain() -> f64 {
    0.05
}
