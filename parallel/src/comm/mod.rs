//! Communicators: the collectives of one group of ranks, whatever carries them.

mod backend;
mod device_comm;
mod flight;
mod gloo;
mod hccl;
mod hybrid;
mod local;
mod membership;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod shm;
mod staged;

pub use backend::{Backend, mpi_library};
pub(crate) use backend::{DeviceTransport, HostTransport, Transports};
pub(crate) use device_comm::DeviceComm;
pub(crate) use flight::FlightRecorder;
pub use gloo::Gloo;
pub(crate) use hccl::Hccl;
pub(crate) use hybrid::HybridComm;
pub use local::Local;
pub(crate) use membership::Membership;
#[cfg(feature = "mpi")]
pub use mpi::finalize;
#[cfg(feature = "mpi")]
pub(crate) use mpi::{Mpi, broadcast_bytes, universe};
pub(crate) use nccl::Nccl;
pub(crate) use shm::Shm;
pub(crate) use staged::Staged;
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

/// For those who cannot say more than libtorch's errors, such as gradients on their way through autograd.
impl From<CommError> for torch_ext::Error {
    fn from(error: CommError) -> torch_ext::Error {
        torch_ext::Error::new(error.to_string())
    }
}

type Finish = Box<dyn FnOnce() -> Result<(), CommError> + Send>;

/// Whether a device has done what was queued on it, or why it cannot.
pub(crate) type Progress = Box<dyn Fn() -> Result<bool, String> + Send>;

/// An operation under way. The tensors it was given must not be touched before [`Work::wait`] returns.
#[must_use = "an operation that nobody waits for may not have happened"]
pub struct Work {
    finish: Option<Finish>,
    /// Of an operation that a device goes on with after `finish`.
    progress: Option<Progress>,
}

impl Work {
    /// An operation that is already complete.
    pub fn done() -> Work {
        Work {
            finish: None,
            progress: None,
        }
    }

    /// An operation that `finish` waits for.
    pub fn new(finish: impl FnOnce() -> Result<(), CommError> + Send + 'static) -> Work {
        Work {
            finish: Some(Box::new(finish)),
            progress: None,
        }
    }

    /// An operation that is queued on a device: after `finish` what this thread is_stream_ordered there comes after it.
    pub(crate) fn queued(
        finish: impl FnOnce() -> Result<(), CommError> + Send + 'static,
        progress: impl Fn() -> Result<bool, String> + Send + 'static,
    ) -> Work {
        Work {
            finish: Some(Box::new(finish)),
            progress: Some(Box::new(progress)),
        }
    }

    /// Waits until the operation is complete; where a device does it, until whatever is queued from here on comes after it.
    ///
    /// # Errors
    /// When it failed, timed out, or its group was aborted. What a device finds out later, [`Communicator::check`] tells.
    pub fn wait(self) -> Result<(), CommError> {
        self.finish.map_or(Ok(()), |finish| finish())
    }
}

/// The collectives of one group of ranks. `rank` and `root` count inside the group.
///
/// # Collective
/// Every rank of the group calls the same operations in the same order, with tensors that are contiguous, of the
/// same dtype and, unless splits say otherwise, of the same shape. Tensors may be empty.
pub trait Communicator: Send + Sync {
    /// What carries it: `shm`, `gloo`, `mpi`, `nccl`, `hccl`, or `local`.
    fn backend(&self) -> &'static str;

    /// Whether a device is given the operations, so that [`Work::wait`] holds nobody up.
    fn is_stream_ordered(&self) -> bool {
        false
    }

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
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError>;

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
    /// them under way side by side otherwise. Both sides of a message name it in the same call, counted over the group.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
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

    /// Is complete when every rank has called it.
    ///
    /// # Errors
    /// As [`Communicator::all_reduce`].
    fn barrier(&self) -> Result<Work, CommError>;

    /// Whether all that devices were given to do among ranks has gone well; to be asked after the device was waited for, and before
    /// what it computed is believed.
    ///
    /// # Errors
    /// The first failure in this world of ranks. Where [`Work::wait`] waits for the end, there is none to tell.
    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }

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
        return Err(format!(
            "the output is {:?} and the input {:?}",
            output.kind(),
            input.kind()
        ));
    }
    for (name, tensor, splits) in [
        ("output", output, output_splits),
        ("input", input, input_splits),
    ] {
        let rows = tensor.size().first().copied().unwrap_or(0);
        if splits.len() != size
            || splits.iter().any(|&s| s < 0)
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
