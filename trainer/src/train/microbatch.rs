//! The microbatches of a step on one rank.

use crate::{Error, data::Dataset, model::IGNORED};
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
    fn upload(device: &dyn Accelerator, inputs: &Tensor, labels: &Tensor) -> Microbatch {
        let both = device.upload(&Tensor::stack(&[inputs, labels], 0));
        Microbatch {
            inputs: both.get(0),
            labels: both.get(1),
        }
    }
}

/// Microbatches of a step by their index on this rank, read as often as passes need them.
pub(crate) trait MicrobatchSource {
    /// Reads microbatch `index` of this rank and uploads it to the device.
    ///
    /// # Errors
    /// If the data cannot be read.
    fn read(&self, index: usize) -> Result<Microbatch, Error>;
}

/// Consecutive microbatches of the shuffled training data.
pub(crate) struct TrainingBatches<'a> {
    pub(crate) data: &'a Dataset,
    pub(crate) device: &'a dyn Accelerator,
    /// First sample of this rank in the step.
    pub(crate) first: u64,
    /// Sequences of a microbatch.
    pub(crate) size: u64,
}

impl TrainingBatches<'_> {
    /// Returns inputs and labels of microbatch `index`, on the host.
    fn on_host(&self, index: usize) -> Result<(Tensor, Tensor), Error> {
        let first = self.first + index as u64 * self.size;
        self.data.batch(first..first + self.size)
    }

    /// Returns the labels of microbatch `index`, on the host.
    pub(crate) fn labels(&self, index: usize) -> Result<Tensor, Error> {
        let (_, labels) = self.on_host(index)?;
        Ok(labels)
    }
}

impl MicrobatchSource for TrainingBatches<'_> {
    fn read(&self, index: usize) -> Result<Microbatch, Error> {
        let (inputs, labels) = self.on_host(index)?;
        Ok(Microbatch::upload(self.device, &inputs, &labels))
    }
}

/// One microbatch of the validation data in order. Rows past the end repeat the last window with
/// ignored labels.
pub(crate) struct ValidationBatch<'a> {
    pub(crate) data: &'a Dataset,
    pub(crate) device: &'a dyn Accelerator,
    /// First window of this microbatch.
    pub(crate) first: u64,
    /// Sequences of a microbatch.
    pub(crate) size: u64,
    /// Number of windows to validate on.
    pub(crate) windows: u64,
}

impl ValidationBatch<'_> {
    /// Returns inputs and labels, on the host.
    fn on_host(&self) -> Result<(Tensor, Tensor), Error> {
        let end = self.first + self.size;
        let last = self.windows - 1;
        let windows = (self.first..end).map(|window| window.min(last));
        let (inputs, labels) = self.data.windows(windows)?;
        let past_end = end.saturating_sub(self.windows).min(self.size) as i64;
        let mut ignored = labels.narrow(0, self.size as i64 - past_end, past_end);
        let _ = ignored.fill_(IGNORED);
        Ok((inputs, labels))
    }

    /// Returns the labels, on the host.
    pub(crate) fn labels(&self) -> Result<Tensor, Error> {
        let (_, labels) = self.on_host()?;
        Ok(labels)
    }
}

impl MicrobatchSource for ValidationBatch<'_> {
    fn read(&self, _index: usize) -> Result<Microbatch, Error> {
        let (inputs, labels) = self.on_host()?;
        Ok(Microbatch::upload(self.device, &inputs, &labels))
    }
}
