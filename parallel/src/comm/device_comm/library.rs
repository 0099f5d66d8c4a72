//! The interface of a vendor's library of collectives, such as NCCL.

use super::super::ReduceOp;
use std::ffi::c_void;
use tch::{Kind, Tensor};

/// A vendor's library. Its functions queue operations on a stream and return.
///
/// # Safety
/// The `unsafe` functions access device memory of the given sizes until the stream has run them.
pub(crate) trait Library: Send + Sync + 'static {
    /// The library's own communicator.
    type Comm: Send + Sync;

    /// The backend's name: `nccl` or `hccl`.
    const NAME: &'static str;

    /// Creates the id that distinguishes a communicator from all others.
    fn new_id(&self) -> Result<Vec<u8>, String>;

    /// Joins a communicator, as all its ranks do at about the same time.
    fn join(&self, id: &[u8], rank: usize, size: usize) -> Result<Self::Comm, String>;

    /// Aborts all queued operations, from any thread, so that the stream continues if the library
    /// can do that. No call follows, and none is in progress unless it waits for other ranks.
    fn abort(&self, comm: &Self::Comm, stream: *mut c_void);

    /// Returns why queued operations cannot complete, or `None` as long as they can. The
    /// communicator was not aborted.
    fn failure(&self, comm: &Self::Comm) -> Option<String>;

    /// True if `operation` can reduce elements of this kind.
    fn supports_reduction(&self, kind: Kind, operation: &str) -> bool;

    unsafe fn all_reduce(
        &self,
        to: &LaunchTarget<Self>,
        data: *mut c_void,
        elements: Elements,
        op: ReduceOp,
    ) -> Result<(), String>;

    unsafe fn broadcast(
        &self,
        to: &LaunchTarget<Self>,
        data: *mut c_void,
        elements: Elements,
        root: usize,
    ) -> Result<(), String>;

    /// Gathers `elements` from each rank.
    unsafe fn all_gather(
        &self,
        to: &LaunchTarget<Self>,
        out: *mut c_void,
        data: *mut c_void,
        elements: Elements,
    ) -> Result<(), String>;

    /// Leaves `elements` on each rank.
    unsafe fn reduce_scatter(
        &self,
        to: &LaunchTarget<Self>,
        out: *mut c_void,
        data: *mut c_void,
        elements: Elements,
        op: ReduceOp,
    ) -> Result<(), String>;

    unsafe fn all_to_all(
        &self,
        to: &LaunchTarget<Self>,
        out: Parts,
        data: Parts,
        kind: Kind,
    ) -> Result<(), String>;

    /// Sends and receives messages as one operation.
    unsafe fn messages(&self, to: &LaunchTarget<Self>, messages: &[Message]) -> Result<(), String>;
}

/// The communicator and the stream of an operation.
pub(crate) struct LaunchTarget<'a, L: Library + ?Sized> {
    pub(crate) comm: &'a L::Comm,
    pub(crate) stream: *mut c_void,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Elements {
    pub(crate) count: usize,
    pub(crate) kind: Kind,
}

impl Elements {
    pub(super) fn of(tensor: &Tensor) -> Elements {
        Elements {
            count: tensor.numel(),
            kind: tensor.kind(),
        }
    }
}

/// One part per rank, which are adjacent in memory.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) data: *mut c_void,
    /// Elements of each part.
    pub(crate) counts: &'a [usize],
}

/// A message of an exchange.
pub(crate) struct Message {
    pub(crate) is_send: bool,
    pub(crate) data: *mut c_void,
    pub(crate) elements: Elements,
    pub(crate) peer: usize,
}
