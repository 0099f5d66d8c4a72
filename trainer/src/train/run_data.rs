//! The data of a run, and how far the run has come in it.

use super::run_state::CountedFrom;
use crate::{
    Error,
    config::Config,
    data::{Dataset, recorded::RecordedData, validation::ValidationSource},
    optim::schedule::Position,
};
use dataset::order::OrderVersion;
use parallel::Accelerator;
use std::collections::BTreeMap;

/// Data sets of a run, and its position.
pub(super) struct RunData {
    pub(super) train: Dataset,
    pub(super) validation: Vec<ValidationSource>,
    /// The records and fingerprints that rank 0 has read.
    pub(super) recorded: RecordedData,
    pub(super) position: DataPosition,
    /// The version of the order in which `train` is drawn.
    pub(super) order: OrderVersion,
}

impl RunData {
    /// Takes what is recorded of the data from here on.
    ///
    /// # Errors
    /// If no token of a source of validation data counts, or a file cannot be read.
    pub(super) fn use_recorded(
        &mut self,
        config: &Config,
        recorded: RecordedData,
    ) -> Result<(), Error> {
        self.recorded = recorded;
        self.mask_ends(config, self.recorded.tokens.end);
        let bytes_per_token = &self.recorded.bytes_per_token;
        for (source, bytes) in self.validation.iter_mut().zip(bytes_per_token) {
            source.bytes_per_token = *bytes;
            source.check_labels()?;
        }
        Ok(())
    }

    /// Leaves labels after the token `end` out if the configuration says so.
    pub(super) fn mask_ends(&mut self, config: &Config, end: Option<u32>) {
        let end = end.filter(|_| config.data.eod_mask_loss);
        self.train.mask_after(end);
        for source in &mut self.validation {
            source.data.mask_after(end);
        }
    }

    /// Returns the epochs so far of the source that has most.
    pub(super) fn most_epochs(&self) -> f64 {
        let epochs = self.train.sampler().epochs(self.position.samples);
        epochs.into_iter().fold(0.0, f64::max)
    }
}

/// Data and device of a trainer, besides its configuration and its world.
pub(super) struct Resources {
    pub(super) device: Box<dyn Accelerator>,
    pub(super) data: RunData,
}

/// Completed steps, with the samples and tokens that they took.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct DataPosition {
    /// Number of completed optimizer steps.
    pub(super) step: u64,
    /// Samples drawn so far: the position in the data.
    pub(super) samples: u64,
    /// Tokens trained on so far.
    pub(super) tokens: u64,
    /// Position since which the batches have the sizes of the configuration.
    pub(super) counted_from: CountedFrom,
    /// Number of batches to skip before a step, because one made the loss not finite.
    pub(super) skips: BTreeMap<u64, u64>,
}

impl DataPosition {
    /// Returns the sequences of the next step, over all ranks.
    pub(super) fn sequences(&self, config: &Config) -> usize {
        config.batch_at(self.tokens)
    }

    /// Returns the tokens of the next step, over all ranks.
    pub(super) fn step_tokens(&self, config: &Config) -> u64 {
        config.step_tokens_at(self.tokens)
    }

    /// Returns the beginning of the next step in the schedule of the learning rate.
    pub(super) fn in_schedule(&self) -> Position {
        Position {
            step: self.step,
            tokens: self.tokens,
        }
    }

    /// Skips the batches that are to be skipped before the next step.
    pub(super) fn skip_batches(&mut self, config: &Config) {
        let Some(&batches) = self.skips.get(&(self.step + 1)) else {
            return;
        };
        let skipped = batches * self.sequences(config) as u64;
        self.samples += skipped;
        self.counted_from.skipped += skipped;
    }

    /// Returns the samples that have been drawn at the end of the run.
    pub(super) fn samples_at_end(&self, config: &Config) -> u64 {
        let steps = config.train.steps.saturating_sub(self.step);
        let tokens = config.tokens_after(self.tokens, steps) - self.tokens;
        self.samples + tokens / config.data.sequence_length as u64
    }

    /// Counts the next step as completed.
    pub(super) fn complete_step(&mut self, config: &Config) {
        self.step += 1;
        // The tokens decide the batch, so they are counted last.
        self.samples += self.sequences(config) as u64;
        self.tokens += self.step_tokens(config);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::schedule::tests::config;

    #[test]
    fn steps_and_skipped_batches_take_samples() {
        let ramp = "steps: 100, \
                    global_batch: [{tokens: 0, sequences: 2}, {tokens: 32, sequences: 4}] \
                    | constant: {lr: 1.0}";
        let config = config(ramp);
        let length = config.data.sequence_length as u64;
        let mut position = DataPosition {
            skips: BTreeMap::from([(3, 5)]),
            ..DataPosition::default()
        };
        let mut expected = DataPosition {
            skips: position.skips.clone(),
            ..DataPosition::default()
        };
        for step in 1..=20 {
            let sequences = if expected.tokens < 32 { 2 } else { 4 };
            let skipped = if step == 3 { 5 * sequences } else { 0 };
            position.skip_batches(&config);
            position.complete_step(&config);
            expected.step = step;
            expected.samples += skipped + sequences;
            expected.tokens += sequences * length;
            expected.counted_from.skipped += skipped;
            assert_eq!(position, expected);
            // From here on, every step has the larger batch.
            if expected.tokens >= 32 {
                let at_end = position.samples_at_end(&config);
                assert_eq!(at_end, position.samples + (100 - step) * 4);
            }
        }
    }
}
