//! The microbatches of a step on one rank.

use crate::{
    Error,
    data::{Dataset, count_labels},
    model::{BatchContext, IGNORED, Model},
};
use parallel::Accelerator;
use std::cell::OnceCell;
use tch::Tensor;

/// The sequences that a rank processes at once, on its device. Tokens and labels are those of this
/// rank's positions.
pub(crate) struct Microbatch {
    /// Token ids `[B, S / context ranks]` int64.
    pub(crate) tokens: Tensor,
    /// The next token of each position, like `tokens`.
    pub(crate) labels: Tensor,
    pub(crate) context: BatchContext,
}

/// Sequences on the host.
struct HostMicrobatch {
    /// Token ids `[B, S]` int64.
    inputs: Tensor,
    /// The next token of each position `[B, S]` int64.
    labels: Tensor,
}

/// Microbatches by their index on this rank. Each is read once, when it is first needed.
pub(crate) struct HostMicrobatches<'a> {
    read: Box<dyn Fn(usize) -> Result<HostMicrobatch, Error> + 'a>,
    loaded: Vec<OnceCell<HostMicrobatch>>,
}

/// The part of the validation data that a microbatch has. Rows past the end repeat the last window
/// with ignored labels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ValidationRange {
    /// First window of the microbatch.
    pub(crate) first: u64,
    /// Sequences of the microbatch.
    pub(crate) size: u64,
    /// Number of windows to validate on.
    pub(crate) windows: u64,
}

impl<'a> HostMicrobatches<'a> {
    fn new(
        count: usize,
        read: impl Fn(usize) -> Result<HostMicrobatch, Error> + 'a,
    ) -> HostMicrobatches<'a> {
        HostMicrobatches {
            read: Box::new(read),
            loaded: (0..count).map(|_| OnceCell::new()).collect(),
        }
    }

    /// Returns `count` consecutive microbatches of `size` sequences, from sample `first` of the
    /// shuffled training data.
    pub(crate) fn of_step(
        data: &'a Dataset,
        first: u64,
        size: u64,
        count: usize,
    ) -> HostMicrobatches<'a> {
        HostMicrobatches::new(count, move |index| {
            let first = first + index as u64 * size;
            let (inputs, labels) = data.batch(first..first + size)?;
            Ok(HostMicrobatch { inputs, labels })
        })
    }

    /// Returns one microbatch of the validation data.
    pub(crate) fn of_validation(data: &'a Dataset, range: ValidationRange) -> HostMicrobatches<'a> {
        HostMicrobatches::new(1, move |_| {
            let end = range.first + range.size;
            let last = range.windows - 1;
            let windows = (range.first..end).map(|window| window.min(last));
            let (inputs, labels) = data.windows(windows)?;
            let past_end = end.saturating_sub(range.windows).min(range.size) as i64;
            let mut ignored = labels.narrow(0, range.size as i64 - past_end, past_end);
            let _ = ignored.fill_(IGNORED);
            Ok(HostMicrobatch { inputs, labels })
        })
    }

    /// Returns the number of labels that count in all microbatches.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub(crate) fn counted_labels(&self) -> Result<u64, Error> {
        let counted = |index| Ok(count_labels(&self.on_host(index)?.labels));
        (0..self.loaded.len()).map(counted).sum()
    }

    /// Uploads microbatch `index` for the passes of `model`, in one copy.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub(crate) fn upload(
        &self,
        index: usize,
        model: &Model,
        device: &dyn Accelerator,
    ) -> Result<Microbatch, Error> {
        let HostMicrobatch { inputs, labels } = self.on_host(index)?;
        let positions = model.document_positions(inputs)?;
        let parts: Vec<&Tensor> = [inputs, labels].into_iter().chain(&positions).collect();
        let uploaded = device.upload(&Tensor::stack(&parts, 0));
        let inputs = uploaded.get(0);
        let positions = positions.map(|_| uploaded.get(2));
        Ok(Microbatch {
            tokens: model.own_positions(&inputs),
            labels: model.own_positions(&uploaded.get(1)),
            context: model.batch_context(&inputs, positions.as_ref()),
        })
    }

    fn on_host(&self, index: usize) -> Result<&HostMicrobatch, Error> {
        let loaded = &self.loaded[index];
        if let Some(known) = loaded.get() {
            return Ok(known);
        }
        let read = (self.read)(index)?;
        Ok(loaded.get_or_init(|| read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_microbatch_is_read_once_when_it_is_needed() {
        let reads = Cell::new(0);
        let batches = HostMicrobatches::new(3, |index| {
            reads.set(reads.get() + 1);
            let inputs = Tensor::from_slice(&[index as i64, 7]).view([1, 2]);
            let labels = Tensor::from_slice(&[7, IGNORED]).view([1, 2]);
            Ok(HostMicrobatch { inputs, labels })
        });
        assert_eq!(reads.get(), 0);
        for _ in 0..2 {
            let inputs = &batches.on_host(1).unwrap().inputs;
            assert_eq!(inputs.int64_value(&[0, 0]), 1);
        }
        assert_eq!(reads.get(), 1);
        assert_eq!(batches.counted_labels().unwrap(), 3);
        assert_eq!(reads.get(), 3);
    }
}
