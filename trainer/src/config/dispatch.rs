//! How tokens reach their experts, and who holds which.

use moe::lending::least_loaded::{Imbalance, Planner};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How tokens reach their experts. All compute the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    /// Each choice goes to the rank that holds its expert.
    #[default]
    Standard,
    /// Full ranks lend experts to others (LLEP, arXiv 2601.17111); see `least_loaded`.
    LeastLoaded,
    /// A token crosses to a node once, whatever the number of its experts there, and spreads inside.
    Hierarchical,
    /// Both.
    HierarchicalLeastLoaded,
}

impl Dispatch {
    /// Whether ranks lend experts.
    pub fn least_loaded(self) -> bool {
        matches!(
            self,
            Dispatch::LeastLoaded | Dispatch::HierarchicalLeastLoaded
        )
    }

    /// Whether tokens go by way of nodes.
    pub fn hierarchical(self) -> bool {
        matches!(
            self,
            Dispatch::Hierarchical | Dispatch::HierarchicalLeastLoaded
        )
    }
}

/// Knobs of least-loaded dispatch; the defaults are the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LeastLoadedConfig {
    /// Choices that a rank is given at most, over the mean (alpha).
    pub capacity: f64,
    /// Choices for which it is worth to send an expert's weights (m): a number, or `measured` at the start on this
    /// machine. (A checkpoint keeps what was measured; for the same bits in every run give a number.)
    pub min_tokens: MinTokens,
    /// Largest load over mean load up to which nothing is moved (lambda).
    pub threshold: f64,
    /// What that is measured over.
    pub threshold_over: Imbalance,
    /// Plan exactly as the paper's algorithm does, flaws included, to compare.
    pub strict_paper: bool,
}

/// A number of tokens, or `measured`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number of tokens, or measured")]
pub enum MinTokens {
    /// So many.
    Tokens(u32),
    /// What one transfer costs on this machine.
    Measured(Measured),
}

/// The word `measured`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// Find out at the start.
    Measured,
}

impl Default for LeastLoadedConfig {
    fn default() -> LeastLoadedConfig {
        LeastLoadedConfig {
            capacity: 1.0,
            min_tokens: MinTokens::Measured(Measured::Measured),
            threshold: 1.3,
            threshold_over: Imbalance::Device,
            strict_paper: false,
        }
    }
}

impl LeastLoadedConfig {
    /// Decides for owners on `nodes`; what is to be measured is the paper's 1024 until it is.
    pub fn planner(&self, nodes: Vec<usize>) -> Planner {
        let LeastLoadedConfig {
            capacity,
            threshold,
            threshold_over: over,
            strict_paper,
            ..
        } = *self;
        let min_tokens = match self.min_tokens {
            MinTokens::Tokens(tokens) => i64::from(tokens),
            MinTokens::Measured(_) => 1024,
        };
        Planner {
            capacity,
            min_tokens,
            threshold,
            over,
            strict_paper,
            nodes,
        }
    }
}

/// Moving experts between ranks now and then, with their optimizer state, so that ranks are evenly loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlacementConfig {
    /// Steps between moves.
    pub every: u64,
    /// How much of an expert's smoothed load is that of earlier steps.
    #[serde(default = "nine_tenths")]
    pub smoothing: f64,
    /// Experts move only where the fullest rank's load falls by at least this share of it.
    #[serde(default = "twentieth")]
    pub min_gain: f64,
}

fn nine_tenths() -> f64 {
    0.9
}
fn twentieth() -> f64 {
    0.05
}
