//! AdamW over fp32 master weights, with the global gradient norm and clipping.

use crate::Error;
use crate::config::OptimizerConfig;
use crate::parameters::{Parameter, Parameters};
use kernels::profile::{Cost, part};
use parallel::{Accelerator, Communicator, GradientBuckets, ReduceOp};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::{AdamW, fused_adamw};

/// The optimizer's state on this rank.
pub struct Optimizer {
    config: OptimizerConfig,
    grad_clip: f64,
    exp_avgs: Vec<Tensor>,
    exp_avg_sqs: Vec<Tensor>,
    /// Parameters that share weight decay and learning-rate factor.
    groups: Vec<Group>,
    /// All ranks: the squares of what each counts add up in the norm.
    world: Arc<dyn Communicator>,
}

struct Group {
    decay: bool,
    lr_scale: f64,
    members: Vec<usize>,
}

impl Optimizer {
    /// State for `parameters`, all zero.
    pub fn new(
        config: &OptimizerConfig,
        grad_clip: f64,
        parameters: &Parameters,
        device: &dyn Accelerator,
        world: Arc<dyn Communicator>,
    ) -> Optimizer {
        let zeros = || parameters.iter().map(|p| device.zeros(&p.master.size(), Kind::Float)).collect::<Vec<_>>();
        let mut groups: Vec<Group> = Vec::new();
        for (index, parameter) in parameters.iter().enumerate() {
            let (decay, lr_scale) = (parameter.decay, parameter.lr_scale);
            match groups.iter_mut().find(|group| group.decay == decay && group.lr_scale == lr_scale) {
                Some(group) => group.members.push(index),
                None => groups.push(Group { decay, lr_scale, members: vec![index] }),
            }
        }
        let config = config.clone();
        Optimizer { config, grad_clip, exp_avgs: zeros(), exp_avg_sqs: zeros(), groups, world }
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
    pub fn grad_norm(&self, parameters: &Parameters, gradients: &GradientBuckets) -> Result<f64, Error> {
        let counted = parameters.iter().enumerate().filter(|(_, parameter)| parameter.counted);
        let norms: Vec<Tensor> = counted.map(|(index, _)| gradients.gradient(index).norm()).collect();
        let norms = match norms.is_empty() {
            true => Vec::new(),
            false => Vec::<f64>::try_from(Tensor::stack(&norms, 0).to_kind(Kind::Double))?,
        };
        let total = Tensor::from_slice(&[norms.iter().map(|norm| norm * norm).sum::<f64>()]);
        self.world.all_reduce(&total, ReduceOp::Sum)?.wait()?;
        Ok(total.double_value(&[0]).sqrt())
    }

    /// Step number `step` (1 is the first) with learning rate `lr`, gradients clipped by their norm.
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
    ) -> Result<(), Error> {
        let list: Vec<_> = parameters.iter().collect();
        let device = list.first().map(|p| p.master.device());
        let Some(device) = device else { return Ok(()) };
        // Clipping as torch.nn.utils.clip_grad_norm_ does it; the kernel divides by the scale in its own pass.
        let clipped = self.grad_clip > 0.0 && grad_norm > self.grad_clip;
        let scale =
            clipped.then(|| Tensor::from((grad_norm + 1e-6) / self.grad_clip).to_kind(Kind::Float).to_device(device));
        let count = Tensor::from(step as f64).to_kind(Kind::Float).to_device(device);
        part("optimizer", "AdamW", Cost::default, || self.update(&list, gradients, lr, scale.as_ref(), &count))?;
        part("optimizer", "weights", Cost::default, || parameters.iter().for_each(Parameter::store));
        Ok(())
    }

    fn update(
        &mut self,
        list: &[&Parameter],
        gradients: &GradientBuckets,
        lr: f64,
        scale: Option<&Tensor>,
        count: &Tensor,
    ) -> Result<(), Error> {
        for group in &self.groups {
            let pick = |tensor: &dyn Fn(usize) -> Tensor| group.members.iter().map(|&i| tensor(i)).collect::<Vec<_>>();
            fused_adamw(
                &pick(&|i| list[i].master.shallow_clone()),
                &pick(&|i| gradients.gradient(i)),
                &pick(&|i| self.exp_avgs[i].shallow_clone()),
                &pick(&|i| self.exp_avg_sqs[i].shallow_clone()),
                &pick(&|_| count.shallow_clone()),
                AdamW {
                    lr: lr * group.lr_scale,
                    beta1: self.config.beta1,
                    beta2: self.config.beta2,
                    weight_decay: if group.decay { self.config.weight_decay } else { 0.0 },
                    eps: self.config.eps,
                },
                scale,
            )?;
        }
        Ok(())
    }
}
