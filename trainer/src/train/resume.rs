//! Start of a run from a snapshot or a checkpoint.

use super::{
    ResumeReport, ResumeSource, Trainer,
    checkpointing::{self, Restored},
    resume_rules::ResumeRules,
    run_state::{CountedFrom, RunState},
    saved_config::config_in,
    snapshot_resume, validation,
};
use crate::{Error, config::Config, optim::rate_jump::rate_jump};
use checkpoint::folder::{self, Depth, Leftover};
use parallel::agreement::agree;
use std::path::Path;

impl Trainer {
    /// Resumes from the snapshot that the launcher chose, or else from the newest usable checkpoint
    /// in the run's folder, if any. Reports unusable checkpoints to `warn`, and differences in
    /// [`Trainer::resume_report`].
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If the snapshot cannot be read, there are checkpoints and none can be used, or a change of
    /// the configuration is refused. Nothing was written then.
    pub fn resume(&mut self, warn: &mut dyn FnMut(&str)) -> Result<ResumeSource, Error> {
        let restored = self.restore(warn)?;
        if self.snapshots.is_none() {
            // With keepers, the launcher writes checkpoints and does this.
            self.clean_checkpoints(warn)?;
        }
        let Some((restored, source)) = restored else {
            return Ok(ResumeSource::Nothing);
        };
        let Restored {
            state,
            saved,
            changes,
        } = restored;
        if let (Some(expert_placement), Some(placement)) =
            (&mut self.expert_placement, &state.placement)
        {
            expert_placement.resume(placement);
        }
        self.step = state.step;
        self.samples = state.samples;
        self.tokens = state.tokens;
        self.counted_from = self.counted_since(&state, &saved);
        self.repeats_validation = validation::is_repeated(&self.config, &saved, state.step);
        // The value that was measured at the start of the run gives the same plans, and so the same
        // bits, as without an interruption.
        if let (Some(planner), Some(min_tokens)) = (&self.planner, state.min_tokens)
            && self.min_tokens_is_measured()
        {
            planner.lock().min_tokens = min_tokens;
        }
        if let Some((before, after)) = rate_jump(&saved, &self.config, self.position()) {
            warn(&format!(
                "the learning rate jumps from {before:.3e} in step {} to {after:.3e} in step {}, \
                 because the configuration changed",
                self.step,
                self.step + 1
            ));
        }
        self.resume_report = ResumeReport {
            changes: changes.reported,
            notes: changes.notes,
        };
        Ok(source)
    }

    /// Copies a snapshot or a checkpoint into model and optimizer.
    fn restore(
        &self,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Option<(Restored, ResumeSource)>, Error> {
        let rules = ResumeRules {
            config: &self.config,
            accepted: &self.accepted_changes,
            prepare: &|state: &RunState| self.restore_placement(state),
        };
        let tensors = self.state_tensors();
        if let Some(snapshots) = &self.snapshots {
            let restored = snapshot_resume::resume(snapshots, &tensors, &self.world, &rules)?;
            if let Some(restored) = restored {
                return Ok(Some((restored, ResumeSource::Snapshot)));
            }
        }
        let root = self.checkpoint_dir();
        let restored = checkpointing::resume(&root, &tensors, &self.world, &rules, warn)?;
        Ok(restored.map(|restored| (restored, ResumeSource::Checkpoint)))
    }

    /// Returns the position since which the batches have the sizes of the configuration.
    fn counted_since(&self, state: &RunState, saved: &Config) -> CountedFrom {
        let batches_stay = saved.train.global_batch == self.config.train.global_batch
            && saved.data.sequence_length == self.config.data.sequence_length;
        let here = CountedFrom {
            step: state.step,
            samples: state.samples,
            tokens: state.tokens,
            skipped: 0,
        };
        let before = state.counted_from.filter(|_| batches_stay);
        before.unwrap_or(here)
    }

    /// Removes what interrupted writes left of checkpoints.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If checkpoints cannot be written, because their folder is a link.
    fn clean_checkpoints(&self, warn: &mut dyn FnMut(&str)) -> Result<(), Error> {
        let cleaned = if self.is_rank_0() {
            folder::clean(&self.checkpoint_dir())
        } else {
            Ok(Vec::new())
        };
        let leftovers: Result<Vec<Leftover>, Error> = match cleaned {
            Err(error @ checkpoint::Error::Mismatch { .. }) => Err(error.into()),
            Err(error) => {
                warn(&format!("an unfinished checkpoint stays: {error}"));
                Ok(Vec::new())
            }
            Ok(leftovers) => Ok(leftovers),
        };
        for leftover in agree(&self.world, leftovers)? {
            warn(&format!("removed an unfinished checkpoint: {leftover}"));
        }
        Ok(())
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
}

/// Checks the configuration of a run that is about to resume from the newest checkpoint under
/// `root`, without reading tensors. A checkpoint that cannot be read is left to the resume itself.
///
/// # Errors
/// If a key differs that changes what the saved weights compute.
pub fn check_resume(config: &Config, accepted: &[String], root: &Path) -> Result<(), Error> {
    let rules = ResumeRules {
        config,
        accepted,
        prepare: &|_| {},
    };
    for path in checkpoint::list(root)? {
        let Ok(saved) = config_in(&path) else {
            continue;
        };
        let Err(refused) = rules.check_keys(&path, &saved) else {
            return Ok(());
        };
        // A damaged checkpoint is not resumed from, whatever its configuration is.
        match folder::verify(&path, Depth::Data) {
            Ok(_) => return Err(refused),
            Err(error) if error.is_denied() => return Err(error.into()),
            Err(_) => {}
        }
    }
    Ok(())
}
