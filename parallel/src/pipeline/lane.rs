//! Where collectives go on beside a rank's passes: a thread where they are waited for on the host, a queue where a device does them.

use super::CollectiveFn;
use crate::background;
use crate::{Accelerator, CommError, Communicator};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use tch::{Kind, Tensor};
use torch_ext::{Event, Stream};

/// Goes through the exchanges of one kind of collective, in order.
pub(super) enum Lane {
    /// A thread that waits for each.
    Thread {
        requests: Sender<CollectiveFn>,
        results: Receiver<Result<Vec<Tensor>, CommError>>,
    },
    /// A stream beside the passes' one. Were they on the passes' own, what this rank computes next would wait for other ranks, and
    /// theirs for it.
    Queue {
        group: Arc<dyn Communicator>,
        like: Tensor,
        stream: Stream,
        queued: Mutex<VecDeque<PendingCollective>>,
    },
}

/// An exchange that a device was given.
pub(super) struct PendingCollective {
    results: Vec<Tensor>,
    done: Event,
    /// Kept for the tensors in it, whose memory is of the passes' stream.
    _collective_fn: CollectiveFn,
}

impl Lane {
    pub(super) fn new(
        group: Arc<dyn Communicator>,
        device: &dyn Accelerator,
    ) -> Result<Lane, torch_ext::Error> {
        let like = device.zeros(&[1], Kind::Float);
        let on_device = !device.computes_on_host();
        if group.is_stream_ordered() {
            let stream = Stream::from_pool(&like)?;
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
            // What little is computed here must not take cores from the passes.
            tch::set_num_threads(1);
            if on_device && torch_ext::set_device(&like).is_err() {
                return;
            }
            while let Ok(exchange) = inbox.recv() {
                if outbox
                    .send(tch::no_grad(|| exchange(group.as_ref())))
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Lane::Thread { requests, results })
    }

    /// Begins an exchange.
    ///
    /// # Errors
    /// On a device, those of its operations.
    pub(super) fn enter(&self, exchange: CollectiveFn) -> Result<(), CommError> {
        match self {
            Lane::Thread { requests, .. } => requests
                .send(exchange)
                .expect("the thread lives as long as this"),
            Lane::Queue {
                group,
                like,
                stream,
                queued,
            } => {
                let failed = |error| failed(group.as_ref(), &error);
                let passes = Stream::current(like).map_err(failed)?;
                passes
                    .record()
                    .and_then(|so_far| stream.wait_for(&so_far))
                    .map_err(failed)?;
                stream.make_current().map_err(failed)?;
                let results = tch::no_grad(|| exchange(group.as_ref()));
                let done = stream.record();
                passes.make_current().map_err(failed)?;
                let queued_now = PendingCollective {
                    results: results?,
                    done: done.map_err(failed)?,
                    _collective_fn: exchange,
                };
                queued.lock().push_back(queued_now);
            }
        }
        Ok(())
    }

    /// The result of the next one: on a device, for whatever is queued from here on.
    ///
    /// # Errors
    /// Those of its operations.
    pub(super) fn next(&self) -> Result<Vec<Tensor>, CommError> {
        match self {
            Lane::Thread { results, .. } => {
                results.recv().expect("the thread lives as long as this")
            }
            Lane::Queue {
                group,
                like,
                queued,
                ..
            } => {
                let next = queued.lock().pop_front();
                let next = next.expect("as many are asked for as were begun");
                let wait = || {
                    let passes = Stream::current(like)?;
                    passes.wait_for(&next.done)?;
                    next.results
                        .iter()
                        .try_for_each(|tensor| passes.record_tensor(tensor))
                };
                wait().map_err(|error| failed(group.as_ref(), &error))?;
                Ok(next.results)
            }
        }
    }
}

fn failed(group: &dyn Communicator, error: &torch_ext::Error) -> CommError {
    CommError {
        rank: group.rank(),
        group: "pipeline".into(),
        members: (0..group.size()).collect(),
        operation: "queueing a collective",
        reason: error.to_string(),
    }
}
