//! A communicator whose calls are recorded.

use super::{
    super::{CommError, Communicator, ReduceOp, Work},
    FlightRecorder,
    calls::{Call, RecordedGroup},
};
use kernels::profile::{self, span};
use std::{sync::Arc, time::Instant};
use tch::Tensor;

pub(super) struct RecordedComm {
    pub(super) inner: Arc<dyn Communicator>,
    pub(super) recorder: FlightRecorder,
    pub(super) group: Arc<RecordedGroup>,
}

impl RecordedComm {
    /// Records a collective; `tensor` is what this rank contributes.
    fn collective(
        &self,
        operation: &'static str,
        tensor: Option<&Tensor>,
        start: impl FnOnce() -> Result<Work, CommError>,
    ) -> Result<Work, CommError> {
        self.record(operation, tensor, None, start)
    }

    /// Records a send to or a receive from `peer`.
    fn point_to_point(
        &self,
        operation: &'static str,
        tensor: &Tensor,
        peer: usize,
        start: impl FnOnce() -> Result<Work, CommError>,
    ) -> Result<Work, CommError> {
        self.record(operation, Some(tensor), Some(peer), start)
    }

    fn record(
        &self,
        operation: &'static str,
        tensor: Option<&Tensor>,
        peer: Option<usize>,
        start: impl FnOnce() -> Result<Work, CommError>,
    ) -> Result<Work, CommError> {
        let call = Call {
            group: self.group.clone(),
            number: None,
            operation,
            peer: peer.and_then(|peer| self.group.membership.members.get(peer).copied()),
            tensor: tensor.map_or(String::new(), |tensor| {
                format!("{:?} {:?}", tensor.kind(), tensor.size())
            }),
            started_s: self.recorder.seconds(),
            ended_s: None,
            started: Instant::now(),
            waited_for: false,
            missing: None,
        };
        self.recorder.check()?;
        let cost = tensor.map_or(profile::Cost::default(), |tensor| {
            profile::Cost::passes(1.0, tensor)
        });
        let started = self.recorder.started(call, peer.is_none());
        let id = started.id;
        let mut work = start().map_err(|error| self.recorder.failed(&started, error))?;
        let recorder = self.recorder.clone();
        let progress = work.progress.take();
        let is_on_device = progress.is_some();
        if let Some(progress) = progress {
            let call = started.call.clone();
            recorder.0.watch(id, call, self.inner.clone(), progress);
        }
        Ok(Work::new(move || {
            recorder.change(id, |call| call.waited_for = true);
            let result = span("communication", operation, || cost, || work.wait())
                .map_err(|error| recorder.failed(&started, error));
            if !is_on_device {
                recorder.ended(id);
            }
            result
        }))
    }
}

impl Communicator for RecordedComm {
    fn backend(&self) -> &'static str {
        self.inner.backend()
    }
    fn is_stream_ordered(&self) -> bool {
        self.inner.is_stream_ordered()
    }
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        let start = || self.inner.all_reduce(tensor, op);
        self.collective("all_reduce", Some(tensor), start)
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        let start = || self.inner.broadcast(tensor, root);
        self.collective("broadcast", Some(tensor), start)
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        let start = || self.inner.all_gather(output, input);
        self.collective("all_gather", Some(input), start)
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        let start = || self.inner.reduce_scatter(output, input, op);
        self.collective("reduce_scatter", Some(input), start)
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        let start = || {
            self.inner
                .all_to_all(output, input, output_splits, input_splits)
        };
        self.collective("all_to_all", Some(input), start)
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        let start = || self.inner.send(tensor, to, tag);
        self.point_to_point("send", tensor, to, start)
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        let start = || self.inner.recv(tensor, from, tag);
        self.point_to_point("recv", tensor, from, start)
    }
    fn exchange(
        &self,
        sends: &[(&Tensor, usize)],
        receives: &[(&Tensor, usize)],
        tag: i32,
    ) -> Result<Work, CommError> {
        let first = sends.iter().chain(receives).next();
        let tensor = first.map(|(tensor, _)| *tensor);
        let start = || self.inner.exchange(sends, receives, tag);
        self.collective("exchange", tensor, start)
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.collective("barrier", None, || self.inner.barrier())
    }
    fn check(&self) -> Result<(), CommError> {
        self.recorder.check().and_then(|()| self.inner.check())
    }
    fn abort(&self) {
        self.inner.abort();
    }
}
