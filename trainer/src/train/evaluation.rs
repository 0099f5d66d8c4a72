//! Validation loss of the current parameters, and the steps after which a run computes it.

use super::{
    Trainer,
    metrics::records::ValidationMetrics,
    microbatch::{HostMicrobatches, ValidationRange},
};
use crate::{
    Error,
    config::{Config, KeyChange, ResumeEffect},
    data::validation::ValidationSource,
    scalars::fetch_scalars,
};
use moe::balance::BatchTotals;
use parallel::agreement::sum_over_ranks;
use std::collections::BTreeMap;

/// True if a validation is due after step `step`, which may be the last of the run.
pub(super) fn is_due(config: &Config, step: u64, is_last: bool) -> bool {
    let Some(validation) = &config.validation else {
        return false;
    };
    is_last || validation.every > 0 && step.is_multiple_of(validation.every)
}

/// True if a run that resumes from the state after step `step` begins with the validation of that
/// step, and replaces the line that it may have. `saved` is the configuration of the state, and
/// `changes` are the reported differences from it: not those that only move data.
///
/// The state does not tell whether there is a line: an orderly stop omits the validation, a disk
/// may not have taken the line when the run was killed, and the run may have moved to another
/// folder. So each due validation is repeated, which gives the same line. Nothing but the state
/// and the configurations decides, so that all ranks agree without the file, which only rank 0 has.
///
/// A run that validates in another way keeps the line instead: its own value would not be that of
/// the run that trained up to `step`. The caller compares the contents of the data.
pub(super) fn is_repeated(saved: &Config, changes: &[KeyChange], step: u64) -> bool {
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

impl Trainer {
    /// Returns the loss of each source of validation data, or `None` without validation data.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If data cannot be read or a collective fails.
    pub fn validate(&self) -> Result<Option<ValidationMetrics>, Error> {
        if self.data.validation.is_empty() {
            return Ok(None);
        }
        let mut own_losses = Vec::new();
        let mut counted_tokens = Vec::new();
        for source in &self.data.validation {
            let own = self.validate_on(source, source.windows)?;
            own_losses.push(own.loss);
            counted_tokens.push(own.counted_tokens);
        }
        let losses = sum_over_ranks(&self.rank.world, &own_losses)?;
        let total: u64 = counted_tokens.iter().sum();
        let mut metrics = ValidationMetrics {
            step: self.step(),
            validation_loss: mean_loss(&losses, &counted_tokens),
            counted_tokens: total,
            validation: BTreeMap::new(),
            bits_per_byte: BTreeMap::new(),
        };
        for (source, loss) in self.data.validation.iter().zip(losses) {
            let name = || source.name.clone();
            metrics.validation.insert(name(), loss);
            if let Some(bits) = source.bits_per_byte(loss) {
                metrics.bits_per_byte.insert(name(), bits);
            }
        }
        Ok(Some(metrics))
    }

    /// Runs the operations of a validation on one sequence, if there is validation data.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If data cannot be read or a collective fails.
    pub(super) fn rehearse_validation(&self) -> Result<(), Error> {
        if let Some(source) = self.data.validation.first() {
            let own = self.validate_on(source, 1)?;
            sum_over_ranks(&self.rank.world, &[own.loss])?;
        }
        Ok(())
    }

    /// Runs the model on the first `windows` sequences of a source.
    fn validate_on(&self, source: &ValidationSource, windows: u64) -> Result<OwnLoss, Error> {
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
            HostMicrobatches::of_validation(&source.data, range)
        };
        // A rank may have too many sequences to keep them from here to the forward passes.
        let count = || {
            let counts = rounds.clone().map(|round| batch(round).counted_labels());
            counts.sum()
        };
        let counted_tokens = self.counted_tokens(&source.data, tokens, count)?;
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
        Ok(OwnLoss {
            loss: losses.into_iter().fold(0.0, |sum, loss| sum + loss),
            counted_tokens,
        })
    }
}

/// A rank's part of a validation loss.
struct OwnLoss {
    /// The part of the mean that this rank adds.
    loss: f64,
    /// Counted tokens of all ranks.
    counted_tokens: u64,
}

/// Returns the mean over all counted tokens, of the means over those of each source.
fn mean_loss(losses: &[f64], counted_tokens: &[u64]) -> f64 {
    let total: u64 = counted_tokens.iter().sum();
    let parts = losses.iter().zip(counted_tokens);
    let parts = parts.map(|(loss, &tokens)| loss * (tokens as f64 / total as f64));
    parts.fold(0.0, |sum, part| sum + part)
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
        config.validation = Some(ValidationConfig {
            every,
            sequences,
            at_start: true,
        });
        config
    }

    fn repeated_from(now: &Config, saved: &Config, step: u64) -> bool {
        is_repeated(saved, &now.changes_from(saved), step)
    }

    #[test]
    fn the_saved_configuration_decides_what_is_repeated() {
        let saved = validating(10);
        let repeated = |step| repeated_from(&saved, &saved, step);
        assert!(repeated(10) && repeated(90));
        assert!(!repeated(0) && !repeated(15));
        // The last step of a shorter run is validated whatever its number is: no stop omits that.
        let mut shorter = saved.clone();
        shorter.train.steps = 15;
        assert!(is_due(&shorter, 15, true) && !repeated_from(&saved, &shorter, 15));
        let more_often = validating(5);
        assert!(!repeated_from(&more_often, &saved, 15));
        assert!(repeated_from(&saved, &more_often, 15));
    }

    #[test]
    fn a_value_of_another_kind_is_kept() {
        let saved = validating(10);
        let repeated_after = |change: &dyn Fn(&mut Config)| {
            let mut now = saved.clone();
            change(&mut now);
            repeated_from(&now, &saved, 20)
        };
        let other_data = |config: &mut Config| config.data.validation[0].weight = Some(2.0);
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
        assert!(repeated_after(
            &|config| config.data.train[0].weight = Some(2.0)
        ));
        assert!(repeated_after(&|config| config.run.dir = "other".into()));
    }

    #[test]
    fn the_mean_is_over_tokens() {
        assert_eq!(mean_loss(&[0.1], &[7]), 0.1);
        assert_eq!(mean_loss(&[0.0, 3.0], &[100, 200]), 2.0);
    }
}
