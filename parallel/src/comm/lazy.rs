//! A communicator that is joined when it is first used.
//!
//! The first operation triggers the joining, so all members take part. A background thread joins:
//! an operation only waits for other ranks in [`Work::wait`], as on any other communicator.

use super::{
    CommError, Communicator, Membership, ReduceOp, Work,
    deferred::{AbortFlag, Deferred},
};
use crate::background;
use parking_lot::Mutex;
use std::{
    sync::{Arc, mpsc::Sender},
    time::Duration,
};
use tch::Tensor;

type Joined = Result<Arc<dyn Communicator>, CommError>;
type Join = Box<dyn FnOnce() -> Joined + Send>;
type Start = Box<dyn FnOnce(&dyn Communicator) -> Result<Work, CommError> + Send>;

/// A group whose members have not met before its first operation.
pub(crate) struct LazyComm {
    state: Arc<LazyState>,
    /// Of the communicator that will be joined.
    backend: &'static str,
    timeout: Duration,
}

struct LazyState {
    membership: Membership,
    phase: Mutex<Phase>,
    abort_flag: AbortFlag,
}

enum Phase {
    Unused(Join),
    /// With the operations that start afterwards, in order.
    Joining(Vec<QueuedOperation>),
    Joined(Joined),
}

struct QueuedOperation {
    name: &'static str,
    start: Start,
    started: Sender<Result<Work, CommError>>,
}

impl LazyComm {
    /// Returns a group for which `join` connects this rank with the others.
    ///
    /// `timeout` limits each wait, also that for members to join.
    pub(crate) fn new(
        membership: Membership,
        backend: &'static str,
        timeout: Duration,
        join: impl FnOnce() -> Joined + Send + 'static,
    ) -> LazyComm {
        LazyComm {
            state: Arc::new(LazyState {
                membership,
                phase: Mutex::new(Phase::Unused(Box::new(join))),
                abort_flag: AbortFlag::default(),
            }),
            backend,
            timeout,
        }
    }

    /// Starts an operation once the group is joined.
    fn operation(
        &self,
        name: &'static str,
        start: impl FnOnce(&dyn Communicator) -> Result<Work, CommError> + Send + 'static,
    ) -> Result<Work, CommError> {
        let state = &self.state;
        let failed = |reason: String| state.membership.error(name, reason);
        let mut phase = state.phase.lock();
        if let Phase::Joined(joined) = &*phase {
            let joined = joined.clone();
            drop(phase);
            return start(&*joined?);
        }
        state.abort_flag.check().map_err(failed)?;
        let (started, deferred) = Deferred::new(&state.abort_flag);
        let queued = QueuedOperation {
            name,
            start: Box::new(start),
            started,
        };
        *phase = match std::mem::replace(&mut *phase, Phase::Joining(Vec::new())) {
            Phase::Unused(join) => {
                let state = state.clone();
                background::spawn("join", move || state.join(join));
                Phase::Joining(vec![queued])
            }
            Phase::Joining(mut operations) => {
                operations.push(queued);
                Phase::Joining(operations)
            }
            joined @ Phase::Joined(_) => joined,
        };
        drop(phase);
        let state = state.clone();
        let timeout = self.timeout;
        Ok(Work::new(move || {
            let work = deferred.wait(timeout);
            let work = work.map_err(|reason| {
                let reason = format!("{reason} while the ranks joined the group");
                state.membership.error(name, reason)
            })?;
            work?.wait()
        }))
    }

    fn joined(&self) -> Option<Arc<dyn Communicator>> {
        match &*self.state.phase.lock() {
            Phase::Joined(Ok(joined)) => Some(joined.clone()),
            _ => None,
        }
    }
}

impl LazyState {
    /// Joins, and starts the queued operations.
    fn join(&self, join: Join) {
        let joined = join();
        let mut phase = self.phase.lock();
        let queued = match std::mem::replace(&mut *phase, Phase::Joined(joined.clone())) {
            Phase::Joining(queued) => queued,
            Phase::Unused(_) | Phase::Joined(_) => Vec::new(),
        };
        for QueuedOperation {
            name,
            start,
            started,
        } in queued
        {
            let result = match &joined {
                Err(error) => Err(error.clone()),
                Ok(joined) => {
                    let work = self.abort_flag.unless_aborted(|| start(&**joined));
                    let failed = |reason| Err(self.membership.error(name, reason));
                    work.unwrap_or_else(failed)
                }
            };
            // The operation's thread may have stopped waiting.
            let _ = started.send(result);
        }
        drop(phase);
        if let (Ok(joined), Err(_)) = (joined, self.abort_flag.check()) {
            joined.abort();
        }
    }
}

impl Communicator for LazyComm {
    fn backend(&self) -> &'static str {
        self.backend
    }
    fn rank(&self) -> usize {
        self.state.membership.position
    }
    fn size(&self) -> usize {
        self.state.membership.size()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        let tensor = tensor.shallow_clone();
        self.operation("all_reduce", move |joined| joined.all_reduce(&tensor, op))
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        let tensor = tensor.shallow_clone();
        self.operation("broadcast", move |joined| joined.broadcast(&tensor, root))
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        let output = output.shallow_clone();
        let input = input.shallow_clone();
        self.operation("all_gather", move |joined| {
            joined.all_gather(&output, &input)
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        let output = output.shallow_clone();
        let input = input.shallow_clone();
        self.operation("reduce_scatter", move |joined| {
            joined.reduce_scatter(&output, &input, op)
        })
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        // Here, since nothing is sent then.
        super::check_splits(output, input, output_splits, input_splits, self.size())
            .map_err(|reason| self.state.membership.error("all_to_all", reason))?;
        let output = output.shallow_clone();
        let input = input.shallow_clone();
        let output_splits = output_splits.to_vec();
        let input_splits = input_splits.to_vec();
        self.operation("all_to_all", move |joined| {
            joined.all_to_all(&output, &input, &output_splits, &input_splits)
        })
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        let tensor = tensor.shallow_clone();
        self.operation("send", move |joined| joined.send(&tensor, to, tag))
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        let tensor = tensor.shallow_clone();
        self.operation("recv", move |joined| joined.recv(&tensor, from, tag))
    }
    fn barrier(&self) -> Result<Work, CommError> {
        self.operation("barrier", |joined| joined.barrier())
    }
    fn abort(&self) {
        self.state.abort_flag.set();
        if let Some(joined) = self.joined() {
            joined.abort();
        }
    }
}
