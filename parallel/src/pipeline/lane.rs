//! A lane runs one kind of collective while the rank computes its passes.
//!
//! It is a thread if the host waits for collectives, and a stream if the device does.

use crate::{Accelerator, CommError, Communicator, MemberRanges, background};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
};
use tch::{Kind, Tensor};
use torch_ext::{Event, Priority, Stream};

/// A rank's part in a collective; its result goes to the passes that depend on the collective.
///
/// It runs on a lane, so it may compute between operations without delaying passes. The lane calls
/// it once and keeps its tensors alive until the result is complete.
pub type CollectiveFn = Box<dyn Fn(&dyn Communicator) -> Result<Vec<Tensor>, CommError> + Send>;

/// Runs the collectives of one kind, in order.
pub(super) enum Lane {
    /// A thread that waits for each collective.
    Thread {
        requests: Sender<CollectiveFn>,
        results: Receiver<Result<Vec<Tensor>, CommError>>,
    },
    /// A stream of its own. On the stream of the passes, a rank's next pass would wait for other
    /// ranks, and theirs for this one.
    Queue {
        group: Arc<dyn Communicator>,
        like: Tensor,
        stream: Stream,
        queued: Mutex<VecDeque<PendingCollective>>,
    },
}

/// A collective on a device's stream.
pub(super) struct PendingCollective {
    results: Vec<Tensor>,
    done: Event,
    /// Keeps its tensors alive: their memory belongs to the stream of the passes.
    _collective_fn: CollectiveFn,
}

impl Lane {
    /// Starts a lane on `group` for collectives on `device`.
    pub(super) fn new(
        group: Arc<dyn Communicator>,
        device: &dyn Accelerator,
    ) -> Result<Lane, torch_ext::Error> {
        let like = device.zeros(&[1], Kind::Float);
        if group.is_stream_ordered() {
            let stream = Stream::from_pool(&like, Priority::Normal)?;
            return Ok(Lane::Queue {
                group,
                like,
                stream,
                queued: Mutex::default(),
            });
        }
        let (requests, inbox) = channel::<CollectiveFn>();
        let (outbox, results) = channel();
        background::spawn("lane", move || {
            // The little that is computed here must not take cores from the passes.
            tch::set_num_threads(1);
            let device = torch_ext::use_device(like.device())
                .map_err(|error| failed(group.as_ref(), &error));
            while let Ok(collective_fn) = inbox.recv() {
                let run = |()| tch::no_grad(|| collective_fn(group.as_ref()));
                let result = device.clone().and_then(run);
                if outbox.send(result).is_err() {
                    return;
                }
            }
        });
        Ok(Lane::Thread { requests, results })
    }

    /// Starts a collective after those that were entered before.
    ///
    /// # Errors
    /// On a device, those of its operations.
    pub(super) fn enter(&self, collective_fn: CollectiveFn) -> Result<(), CommError> {
        match self {
            Lane::Thread { requests, .. } => {
                let sent = requests.send(collective_fn);
                sent.expect("the thread lives as long as the lane");
            }
            Lane::Queue {
                group,
                like,
                stream,
                queued,
            } => {
                let failed = |error| failed(group.as_ref(), &error);
                let passes = Stream::current(like).map_err(failed)?;
                let so_far = passes.record().map_err(failed)?;
                stream.wait_for(&so_far).map_err(failed)?;
                stream.make_current().map_err(failed)?;
                let results = tch::no_grad(|| collective_fn(group.as_ref()));
                let done = stream.record();
                passes.make_current().map_err(failed)?;
                let pending = PendingCollective {
                    results: results?,
                    done: done.map_err(failed)?,
                    _collective_fn: collective_fn,
                };
                queued.lock().push_back(pending);
            }
        }
        Ok(())
    }

    /// Returns the result of the oldest collective.
    ///
    /// A thread's result is waited for. On a device, the stream of the passes waits for it.
    ///
    /// # Errors
    /// If the collective fails.
    pub(super) fn next(&self) -> Result<Vec<Tensor>, CommError> {
        match self {
            Lane::Thread { results, .. } => {
                let result = results.recv();
                result.expect("the thread lives as long as the lane")
            }
            Lane::Queue {
                group,
                like,
                queued,
                ..
            } => {
                let oldest = queued.lock().pop_front();
                let oldest = oldest.expect("each result belongs to a collective that was entered");
                let wait = || {
                    let passes = Stream::current(like)?;
                    passes.wait_for(&oldest.done)?;
                    oldest
                        .results
                        .iter()
                        .try_for_each(|tensor| passes.record_tensor(tensor))
                };
                wait().map_err(|error| failed(group.as_ref(), &error))?;
                Ok(oldest.results)
            }
        }
    }
}

fn failed(group: &dyn Communicator, error: &torch_ext::Error) -> CommError {
    CommError {
        rank: group.rank(),
        group: "pipeline".into(),
        members: MemberRanges::first(group.size()),
        operation: "queueing a collective",
        reason: error.to_string(),
    }
}
