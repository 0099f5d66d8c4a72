//! AdamW (arXiv 1711.05101), by a fused kernel.

use super::rule::{RowRule, RowUpdate, Rule, StepScalars, Update};
use crate::Error;
use kernels::{AdamWUpdate, adamw};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;
use torch_ext::AdamW;

/// AdamW (arXiv 1711.05101). Keys that are left out have the values of `optimizer`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamwConfig {
    /// Decay rate of the first moment.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub beta1: Option<f64>,
    /// Decay rate of the second moment.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub beta2: Option<f64>,
    /// Term added to the denominator of the update.
    #[schemars(range(min = 1e-15, max = 1.0))]
    pub eps: Option<f64>,
    /// Decoupled weight decay. Norms and biases have none.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: Option<f64>,
}

impl AdamwConfig {
    /// Returns the optimizer, with the constants of `others` for unset keys.
    pub(crate) fn resolve(&self, others: &Adamw) -> Adamw {
        Adamw {
            beta1: self.beta1.unwrap_or(others.beta1),
            beta2: self.beta2.unwrap_or(others.beta2),
            eps: self.eps.unwrap_or(others.eps),
            weight_decay: self.weight_decay.unwrap_or(others.weight_decay),
        }
    }
}

/// AdamW with all constants.
#[derive(Debug, Clone)]
pub(crate) struct Adamw {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
}

impl Rule for Adamw {
    fn state(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn update(&self) -> Update<'_> {
        Update::Rows(self)
    }
}

impl RowRule for Adamw {
    fn update_rows(&self, updates: &[RowUpdate], scalars: StepScalars) -> Result<(), Error> {
        let weight_decay = if scalars.decays {
            self.weight_decay
        } else {
            0.0
        };
        let constants = AdamW {
            lr: scalars.lr,
            beta1: self.beta1,
            beta2: self.beta2,
            weight_decay,
            eps: self.eps,
        };
        let fused = |update: &RowUpdate| AdamWUpdate {
            master: update.master.shallow_clone(),
            gradient: update.gradient.shallow_clone(),
            exp_avg: update.state[0].shallow_clone(),
            exp_avg_sq: update.state[1].shallow_clone(),
            stored: update.stored.as_ref().map(Tensor::shallow_clone),
        };
        let updates: Vec<AdamWUpdate> = updates.iter().map(fused).collect();
        Ok(adamw(&updates, constants, scalars.step, scalars.scale)?)
    }
}
