//! The number of tokens whose loss counts. It normalizes the cross-entropy, so that it must be
//! known before the first backward of a step.

use super::Trainer;
use crate::{
    Error,
    config::ValidationConfig,
    data::{Dataset, count_labels},
};
use parallel::agreement::sum_over_ranks;
use tch::Tensor;

impl Trainer {
    /// Returns the counted tokens of the microbatches of all ranks. `labels` are those of this
    /// rank's microbatches, which are read if `data` has masks; otherwise all `tokens` count.
    ///
    /// # Collective
    /// All ranks, if `data` has masks.
    ///
    /// # Errors
    /// If labels cannot be read or a collective fails.
    pub(super) fn counted_tokens(
        &self,
        data: &Dataset,
        tokens: u64,
        mut labels: impl Iterator<Item = Result<Tensor, Error>>,
    ) -> Result<u64, Error> {
        if !data.has_masks() {
            return Ok(tokens);
        }
        let own = self.mesh.coordinates();
        // Ranks that differ on other axes than data read the same samples.
        let is_counting = own.tensor == 0 && own.context == 0 && own.pipeline == 0;
        let counted = if is_counting {
            labels.try_fold(0, |sum, labels| {
                labels.map(|labels| sum + count_labels(&labels))
            })?
        } else {
            0
        };
        let summed = sum_over_ranks(&self.world, &[counted as f64])?;
        Ok(summed[0] as u64)
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
