//! The interface of all communicators, their errors, and operations in progress.

use super::{MemberRanges, ReduceOp};
use tch::Tensor;

/// An error of a collective or point-to-point operation.
#[derive(Debug, Clone, thiserror::Error)]
#[error("rank {rank}: {operation} in group '{group}' of ranks {members} failed: {reason}")]
pub struct CommError {
    /// The global rank on which the operation failed.
    pub rank: usize,
    /// The name of the group.
    pub group: String,
    /// The global ranks of the group.
    pub members: MemberRanges,
    pub operation: &'static str,
    /// The message of the backend, or why moerun rejected the call.
    pub reason: String,
}

/// For callbacks of autograd, which can only return libtorch's errors.
impl From<CommError> for torch_ext::Error {
    fn from(error: CommError) -> torch_ext::Error {
        torch_ext::Error::new(error.to_string())
    }
}

type Finish = Box<dyn FnOnce() -> Result<(), CommError> + Send>;

/// Returns true once a device has completed an operation, or why it cannot.
pub(crate) type Progress = Box<dyn Fn() -> Result<bool, String> + Send>;

/// An operation in progress. Its tensors must not be touched until [`Work::wait`] returns.
#[must_use = "the operation has completed only after `wait`"]
pub struct Work {
    finish: Option<Finish>,
    /// Present if a device continues the operation after `finish`.
    pub(super) progress: Option<Progress>,
}

impl Work {
    /// Returns an operation that is already complete.
    pub fn done() -> Work {
        Work {
            finish: None,
            progress: None,
        }
    }

    /// Returns an operation that `finish` waits for.
    pub fn new(finish: impl FnOnce() -> Result<(), CommError> + Send + 'static) -> Work {
        Work {
            finish: Some(Box::new(finish)),
            progress: None,
        }
    }

    /// Returns an operation that is queued on a device. After `finish`, whatever this thread queues
    /// there runs after the operation.
    pub(crate) fn queued(
        finish: impl FnOnce() -> Result<(), CommError> + Send + 'static,
        progress: impl Fn() -> Result<bool, String> + Send + 'static,
    ) -> Work {
        Work {
            finish: Some(Box::new(finish)),
            progress: Some(Box::new(progress)),
        }
    }

    /// Waits until the operation is complete.
    ///
    /// If [`Communicator::is_stream_ordered`], the host does not wait: what this thread queues from
    /// here on runs after the operation.
    ///
    /// # Errors
    /// If the operation failed or timed out, or its group was aborted. [`Communicator::check`]
    /// reports what a device discovers later.
    pub fn wait(self) -> Result<(), CommError> {
        self.finish.map_or(Ok(()), |finish| finish())
    }
}

/// The collectives of one group of ranks. `rank` and `root` are numbers within the group.
///
/// # Collective
/// Every rank of the group calls the same operations in the same order, with contiguous tensors of
/// the same dtype and, unless splits say otherwise, of the same shape. Tensors may be empty.
pub trait Communicator: Send + Sync {
    /// Returns the backend's name: `shm`, `gloo`, `mpi`, `nccl`, `hccl` or `local`.
    fn backend(&self) -> &'static str;

    /// True if operations run on a device stream and [`Work::wait`] does not block the host.
    fn is_stream_ordered(&self) -> bool {
        false
    }

    /// Returns this rank's number in the group.
    fn rank(&self) -> usize;

    /// Returns the number of ranks in the group.
    fn size(&self) -> usize;

    /// Reduces `tensor` over the group, in place.
    ///
    /// # Errors
    /// If the operation cannot start; [`Work::wait`] returns later failures. This holds for all
    /// operations.
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError>;

    /// Copies `tensor` of `root` to all ranks, in place.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`].
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError>;

    /// Concatenates every rank's `input` `[n, ...]` along dim 0 into `output` `[size * n, ...]`.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`].
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError>;

    /// Reduces every rank's `input` `[size * n, ...]` and writes this rank's part to `output`
    /// `[n, ...]`.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`].
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError>;

    /// Sends `input_splits[r]` rows of `input` to each rank `r`, and receives `output_splits[r]`
    /// rows from it.
    ///
    /// # Errors
    /// If the splits do not add up to the tensors' rows, and as for [`Communicator::all_reduce`].
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError>;

    /// Sends `tensor` to rank `to`. Messages with the same tag arrive in order.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`].
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError>;

    /// Receives into `tensor` from rank `from`.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`].
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError>;

    /// Sends and receives any number of tensors, each to or from a rank, as one operation.
    ///
    /// Some backends can overlap messages only this way. Both sides of a message name it in the
    /// same call, counted over the group.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`].
    fn exchange(
        &self,
        sends: &[(&Tensor, usize)],
        receives: &[(&Tensor, usize)],
        tag: i32,
    ) -> Result<Work, CommError> {
        let mut works = Vec::with_capacity(sends.len() + receives.len());
        for (tensor, from) in receives {
            works.push(self.recv(tensor, *from, tag)?);
        }
        for (tensor, to) in sends {
            works.push(self.send(tensor, *to, tag)?);
        }
        Ok(Work::new(move || {
            works.into_iter().try_for_each(Work::wait)
        }))
    }

    /// Completes once every rank has called it.
    ///
    /// # Errors
    /// As for [`Communicator::all_reduce`].
    fn barrier(&self) -> Result<Work, CommError>;

    /// Checks the operations that were queued on devices.
    ///
    /// Call it after the device is synchronized and before using its results.
    ///
    /// # Errors
    /// The first failure in this world. Backends whose [`Work::wait`] waits for completion have
    /// none.
    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }

    /// Aborts every operation of this group, from any thread: waiting ranks return an error.
    fn abort(&self);
}

/// Rejects splits that do not match the tensors, before a backend accesses memory outside of them.
pub(crate) fn check_splits(
    output: &Tensor,
    input: &Tensor,
    output_splits: &[i64],
    input_splits: &[i64],
    size: usize,
) -> Result<(), String> {
    if output.kind() != input.kind() {
        return Err(format!(
            "the output is {:?}, but the input is {:?}",
            output.kind(),
            input.kind()
        ));
    }
    for (name, tensor, splits) in [
        ("output", output, output_splits),
        ("input", input, input_splits),
    ] {
        let rows = tensor.size().first().copied().unwrap_or(0);
        let is_negative = |split: &i64| *split < 0;
        if splits.len() != size
            || splits.iter().any(is_negative)
            || splits.iter().sum::<i64>() != rows
        {
            return Err(format!(
                "{name} splits {splits:?} do not divide {rows} rows among {size} ranks"
            ));
        }
        if !tensor.is_contiguous() {
            return Err(format!("the {name} tensor is not contiguous"));
        }
    }
    Ok(())
}
