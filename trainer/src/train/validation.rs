//! Validation loss of the current parameters.

use super::{Trainer, metrics::ValidationMetrics, microbatch::ValidationBatch};
use crate::Error;
use moe::balance::BatchTotals;
use parallel::agreement::sum_over_ranks;

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
        let Some(data) = &self.validation else {
            return Ok(None);
        };
        let windows = (config.sequences as u64).min(data.num_windows());
        let tokens = windows * self.config.data.sequence_length as u64;
        let size = self.config.train.micro_batch as u64;
        let ranks = self.mesh.shape().data as u64;
        let rank = self.mesh.coordinates().data as u64;
        // Every rank runs the same number of forwards. Rows past the end do not enter the loss.
        let rounds = 0..windows.div_ceil(size * ranks);
        let batch = |round: u64| ValidationBatch {
            data,
            device: self.device.as_ref(),
            first: (round * ranks + rank) * size,
            size,
            windows,
        };
        let labels = rounds.clone().map(|round| batch(round).labels());
        let counted_tokens = self.counted_tokens(data, tokens, labels)?;
        let mut loss = 0.0;
        for round in rounds {
            if let Some(snapshots) = &self.snapshots {
                snapshots.progress.tick();
            }
            let totals = BatchTotals {
                groups: 1.0,
                positions: tokens as f64,
                counted_tokens: counted_tokens as f64,
                counts_le: None,
            };
            let sums = self.run_schedule(&self.single_forward, None, &batch(round), totals)?;
            loss += sums.cross_entropy;
        }
        let summed = sum_over_ranks(&self.world, &[loss])?;
        Ok(Some(ValidationMetrics {
            step: self.step,
            validation_loss: summed[0],
            counted_tokens,
        }))
    }
}
