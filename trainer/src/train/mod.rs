//! The training loop: steps, validation, snapshots and checkpoints of one run.

mod accounting;
pub(crate) mod checkpointing;
mod copy_thread;
mod counted_tokens;
mod durability;
mod expert_placement;
mod handed_on;
mod inspection;
pub(crate) mod metrics;
mod microbatch;
mod model_shapes;
mod progress_counter;
mod rehearsal;
mod resume;
mod resume_rules;
mod retention;
mod run_state;
mod save_plan;
pub(crate) mod saved_config;
mod setup;
pub(crate) mod slot_writer;
mod snapshot_resume;
pub(crate) mod snapshots;
mod stages;
mod step;
mod step_sums;
mod validation;

pub use resume::check_resume;
pub use retention::retain_checkpoints;
pub use saved_config::newest_config;

use crate::{
    Error,
    config::{Config, Dtype, KeyChange, MinTokens, PipelinePlan},
    data::Dataset,
    lines::{Limits, ResumePoint},
    model::{Model, ParameterCount},
    optim::Optimizer,
    train::{
        expert_placement::ExpertPlacement,
        metrics::{
            files::MetricsFiles,
            records::{Progress, StepMetrics},
        },
        retention::Retention,
        run_state::CountedFrom,
        snapshots::{ReservedSlot, Snapshots},
    },
};
use moe::lending::least_loaded::Planner;
use parallel::{
    Accelerator, Communicator, GradientBuckets, Mesh,
    pipeline::{Executor, Schedule},
};
use parking_lot::Mutex;
use std::{collections::BTreeMap, sync::Arc, thread::JoinHandle};

/// Final state of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Number of completed steps.
    pub step: u64,
    /// True if a rank was told to stop before the last step.
    pub stopped: bool,
    /// The last validation loss, in nats per token.
    pub validation_loss: Option<f64>,
}

/// The state that a run starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeSource {
    /// The initial values of a new run.
    Nothing,
    /// A snapshot in the memory of keepers.
    Snapshot,
    /// A checkpoint on disk.
    Checkpoint,
}

/// Differences between a run that resumed and the one that saved its state.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ResumeReport {
    /// Changed keys that may affect results.
    pub changes: Vec<KeyChange>,
    /// Outcomes of state that only one of both has, one line each.
    pub notes: Vec<String>,
}

/// The passes of a step with one batch size.
struct StepPlan {
    /// Sequences of the step, over all ranks.
    sequences: usize,
    plan: PipelinePlan,
    /// Forward passes of all microbatches.
    forward_schedule: Schedule,
}

/// Data and device of a trainer, besides its configuration and its world.
struct Resources {
    device: Box<dyn Accelerator>,
    train: Dataset,
    validation: Option<Dataset>,
}

/// A run on one rank.
pub struct Trainer {
    config: Config,
    mesh: Mesh,
    world: Arc<dyn Communicator>,
    device: Box<dyn Accelerator>,
    model: Model,
    pipeline: Executor,
    /// Passes of a step, for each batch size of the run.
    plans: Vec<StepPlan>,
    /// Forward passes of one microbatch.
    single_forward: Schedule,
    gradients: GradientBuckets,
    optimizer: Optimizer,
    planner: Option<Arc<Mutex<Planner>>>,
    expert_placement: Option<ExpertPlacement>,
    train: Dataset,
    validation: Option<Dataset>,
    /// Number of completed optimizer steps.
    step: u64,
    /// Samples drawn so far: the position in the data.
    samples: u64,
    /// Tokens trained on so far.
    tokens: u64,
    /// Position since which the batches have the sizes of the configuration.
    counted_from: CountedFrom,
    snapshots: Option<Snapshots>,
    /// For the snapshot of the last step.
    reserved: Option<ReservedSlot>,
    /// Number of batches to skip before a step, because one made the loss not finite.
    skips: BTreeMap<u64, u64>,
    last_step_seconds: f64,
    /// Keys whose refused changes the user accepts on a resume.
    accepted_changes: Vec<String>,
    resume_report: ResumeReport,
    /// True if the run repeats the validation of the state that it resumed from.
    repeats_validation: bool,
    /// True if this rank was asked for a checkpoint.
    wants_checkpoint: bool,
    /// The step after which the ranks write the checkpoint that one was asked for.
    requested_checkpoint: Option<u64>,
    files: MetricsFiles,
    /// Used on rank 0 only.
    retention: Retention,
    /// The thread that writes the trace of a step.
    trace: Option<JoinHandle<()>>,
}

/// Requests to a run from outside. A request to one rank is one to all.
pub trait RunRequests {
    /// True if the run has to stop after the step.
    fn wants_stop(&self) -> bool;

    /// True if the run has to write a checkpoint and continue.
    fn wants_checkpoint(&self) -> bool {
        false
    }

    /// Notes that the ranks now write the checkpoint that one of them was asked for.
    fn begin_checkpoint(&self) {}
}

impl<F: Fn() -> bool> RunRequests for F {
    fn wants_stop(&self) -> bool {
        self()
    }
}

impl Trainer {
    /// Returns the number of completed steps.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Returns this rank's part of the model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the gradients of the last [`Trainer::forward_backward`].
    pub fn gradients(&self) -> &GradientBuckets {
        &self.gradients
    }

    /// Returns the number of routed tokens from which least-loaded dispatch lends an expert.
    pub fn min_tokens(&self) -> Option<i64> {
        let planner = self.planner.as_ref()?;
        Some(planner.lock().min_tokens)
    }

    /// Returns the mesh with this rank's coordinates.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Accepts changes of these keys on a resume that would be refused. A section stands for all
    /// its keys.
    pub fn accept_changes(&mut self, keys: Vec<String>) {
        self.accepted_changes = keys;
    }

    /// Returns how the run differs from the one whose state [`Trainer::resume`] read.
    pub fn resume_report(&self) -> &ResumeReport {
        &self.resume_report
    }

    /// Sets how many batches to skip before each of these steps.
    pub fn skip_batches(&mut self, skips: BTreeMap<u64, u64>) {
        self.skips = skips;
    }

    /// Trains to the last step of the configuration, or until `requests` of any rank stop the run.
    ///
    /// A checkpoint that cannot be written before the end is reported to `progress`, and training
    /// continues.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If a step fails, or the last checkpoint cannot be written.
    pub fn run(
        &mut self,
        requests: &dyn RunRequests,
        progress: &mut dyn Progress,
    ) -> Result<Outcome, Error> {
        let point = ResumePoint {
            step: self.step,
            repeats_validation: std::mem::take(&mut self.repeats_validation),
        };
        if self.is_rank_0() {
            let limits = Limits::of_mib(self.config.run.line_buffer_mib);
            self.files = MetricsFiles::open(&self.config.run.dir, point, limits)?;
        }
        let outcome = self.run_steps(point.repeats_validation, requests, progress);
        let files = std::mem::take(&mut self.files);
        files.finish(outcome.is_err(), progress);
        let failures = self.retention.finish();
        if failures > 0 {
            progress.warn(&format!(
                "old checkpoints could not be removed {failures} times; the log says why"
            ));
        }
        if let Some(trace) = self.trace.take().filter(|_| outcome.is_ok()) {
            // Panics only if writing does, which leaves no trace either.
            let _ = trace.join();
        }
        outcome
    }

    fn run_steps(
        &mut self,
        repeats_validation: bool,
        requests: &dyn RunRequests,
        progress: &mut dyn Progress,
    ) -> Result<Outcome, Error> {
        let steps = self.config.train.steps;
        let mut outcome = Outcome {
            step: self.step,
            stopped: false,
            validation_loss: None,
        };
        if repeats_validation {
            outcome.validation_loss = self.report_validation(progress)?;
        }
        while self.step < steps && !outcome.stopped {
            self.wants_checkpoint = requests.wants_checkpoint();
            let (metrics, stopped) = self.train_step(requests.wants_stop())?;
            if self.requested_checkpoint >= Some(self.step) {
                requests.begin_checkpoint();
            }
            outcome.stopped = stopped && self.step < steps;
            if self.is_rank_0() {
                self.report_step(&metrics, progress);
            }
            let is_last = self.step == steps || outcome.stopped;
            // A stop does not wait for a validation: the run makes up for it when it resumes.
            if validation::is_due(&self.config, self.step, is_last) && !outcome.stopped {
                outcome.validation_loss = self.report_validation(progress)?;
            }
            self.persist(is_last, progress)?;
        }
        outcome.step = self.step;
        Ok(outcome)
    }

    /// Returns the communicator of all ranks.
    pub fn communicator(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    fn is_rank_0(&self) -> bool {
        self.world.rank() == 0
    }

    fn report_step(&self, metrics: &StepMetrics, progress: &mut dyn Progress) {
        let steps = self.config.train.steps;
        self.files.write_step(metrics);
        self.files.report(progress);
        progress.step(metrics, steps);
        if metrics.counted_tokens == 0 {
            progress.warn(&format!(
                "no token of step {} counts in the loss, because the masks of the data leave none",
                metrics.step
            ));
        }
    }

    /// True if the files that have only some steps have `step`.
    fn is_logged(&self, step: u64) -> bool {
        let is_end = step == 1 || step == self.config.train.steps;
        is_end || step.is_multiple_of(self.config.run.log_every)
    }

    /// Validates and writes the line of the current step. Returns the loss.
    fn report_validation(&self, progress: &mut dyn Progress) -> Result<Option<f64>, Error> {
        let Some(line) = self.validate()? else {
            return Ok(None);
        };
        if self.is_rank_0() {
            self.files.write_validation(&line);
            progress.validation(self.step, line.validation_loss);
        }
        Ok(Some(line.validation_loss))
    }

    /// True if `min_tokens` is measured and not configured.
    fn min_tokens_is_measured(&self) -> bool {
        let moe = self.config.model.moe.as_ref();
        moe.is_some_and(|moe| matches!(moe.least_loaded.min_tokens, MinTokens::Measured(_)))
    }

    /// Sequences of the next step, over all ranks.
    fn global_batch(&self) -> usize {
        self.config.batch_at(self.tokens)
    }

    /// Tokens of the next step, over all ranks.
    fn tokens_per_step(&self) -> u64 {
        self.config.step_tokens_at(self.tokens)
    }

    /// The passes of the next step.
    fn step_plan(&self) -> &StepPlan {
        let sequences = self.global_batch();
        let plan = self.plans.iter().find(|plan| plan.sequences == sequences);
        plan.expect("a plan for each stage of the batch")
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
            self.mesh,
            self.device.name(),
            total as f64 / 1e6,
            active as f64 / 1e6,
            self.train.num_tokens(),
            self.tokens_per_step(),
            self.lending_summary()
        )
    }

    fn lending_summary(&self) -> String {
        if let Some(min_tokens) = self.min_tokens() {
            let origin = if self.min_tokens_is_measured() {
                "measured"
            } else {
                "configured"
            };
            return format!("; experts are lent from {min_tokens} tokens on ({origin})");
        }
        match &self.config.model.moe {
            Some(moe) if moe.dispatch.least_loaded() || moe.placement.is_some() => {
                "; each rank has all experts (parallel.expert is 1), so none is lent or moved"
                    .to_string()
            }
            _ => String::new(),
        }
    }
}
