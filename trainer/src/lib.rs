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
mod inference;
mod memory;
mod model;
mod optim;
mod process_groups;
mod train;

pub use error::Error;
pub use inference::generate::{GenerateOptions, generate};
pub use inference::routing::{RoutingSample, sample_routing};
pub use memory::RankMemory;
pub use model::parameters::{Parameter, Parameters, Replicas};
pub use model::{
    BuildContext, ForwardOutput, Model, ModelPart, StagePart, VocabularyShard, split_layers,
};
pub use optim::Optimizer;
pub use process_groups::ProcessGroups;
pub use train::metrics::{JsonLinesWriter, Progress, RoutingLine, SnapshotMetrics, StepMetrics};
pub use train::reference::{ReferenceShape, ReferenceStep, StepTimes};
pub use train::snapshots::{CopyTimer, KeeperAccess};
pub use train::{Outcome, ResumeSource, Trainer};
