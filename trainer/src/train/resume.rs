//! Start of a run from a snapshot or a checkpoint.

use super::{ResumeSource, Trainer, checkpointing, run_state::RunState};
use crate::Error;

/// Configuration that decides the order of the data, as JSON pointers.
const DATA_ORDER_KEYS: [&str; 3] = ["/run/seed", "/data", "/train/global_batch"];

impl Trainer {
    /// Resumes from the snapshot that the launcher chose, or else from the newest usable checkpoint
    /// in the run's folder, if any. Reports refused checkpoints to `warn`.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If the snapshot cannot be read, or there are checkpoints and none can be used.
    pub fn resume(&mut self, warn: &mut dyn FnMut(&str)) -> Result<ResumeSource, Error> {
        let Some((state, source)) = self.restore(warn)? else {
            return Ok(ResumeSource::Nothing);
        };
        if let (Some(expert_placement), Some(placement)) =
            (&mut self.expert_placement, &state.placement)
        {
            expert_placement.resume(placement);
        }
        self.step = state.step;
        self.samples = state.samples;
        self.tokens = state.tokens;
        // The value that was measured at the start of the run gives the same plans, and so the same
        // bits, as without an interruption.
        if let (Some(planner), Some(min_tokens)) = (&self.planner, state.min_tokens)
            && self.min_tokens_is_measured()
        {
            planner.lock().min_tokens = min_tokens;
        }
        self.warn_of_changed_data(&state, warn);
        Ok(source)
    }

    /// Copies a snapshot or a checkpoint into model and optimizer.
    fn restore(
        &self,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Option<(RunState, ResumeSource)>, Error> {
        // The names of experts' rows must be those of the saved placement before values are read.
        let prepare = |state: &RunState| self.restore_placement(state);
        let tensors = self.state_tensors();
        if let Some(snapshots) = &self.snapshots {
            let parts = snapshots.restored();
            let restored = checkpointing::resume_snapshot(parts, &tensors, &self.world, &prepare)?;
            if let Some(state) = restored {
                return Ok(Some((state, ResumeSource::Snapshot)));
            }
        }
        let root = self.checkpoint_dir();
        let restored = checkpointing::resume(&root, &tensors, &self.world, &prepare, warn)?;
        Ok(restored.map(|state| (state, ResumeSource::Checkpoint)))
    }

    fn restore_placement(&self, state: &RunState) {
        let Some(placement) = &state.placement else {
            return;
        };
        let current = self.expert_placement.as_ref();
        if !current.is_some_and(|current| current.fits(placement)) {
            return;
        }
        for (moe_layer, moe, experts) in self.model.local_moe_layers() {
            let slots = &placement.physical_slots[moe_layer];
            experts.set_physical_slots(&self.model.parameters, &moe.dispatcher, slots);
        }
    }

    fn warn_of_changed_data(&self, state: &RunState, warn: &mut dyn FnMut(&str)) {
        let config = serde_json::to_value(&self.config).expect("plain data");
        for pointer in DATA_ORDER_KEYS {
            if config.pointer(pointer) != state.config.pointer(pointer) {
                let key = pointer[1..].replace('/', ".");
                warn(&format!(
                    "{key} differs from the checkpoint's: the data continues in another order"
                ));
            }
        }
    }
}
