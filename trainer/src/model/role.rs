//! The part that a parameter plays in the model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The part that a parameter plays in the model. Optimizers and maximal update parametrization
/// treat roles differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Embedding and output layer.
    Vocabulary,
    /// Vectors that scale normalized activations.
    Norm,
    /// Matrices that map tokens to scores of experts, or to the gate of the shared experts.
    Router,
    /// Matrices of attention, dense feed-forward layers and shared experts.
    Matrix,
    /// Matrices of routed experts.
    Expert,
    /// Vectors that are added to activations or scores: biases, a router's trained bias, and sinks.
    Bias,
}

impl Role {
    /// All roles, in the order of their discriminants.
    pub(crate) const ALL: [Role; 6] = [
        Role::Vocabulary,
        Role::Norm,
        Role::Router,
        Role::Matrix,
        Role::Expert,
        Role::Bias,
    ];

    /// True if weight decay applies.
    pub(crate) fn decays(self) -> bool {
        !matches!(self, Role::Norm | Role::Bias)
    }

    /// Returns the word in a configuration.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Role::Vocabulary => "vocabulary",
            Role::Norm => "norm",
            Role::Router => "router",
            Role::Matrix => "matrix",
            Role::Expert => "expert",
            Role::Bias => "bias",
        }
    }
}
