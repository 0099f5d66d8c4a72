//! Start of a run from a snapshot or a checkpoint.

use super::{
    Trainer,
    checkpointing::{self, Restored},
    evaluation,
    resume_rules::{AllowedChanges, ResumeRules},
    run_state::{CountedFrom, RunState},
    saved_config::config_in,
    snapshot_resume,
};
use crate::{
    Error,
    config::{Config, KeyChange},
    data::report::DataReport,
    hub::ByteProgress,
    optim::rate_jump::rate_jump,
};
use checkpoint::folder::{self, Depth, Leftover};
use dataset::order::OrderVersion;
use parallel::agreement::agree;
use std::path::Path;

/// The state that a run starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeSource {
    /// The initial values of a new run.
    Nothing,
    /// A snapshot in the memory of keepers.
    Snapshot,
    /// A checkpoint on disk.
    Checkpoint,
    /// The folder of a Hugging Face model, which gave a new run its weights.
    Folder,
}

/// Differences between a run that resumed and the one that saved its state.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ResumeReport {
    /// Changed keys that may affect results.
    pub changes: Vec<KeyChange>,
    /// Outcomes of state that only one of both has, one line each.
    pub notes: Vec<String>,
    /// Rules of an earlier version by which the run reads its data, one line each. They are no
    /// differences.
    pub data_rules: Vec<String>,
}

/// Differences in the data after a resume.
struct ResumedData {
    /// True unless a validation has other data or other rules than before.
    validates_the_same: bool,
    /// Lines for the user about the rules of an earlier version.
    rules: Vec<String>,
}

/// Rules for the start of a run, and its outcome.
#[derive(Default)]
pub(super) struct Resumption {
    /// Keys whose refused changes the user accepts on a resume.
    accepted_changes: Vec<String>,
    /// Shows how much of a folder this rank has read.
    pub(super) loading: Option<Box<ByteProgress<'static>>>,
    pub(super) report: ResumeReport,
    /// True if the run repeats the validation of the state that it resumed from.
    pub(super) repeats_validation: bool,
}

impl Trainer {
    /// Accepts changes of these keys on a resume that would be refused. A section stands for all
    /// its keys.
    pub fn accept_changes(&mut self, keys: Vec<String>) {
        self.resumption.accepted_changes = keys;
    }

    /// Calls `progress` while this rank reads its part of the folder of `model.from`.
    pub fn show_loading(&mut self, progress: Box<ByteProgress<'static>>) {
        self.resumption.loading = Some(progress);
    }

    /// Returns how the run differs from the one whose state [`Trainer::resume`] read.
    pub fn resume_report(&self) -> &ResumeReport {
        &self.resumption.report
    }

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
        if self.durability.snapshots.is_none() {
            // With keepers, the launcher writes checkpoints and does this.
            self.clean_checkpoints(warn)?;
        }
        let Some((restored, source)) = restored else {
            return self.start_from_folder();
        };
        let Restored {
            state,
            saved,
            mut changes,
        } = restored;
        if let (Some(current), Some(saved)) = (&mut self.experts.placement, &state.placement) {
            current.resume(saved);
        }
        let counted_from = self.counted_since(&state, &saved);
        let position = &mut self.data.position;
        position.step = state.step;
        position.samples = state.samples;
        position.tokens = state.tokens;
        position.counted_from = counted_from;
        // The value that was measured at the start of the run gives the same plans, and so the same
        // bits, as without an interruption.
        if let (Some(planner), Some(min_tokens)) = (&self.experts.planner, state.min_tokens)
            && self.min_tokens_is_measured()
        {
            planner.lock().min_tokens = min_tokens;
        }
        if let Some((before, after)) =
            rate_jump(&saved, &self.config, self.data.position.in_schedule())
        {
            warn(&format!(
                "the learning rate jumps from {before:.3e} in step {} to {after:.3e} in step {}, \
                 because the configuration changed",
                self.step(),
                self.step() + 1
            ));
        }
        let resumed = self.resume_data(&state, &saved, &mut changes, warn)?;
        let starts = state.state_starts;
        self.optimizer
            .set_state_starts(starts, &self.model.parameters);
        self.resumption.repeats_validation = resumed.validates_the_same
            && evaluation::is_repeated(&saved, &changes.reported, state.step);
        self.resumption.report = ResumeReport {
            changes: changes.reported,
            notes: changes.notes,
            data_rules: resumed.rules,
        };
        Ok(source)
    }

    /// Continues in the saved order of samples, and compares the contents of the data.
    fn resume_data(
        &mut self,
        state: &RunState,
        saved_config: &Config,
        changes: &mut AllowedChanges,
        warn: &mut dyn FnMut(&str),
    ) -> Result<ResumedData, Error> {
        let order = state.order();
        self.data.order = order;
        self.data.train.use_order(order)?;
        let recorded = &mut self.data.recorded;
        let mut validates_the_same = true;
        if let Some(saved) = &state.data {
            let now = &recorded.fingerprints;
            for warning in now.changes_since(saved, &self.config) {
                warn(&warning);
            }
            changes
                .reported
                .retain(|change| !now.only_moved(saved, change));
            validates_the_same = now.validates_as(saved);
        }
        let saved_tokens = state.document_tokens.as_ref();
        let change = saved_tokens.and_then(|saved| recorded.tokens.resume(saved));
        // A change of a given token is one of the configuration.
        let data = &self.config.data;
        if let Some(change) = change.filter(|_| data.eod_token.is_none()) {
            warn(&change);
            validates_the_same &= data.key_that_needs_eod_token().is_none();
        }
        let mut rules = Vec::new();
        if order != OrderVersion::default() {
            rules.push(format!(
                "samples are drawn in version {} of the order, with which the run began; new runs \
                 use version {}",
                u32::from(order),
                u32::from(OrderVersion::default())
            ));
        }
        // The version that kept no order read the list as one text, from its beginning.
        let has_several =
            |config: &Config| config.validation.is_some() && config.data.validation.len() > 1;
        if state.order.is_none() && has_several(saved_config) && has_several(&self.config) {
            validates_the_same = false;
            rules.push(
                "the validation loss is now one over all sources of data.validation, where the \
                 version that began the run read the first sequences of the list only"
                    .to_string(),
            );
        }
        Ok(ResumedData {
            validates_the_same,
            rules,
        })
    }

    /// Describes the sources of training data over the whole run, in the order that the run has
    /// after [`Trainer::resume`].
    pub fn data_report(&self) -> DataReport {
        let samples = self.data.position.samples_at_end(&self.config);
        let mut report = DataReport::new(&self.config, &self.data.train, samples);
        let recorded = &self.data.recorded;
        report.lines.extend(recorded.lines.iter().cloned());
        report.warnings.extend(recorded.warnings.iter().cloned());
        let lacking = self.data.validation.iter();
        let lacking = lacking.filter_map(|source| source.lacking_windows());
        report.warnings.extend(lacking);
        report
    }

    /// Copies a snapshot or a checkpoint into model and optimizer.
    fn restore(
        &self,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Option<(Restored, ResumeSource)>, Error> {
        let rules = ResumeRules {
            config: &self.config,
            accepted: &self.resumption.accepted_changes,
            prepare: &|state: &RunState| self.restore_placement(state),
        };
        let world = &self.rank.world;
        let tensors = self.state_tensors();
        if let Some(snapshots) = &self.durability.snapshots {
            let restored = snapshot_resume::resume(snapshots, &tensors, world, &rules)?;
            if let Some(restored) = restored {
                return Ok(Some((restored, ResumeSource::Snapshot)));
            }
        }
        let root = self.checkpoint_dir();
        let restored = checkpointing::resume(&root, &tensors, world, &rules, warn)?;
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
        let cleaned = if self.rank.is_first() {
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
        for leftover in agree(&self.rank.world, leftovers)? {
            warn(&format!("removed an unfinished checkpoint: {leftover}"));
        }
        Ok(())
    }

    fn restore_placement(&self, state: &RunState) {
        let Some(placement) = &state.placement else {
            return;
        };
        let current = self.experts.placement.as_ref();
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
        let Ok(saved) = config_in(&path, config) else {
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
