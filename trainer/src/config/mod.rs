//! The experiment, as a person writes it. Every field has its unit; unknown keys are refused.

mod check;
mod dispatch;
mod layout;
mod model;
mod snapshot;

pub(crate) use check::hierarchical_groups;
pub use dispatch::{Dispatch, LeastLoadedConfig, Measured, MinTokens, PlacementConfig};
pub use layout::{
    NoneOrAll, ParallelConfig, PipelinePlan, RecomputeConfig, RecomputedLayers, RecomputedPart,
    ScheduleChoice, VocabularyLayout,
};
pub use model::{ModelConfig, MoeConfig, MupConfig, QkNorm, RouterConfig};
pub use snapshot::{
    OnDivergence, ParityConfig, RedundancyConfig, RestartConfig, SnapshotConfig, SnapshotEvery,
    WithoutSpare,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One experiment.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the run lives and what it starts from.
    pub run: RunConfig,
    /// How the ranks share the work.
    #[serde(default)]
    pub parallel: ParallelConfig,
    /// The model's shape.
    pub model: ModelConfig,
    /// What it reads.
    pub data: DataConfig,
    /// How long and in what portions it learns.
    pub train: TrainConfig,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning rate over time.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// What is kept on disk.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What is kept in memory, so that a failure loses seconds.
    #[serde(default)]
    pub snapshot: SnapshotConfig,
    /// What happens after a failure.
    #[serde(default)]
    pub restart: RestartConfig,
    /// How the model is judged on text it does not learn from.
    #[serde(default)]
    pub validation: Option<ValidationConfig>,
}

/// Where the run lives and what it starts from.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Folder for checkpoints, metrics.jsonl and logs. Starting again with the same folder goes on from its last
    /// checkpoint.
    pub dir: PathBuf,
    /// Decides initial weights and the order of the data.
    #[serde(default = "one")]
    pub seed: u64,
    /// `cpu`, `cuda`, `npu` or `auto` (a GPU or NPU for each rank where there are such).
    #[serde(default = "auto")]
    pub device: String,
    /// Which processors a rank runs on: `none`, `numa` (those of one NUMA node), `cores` (its share, alone), or `auto` (`numa` on
    /// machines with several nodes whose launcher has not bound ranks already).
    #[serde(default)]
    pub cpu_affinity: parallel::CpuAffinity,
    /// What carries what ranks tell each other: `gloo`, `mpi`, `nccl`, `hccl`, or `auto` (NCCL for tensors of GPUs, HCCL for those
    /// of NPUs; for others the memory that ranks of one machine share, and in groups of several machines MPI where mpirun started
    /// the ranks, else Gloo).
    #[serde(default)]
    pub backend: parallel::Backend,
    /// Seconds until an operation among ranks counts as failed.
    #[serde(default = "five_minutes")]
    pub timeout_s: u64,
    /// Steps between lines on a terminal that shows no progress bar.
    #[serde(default = "ten")]
    pub log_every: u64,
    /// The number of a step whose parts each rank writes to `logs/rank-N.trace.json`, for <https://ui.perfetto.dev>.
    #[serde(default)]
    pub trace_step: Option<u64>,
}

/// A number of ranks, or `auto`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number of ranks, or auto")]
pub enum AxisSize {
    /// So many.
    Size(usize),
    /// As many as there are.
    Auto(Auto),
}

/// The word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    /// Decide at start.
    Auto,
}

/// What the model reads.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Training data, mixed by weight.
    pub train: Vec<SourceConfig>,
    /// Validation data; needed when there is a `validation` section.
    #[serde(default)]
    pub validation: Vec<SourceConfig>,
    /// Tokens the model sees at once.
    pub sequence_length: usize,
    /// The token that ends a document: tokens then attend only to those of their own document. Without it, to all before
    /// them.
    #[serde(default)]
    pub eod_token: Option<u32>,
    /// The tokenizer.json that made the data, for `moerun generate`; by default the one beside the first source.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
}

/// One pair of token files.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Path of the `.bin` and `.idx` files without the extension.
    pub path: PathBuf,
    /// Share of sequences drawn from here, relative to the other sources.
    #[serde(default = "unit")]
    pub weight: f64,
}

/// How long and in what portions the model learns.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps in all.
    pub steps: u64,
    /// Sequences in a step, over all ranks.
    pub global_batch: usize,
    /// Sequences a rank works on at once; the rest of its share is accumulated.
    pub micro_batch: usize,
    /// Arithmetic of the model. Weights are kept in fp32 either way.
    #[serde(default)]
    pub dtype: Dtype,
    /// Products of routed experts in 8-bit floating point, in forward and for the gradients of their rows: faster on Hopper GPUs
    /// and newer, elsewhere the same numbers at no gain. See docs/precision.md for what it costs in loss.
    #[serde(default)]
    pub fp8_experts: bool,
    /// Largest global gradient norm; larger gradients are scaled down. 0: no limit.
    #[serde(default = "unit")]
    pub grad_clip: f64,
}

/// Arithmetic of the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit.
    #[default]
    Fp32,
    /// bfloat16, with fp32 master weights, gradients and optimizer state.
    Bf16,
}

impl Dtype {
    /// Of tensors.
    pub fn kind(self) -> tch::Kind {
        match self {
            Dtype::Fp32 => tch::Kind::Float,
            Dtype::Bf16 => tch::Kind::BFloat16,
        }
    }
}

/// AdamW's constants.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay of matrices and embeddings; norms have none.
    pub weight_decay: f64,
    /// Keep moments and fp32 masters in the host's memory and update them there: a GPU or NPU has 12 bytes less to keep for each
    /// parameter in bf16 (8 in fp32), and each step takes longer. On CPUs, where all is in the host's memory, it changes nothing.
    pub offload: bool,
}

impl Default for OptimizerConfig {
    fn default() -> OptimizerConfig {
        OptimizerConfig {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            offload: false,
        }
    }
}

/// The learning rate over time.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleConfig {
    /// `min(max_lr, beta * a * n^b)` after `n` tokens, with `beta` the step's tokens in units of 4096 (Power
    /// scheduler, arXiv 2408.13359).
    Power(PowerConfig),
    /// Warm-up, constant, decay over the last steps.
    Wsd(WsdConfig),
    /// Half a cosine from `lr` to `lr * final_ratio`.
    Cosine(RampConfig),
    /// A straight line from `lr` to `lr * final_ratio`.
    Linear(RampConfig),
    /// Warm-up, then constant.
    Constant(ConstantConfig),
}

impl Default for ScheduleConfig {
    fn default() -> ScheduleConfig {
        ScheduleConfig::Power(PowerConfig::default())
    }
}

/// Constants of the Power scheduler; the defaults are the paper's.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PowerConfig {
    /// Amplitude.
    pub a: f64,
    /// Exponent, negative.
    pub b: f64,
    /// Upper limit.
    pub max_lr: f64,
    /// Steps of linear warm-up, to the law's value at their end.
    pub warmup_steps: u64,
    /// Steps at the end over which the rate falls exponentially to zero.
    pub decay_steps: u64,
}

impl Default for PowerConfig {
    fn default() -> PowerConfig {
        PowerConfig {
            a: 4.0,
            b: -0.51,
            max_lr: 0.02,
            warmup_steps: 100,
            decay_steps: 0,
        }
    }
}

/// Warm-up, stable, decay.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WsdConfig {
    /// The stable rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Steps of decay at the end, along `1 - sqrt(x)`.
    pub decay_steps: u64,
}

/// A schedule that ends with the run.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RampConfig {
    /// The rate after warm-up.
    pub lr: f64,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup_steps: u64,
    /// The last rate as a share of `lr`.
    #[serde(default)]
    pub final_ratio: f64,
}

/// A constant rate.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConstantConfig {
    /// The rate after warm-up.
    pub lr: f64,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup_steps: u64,
}

/// What is kept on disk.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; one is also written at the end and on a signal. 0: only then.
    pub every: u64,
    /// How many of the newest to keep.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> CheckpointConfig {
        CheckpointConfig {
            every: 100,
            keep: 2,
        }
    }
}

/// How the model is judged.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Steps between validations; one is also made at the end.
    pub every: u64,
    /// Sequences in each, the same every time.
    pub sequences: usize,
}

fn one() -> u64 {
    1
}
fn ten() -> u64 {
    10
}
fn five_minutes() -> u64 {
    300
}
fn unit() -> f64 {
    1.0
}
fn auto() -> String {
    "auto".into()
}
