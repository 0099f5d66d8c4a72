//! The training loop: steps, evaluation, snapshots and checkpoints of one run.

mod accounting;
pub(crate) mod checkpointing;
mod copy_thread;
mod counted_tokens;
mod durability;
mod evaluation;
mod expert_balance;
mod expert_placement;
mod handed_on;
mod inspection;
pub(crate) mod metrics;
mod microbatch;
mod model_shapes;
mod own_figures;
mod passes;
mod progress_counter;
mod qk_clip;
mod rehearsal;
mod resume;
mod resume_rules;
mod retention;
mod run;
mod run_data;
pub(crate) mod run_state;
mod save_plan;
pub(crate) mod saved_config;
mod setup;
pub(crate) mod slot_writer;
mod snapshot_resume;
pub(crate) mod snapshots;
mod stages;
mod start_from_folder;
mod step;
mod step_sums;
mod trace;

pub use resume::{ResumeReport, ResumeSource, check_resume};
pub use retention::retain_checkpoints;
pub use run::{Outcome, RunRequests};
pub use saved_config::newest_config;

use crate::{
    config::{Config, Dtype},
    model::{Model, ParameterCount},
    optim::Optimizer,
    train::{
        durability::Durability, expert_balance::ExpertBalance, passes::Passes, resume::Resumption,
        run::Reports, run_data::RunData,
    },
};
use parallel::{Accelerator, Communicator, GradientBuckets, Mesh};
use std::{collections::BTreeMap, sync::Arc};

/// A run on one rank.
pub struct Trainer {
    config: Config,
    rank: ThisRank,
    data: RunData,
    model: Model,
    passes: Passes,
    optimizer: Optimizer,
    experts: ExpertBalance,
    durability: Durability,
    resumption: Resumption,
    reports: Reports,
}

/// This rank's place among the others, and its device.
struct ThisRank {
    mesh: Mesh,
    world: Arc<dyn Communicator>,
    device: Box<dyn Accelerator>,
}

impl ThisRank {
    /// True on the rank that reports.
    fn is_first(&self) -> bool {
        self.world.rank() == 0
    }
}

impl Trainer {
    /// Returns the number of completed steps.
    pub fn step(&self) -> u64 {
        self.data.position.step
    }

    /// Returns this rank's part of the model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the gradients of the last [`Trainer::forward_backward`].
    pub fn gradients(&self) -> &GradientBuckets {
        &self.passes.gradients
    }

    /// Returns the mesh with this rank's coordinates.
    pub fn mesh(&self) -> &Mesh {
        &self.rank.mesh
    }

    /// Returns the communicator of all ranks.
    pub fn communicator(&self) -> &Arc<dyn Communicator> {
        &self.rank.world
    }

    /// Sets how many batches to skip before each of these steps.
    pub fn skip_batches(&mut self, skips: BTreeMap<u64, u64>) {
        self.data.position.skips = skips;
    }

    /// Describes the run in one line: layout, model, precision and data.
    pub fn summary(&self) -> String {
        let ParameterCount { total, active } = self.config.model.num_parameters();
        let dtype = match self.config.train.dtype {
            Dtype::Bf16 => "bf16",
            Dtype::Fp32 => "fp32",
        };
        let offload = if self.model.parameters.are_offloaded() {
            "; optimizer state in host memory"
        } else {
            ""
        };
        format!(
            "{} on {}; {:.1}M parameters ({:.1}M active), {dtype}; {} training tokens, {} per step\
             {offload}{}",
            self.rank.mesh,
            self.rank.device.name(),
            total as f64 / 1e6,
            active as f64 / 1e6,
            self.data.train.num_tokens(),
            self.data.position.step_tokens(&self.config),
            self.lending_summary()
        )
    }
}
