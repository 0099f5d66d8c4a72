//! Communicators: the collectives of one group of ranks, whatever carries them.

mod backend;
mod flight;
mod gloo;
mod local;
mod membership;
#[cfg(feature = "mpi")]
mod mpi;

pub(crate) use backend::Carrier;
pub use backend::{Backend, mpi_library};
pub(crate) use flight::FlightRecorder;
pub use gloo::Gloo;
pub use local::Local;
pub(crate) use membership::Membership;
#[cfg(feature = "mpi")]
pub use mpi::finalize;
#[cfg(feature = "mpi")]
pub(crate) use mpi::{Mpi, share, universe};
pub use torch_ext::ReduceOp;

use tch::Tensor;

/// A collective or point-to-point operation failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("rank {rank}: {operation} in group '{group}' of ranks {members:?} failed: {reason}")]
pub struct CommError {
    /// The global rank it failed on.
    pub rank: usize,
    /// The group's name.
    pub group: String,
    /// The global ranks of the group.
    pub members: Vec<usize>,
    /// What was being done.
    pub operation: &'static str,
    /// What the backend said.
    pub reason: String,
}

/// An operation under way. The tensors it was given must not be touched before [`Work::wait`] returns.
#[must_use = "an operation that nobody waits for may not have happened"]
pub struct Work(Option<Box<dyn FnOnce() -> Result<(), CommError> + Send>>);

impl Work {
    /// An operation that is already complete.
    pub fn done() -> Work {
        Work(None)
    }

    /// An operation that `finish` waits for.
    pub fn new(finish: impl FnOnce() -> Result<(), CommError> + Send + 'static) -> Work {
        Work(Some(Box::new(finish)))
    }

    /// Waits until the operation is complete.
    ///
    /// # Errors
    /// When it failed, timed out, or its group was aborted.
    pub fn wait(self) -> Result<(), CommError> {
        self.0.map_or(Ok(()), |finish| finish())
    }
}

/// The collectives of one group of ranks. `rank` and `root` count inside the group.
///
/// # Collective
/// Every rank of the group calls the same operations in the same order, with tensors that are contiguous, of the
/// same dtype and, unless splits say otherwise, of the same shape. Tensors may be empty.
pub trait Communicator: Send + Sync {
    /// What carries it: `gloo`, `mpi`, `nccl`, `hccl`, or `local`.
    fn backend(&self) -> &'static str;

    /// This rank's number in the group.
    fn rank(&self) -> usize;

    /// How many ranks the group has.
    fn size(&self) -> usize;

    /// Combines `tensor` over the group, in place.
    ///
    /// # Errors
    /// When the operation cannot be started; later failures come from [`Work::wait`]. So for all that follow.
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError>;

    /// Copies `tensor` of `root` to all ranks, in place.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError>;

    /// Concatenates every rank's `input` `[n, ...]` along dim 0 into `output` `[size * n, ...]`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError>;

    /// Combines every rank's `input` `[size * n, ...]` and leaves this rank its part in `output` `[n, ...]`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn reduce_scatter(&self, output: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work, CommError>;

    /// Sends `input_splits[r]` rows of `input` to rank `r` and receives `output_splits[r]` rows from it.
    ///
    /// # Errors
    /// When the splits do not add up to the tensors' rows; as [`Communicator::all_reduce`].
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError>;

    /// Sends `tensor` to rank `to`; messages with one tag arrive in order.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError>;

    /// Receives into `tensor` from rank `from`.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError>;

    /// Sends and receives any number of tensors, each to or from a rank, as one operation: for backends that cannot have
    /// them under way side by side otherwise.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn exchange(&self, sends: &[(&Tensor, usize)], receives: &[(&Tensor, usize)], tag: i32) -> Result<Work, CommError> {
        let mut works = Vec::with_capacity(sends.len() + receives.len());
        for (tensor, from) in receives {
            works.push(self.recv(tensor, *from, tag)?);
        }
        for (tensor, to) in sends {
            works.push(self.send(tensor, *to, tag)?);
        }
        Ok(Work::new(move || works.into_iter().try_for_each(Work::wait)))
    }

    /// Is complete when every rank has called it.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn barrier(&self) -> Result<Work, CommError>;

    /// Gives up every operation of this group, from any thread: waiting ranks return with an error.
    fn abort(&self);
}

/// Refuses splits that do not fit the tensors, before a backend reads outside of them.
fn check_splits(
    output: &Tensor,
    input: &Tensor,
    output_splits: &[i64],
    input_splits: &[i64],
    size: usize,
) -> Result<(), String> {
    if output.kind() != input.kind() {
        return Err(format!("the output is {:?} and the input {:?}", output.kind(), input.kind()));
    }
    for (name, tensor, splits) in [("output", output, output_splits), ("input", input, input_splits)] {
        let rows = tensor.size().first().copied().unwrap_or(0);
        if splits.len() != size || splits.iter().any(|&s| s < 0) || splits.iter().sum::<i64>() != rows {
            return Err(format!("{name} splits {splits:?} do not divide {rows} rows among {size} ranks"));
        }
        if !tensor.is_contiguous() {
            return Err(format!("the {name} tensor is not contiguous"));
        }
    }
    Ok(())
}
