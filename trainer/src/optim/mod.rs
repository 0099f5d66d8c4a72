//! AdamW over fp32 master weights, with the global gradient norm and clipping.

mod offload;
pub(crate) mod schedule;

use crate::Error;
use crate::config::OptimizerConfig;
use crate::model::parameters::Parameters;
use crate::optim::offload::Offload;
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
    /// Parameters that share weight decay and learning-rate factor.
    groups: Vec<ParameterGroup>,
    /// Where masters are in the host's memory.
    offload: Option<Offload>,
    /// All ranks: the squares of what each counts add up in the norm.
    world: Arc<dyn Communicator>,
}

struct ParameterGroup {
    decay: bool,
    lr_scale: f64,
    members: Vec<usize>,
}

impl Optimizer {
    /// State for `parameters`, all zero, where their masters are.
    ///
    /// # Errors
    /// When there is no memory by way of which gradients could come to the host.
    pub fn new(
        config: &OptimizerConfig,
        grad_clip: f64,
        parameters: &Parameters,
        device: &dyn Accelerator,
        world: Arc<dyn Communicator>,
    ) -> Result<Optimizer, Error> {
        let zeros = || {
            parameters
                .iter()
                .map(|parameter| parameter.master.zeros_like())
                .collect::<Vec<_>>()
        };
        let mut groups: Vec<ParameterGroup> = Vec::new();
        for (index, parameter) in parameters.iter().enumerate() {
            let decay = parameter.decay;
            let lr_scale = parameter.lr_scale;
            match groups
                .iter_mut()
                .find(|group| group.decay == decay && group.lr_scale == lr_scale)
            {
                Some(group) => group.members.push(index),
                None => groups.push(ParameterGroup {
                    decay,
                    lr_scale,
                    members: vec![index],
                }),
            }
        }
        let largest = parameters
            .iter()
            .map(|parameter| parameter.master.numel() as i64)
            .max()
            .unwrap_or(0);
        let offload = || Offload::new(device, largest, parameters.kind());
        let offload = parameters.are_offloaded().then(offload).transpose()?;
        let config = config.clone();
        Ok(Optimizer {
            config,
            grad_clip,
            exp_avgs: zeros(),
            exp_avg_sqs: zeros(),
            groups,
            offload,
            world,
        })
    }

    /// First and second moments of parameter `index`.
    pub fn moments(&self, index: usize) -> (&Tensor, &Tensor) {
        (&self.exp_avgs[index], &self.exp_avg_sqs[index])
    }

    /// The norm of all gradients of the model, each counted once whatever the layout.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// When a collective fails.
    pub fn grad_norm(
        &self,
        parameters: &Parameters,
        gradients: &GradientBuckets,
    ) -> Result<f64, Error> {
        let counted = parameters
            .iter()
            .enumerate()
            .filter(|(_, parameter)| parameter.counted);
        let squares: Vec<Tensor> = counted
            .map(|(index, _)| sum_of_squares(&gradients.gradient(index)))
            .collect();
        let squares = if squares.is_empty() {
            Vec::new()
        } else {
            Vec::<f64>::try_from(Tensor::stack(&squares, 0))?
        };
        let total = Tensor::from_slice(&[squares.iter().sum::<f64>()]);
        self.world.all_reduce(&total, ReduceOp::Sum)?.wait()?;
        Ok(total.double_value(&[0]).sqrt())
    }

    /// Step number `step` (1 is the first) with learning rate `lr`, gradients clipped by their norm, of what `device` computes with.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn step(
        &mut self,
        parameters: &Parameters,
        gradients: &GradientBuckets,
        step: u64,
        lr: f64,
        grad_norm: f64,
        device: &dyn Accelerator,
    ) -> Result<(), Error> {
        // Clipping as torch.nn.utils.clip_grad_norm_ does it; the kernel divides by the scale in its own pass.
        let clipped = self.grad_clip > 0.0 && grad_norm > self.grad_clip;
        let scale = clipped.then(|| (grad_norm + 1e-6) / self.grad_clip);
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
            let config = AdamW {
                lr: lr * group.lr_scale,
                beta1: self.config.beta1,
                beta2: self.config.beta2,
                weight_decay: if group.decay {
                    self.config.weight_decay
                } else {
                    0.0
                },
                eps: self.config.eps,
            };
            match &self.offload {
                Some(offload) => offload.update(device, &updates, config, step, scale)?,
                None => adamw(&updates, config, step, scale)?,
            }
        }
        Ok(())
    }
}
