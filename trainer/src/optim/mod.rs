//! AdamW over fp32 master weights, with the global gradient norm and clipping.

mod offload;
pub(crate) mod rate_jump;
pub(crate) mod schedule;

use crate::{
    Error,
    config::OptimizerConfig,
    model::parameters::{Parameter, Parameters},
    optim::offload::Offload,
    scalars::fetch_scalars,
};
use kernels::{AdamWUpdate, adamw, sum_of_squares};
use parallel::{Accelerator, Communicator, GradientBuckets, ReduceOp};
use std::sync::Arc;
use tch::Tensor;
use torch_ext::AdamW;

/// The optimizer's state on this rank.
pub struct Optimizer {
    config: OptimizerConfig,
    grad_clip: f64,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    groups: Vec<ParameterGroup>,
    /// Set if masters are in host memory.
    offload: Option<Offload>,
    /// All ranks, which sum their parts of the squared gradient norm.
    world: Arc<dyn Communicator>,
}

/// Parameters with the same weight decay and learning-rate factor.
struct ParameterGroup {
    decay: bool,
    lr_scale: f64,
    members: Vec<usize>,
}

impl ParameterGroup {
    fn fits(&self, parameter: &Parameter) -> bool {
        self.decay == parameter.decay && self.lr_scale == parameter.lr_scale
    }
}

/// Groups parameters in the order in which each group's first parameter appears.
fn parameter_groups(parameters: &Parameters) -> Vec<ParameterGroup> {
    let mut groups: Vec<ParameterGroup> = Vec::new();
    for (index, parameter) in parameters.iter().enumerate() {
        match groups.iter_mut().find(|group| group.fits(parameter)) {
            Some(group) => group.members.push(index),
            None => groups.push(ParameterGroup {
                decay: parameter.decay,
                lr_scale: parameter.lr_scale,
                members: vec![index],
            }),
        }
    }
    groups
}

/// Returns the squared norm of each gradient that this rank counts, `[]` fp64 on its device.
pub(crate) fn squared_norms(parameters: &Parameters, gradients: &GradientBuckets) -> Vec<Tensor> {
    let all = parameters.iter().enumerate();
    let counted = all.filter(|(_, parameter)| parameter.counted);
    counted
        .map(|(index, _)| sum_of_squares(&gradients.gradient(index)))
        .collect()
}

impl Optimizer {
    /// Creates zero moments for `parameters`, in the memory of their masters.
    ///
    /// # Errors
    /// If there is no memory to stage gradients on the host.
    pub fn new(
        config: &OptimizerConfig,
        grad_clip: f64,
        parameters: &Parameters,
        device: &dyn Accelerator,
        world: Arc<dyn Communicator>,
    ) -> Result<Optimizer, Error> {
        let masters = || parameters.iter().map(|parameter| &parameter.master);
        let largest = masters().map(Tensor::numel).max().unwrap_or(0);
        let offload = if parameters.are_offloaded() {
            Some(Offload::new(device, largest as i64, parameters.kind())?)
        } else {
            None
        };
        Ok(Optimizer {
            config: config.clone(),
            grad_clip,
            exp_avgs: masters().map(Tensor::zeros_like).collect(),
            exp_avg_sqs: masters().map(Tensor::zeros_like).collect(),
            groups: parameter_groups(parameters),
            offload,
            world,
        })
    }

    /// Returns the first and the second moment of parameter `index`.
    pub fn moments(&self, index: usize) -> (&Tensor, &Tensor) {
        (&self.exp_avgs[index], &self.exp_avg_sqs[index])
    }

    /// Returns the norm of all gradients of the model. Each counts once, whatever the layout.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a collective fails.
    pub fn grad_norm(
        &self,
        parameters: &Parameters,
        gradients: &GradientBuckets,
    ) -> Result<f64, Error> {
        let [squares] = fetch_scalars([&squared_norms(parameters, gradients)])?;
        self.norm_of(&squares)
    }

    /// Returns the norm of all gradients of the model from the fetched [`squared_norms`] of each
    /// rank.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a collective fails.
    pub(crate) fn norm_of(&self, squares: &[f64]) -> Result<f64, Error> {
        let total = Tensor::from_slice(&[squares.iter().sum::<f64>()]);
        self.world.all_reduce(&total, ReduceOp::Sum)?.wait()?;
        Ok(total.double_value(&[0]).sqrt())
    }

    /// Updates the parameters in step `step` (1 is the first) with learning rate `lr`, and clips
    /// the gradients by their norm.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn step(
        &mut self,
        parameters: &Parameters,
        gradients: &GradientBuckets,
        step: u64,
        lr: f64,
        grad_norm: f64,
        device: &dyn Accelerator,
    ) -> Result<(), Error> {
        // As torch.nn.utils.clip_grad_norm_; the kernel divides by the scale in its own pass.
        let is_clipped = self.grad_clip > 0.0 && grad_norm > self.grad_clip;
        let scale = is_clipped.then(|| (grad_norm + 1e-6) / self.grad_clip);
        for group in &self.groups {
            let update = |&index: &usize| {
                let parameter = parameters.get(index);
                AdamWUpdate {
                    master: parameter.master.shallow_clone(),
                    gradient: gradients.gradient(index),
                    exp_avg: self.exp_avgs[index].shallow_clone(),
                    exp_avg_sq: self.exp_avg_sqs[index].shallow_clone(),
                    stored: parameter.model_dtype_copy(),
                }
            };
            let updates: Vec<AdamWUpdate> = group.members.iter().map(update).collect();
            let config = self.adamw_config(group, lr);
            match &self.offload {
                Some(offload) => offload.update(device, &updates, config, step, scale)?,
                None => adamw(&updates, config, step, scale)?,
            }
        }
        Ok(())
    }

    fn adamw_config(&self, group: &ParameterGroup, lr: f64) -> AdamW {
        let weight_decay = if group.decay {
            self.config.weight_decay
        } else {
            0.0
        };
        AdamW {
            lr: lr * group.lr_scale,
            beta1: self.config.beta1,
            beta2: self.config.beta2,
            weight_decay,
            eps: self.config.eps,
        }
    }
}
