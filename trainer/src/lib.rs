//! Training of MoE language models: configuration, data, model, optimizer and training loop.
//!
//! A [`config::Config`] describes a run. [`Trainer`] runs it on one rank of a [`parallel::World`]:
//! it builds this rank's part of the [`Model`], reads its samples from a [`data::Dataset`], and
//! saves and resumes the run. [`config::Config::memory`] estimates a run's memory in advance.
//! [`generate`] and [`sample_routing`] use a trained model.
//!
//! Invariants:
//! - The layout changes no values: a parameter's initial value depends on its global name, the
//!   element's index and the seed; a sample on its number; a loss is a sum over ranks and
//!   microbatches.
//! - The position in the data is a number, so that a resumed run replays nothing.
//! - The configuration is checked before a rank starts. Messages name the key and show the numbers.
//!
//! # Example
//!
//! A small model on one CPU, and its loss on one sequence:
//!
//! ```
//! use moe::balance::BatchTotals;
//! use parallel::{Accelerator, Cpu};
//! use tch::Tensor;
//! use trainer::config::{Dtype, ModelConfig, MoeConfig};
//! use trainer::{BuildContext, Model, ModelPart, ProcessGroups};
//!
//! let config = ModelConfig {
//!     kv_heads: Some(2),
//!     moe: Some(MoeConfig::new(8, 2, 16)),
//!     ..ModelConfig::new(64, 32, 2, 4)
//! };
//! let groups = ProcessGroups::single_rank();
//! let ctx = BuildContext::single_rank(16, Dtype::Fp32, &Cpu, &groups);
//! let model = Model::new(&config, ModelPart::whole(config.layers), &ctx);
//!
//! let tokens: Vec<i64> = (0..17).collect();
//! let tokens = Cpu.upload(&Tensor::from_slice(&tokens).view([1, 17]));
//! let inputs = tokens.narrow(1, 0, 16);
//! let labels = tokens.narrow(1, 1, 16);
//! let totals = BatchTotals {
//!     groups: 1.0,
//!     positions: 16.0,
//!     counted_tokens: 16.0,
//!     counts_le: None,
//! };
//! let output = tch::no_grad(|| model.forward(&inputs))?;
//! let losses = tch::no_grad(|| model.losses(&output, &labels, &totals))?;
//! // An untrained model predicts all tokens with about equal probability.
//! let cross_entropy = losses.cross_entropy.double_value(&[]);
//! assert!((cross_entropy - 64f64.ln()).abs() < 0.1);
//! # Ok::<(), trainer::Error>(())
//! ```

mod backward_memory;
mod bench;
pub mod config;
pub mod data;
mod error;
mod families;
mod hub;
mod inference;
mod join_groups;
pub mod lines;
mod memory;
mod model;
mod optim;
mod problems;
mod process_groups;
mod replica_ranks;
mod scalars;
mod stage_layout;
mod train;

pub use bench::copy_timer::CopyTimer;
pub use bench::import::{PartAction, ReadPart, read_part, rewrite_folder, write_synthetic_folder};
pub use bench::reference::{GemmShape, ReferenceShape, ReferenceStep, StepTimes};
pub use data::{
    records::{RecordCheck, Records},
    report::DataReport,
};
pub use error::Error;
pub use hub::{
    ByteProgress,
    export::{ExportOptions, ExportReport, export},
    import::{ImportReport, import},
    model_folder::ModelFolder,
    section::{complete_section, contradictions, folder_model},
    upcycle::{UpcycleMethod, UpcycleOptions, upcycle},
};
pub use inference::evaluate::{EvaluateOptions, SourceLoss, evaluate};
pub use inference::generate::{GenerateOptions, generate};
pub use inference::routing::{RoutingSample, sample_routing};
pub use inference::score::{Score, ScoreRequest, score};
pub use memory::{EqualRanks, RankMemory};
pub use model::parameters::{Parameter, Parameters};
pub use model::replicas::Replicas;
pub use model::{
    AuxLosses, BuildContext, ForwardOutput, Losses, Model, ModelPart, ParameterCount,
    PipelineSplit, Share, StagePart, split_layers,
};
pub use optim::{Optimizer, StageRanks};
pub use process_groups::ProcessGroups;
pub use train::metrics::records::{
    DroppedLines, LayerDistribution, LayerMetrics, LayerTotal, MoeMetrics, Progress,
    RankDistribution, RankDistributions, RankLine, RankLists, RoutingLine, SnapshotMetrics,
    StepMetrics, ValidationMetrics,
};
pub use train::snapshots::KeeperAccess;
pub use train::{
    Outcome, ResumeReport, ResumeSource, RunRequests, Trainer, check_resume, newest_config,
    retain_checkpoints,
};
