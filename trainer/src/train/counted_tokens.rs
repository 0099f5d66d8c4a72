//! The number of tokens whose loss counts. It normalizes the cross-entropy, so that it must be
//! known before the first backward of a step.

use super::Trainer;
use crate::{Error, data::Dataset};
use parallel::agreement::sum_over_ranks;

impl Trainer {
    /// Returns the counted tokens of the microbatches of all ranks. `count` returns those of this
    /// rank's microbatches and is called if `data` has masks; otherwise all `tokens` count.
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
        count: impl FnOnce() -> Result<u64, Error>,
    ) -> Result<u64, Error> {
        if !data.has_masks() {
            return Ok(tokens);
        }
        let own = self.rank.mesh.coordinates();
        // Ranks that differ on other axes than data read the same samples.
        let is_counting = own.tensor == 0 && own.context == 0 && own.pipeline == 0;
        let counted = if is_counting { count()? } else { 0 };
        let summed = sum_over_ranks(&self.rank.world, &[counted as f64])?;
        Ok(summed[0] as u64)
    }
}
