//! The optimizer of each parameter.

use super::{adamw::Adamw, rule::Rule};
use crate::{config::OptimizerConfig, model::role::Role};

/// The optimizers of a run, by the roles of parameters.
pub(crate) struct Groups {
    adamw: Adamw,
}

impl Groups {
    pub(crate) fn new(config: &OptimizerConfig) -> Groups {
        Groups {
            adamw: Adamw {
                beta1: config.beta1,
                beta2: config.beta2,
                eps: config.eps,
                weight_decay: config.weight_decay,
            },
        }
    }

    /// Returns the optimizer of parameters with this role.
    pub(crate) fn rule(&self, _role: Role) -> &dyn Rule {
        &self.adamw
    }
}
