//! Reference training steps: shapes of `MixtralForCausalLM` that peers measure, on random tokens.

use crate::Error;
use crate::config::{Dtype, ModelConfig, MoeConfig, OptimizerConfig, QkNorm, RouterConfig};
use crate::model::{BuildContext, Model, ModelPart};
use crate::optim::Optimizer;
use crate::process_groups::ProcessGroups;
use kernels::profile::{Cost, span};
use moe::balance::{BalanceScope, BatchTotals};
use parallel::{Accelerator, Communicator, GradientBuckets, Local, Replication};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tch::{Kind, Tensor};

/// What was measured.
#[derive(Debug, Clone)]
pub struct StepTimes {
    /// Seconds of each step.
    pub seconds: Vec<f64>,
    /// The loss before each step: the cross-entropy and what balance adds to it.
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
    shape: ReferenceShape,
}

/// The size of a step.
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

impl ReferenceShape {
    /// Hidden 256, 4 layers, 8 heads over 4 key heads, 8 experts top-2 of width 512, vocabulary 8192, 8 x 256 tokens.
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
    /// The same with one sequence of 2048 tokens, and 16 experts top-4.
    pub const LONG: ReferenceShape = ReferenceShape {
        experts: 16,
        top_k: 4,
        batch: 1,
        sequence: 2048,
        ..ReferenceShape::REFERENCE
    };
    /// The same with hidden 768, 2 layers, 12 heads and experts of width 1536.
    pub const WIDE: ReferenceShape = ReferenceShape {
        hidden: 768,
        layers: 2,
        heads: 12,
        ffn: 1536,
        ..ReferenceShape::REFERENCE
    };
    /// OLMoE-1B-7B's widths (arXiv 2409.02060): hidden 2048, 64 experts top-8 of width 1024, vocabulary 50304, 2 x 4096 tokens; 4 of its
    /// 16 layers, 1.8 billion parameters, so that a GPU of 80 GB holds them with masters and moments.
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
    /// Mixtral-8x7B's widths (arXiv 2401.04088): hidden 4096, 8 experts top-2 of width 14336, vocabulary 32000, 2 x 4096 tokens; 1 of its
    /// 32 layers, 1.7 billion parameters.
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

    /// Tokens of a step.
    pub fn tokens(&self) -> i64 {
        self.batch * self.sequence
    }

    /// The products with weights that a forward makes, as rows, inner and outer width, and how often, when experts have as many
    /// rows each. Backward makes each twice more: for the input and for the weight.
    pub fn gemms(&self) -> Vec<([i64; 3], usize)> {
        let [hidden, ffn, kv] = [
            self.hidden,
            self.ffn,
            self.hidden / self.heads * self.kv_heads,
        ]
        .map(|size| size as i64);
        let rows = self.tokens() * self.top_k as i64 / self.experts as i64;
        let experts = self.layers * self.experts;
        vec![
            ([self.tokens(), hidden, hidden], 2 * self.layers),
            ([self.tokens(), hidden, kv], 2 * self.layers),
            ([rows, hidden, 2 * ffn], experts),
            ([rows, ffn, hidden], experts),
            ([self.tokens(), hidden, self.vocab as i64], 1),
        ]
    }
}

impl ReferenceShape {
    /// Floating-point operations that the model has by the usual formula (arXiv 2204.02311, appendix B): six for each weight that a
    /// token meets, and attention as if every position saw every other.
    pub fn model_flops(&self) -> f64 {
        let attention =
            12.0 * (self.layers * self.hidden) as f64 * (self.sequence * self.tokens()) as f64;
        self.gemm_flops() + attention
    }

    /// Those of products with weights: forward, and backward twice as many.
    pub fn gemm_flops(&self) -> f64 {
        let of = |([rows, inner, outer], times): ([i64; 3], usize)| {
            6.0 * (rows * inner * outer) as f64 * times as f64
        };
        self.gemms().into_iter().map(of).sum()
    }
}

impl ReferenceStep {
    /// The first weights are those of seed 0. With `force_balance` experts are chosen in turns.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn new(
        shape: ReferenceShape,
        dtype: Dtype,
        force_balance: bool,
        device: Box<dyn Accelerator>,
    ) -> Result<ReferenceStep, Error> {
        let moe = MoeConfig {
            // transformers counts a token once for each of its choices. What is forced has nothing to learn.
            load_balance: if force_balance {
                0.0
            } else {
                0.02 * shape.top_k as f64
            },
            load_balance_over: BalanceScope::Microbatch,
            load_balance_pool_layers: true,
            router: RouterConfig {
                force_balance,
                ..RouterConfig::default()
            },
            ..MoeConfig::new(shape.experts, shape.top_k, shape.ffn)
        };
        let config = ModelConfig {
            vocab_size: shape.vocab,
            hidden: shape.hidden,
            layers: shape.layers,
            heads: shape.heads,
            kv_heads: Some(shape.kv_heads),
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
        let ranks = ProcessGroups::single_rank();
        let ctx =
            BuildContext::single_rank(shape.sequence as usize, dtype, device.as_ref(), &ranks);
        let model = Model::new(&config, ModelPart::whole(config.layers), &ctx);
        let leaves: Vec<_> = model
            .parameters
            .iter()
            .map(|p| (p.weight.clone(), 0))
            .collect();
        let gradients = GradientBuckets::new(
            &leaves,
            &[Replication::alone()],
            25 << 20,
            true,
            device.as_ref(),
        )?;
        let settings = OptimizerConfig {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            offload: false,
        };
        let optimizer = Optimizer::new(&settings, 1.0, &model.parameters, device.as_ref(), alone)?;
        tch::manual_seed(1);
        let inputs = device
            .zeros(&[shape.batch, shape.sequence], Kind::Int64)
            .random_to_(shape.vocab as i64);
        // The next token, as a causal model is trained; the last position has none.
        let labels = inputs.roll([-1], [1]);
        let _ = labels
            .narrow(1, shape.sequence - 1, 1)
            .fill_(crate::model::IGNORED);
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

    /// Writes the weights as they are, by their global names, in fp32, and the tokens as `tokens`, so that another
    /// implementation can begin with the same.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let mut all = vec![("tokens".to_string(), self.inputs.shallow_clone())];
        for parameter in self.model.parameters.iter() {
            let parts = parameter.slices(&parameter.master);
            all.extend(
                parts
                    .into_iter()
                    .map(|(place, part)| (place.name, part.contiguous())),
            );
        }
        Tensor::write_safetensors(&all, path)?;
        Ok(())
    }

    /// Forward, backward, clipping and update; seconds and the loss.
    ///
    /// # Errors
    /// libtorch's message.
    pub fn run(&mut self) -> Result<(f64, f64), Error> {
        let started = Instant::now();
        let tokens = (self.shape.batch * (self.shape.sequence - 1)) as f64;
        span("phase", "zero gradients", Cost::default, || {
            self.gradients.begin(1)
        });
        let output = span("phase", "forward", Cost::default, || {
            self.model.forward(&self.inputs)
        })?;
        let totals = BatchTotals {
            groups: 1.0,
            tokens,
            counts_le: None,
        };
        let losses = span("phase", "loss", Cost::default, || {
            self.model.losses(&output, &self.labels, &totals)
        })?;
        span("phase", "backward", Cost::default, || {
            losses.total.f_backward()
        })?;
        self.gradients.finish()?;
        let norm = self
            .optimizer
            .grad_norm(&self.model.parameters, &self.gradients)?;
        self.step += 1;
        self.optimizer.step(
            &self.model.parameters,
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

    /// `warmup` steps that are not counted, then `steps` that are.
    ///
    /// # Errors
    /// libtorch's message.
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
        let parameters = self
            .model
            .parameters
            .iter()
            .map(|p| p.master.numel() as i64)
            .sum();
        let peak_memory = parallel::peak_resident()?;
        let peak_tensors = self.device.memory()?.peak;
        Ok(StepTimes {
            seconds,
            losses,
            parameters,
            peak_memory,
            peak_tensors,
            tokens: self.shape.tokens(),
        })
    }
}
