//! The communicator of ranks with a device: the memory that a tensor is in decides the transport.

use super::{CommError, Communicator, ReduceOp, Work};
use std::sync::Arc;
use tch::{Device, Tensor};

/// A group with a communicator for host memory and one for device memory.
pub(crate) struct HybridComm {
    pub(crate) host: Arc<dyn Communicator>,
    pub(crate) device: Arc<dyn Communicator>,
}

impl HybridComm {
    fn for_tensor(&self, tensor: &Tensor) -> &dyn Communicator {
        if tensor.device() == Device::Cpu {
            self.host.as_ref()
        } else {
            self.device.as_ref()
        }
    }
}

impl Communicator for HybridComm {
    fn backend(&self) -> &'static str {
        self.device.backend()
    }
    fn is_stream_ordered(&self) -> bool {
        self.device.is_stream_ordered()
    }
    fn rank(&self) -> usize {
        self.host.rank()
    }
    fn size(&self) -> usize {
        self.host.size()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.for_tensor(tensor).all_reduce(tensor, op)
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.for_tensor(tensor).broadcast(tensor, root)
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.for_tensor(input).all_gather(output, input)
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.for_tensor(input).reduce_scatter(output, input, op)
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        self.for_tensor(input)
            .all_to_all(output, input, output_splits, input_splits)
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.for_tensor(tensor).send(tensor, to, tag)
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.for_tensor(tensor).recv(tensor, from, tag)
    }
    fn exchange(
        &self,
        sends: &[(&Tensor, usize)],
        receives: &[(&Tensor, usize)],
        tag: i32,
    ) -> Result<Work, CommError> {
        match sends.iter().chain(receives).next() {
            Some((tensor, _)) => self.for_tensor(tensor).exchange(sends, receives, tag),
            None => Ok(Work::done()),
        }
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.host.barrier()
    }
    fn check(&self) -> Result<(), CommError> {
        self.device.check()
    }
    fn abort(&self) {
        // The device's driver may block.
        self.host.abort();
        self.device.abort();
    }
}
