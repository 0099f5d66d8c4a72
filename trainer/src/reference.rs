//! The reference training step: the shape of `MixtralForCausalLM` that peers measure, on random tokens.

use crate::Error;
use crate::config::{Dtype, ModelConfig, MoeConfig, OptimizerConfig, QkNorm};
use crate::model::{Model, ModelPart, Setting};
use crate::optimizer::Optimizer;
use crate::ranks::Ranks;
use moe::balance::{BatchTotals, Statistics};
use parallel::{Accelerator, Communicator, GradientBuckets, Local, Replication};
use std::sync::Arc;
use std::time::Instant;
use tch::{Kind, Tensor};

/// What was measured.
#[derive(Debug, Clone)]
pub struct StepTimes {
    /// Seconds of each step.
    pub seconds: Vec<f64>,
    /// Cross-entropy before each step.
    pub losses: Vec<f64>,
    /// Parameters of the model.
    pub parameters: i64,
    /// The most resident memory of the process so far, in bytes.
    pub peak_memory: u64,
    /// The most that tensors held on the device, in bytes.
    pub peak_tensors: u64,
    /// Tokens of a step.
    pub tokens: i64,
}

/// A model, its optimizer and a batch, on one device.
pub struct ReferenceStep {
    model: Model,
    gradients: GradientBuckets,
    optimizer: Optimizer,
    inputs: Tensor,
    labels: Tensor,
    step: u64,
    device: Box<dyn Accelerator>,
}

const BATCH: i64 = 8;
const SEQUENCE: i64 = 256;
const VOCAB: i64 = 8192;

impl ReferenceStep {
    /// Hidden 256, 4 layers, 8 heads over 4 key heads, 8 experts top-2 of width 512, vocabulary 8192, 8 x 256 tokens.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn new(dtype: Dtype, device: Box<dyn Accelerator>) -> Result<ReferenceStep, Error> {
        let moe = MoeConfig {
            load_balance: 0.02,
            load_balance_over: Statistics::Microbatch,
            load_balance_pool_layers: true,
            ..MoeConfig::new(8, 2, 512)
        };
        let config = ModelConfig {
            vocab_size: VOCAB as usize,
            hidden: 256,
            layers: 4,
            heads: 8,
            kv_heads: Some(4),
            head_dim: None,
            ffn: None,
            dense_layers: 0,
            moe_every: 1,
            moe: Some(moe),
            rope_theta: 1e6,
            norm_eps: 1e-5,
            qk_norm: QkNorm::None,
            tie_embeddings: false,
            init_std: 0.02,
            mup: None,
        };
        let alone: Arc<dyn Communicator> = Arc::new(Local::new(0, "bench"));
        let ranks = Ranks::alone();
        let setting = Setting::alone(SEQUENCE as usize, dtype, device.as_ref(), &ranks);
        let model = Model::new(&config, ModelPart::whole(config.layers), &setting);
        let leaves: Vec<_> = model.parameters.iter().map(|p| (p.weight.clone(), 0)).collect();
        let gradients = GradientBuckets::new(&leaves, &[Replication::alone()], 25 << 20, true, device.as_ref())?;
        let settings = OptimizerConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let optimizer = Optimizer::new(&settings, 1.0, &model.parameters, device.as_ref(), alone);
        tch::manual_seed(1);
        let inputs = device.zeros(&[BATCH, SEQUENCE], Kind::Int64).random_to_(VOCAB);
        // The next token, as a causal model is trained; the last position has none.
        let labels = inputs.roll([-1], [1]);
        let _ = labels.narrow(1, SEQUENCE - 1, 1).fill_(crate::model::IGNORED);
        Ok(ReferenceStep { model, gradients, optimizer, inputs, labels, step: 0, device })
    }

    /// Forward, backward, clipping and update; seconds and the cross-entropy.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn run(&mut self) -> Result<(f64, f64), Error> {
        let started = Instant::now();
        let tokens = (BATCH * (SEQUENCE - 1)) as f64;
        self.gradients.begin(1);
        let output = self.model.forward(&self.inputs)?;
        let totals = BatchTotals { groups: 1.0, tokens, counts_le: None };
        let losses = self.model.losses(&output, &self.labels, &totals)?;
        losses.total.f_backward()?;
        self.gradients.finish()?;
        let norm = self.optimizer.grad_norm(&self.model.parameters, &self.gradients)?;
        self.step += 1;
        self.optimizer.step(&self.model.parameters, &self.gradients, self.step, 3e-4, norm)?;
        self.device.synchronize()?;
        Ok((started.elapsed().as_secs_f64(), losses.cross_entropy))
    }

    /// `warmup` steps that are not counted, then `steps` that are.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn measure(&mut self, warmup: usize, steps: usize) -> Result<StepTimes, Error> {
        let (mut seconds, mut losses) = (Vec::new(), Vec::new());
        for index in 0..warmup + steps {
            let (time, loss) = self.run()?;
            losses.push(loss);
            if index >= warmup {
                seconds.push(time);
            }
        }
        let parameters = self.model.parameters.iter().map(|p| p.master.numel() as i64).sum();
        let peak_memory = parallel::peak_resident()?;
        let peak_tensors = self.device.memory()?.peak;
        Ok(StepTimes { seconds, losses, parameters, peak_memory, peak_tensors, tokens: BATCH * SEQUENCE })
    }
}
