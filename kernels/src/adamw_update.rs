//! The tensors and scalars of one AdamW update.

use tch::Tensor;
use torch_ext::AdamW;

/// A parameter to update.
pub struct AdamWUpdate {
    /// fp32 weights, which the update changes.
    pub master: Tensor,
    /// fp32 gradient of the weights.
    pub gradient: Tensor,
    /// Running mean of gradients (first moment), fp32.
    pub exp_avg: Tensor,
    /// Running mean of squared gradients (second moment), fp32.
    pub exp_avg_sq: Tensor,
    /// The weights that the model computes with, if these are not `master` itself: `master`
    /// rounded to their dtype.
    pub stored: Option<Tensor>,
}

/// The scalars of a step, in the form in which the update of one element uses them.
#[derive(Clone, Copy)]
pub(crate) struct Scalars {
    pub(crate) inverse_scale: f32,
    pub(crate) decay_factor: f32,
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) step_size: f32,
    pub(crate) inverse_root_correction: f32,
    pub(crate) eps: f32,
}

impl Scalars {
    pub(crate) fn of(config: AdamW, step: u64, scale: Option<f64>) -> Scalars {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Scalars {
            inverse_scale: (1.0 / scale.unwrap_or(1.0)) as f32,
            decay_factor: (1.0 - config.lr * config.weight_decay) as f32,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            step_size: (config.lr / correction(config.beta1)) as f32,
            inverse_root_correction: (1.0 / correction(config.beta2).sqrt()) as f32,
            eps: config.eps as f32,
        }
    }
}
