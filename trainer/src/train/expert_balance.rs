//! Balance of the load of experts between steps: biases, placement, and the price of lending.

use super::{Trainer, expert_placement::ExpertPlacement, metrics::step_figures::StepFigures};
use crate::{Error, config::MinTokens};
use moe::{balance::update_bias, lending::least_loaded::Planner};
use parking_lot::Mutex;
use std::sync::Arc;
use tch::Tensor;

/// Means of balancing experts that a run may have.
pub(super) struct ExpertBalance {
    pub(super) planner: Option<Arc<Mutex<Planner>>>,
    pub(super) placement: Option<ExpertPlacement>,
}

impl Trainer {
    /// Returns the number of routed tokens from which least-loaded dispatch lends an expert.
    pub fn min_tokens(&self) -> Option<i64> {
        let planner = self.experts.planner.as_ref()?;
        Some(planner.lock().min_tokens)
    }

    /// True if `min_tokens` is measured and not configured.
    pub(super) fn min_tokens_is_measured(&self) -> bool {
        let moe = self.config.model.moe.as_ref();
        moe.is_some_and(|moe| matches!(moe.least_loaded.min_tokens, MinTokens::Measured(_)))
    }

    /// Updates the loss-free balancing biases from the routed tokens of the step.
    pub(super) fn update_biases(&self, figures: &StepFigures) {
        let Some(moe) = &self.config.model.moe else {
            return;
        };
        for (moe_layer, _, mut bias) in self.model.biases() {
            let tokens = &figures.moe_layers[moe_layer].tokens_per_expert;
            let tokens = self.rank.device.upload(&Tensor::from_slice(tokens));
            update_bias(&mut bias, &tokens, moe.bias_update_rate);
        }
    }

    /// Moves experts if that is due and returns their number, with `model.moe.placement`.
    pub(super) fn move_experts(&mut self, figures: &StepFigures) -> Result<Option<u64>, Error> {
        let Some(placement) = &mut self.experts.placement else {
            return Ok(None);
        };
        let layers = figures.moe_layers.iter();
        let tokens: Vec<&[f64]> = layers.map(|layer| &layer.tokens_per_expert[..]).collect();
        let step = self.data.position.step + 1;
        let moved = placement.step(step, &tokens, &self.model, &self.optimizer)?;
        Ok(Some(moved))
    }

    /// Describes lending and placement for the summary of the run.
    pub(super) fn lending_summary(&self) -> String {
        if let Some(min_tokens) = self.min_tokens() {
            let origin = if self.min_tokens_is_measured() {
                "measured"
            } else {
                "configured"
            };
            return format!("; experts are lent from {min_tokens} tokens on ({origin})");
        }
        match &self.config.model.moe {
            Some(moe) if moe.dispatch.least_loaded() || moe.placement.is_some() => {
                "; each rank has all experts (parallel.expert is 1), so none is lent or moved"
                    .to_string()
            }
            _ => String::new(),
        }
    }
}
