//! Muon (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks"): momentum whose
//! matrices are orthogonalized, with the scale of Moonlight (arXiv 2502.16982).

use super::rule::{MatrixRule, RowUpdate, Rule, StepScalars, Update};
use crate::{Error, config::dtype::Dtype, model::role::Role};
use kernels::{
    orthogonalization_flops, orthogonalize,
    profile::{Cost, span},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Muon: momentum, of which each matrix is orthogonalized by five Newton-Schulz iterations. Each
/// expert is a matrix of its own, and so are q, k, v, gate and up. In latent attention `kv_up`,
/// with keys and values of all heads, is one matrix, and `kv_down`, with the shared rotary key, is
/// another, as in Moonlight (arXiv 2502.16982).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MuonConfig {
    /// Decay rate of the momentum, a running mean of gradients.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
    /// Orthogonalizes momentum x buffer + (1 - momentum) x gradient (Nesterov), instead of the
    /// buffer.
    pub nesterov: bool,
    /// Decoupled weight decay. By default `optimizer.weight_decay`.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: Option<f64>,
    /// Scale of the update by the shape of the matrix.
    pub adjust_lr: AdjustLr,
    /// Precision of the iterations, and of the matrices that ranks exchange for them. By default
    /// `train.dtype`.
    pub dtype: Option<Dtype>,
}

/// Scale of Muon's update by the shape of the matrix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdjustLr {
    /// `0.2 sqrt(max(rows, columns))`: elements change as much as with AdamW, so that both have the
    /// same learning rate and weight decay (Moonlight, arXiv 2502.16982).
    #[default]
    MatchRmsAdamw,
    /// `sqrt(max(1, rows / columns))`. Learning rates are then larger, such as 0.02. One rate suits
    /// all widths, so `model.mup.width` is refused with it.
    Original,
}

impl AdjustLr {
    fn factor(self, rows: i64, columns: i64) -> f64 {
        match self {
            AdjustLr::MatchRmsAdamw => 0.2 * (rows.max(columns) as f64).sqrt(),
            AdjustLr::Original => (rows as f64 / columns as f64).max(1.0).sqrt(),
        }
    }
}

impl Default for MuonConfig {
    fn default() -> MuonConfig {
        MuonConfig {
            momentum: 0.95,
            nesterov: true,
            weight_decay: None,
            adjust_lr: AdjustLr::default(),
            dtype: None,
        }
    }
}

impl MuonConfig {
    /// Returns the optimizer, with these values for unset keys.
    pub(crate) fn resolve(&self, weight_decay: f64, kind: Kind) -> Muon {
        Muon {
            momentum: self.momentum,
            nesterov: self.nesterov,
            weight_decay: self.weight_decay.unwrap_or(weight_decay),
            adjust_lr: self.adjust_lr,
            kind: self.dtype.map_or(kind, Dtype::kind),
        }
    }
}

/// Muon with all constants.
#[derive(Debug, Clone)]
pub(crate) struct Muon {
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    adjust_lr: AdjustLr,
    /// Dtype of the iterations.
    kind: Kind,
}

impl Rule for Muon {
    fn state(&self) -> &'static [&'static str] {
        &["muon_momentum"]
    }

    fn default_roles(&self) -> Option<&'static [Role]> {
        Some(&[Role::Matrix, Role::Expert])
    }

    fn problem_with(&self, role: Role) -> Option<&'static str> {
        match role {
            Role::Matrix | Role::Expert | Role::Router => None,
            Role::Norm | Role::Bias => Some("muon updates matrices, and these are vectors"),
            Role::Vocabulary => Some(
                "muon updates matrices that map activations to activations; embedding and output \
                 layer learn better with adamw",
            ),
        }
    }

    fn update(&self) -> Update<'_> {
        Update::Matrices(self)
    }
}

impl MatrixRule for Muon {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn flops(&self, rows: i64, columns: i64) -> f64 {
        orthogonalization_flops(rows, columns)
    }

    fn prepare(&self, update: &RowUpdate, scalars: StepScalars) -> Result<(), Error> {
        let cost = || Cost::passes(6.0, &update.gradient);
        span("optimizer", "Muon's momentum", cost, || {
            tch::no_grad(|| self.add_to_momentum(update, scalars))
        })
    }

    fn transform(&self, matrix: &Tensor) -> Tensor {
        orthogonalize(matrix)
    }

    fn apply(
        &self,
        update: &RowUpdate,
        shape: [i64; 2],
        scalars: StepScalars,
    ) -> Result<(), Error> {
        let [rows, columns] = shape;
        let lr = scalars.lr * self.adjust_lr.factor(rows, columns);
        let decayed = if scalars.decays {
            1.0 - scalars.lr * self.weight_decay
        } else {
            1.0
        };
        let cost = || Cost::passes(5.0, &update.master);
        span("optimizer", "Muon's update", cost, || {
            tch::no_grad(|| {
                let mut master = update.master.shallow_clone();
                let _ = master.f_mul_scalar_(decayed)?;
                let _ = master.f_sub_(&update.gradient.f_mul_scalar(lr)?)?;
                if let Some(stored) = &update.stored {
                    stored.shallow_clone().f_copy_(&master)?;
                }
                Ok(())
            })
        })
    }
}

impl Muon {
    /// Adds the gradient to the momentum, and replaces it by what is orthogonalized.
    fn add_to_momentum(&self, update: &RowUpdate, scalars: StepScalars) -> Result<(), Error> {
        let mut gradient = update.gradient.shallow_clone();
        let mut momentum = update.state[0].shallow_clone();
        let _ = gradient.f_mul_scalar_(scalars.gradient_factor())?;
        let _ = momentum.f_lerp_(&gradient, 1.0 - self.momentum)?;
        if self.nesterov {
            let _ = gradient.f_lerp_(&momentum, self.momentum)?;
        } else {
            gradient.f_copy_(&momentum)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::golden_file::{GoldenFile, SHAPES, WEIGHT_DECAY, largest_difference};

    /// Returns the largest difference between the results of torch's iterations, which are in bf16,
    /// and of those in fp32.
    fn rounding_of_torch(golden: &GoldenFile, shape: [i64; 2], name: &str) -> f64 {
        let result = |reference| golden.tensor(shape, &format!("muon/{name}/{reference}"));
        let begun = golden.tensor(shape, "weight");
        largest_difference(result("torch"), result("fp32"), begun)
    }

    /// Compares steps in `kind` with the golden file's `reference`.
    fn check(kind: Kind, reference: &str, tolerance: impl Fn(&GoldenFile, [i64; 2], &str) -> f64) {
        let golden = GoldenFile::open();
        for (name, nesterov, adjust_lr) in [
            ("original", true, AdjustLr::Original),
            ("match_rms_adamw", true, AdjustLr::MatchRmsAdamw),
            ("plain", false, AdjustLr::Original),
        ] {
            let config = MuonConfig {
                nesterov,
                adjust_lr,
                ..MuonConfig::default()
            };
            let rule = config.resolve(WEIGHT_DECAY, kind);
            for shape in SHAPES {
                let ours = golden.steps(shape, rule.state().len(), |update, scalars| {
                    rule.prepare(update, scalars).unwrap();
                    let transformed = rule.transform(&update.gradient.to_kind(kind));
                    update.gradient.shallow_clone().copy_(&transformed);
                    rule.apply(update, shape, scalars).unwrap();
                });
                let theirs = golden.tensor(shape, &format!("muon/{name}/{reference}"));
                let begun = golden.tensor(shape, "weight");
                let difference = largest_difference(&ours, theirs, begun);
                let limit = tolerance(&golden, shape, name);
                assert!(
                    difference < limit,
                    "{name} {shape:?}: {difference}, {limit}"
                );
            }
        }
    }

    #[test]
    fn steps_in_fp32_equal_the_algorithm_in_fp32() {
        check(Kind::Float, "fp32", |_, _, _| 1e-5);
    }

    #[test]
    fn steps_in_bf16_equal_those_of_torch_within_rounding() {
        // Both sides round, each at its own places.
        check(Kind::BFloat16, "torch", |golden, shape, name| {
            2.0 * rounding_of_torch(golden, shape, name)
        });
    }
}
