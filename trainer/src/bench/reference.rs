//! Reference training steps for `moerun bench step`: shapes of `MixtralForCausalLM` that peers
//! measure, on random tokens.

use crate::{
    Error,
    config::{Dtype, ModelConfig, MoeConfig, OptimizerConfig, RouterConfig},
    model::{
        BuildContext, IGNORED, Model, ModelPart,
        decoder::{layer_specs, vocabulary_spec},
        spec::{ParamSpec, Role},
    },
    optim::{Optimizer, StageRanks},
    process_groups::ProcessGroups,
};
use kernels::profile::{Cost, span};
use moe::balance::{BalanceScope, BatchTotals};
use parallel::{Accelerator, GradientBuckets, Local, Replication};
use std::{path::Path, sync::Arc, time::Instant};
use tch::{Kind, Tensor};

/// Times, losses and memory that [`ReferenceStep::measure`] returns.
#[derive(Debug, Clone)]
pub struct StepTimes {
    /// Seconds of each step.
    pub seconds: Vec<f64>,
    /// Total loss before each step: cross-entropy and weighted load-balancing loss.
    pub losses: Vec<f64>,
    /// Number of parameters of the model.
    pub parameters: i64,
    /// Peak resident memory of the process so far, in bytes.
    pub peak_memory: u64,
    /// Peak bytes of tensors on the device.
    pub peak_tensors: u64,
    /// Tokens of a step.
    pub tokens: i64,
}

/// A model, its optimizer and a batch, on one device. Serves benchmarks only.
pub struct ReferenceStep {
    model: Model,
    gradients: GradientBuckets,
    optimizer: Optimizer,
    inputs: Tensor,
    labels: Tensor,
    step: u64,
    device: Box<dyn Accelerator>,
    shape: ReferenceShape,
}

/// Size of a reference step.
#[derive(Debug, Clone, Copy)]
pub struct ReferenceShape {
    hidden: usize,
    layers: usize,
    heads: usize,
    experts: usize,
    top_k: usize,
    ffn: usize,
    batch: i64,
    sequence: i64,
    kv_heads: usize,
    vocab: usize,
}

/// GEMMs of equal shape in a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct GemmShape {
    /// Rows of the left operand and of the result.
    pub rows: i64,
    /// Columns of the left operand.
    pub inner: i64,
    /// Columns of the result.
    pub outer: i64,
    /// Number of such GEMMs.
    pub times: usize,
}

impl ReferenceShape {
    /// Hidden 256, 4 layers, 8 heads over 4 key heads, 8 experts top-2 of width 512, vocabulary
    /// 8192, 8 x 256 tokens.
    pub const REFERENCE: ReferenceShape = ReferenceShape {
        hidden: 256,
        layers: 4,
        heads: 8,
        experts: 8,
        top_k: 2,
        ffn: 512,
        batch: 8,
        sequence: 256,
        kv_heads: 4,
        vocab: 8192,
    };
    /// [`ReferenceShape::REFERENCE`] with one sequence of 2048 tokens, and 16 experts top-4.
    pub const LONG: ReferenceShape = ReferenceShape {
        experts: 16,
        top_k: 4,
        batch: 1,
        sequence: 2048,
        ..ReferenceShape::REFERENCE
    };
    /// [`ReferenceShape::REFERENCE`] with hidden 768, 2 layers, 12 heads and experts of width 1536.
    pub const WIDE: ReferenceShape = ReferenceShape {
        hidden: 768,
        layers: 2,
        heads: 12,
        ffn: 1536,
        ..ReferenceShape::REFERENCE
    };
    /// The widths of OLMoE-1B-7B (arXiv 2409.02060): hidden 2048, 64 experts top-8 of width 1024,
    /// vocabulary 50304, 2 x 4096 tokens. It has 4 of the 16 layers, 1.8 billion parameters, so
    /// that a GPU of 80 GB holds them with masters and moments.
    pub const OLMOE: ReferenceShape = ReferenceShape {
        hidden: 2048,
        layers: 4,
        heads: 16,
        experts: 64,
        top_k: 8,
        ffn: 1024,
        batch: 2,
        sequence: 4096,
        kv_heads: 16,
        vocab: 50304,
    };
    /// The widths of Mixtral-8x7B (arXiv 2401.04088): hidden 4096, 8 experts top-2 of width 14336,
    /// vocabulary 32000, 2 x 4096 tokens. It has 1 of the 32 layers, 1.7 billion parameters.
    pub const COARSE: ReferenceShape = ReferenceShape {
        hidden: 4096,
        layers: 1,
        heads: 32,
        experts: 8,
        top_k: 2,
        ffn: 14336,
        batch: 2,
        sequence: 4096,
        kv_heads: 8,
        vocab: 32000,
    };

    /// Returns the tokens of a step.
    pub fn tokens(&self) -> i64 {
        self.batch * self.sequence
    }

    /// Returns the GEMMs of a forward pass with weights, for an even expert load. Backward runs
    /// each twice more: for the input and for the weight.
    pub fn gemms(&self) -> Vec<GemmShape> {
        let config = self.model_config(false);
        let tokens = self.tokens();
        let routed = tokens * self.top_k as i64 / self.experts as i64;
        let gemm = |spec: &ParamSpec, layers: usize| {
            let shape = spec.shape();
            GemmShape {
                rows: match spec.role {
                    Role::Expert => routed,
                    _ => tokens,
                },
                inner: shape[1],
                outer: shape[0],
                times: layers * spec.matrices() as usize,
            }
        };
        // All layers are alike. Routers compute in fp32.
        let mut layer = layer_specs(&config, 0);
        layer.retain(|spec| matches!(spec.role, Role::Matrix | Role::Expert));
        let mut gemms: Vec<GemmShape> = layer.iter().map(|spec| gemm(spec, self.layers)).collect();
        gemms.push(gemm(&vocabulary_spec(&config, "head"), 1));
        gemms
    }

    /// Returns the FLOPs of a step by the usual formula (arXiv 2204.02311, appendix B).
    pub fn model_flops(&self) -> f64 {
        let per_token = self
            .model_config(false)
            .flops_per_token(self.sequence as usize);
        per_token * self.tokens() as f64
    }

    /// Returns the FLOPs of GEMMs with weights: forward, and backward twice as many.
    pub fn gemm_flops(&self) -> f64 {
        let flops = |gemm: GemmShape| {
            let GemmShape {
                rows,
                inner,
                outer,
                times,
            } = gemm;
            6.0 * (rows * inner * outer) as f64 * times as f64
        };
        self.gemms().into_iter().map(flops).sum()
    }

    fn model_config(&self, force_balance: bool) -> ModelConfig {
        let moe = MoeConfig {
            // transformers counts a token once per chosen expert. Forced balance needs no loss.
            load_balance: if force_balance {
                0.0
            } else {
                0.02 * self.top_k as f64
            },
            load_balance_over: BalanceScope::Microbatch,
            load_balance_pool_layers: true,
            router: RouterConfig {
                force_balance,
                ..RouterConfig::default()
            },
            ..MoeConfig::new(self.experts, self.top_k, self.ffn)
        };
        ModelConfig {
            kv_heads: Some(self.kv_heads),
            moe: Some(moe),
            rope_theta: 1e6,
            ..ModelConfig::new(self.vocab, self.hidden, self.layers, self.heads)
        }
    }
}

impl ReferenceStep {
    /// Creates the model with the initial weights of seed 0, and a random batch. With
    /// `force_balance`, the router assigns experts round-robin.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn new(
        shape: ReferenceShape,
        dtype: Dtype,
        force_balance: bool,
        device: Box<dyn Accelerator>,
    ) -> Result<ReferenceStep, Error> {
        let config = shape.model_config(force_balance);
        let groups = ProcessGroups::single_rank();
        let sequence_length = shape.sequence as usize;
        let ctx = BuildContext::single_rank(sequence_length, dtype, device.as_ref(), &groups);
        let model = Model::new(&config, ModelPart::whole(config.layers), &ctx);
        let parameters = model.parameters.iter();
        let weights: Vec<_> = parameters.map(|p| (p.weight.clone(), 0)).collect();
        let single = [Replication::alone()];
        let gradients = GradientBuckets::new(&weights, &single, 25 << 20, true, device.as_ref())?;
        let world = Arc::new(Local::new(0, "bench"));
        let optimizer = Optimizer::new(
            &OptimizerConfig::default(),
            1.0,
            &model.parameters,
            device.as_ref(),
            world,
            StageRanks::alone(),
        )?;
        tch::manual_seed(1);
        let inputs = device
            .zeros(&[shape.batch, shape.sequence], Kind::Int64)
            .random_to_(shape.vocab as i64);
        // The label is the next token; the last position has none.
        let labels = inputs.roll([-1], [1]);
        let _ = labels.narrow(1, shape.sequence - 1, 1).fill_(IGNORED);
        Ok(ReferenceStep {
            model,
            gradients,
            optimizer,
            inputs,
            labels,
            step: 0,
            device,
            shape,
        })
    }

    /// Writes the weights in fp32 by global name, and the tokens as `tokens`, so that another
    /// implementation can start from the same state.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let mut all = vec![("tokens".to_string(), self.inputs.shallow_clone())];
        for parameter in self.model.parameters.iter() {
            for (slice, part) in parameter.slices(&parameter.master) {
                all.push((slice.name, part.contiguous()));
            }
        }
        Tensor::write_safetensors(&all, path)?;
        Ok(())
    }

    /// Runs forward, backward, clipping and update. Returns seconds and total loss.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn run(&mut self) -> Result<(f64, f64), Error> {
        let started = Instant::now();
        let phase = "phase";
        span(phase, "zero gradients", Cost::default, || {
            self.gradients.begin(1)
        });
        let output = span(phase, "forward", Cost::default, || {
            self.model.forward(&self.inputs)
        })?;
        let totals = BatchTotals {
            groups: 1.0,
            positions: self.shape.tokens() as f64,
            counted_tokens: (self.shape.batch * (self.shape.sequence - 1)) as f64,
            counts_le: None,
        };
        let losses = span(phase, "loss", Cost::default, || {
            self.model.losses(&output, &self.labels, &totals)
        })?;
        span(phase, "backward", Cost::default, || {
            losses.total.f_backward()
        })?;
        self.gradients.finish()?;
        let parameters = &self.model.parameters;
        let norm = self.optimizer.grad_norm(parameters, &self.gradients)?;
        self.step += 1;
        self.optimizer.step(
            parameters,
            &self.gradients,
            self.step,
            3e-4,
            norm,
            self.device.as_ref(),
        )?;
        let loss = f64::try_from(&losses.total)?;
        self.device.synchronize()?;
        Ok((started.elapsed().as_secs_f64(), loss))
    }

    /// Runs `warmup` unmeasured steps and then `steps` measured ones.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn measure(&mut self, warmup: usize, steps: usize) -> Result<StepTimes, Error> {
        let mut seconds = Vec::new();
        let mut losses = Vec::new();
        for index in 0..warmup + steps {
            let (time, loss) = self.run()?;
            losses.push(loss);
            if index >= warmup {
                seconds.push(time);
            }
        }
        let parameters = self.model.parameters.iter();
        Ok(StepTimes {
            seconds,
            losses,
            parameters: parameters.map(|p| p.master.numel() as i64).sum(),
            peak_memory: parallel::peak_resident()?,
            peak_tensors: self.device.memory()?.peak,
            tokens: self.shape.tokens(),
        })
    }
}
