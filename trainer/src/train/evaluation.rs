//! Validation loss of the current parameters, and the steps after which a run computes it.

use super::{
    Trainer,
    metrics::records::ValidationMetrics,
    microbatch::{HostMicrobatches, ValidationRange},
};
use crate::{
    Error,
    config::{Config, KeyChange, ResumeEffect, ValidationConfig},
    data::{Dataset, count_labels},
    scalars::fetch_scalars,
};
use moe::balance::BatchTotals;
use parallel::agreement::sum_over_ranks;

/// True if a validation is due after step `step`, which may be the last of the run.
pub(super) fn is_due(config: &Config, step: u64, is_last: bool) -> bool {
    let Some(validation) = &config.validation else {
        return false;
    };
    is_last || validation.every > 0 && step.is_multiple_of(validation.every)
}

/// True if a run that resumes from the state after step `step` begins with the validation of that
/// step, and replaces the line that it may have. `saved` is the configuration of the state.
///
/// The state does not tell whether there is a line: an orderly stop omits the validation, a disk
/// may not have taken the line when the run was killed, and the run may have moved to another
/// folder. So each due validation is repeated, which gives the same line. Nothing but the state
/// and the configurations decides, so that all ranks agree without the file, which only rank 0 has.
///
/// A run that validates in another way keeps the line instead: its own value would not be that of
/// the run that trained up to `step`.
pub(super) fn is_repeated(config: &Config, saved: &Config, step: u64) -> bool {
    let changes = config.changes_from(saved);
    step > 0 && is_due(saved, step, false) && !changes.iter().any(changes_value)
}

/// True if the validation loss of the same state depends on the key.
fn changes_value(change: &KeyChange) -> bool {
    let KeyChange { key, effect, .. } = change;
    let section = key.split('.').next().unwrap_or_default();
    match section {
        _ if *effect == ResumeEffect::Free || key == "data.train" => false,
        "model" | "data" | "validation" => true,
        _ => ["train.dtype", "train.fp8_experts"].contains(&key.as_str()),
    }
}

/// Refuses validation data of whose sequences no token counts.
pub(super) fn check_validation(data: &Dataset, config: &ValidationConfig) -> Result<(), Error> {
    if !data.has_masks() {
        return Ok(());
    }
    let windows = (config.sequences as u64).min(data.num_windows());
    for window in 0..windows {
        let (_, labels) = data.windows(window..window + 1)?;
        if count_labels(&labels) > 0 {
            return Ok(());
        }
    }
    Err(Error::Data(format!(
        "no token of the {windows} validation sequences counts: the masks of data.validation \
         leave none"
    )))
}

impl Trainer {
    /// Returns the mean loss over the counted tokens of the validation sequences, or `None` without
    /// validation data.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If data cannot be read or a collective fails.
    pub fn validate(&self) -> Result<Option<ValidationMetrics>, Error> {
        let Some(config) = &self.config.validation else {
            return Ok(None);
        };
        let Some(data) = &self.data.validation else {
            return Ok(None);
        };
        let windows = (config.sequences as u64).min(data.num_windows());
        let tokens = windows * self.config.data.sequence_length as u64;
        let size = self.config.train.micro_batch as u64;
        let ranks = self.rank.mesh.shape().data as u64;
        let rank = self.rank.mesh.coordinates().data as u64;
        // Every rank runs the same number of forwards. Rows past the end do not enter the loss.
        let rounds = 0..windows.div_ceil(size * ranks);
        let batch = |round: u64| {
            let first = (round * ranks + rank) * size;
            let range = ValidationRange {
                first,
                size,
                windows,
            };
            HostMicrobatches::of_validation(data, range)
        };
        // A rank may have too many sequences to keep them from here to the forward passes.
        let count = || {
            let counts = rounds.clone().map(|round| batch(round).counted_labels());
            counts.sum()
        };
        let counted_tokens = self.counted_tokens(data, tokens, count)?;
        let mut losses = Vec::new();
        for round in rounds.clone() {
            if let Some(snapshots) = &self.durability.snapshots {
                snapshots.progress.tick();
            }
            let totals = BatchTotals {
                groups: 1.0,
                positions: tokens as f64,
                counted_tokens: counted_tokens as f64,
                counts_le: None,
            };
            let schedule = &self.passes.single_forward;
            let sums = self.run_schedule(schedule, None, &batch(round), totals)?;
            losses.extend(sums.losses.cross_entropy);
        }
        let [losses] = fetch_scalars([&losses])?;
        let loss = losses.into_iter().fold(0.0, |sum, loss| sum + loss);
        let summed = sum_over_ranks(&self.rank.world, &[loss])?;
        Ok(Some(ValidationMetrics {
            step: self.step(),
            validation_loss: summed[0],
            counted_tokens,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Dtype, ValidationConfig},
        optim::schedule::tests::config,
    };

    fn validating(every: u64) -> Config {
        let mut config = config("steps: 100, global_batch: 4 | constant: {lr: 1.0}");
        config.data.validation = config.data.train.clone();
        let sequences = 8;
        config.validation = Some(ValidationConfig { every, sequences });
        config
    }

    #[test]
    fn the_saved_configuration_decides_what_is_repeated() {
        let saved = validating(10);
        let repeated = |step| is_repeated(&saved, &saved, step);
        assert!(repeated(10) && repeated(90));
        assert!(!repeated(0) && !repeated(15));
        // The last step of a shorter run is validated whatever its number is: no stop omits that.
        let mut shorter = saved.clone();
        shorter.train.steps = 15;
        assert!(is_due(&shorter, 15, true) && !is_repeated(&saved, &shorter, 15));
        let more_often = validating(5);
        assert!(!is_repeated(&more_often, &saved, 15));
        assert!(is_repeated(&saved, &more_often, 15));
    }

    #[test]
    fn a_value_of_another_kind_is_kept() {
        let saved = validating(10);
        let repeated_after = |change: &dyn Fn(&mut Config)| {
            let mut now = saved.clone();
            change(&mut now);
            is_repeated(&now, &saved, 20)
        };
        let other_data = |config: &mut Config| config.data.validation[0].weight = 2.0;
        let changes: [&dyn Fn(&mut Config); 5] = [
            &other_data,
            &|config| config.validation.as_mut().unwrap().sequences = 9,
            &|config| config.validation = None,
            &|config| config.data.sequence_length = 16,
            &|config| config.train.dtype = Dtype::Bf16,
        ];
        for (index, change) in changes.into_iter().enumerate() {
            assert!(!repeated_after(change), "change {index}");
        }
        assert!(repeated_after(&|config| config.train.steps = 200));
        assert!(repeated_after(&|config| config.train.grad_clip = 0.5));
        assert!(repeated_after(&|config| config.data.train[0].weight = 2.0));
        assert!(repeated_after(&|config| config.run.dir = "other".into()));
    }
}
