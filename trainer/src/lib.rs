//! What is computed: configuration, model, data, optimizer, schedules, and the loop that joins them.
//!
//! Invariants:
//! - Layout changes nothing: a parameter's first value depends on its global name, its index and the seed; a sample
//!   on its number; every loss is a sum of contributions over ranks and microbatches.
//! - The position in the data is a number, the step; nothing has to be replayed to resume.
//! - What a person wrote is checked before a rank starts, and a message names the key and shows the arithmetic.

pub mod config;
pub mod data;
mod error;
mod generate;
mod init;
mod loaded;
mod memory;
mod metrics;
mod model;
mod offload;
mod optimizer;
mod parameters;
mod placing;
mod ranks;
mod reference;
mod routing;
mod saving;
pub mod schedule;
mod snapshots;
mod stages;
mod training;

pub use error::Error;
pub use generate::{Generation, generate};
pub use memory::RankMemory;
pub use metrics::{Metrics, Progress, Record, RoutingLine, SnapshotFigures};
pub use model::{
    ForwardOutput, Model, ModelPart, Setting, StagePart, VocabularyShard, split_layers,
};
pub use optimizer::Optimizer;
pub use parameters::{Parameter, Parameters, Replicas};
pub use ranks::Ranks;
pub use reference::{ReferenceStep, Shape, StepTimes};
pub use routing::{RoutingSample, sample_routing};
pub use snapshots::{CopyTimer, KeeperAccess};
pub use training::{Outcome, Resumed, Trainer};
