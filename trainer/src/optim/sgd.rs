//! Stochastic gradient descent with momentum, as `torch.optim.SGD` computes it.

use super::rule::{RowRule, RowUpdate, Rule, StepScalars, Update};
use crate::Error;
use kernels::profile::{Cost, span};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Stochastic gradient descent with momentum (as `torch.optim.SGD`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SgdConfig {
    /// Factor of the momentum: each step adds the gradient to it. 0 keeps no momentum.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
    /// Uses gradient + momentum x buffer as the update (Nesterov).
    pub nesterov: bool,
    /// Coefficient of the L2 penalty, which is added to the gradient. Norms and biases have none.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> SgdConfig {
        SgdConfig {
            momentum: 0.9,
            nesterov: false,
            weight_decay: 0.0,
        }
    }
}

impl Rule for SgdConfig {
    fn state(&self) -> &'static [&'static str] {
        if self.momentum > 0.0 {
            &["sgd_momentum"]
        } else {
            &[]
        }
    }

    fn problem(&self) -> Option<&'static str> {
        (self.nesterov && self.momentum == 0.0)
            .then_some("sgd.nesterov needs a momentum: set sgd.momentum, or leave nesterov out")
    }

    fn update(&self) -> Update<'_> {
        Update::Rows(self)
    }
}

impl RowRule for SgdConfig {
    fn update_rows(&self, updates: &[RowUpdate], scalars: StepScalars) -> Result<(), Error> {
        for update in updates {
            let cost = || Cost::passes(6.0, &update.master);
            span("optimizer", "SGD", cost, || {
                tch::no_grad(|| self.update_one(update, scalars))
            })?;
        }
        Ok(())
    }
}

impl SgdConfig {
    fn update_one(&self, update: &RowUpdate, scalars: StepScalars) -> Result<(), Error> {
        let mut master = update.master.shallow_clone();
        let mut slope = update.gradient.f_mul_scalar(scalars.gradient_factor())?;
        if scalars.decays && self.weight_decay > 0.0 {
            slope = slope.f_add(&master.f_mul_scalar(self.weight_decay)?)?;
        }
        if let Some(momentum) = update.state.first() {
            let mut momentum = momentum.shallow_clone();
            let _ = momentum.f_mul_scalar_(self.momentum)?;
            let _ = momentum.f_add_(&slope)?;
            slope = if self.nesterov {
                slope.f_add(&momentum.f_mul_scalar(self.momentum)?)?
            } else {
                momentum
            };
        }
        let _ = master.f_sub_(&slope.f_mul_scalar(scalars.lr)?)?;
        if let Some(stored) = &update.stored {
            stored.shallow_clone().f_copy_(&master)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::golden_file::{GoldenFile, SHAPES, largest_difference};

    #[test]
    fn steps_equal_those_of_torch() {
        let golden = GoldenFile::open();
        for (name, momentum, nesterov, weight_decay) in [
            ("momentum", 0.9, false, 0.0),
            ("nesterov", 0.9, true, 0.1),
            ("none", 0.0, false, 0.1),
        ] {
            let rule = SgdConfig {
                momentum,
                nesterov,
                weight_decay,
            };
            for shape in SHAPES {
                let ours = golden.steps(shape, rule.state().len(), |update, scalars| {
                    let updates = std::slice::from_ref(update);
                    rule.update_rows(updates, scalars).unwrap();
                });
                let theirs = golden.tensor(shape, &format!("sgd/{name}"));
                let begun = golden.tensor(shape, "weight");
                let difference = largest_difference(&ours, theirs, begun);
                assert!(difference < 1e-6, "{name} {shape:?}: {difference}");
            }
        }
    }
}
