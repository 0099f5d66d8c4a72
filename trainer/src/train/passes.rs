//! The passes of steps, and the gradients that they accumulate.

use crate::{
    Error,
    config::{Config, PipelinePlan},
};
use parallel::{
    GradientBuckets, Mesh,
    pipeline::{Executor, Schedule},
};

/// Everything that runs the passes of this rank.
pub(super) struct Passes {
    pub(super) executor: Executor,
    /// Passes of a step, for each batch size of the run.
    pub(super) plans: Vec<StepPlan>,
    /// Forward passes of one microbatch.
    pub(super) single_forward: Schedule,
    pub(super) gradients: GradientBuckets,
}

/// The passes of a step with one batch size.
pub(super) struct StepPlan {
    /// Sequences of the step, over all ranks.
    sequences: usize,
    pub(super) plan: PipelinePlan,
    /// Forward passes of all microbatches.
    pub(super) forward_schedule: Schedule,
}

impl Passes {
    /// Returns the passes of a step with this number of sequences over all ranks.
    ///
    /// # Panics
    /// If no stage of the run has such steps.
    pub(super) fn of_step(&self, sequences: usize) -> &StepPlan {
        let plan = self.plans.iter().find(|plan| plan.sequences == sequences);
        plan.expect("a plan for each stage of the batch")
    }
}

/// Returns the passes of a step for each batch size of the run.
pub(super) fn step_plans(config: &Config, mesh: &Mesh) -> Result<Vec<StepPlan>, Error> {
    let mut plans: Vec<StepPlan> = Vec::new();
    for stage in config.train.global_batch.stages().iter() {
        let sequences = stage.sequences;
        if plans.iter().any(|known| known.sequences == sequences) {
            continue;
        }
        let microbatches = config.microbatches(mesh, sequences);
        let plan = config.pipeline_plan(microbatches).map_err(Error::Config)?;
        plans.push(StepPlan {
            sequences,
            forward_schedule: plan.forward_only(microbatches),
            plan,
        });
    }
    if plans.is_empty() {
        let reason = "train.global_batch has no stage".to_string();
        return Err(Error::Config(reason));
    }
    Ok(plans)
}
