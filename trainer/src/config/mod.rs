//! The experiment that a YAML file describes. Unknown keys are refused.
//!
//! The doc comments of the sections are also the configuration reference and the JSON schema.

mod batch;
mod check;
pub(crate) mod dispatch;
pub(crate) mod documents;
pub(crate) mod dtype;
pub(crate) mod layer_set;
pub(crate) mod layout;
pub(crate) mod limits;
mod mesh;
mod model;
mod multipliers;
mod optimizer;
mod pipeline_plan;
mod protection;
mod ranges;
mod renamed;
mod resume_keys;
mod schedule;
mod snapshot;
mod source;
mod warnings;
mod words;

pub use batch::{BatchSize, BatchStage};
pub(crate) use check::hierarchical_groups;
pub use dispatch::{Dispatch, LeastLoadedConfig, MinTokens, PlacementConfig};
pub use documents::DocumentRules;
pub use dtype::Dtype;
pub use layer_set::{AllBut, LayerPeriod, LayerSet};
pub use layout::{
    ParallelConfig, RecomputeConfig, RecomputedPart, ScheduleChoice, VocabularyLayout,
};
pub(crate) use limits::MAX_ESTIMATED_LAYERS;
pub use model::{ModelConfig, MupConfig};
pub use multipliers::MultipliersConfig;
pub use optimizer::{GroupConfig, OptimizerConfig};
pub use pipeline_plan::PipelinePlan;
pub use ranges::{NumberRange, resolve_schema, schema};
pub(crate) use renamed::rename_old_keys;
pub use renamed::{Renamed, renamed_keys};
pub use resume_keys::{KeyChange, ResumeEffect, ResumeKey, ResumeKeys, ResumeRule};
pub(crate) use schedule::Length;
pub use schedule::{ConstantConfig, PowerConfig, RampConfig, ScheduleConfig, WsdConfig};
pub use snapshot::{
    OnDivergence, ParityConfig, RedundancyConfig, RestartConfig, SnapshotConfig, SnapshotEvery,
    WithoutSpare,
};
pub use source::{source_names, source_weights};
pub use words::{Auto, AxisSize, MeasuredKeyword, NoneOrAll};

pub use crate::{
    model::{
        attention::{
            AttentionConfig,
            grouped::{AttentionBias, GroupedConfig, QkNorm, WindowConfig},
            latent::LatentConfig,
        },
        moe_block::{ClampedGluConfig, ExpertActivation, MoeConfig, RouterBias, RouterConfig},
        norm::{NormConfig, NormPlacement},
        role::Role,
        rope::RopeConfig,
        rope_scaling::RopeScaling,
    },
    optim::{
        adamw::AdamwConfig,
        muon::{AdjustLr, MuonConfig},
        qk_clip::QkClipConfig,
        sgd::SgdConfig,
    },
};
use config_derive::ResumeKeys;
use dataset::tokens::{TokenDtype, TokenFormat};
use limits::{MAX_CHECKPOINTS, MAX_SECONDS, MAX_SEQUENCES, MAX_TOKENS};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One experiment.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The run: its folder, device, communication and reporting.
    #[on_resume(section)]
    pub run: RunConfig,
    /// The parallel layout: how ranks divide the work.
    #[on_resume(section)]
    #[serde(default)]
    pub parallel: ParallelConfig,
    /// The model's architecture.
    #[on_resume(section)]
    pub model: ModelConfig,
    /// Training and validation data.
    #[on_resume(section)]
    pub data: DataConfig,
    /// Number of steps, batch sizes and precision.
    #[on_resume(section)]
    pub train: TrainConfig,
    /// The optimizer: AdamW, unless `groups` name others.
    #[on_resume(section)]
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning-rate schedule: one of `power`, `wsd`, `cosine`, `linear` and `constant`. By
    /// default `wsd`, with a rate for the model's width, `warmup_steps` of a tenth of the run (at
    /// most 100) and `decay_steps` of a fifth; `moerun config check` prints it.
    #[on_resume(reported)]
    #[serde(default)]
    pub schedule: Option<ScheduleConfig>,
    /// Checkpoints on disk.
    #[on_resume(section)]
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Snapshots in memory, from which a run restarts after a failure.
    #[on_resume(section)]
    #[serde(default)]
    pub snapshot: SnapshotConfig,
    /// Detection of failures, and restarts.
    #[on_resume(section)]
    #[serde(default)]
    pub restart: RestartConfig,
    /// Validation during training. Without this section there is none.
    #[on_resume(section)]
    #[serde(default)]
    pub validation: Option<ValidationConfig>,
}

impl Config {
    /// Returns the configuration with the values that unset keys stand for, where other keys
    /// decide them.
    pub fn resolved(&self) -> Config {
        let mut resolved = self.clone();
        let heads = self.model.attention(0).head_keys();
        resolved.model.kv_heads = heads.kv_heads;
        resolved.model.head_dim = heads.head_dim;
        if let Some(moe) = &mut resolved.model.moe {
            moe.resolve();
        }
        if self.data.eod_token.is_some() {
            resolved.data.mask_documents = Some(self.data.keeps_documents_apart());
        }
        resolved.schedule = Some(self.schedule());
        resolved
    }
}

/// The run: its folder, device, communication and reporting.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Folder for checkpoints, metrics and logs. A run that finds a checkpoint there resumes from
    /// it.
    #[on_resume(free)]
    #[schemars(extend("format" = "path"))]
    pub dir: PathBuf,
    /// Seed of the initial weights and of the order of the data.
    #[on_resume(reported)]
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Device of each rank: `cpu`, `cuda`, `npu`, or `auto` (a GPU or NPU if the machine has one).
    #[on_resume(free)]
    #[serde(default = "auto")]
    pub device: String,
    /// Repeats losses and weights to the bit when the same layout runs again, or restarts, on GPUs
    /// and NPUs: slower kernels with a fixed order of additions run there. Processors always repeat
    /// them. An operation without such a kernel stops the run with a message. Not yet run on
    /// hardware.
    #[on_resume(free)]
    #[serde(default)]
    pub deterministic: bool,
    /// Processors that a rank is bound to: `none`, `numa` (those of one NUMA node), `cores` (its
    /// own share), or `auto` (`numa` on machines with several NUMA nodes, unless the launcher has
    /// bound the ranks).
    #[on_resume(free)]
    #[serde(default)]
    pub cpu_affinity: parallel::CpuAffinity,
    /// Communication backend: `gloo`, `mpi`, `nccl`, `hccl`, or `auto`. `auto` uses NCCL for GPU
    /// tensors and HCCL for NPU tensors. For host tensors it uses shared memory within a machine;
    /// between machines it uses MPI if mpirun started the ranks, and Gloo otherwise.
    #[on_resume(free)]
    #[serde(default)]
    pub backend: parallel::Backend,
    /// Seconds until an unfinished collective counts as failed.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_SECONDS))]
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
    /// Steps between progress lines, if the output is no terminal, and between lines of
    /// `routing.jsonl` and `ranks.jsonl`.
    #[on_resume(free)]
    #[schemars(range(min = 1))]
    #[serde(default = "default_log_every")]
    pub log_every: u64,
    /// MiB of memory for lines that the disk does not take, for each of `metrics.jsonl`,
    /// `routing.jsonl`, `ranks.jsonl` and the log of a rank. Further lines are dropped and counted.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = 1048576))]
    #[serde(default = "default_line_buffer_mib")]
    pub line_buffer_mib: u64,
    /// Step of which each rank writes a trace to `logs/rank-N.trace.json`, for
    /// <https://ui.perfetto.dev>.
    #[on_resume(free)]
    #[schemars(range(min = 1))]
    #[serde(default)]
    pub trace_step: Option<u64>,
    /// Encryption of Gloo's connections between machines. Without this section tensors are
    /// sent in clear text.
    #[on_resume(section)]
    #[serde(default)]
    pub tls: Option<TlsConfig>,
}

/// Files in PEM format with which ranks encrypt Gloo's connections between machines, and prove that
/// they belong to the run. Paths are the same on every machine.
///
/// It needs `run.backend: gloo` on GPUs and NPUs: NCCL, HCCL and MPI do not encrypt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificate of the ranks of a machine, which `ca` has signed.
    #[on_resume(free)]
    #[schemars(extend("format" = "path"))]
    pub cert: PathBuf,
    /// Private key of the certificate. Only its owner may read it.
    #[on_resume(free)]
    #[schemars(extend("format" = "path"))]
    pub key: PathBuf,
    /// Certificate of the authority. A rank that another authority has certified is refused, so an
    /// authority of the run's own is best.
    #[on_resume(free)]
    #[schemars(extend("format" = "path"))]
    pub ca: PathBuf,
}

impl TlsConfig {
    /// Returns the files as Gloo takes them.
    pub fn to_gloo(&self) -> torch_ext::GlooTls {
        torch_ext::GlooTls {
            key: self.key.clone(),
            certificate: self.cert.clone(),
            authority: self.ca.clone(),
        }
    }
}

/// Training and validation data.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Sources of training data, mixed by weight, or without weights in proportion to their size.
    /// In an epoch of a source, each of its sequences is drawn once.
    #[on_resume(reported)]
    pub train: Vec<SourceConfig>,
    /// Sources of validation data, each with a loss of its own. Needed if there is a `validation`
    /// section.
    #[on_resume(reported)]
    #[serde(default)]
    pub validation: Vec<SourceConfig>,
    /// Length of a sequence, in tokens.
    #[on_resume(reported)]
    #[schemars(range(min = 1, max = MAX_TOKENS))]
    pub sequence_length: usize,
    /// Token that ends a document. It belongs to the document that it ends. If it is not set, it is
    /// the one that `dataset.json` records, which all sources need if another key needs the token.
    #[on_resume(reported)]
    #[serde(default)]
    pub eod_token: Option<u32>,
    /// Keeps the documents of a sequence apart: a token attends only to tokens of its own document,
    /// instead of all earlier tokens of its sequence. By default it is true if `eod_token` is set,
    /// as in runs that began before this key existed.
    #[on_resume(reported)]
    #[serde(default)]
    pub mask_documents: Option<bool>,
    /// Begins the positions of rotary embedding at 0 in each document, instead of only in each
    /// sequence. It does not depend on `mask_documents`.
    ///
    /// Scalings of rotary embedding that depend on the length (`dynamic`, `longrope`) depend on
    /// `sequence_length` all the same, and not on the lengths of documents.
    #[on_resume(refused)]
    #[serde(default)]
    pub reset_positions: bool,
    /// Leaves the token after `eod_token` out of the loss, in training and validation: the first
    /// token of a document cannot be predicted from the document before it.
    ///
    /// The cross-entropy is the mean over the counted tokens of the step, on all ranks. The
    /// load-balancing and z losses remain means over all tokens, because every token is routed.
    #[on_resume(reported)]
    #[serde(default)]
    pub eod_mask_loss: bool,
    /// The tokenizer.json with which the data was made, for `moerun generate`; a run whose data
    /// records another one is refused. By default the one in the folder of the first source.
    #[on_resume(free)]
    #[schemars(extend("format" = "path"))]
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// Epochs of a source in the whole run above which a warning is printed.
    #[on_resume(free)]
    #[schemars(range(max = 1e12), extend("exclusiveMinimum" = 0))]
    #[serde(default = "default_max_epochs")]
    pub max_epochs: f64,
}

impl DataConfig {
    /// True if tokens attend only within their document.
    pub(crate) fn keeps_documents_apart(&self) -> bool {
        self.mask_documents.unwrap_or(self.eod_token.is_some())
    }

    /// Returns the treatment of documents that share a sequence and end with the token `end`, given
    /// or recorded; `None` if sequences are one text.
    pub(crate) fn document_rules(&self, end: Option<u32>) -> Option<DocumentRules> {
        let rules = DocumentRules {
            end: end?,
            mask: self.keeps_documents_apart(),
            reset_positions: self.reset_positions,
        };
        (rules.mask || rules.reset_positions).then_some(rules)
    }

    /// Returns the first key that is set and needs the token that ends a document.
    pub(crate) fn key_that_needs_eod_token(&self) -> Option<&'static str> {
        if self.mask_documents == Some(true) {
            Some("mask_documents")
        } else if self.reset_positions {
            Some("reset_positions")
        } else if self.eod_mask_loss {
            Some("eod_mask_loss")
        } else {
            None
        }
    }
}

/// One source of data: token files.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Path of the token files: of a pair of `.bin` and `.idx` files without the extension, of
    /// other formats with it.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// Name in reports, which no other source of the list has. By default the file's name, with the
    /// folder's if several sources have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Format of the files: `megatron`, `raw` (an array without header, such as OLMo's) or
    /// `datatrove`. By default `raw` for `.npy`, `datatrove` for `.ds`, and otherwise `megatron`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<TokenFormat>,
    /// Integer type of the tokens: `u8`, `u16`, `u32` or `u64`. Needed with `raw`; the other
    /// formats record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<TokenDtype>,
    /// Path of a second pair of `.bin` and `.idx` files, without the extension, with one value per
    /// token of the source. The model is not trained to predict a token whose value is 0. The
    /// losses are normalized as `data.eod_mask_loss` describes.
    #[schemars(extend("format" = "path"))]
    #[serde(default)]
    pub mask: Option<PathBuf>,
    /// Relative share of the sequences that are drawn from this source; all sources of a list have
    /// a weight, or none has. Without weights, sources of training data are drawn in proportion to
    /// their size, and those of validation data equally.
    #[schemars(range(max = 1e12), extend("exclusiveMinimum" = 0))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// Number of steps, batch sizes and precision.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run.
    #[on_resume(reported)]
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Sequences per step, over all ranks: a number, or a batch ramp such as
    /// `[{tokens: 0, sequences: 16}, {tokens: 1e9, sequences: 64}]`.
    #[on_resume(reported)]
    pub global_batch: BatchSize,
    /// Sequences per microbatch: what a rank processes at once. Gradients of a rank's microbatches
    /// are accumulated.
    #[on_resume(reported)]
    #[schemars(range(min = 1, max = MAX_SEQUENCES))]
    pub micro_batch: usize,
    /// Precision of the model's arithmetic. Master weights and gradients are fp32 in both cases.
    #[on_resume(reported)]
    #[serde(default)]
    pub dtype: Dtype,
    /// Computes the experts' forward GEMMs, and the gradients of their inputs, in 8-bit floating
    /// point. On GPUs it needs compute capability 9 (Hopper); a run on other GPUs is refused.
    /// Processors emulate it with the same results. Needs `dtype: bf16`. The precision page of the
    /// documentation shows the effect on the loss.
    #[on_resume(reported)]
    #[serde(default)]
    pub fp8_experts: bool,
    /// Largest global gradient norm: larger gradients are scaled down to it. 0 disables clipping.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0))]
    #[serde(default = "unit")]
    pub grad_clip: f64,
}

/// Checkpoints on disk.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints. One is always written at the end of the run and when a signal
    /// stops it; 0 writes no others.
    #[on_resume(free)]
    pub every: u64,
    /// Number of checkpoints to keep: the newest ones.
    #[on_resume(free)]
    #[schemars(range(min = 1, max = MAX_CHECKPOINTS))]
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

/// Validation during training.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Steps between validations. The last step is always validated.
    #[on_resume(free)]
    #[schemars(range(min = 1))]
    pub every: u64,
    /// Number of sequences over all sources, the same ones each time: from the start of each
    /// source, in proportion to the weights, and at least one.
    #[on_resume(reported)]
    #[schemars(range(min = 1))]
    pub sequences: usize,
    /// Validates a new run before its first step as well.
    #[on_resume(free)]
    #[serde(default = "yes")]
    pub at_start: bool,
}

fn default_seed() -> u64 {
    1
}

fn default_log_every() -> u64 {
    10
}

fn default_line_buffer_mib() -> u64 {
    64
}

fn default_timeout_s() -> u64 {
    300
}

fn default_max_epochs() -> f64 {
    4.0
}

fn unit() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

fn auto() -> String {
    "auto".into()
}
