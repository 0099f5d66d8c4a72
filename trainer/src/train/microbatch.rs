//! The microbatches of a step on one rank.

use crate::Error;
use parallel::Accelerator;
use tch::Tensor;

/// The sequences that a rank processes at once, on its device.
pub(crate) struct Microbatch {
    /// Token ids `[B, S]` int64.
    pub(crate) inputs: Tensor,
    /// The next token of each position `[B, S]` int64.
    pub(crate) labels: Tensor,
}

impl Microbatch {
    pub(crate) fn upload(device: &dyn Accelerator, inputs: &Tensor, labels: &Tensor) -> Microbatch {
        Microbatch {
            inputs: device.upload(inputs),
            labels: device.upload(labels),
        }
    }
}

/// Reads microbatches of a step by their index on this rank, as often as passes need them.
pub(crate) trait MicrobatchSource {
    /// Reads microbatch `index` of this rank and uploads it to the device.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn read(&self, index: usize) -> Result<Microbatch, Error>;
}
