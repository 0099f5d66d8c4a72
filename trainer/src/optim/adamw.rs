//! AdamW (arXiv 1711.05101).

use super::rule::{RowUpdate, Rule, StepScalars};
use crate::Error;
use kernels::{AdamWUpdate, adamw};
use tch::Tensor;
use torch_ext::AdamW;

/// Constants of AdamW.
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

    fn update(&self, updates: &[RowUpdate], scalars: StepScalars) -> Result<(), Error> {
        let constants = AdamW {
            lr: scalars.lr,
            beta1: self.beta1,
            beta2: self.beta2,
            weight_decay: if scalars.decays {
                self.weight_decay
            } else {
                0.0
            },
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
