//! Communicators whose operations run on a device stream: the common part of NCCL and HCCL.
//!
//! Each operation runs on a stream of its communicator. It starts after the work that this thread
//! has queued so far; what this thread queues after [`Work::wait`] starts after the operation. The
//! host waits for neither. A tensor may be freed after [`Work::wait`], since whatever reuses its
//! memory is queued later. (c10d's ProcessGroupNCCL has the same discipline.)
//!
//! A failure therefore appears later: the flight recorder looks for it, and [`Communicator::check`]
//! returns it.

mod abortable;
mod library;
mod stream_budget;
mod streams;

use super::{CommError, Communicator, Membership, ReduceOp, Work, check_splits};
pub(super) use library::{Elements, LaunchTarget, Library, Message, Parts};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
pub(crate) use stream_budget::StreamBudget;
use streams::{DeviceStream, Participants, all_participants};
use tch::Tensor;
use torch_ext::{Event, Store, Stream};

/// A group of ranks whose tensors are on a device.
pub(crate) struct DeviceComm<L: Library>(Arc<DeviceCommState<L>>);

struct DeviceCommState<L: Library> {
    library: &'static L,
    membership: Membership,
    /// A tensor on the device.
    like: Mutex<Tensor>,
    streams: BTreeMap<Participants, DeviceStream<L>>,
    aborted: AtomicBool,
}

/// A queued operation, with the tensors that it accesses.
struct Pending {
    done: Arc<Event>,
    /// The last tensor only tells the device.
    tensors: Vec<Tensor>,
    waited: bool,
}

impl Pending {
    /// Orders what this thread queues from here on after the operation.
    fn wait_on_current_stream(&mut self) -> Result<(), torch_ext::Error> {
        self.waited = true;
        let like = &self.tensors[self.tensors.len() - 1];
        Stream::current(like)?.wait_for(&self.done)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // The tensors' memory may be reused only after the operation, even if no thread waited.
        if !self.waited {
            let _ = self.wait_on_current_stream();
        }
    }
}

/// Runs in [`Work::wait`], after the operation.
type WaitHook = Option<Box<dyn FnOnce() + Send>>;

impl<L> DeviceComm<L>
where
    L: Library,
{
    /// Joins a group. `store` is the group's own, and `like` a tensor on the device.
    ///
    /// With `p2p`, neighbours in the ring of the group can send to each other. All of the vendor's
    /// communicators are created here, because that waits for the other ranks. An operation must
    /// not: the others may first do something that waits for this rank. Each takes one of the
    /// streams of `budget`.
    ///
    /// # Collective
    /// All members.
    ///
    /// # Errors
    /// If a member does not join within `timeout`, the library fails, or no stream is left.
    pub(crate) fn join(
        library: &'static L,
        membership: Membership,
        store: &Store,
        timeout: Duration,
        like: Tensor,
        p2p: bool,
        budget: &Mutex<StreamBudget>,
    ) -> Result<DeviceComm<L>, CommError> {
        let failed = |reason: String| membership.error("joining", reason);
        torch_ext::use_device(like.device()).map_err(|e| failed(e.to_string()))?;
        let participants = all_participants(membership.position, membership.size(), p2p);
        let taken = budget.lock().take(membership.name(), participants.len());
        taken.map_err(failed)?;
        let mut streams = BTreeMap::new();
        for participants in participants {
            let stream =
                DeviceStream::create(library, participants, &membership, store, timeout, &like);
            streams.insert(participants, stream.map_err(failed)?);
        }
        Ok(DeviceComm(Arc::new(DeviceCommState {
            library,
            membership,
            like: Mutex::new(like),
            streams,
            aborted: false.into(),
        })))
    }

    /// Queues an operation on `tensors` for `participants`.
    fn queue(
        &self,
        operation: &'static str,
        participants: Participants,
        mut tensors: Vec<Tensor>,
        enqueue: impl FnOnce(&L, &LaunchTarget<L>) -> Result<(), String>,
        after: WaitHook,
    ) -> Result<Work, CommError> {
        let state = &self.0;
        let failed = |reason: String| state.error(operation, reason);
        let torch = |error: torch_ext::Error| state.error(operation, error);
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.is_contiguous()) {
            let shape = tensor.size();
            return Err(failed(format!(
                "a tensor of shape {shape:?} is not contiguous"
            )));
        }
        let like = state.like();
        torch_ext::use_device(like.device()).map_err(torch)?;
        let device_stream = state
            .streams
            .get(&participants)
            .ok_or_else(|| failed(NOT_NEIGHBOURS.into()))?;
        let stream = &device_stream.stream;
        let queue = |comm: &L::Comm| {
            let text = |error: torch_ext::Error| error.to_string();
            let current = Stream::current(&like).map_err(text)?;
            let queued_so_far = current.record().map_err(text)?;
            stream.wait_for(&queued_so_far).map_err(text)?;
            let target = LaunchTarget {
                comm,
                // Not cached: torch_npu flushes queued work to the stream before it returns the
                // handle.
                stream: stream.handle().map_err(text)?,
            };
            enqueue(state.library, &target)?;
            stream.record().map_err(text)
        };
        let done = Arc::new(device_stream.comm.call(queue).map_err(failed)?);

        tensors.push(like);
        let mut pending = Pending {
            done: done.clone(),
            tensors,
            waited: false,
        };
        let watched = state.clone();
        let progress = move || watched.progress(participants, &done);
        let state = state.clone();
        let finish = move || {
            pending
                .wait_on_current_stream()
                .map_err(|error| state.error(operation, error))?;
            if let Some(after) = after {
                after();
            }
            Ok(())
        };
        Ok(Work::queued(finish, progress))
    }

    /// Queues an operation of the whole group.
    fn collective(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        enqueue: impl FnOnce(&L, &LaunchTarget<L>) -> Result<(), String>,
    ) -> Result<Work, CommError> {
        let tensors = tensors.iter().map(|tensor| tensor.shallow_clone());
        self.queue(
            operation,
            Participants::All,
            tensors.collect(),
            enqueue,
            None,
        )
    }

    /// Allocates one part like `own` per rank.
    fn parts_like(&self, own: &Tensor) -> Tensor {
        let mut shape = vec![self.size() as i64];
        shape.extend(own.size());
        Tensor::empty(shape.as_slice(), (own.kind(), own.device()))
    }

    /// Rejects tensors unless `whole` has one `part` per rank.
    fn check_parts(
        &self,
        operation: &'static str,
        whole: &Tensor,
        part: &Tensor,
    ) -> Result<(), CommError> {
        let size = self.size();
        if whole.numel() == part.numel() * size && whole.kind() == part.kind() {
            return Ok(());
        }
        let describe = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
        let whole = describe(whole);
        let part = describe(part);
        let reason = format!("{whole} does not have one part {part} for each of {size} ranks");
        Err(self.0.error(operation, reason))
    }

    fn point_to_point(
        &self,
        operation: &'static str,
        tensor: &Tensor,
        peer: usize,
    ) -> Result<Work, CommError> {
        let own = self.rank();
        if peer >= self.size() || peer == own {
            let reason = format!("rank {peer} of {} is not another rank", self.size());
            return Err(self.0.error(operation, reason));
        }
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        let is_send = operation == "send";
        let (from, to) = if is_send { (own, peer) } else { (peer, own) };
        let message = Message {
            is_send,
            data: tensor.data_ptr(),
            elements: Elements::of(tensor),
            // In the pair's communicator, the sender is rank 0.
            peer: usize::from(is_send),
        };
        self.queue(
            operation,
            Participants::Pair { from, to },
            vec![tensor.shallow_clone()],
            // SAFETY: the tensor is kept until the operation is complete.
            |library, target| unsafe { library.messages(target, &[message]) },
            None,
        )
    }
}

const NOT_NEIGHBOURS: &str = "these ranks are not neighbours in a group for point-to-point \
    messages: create it with World::p2p_group";

impl<L> DeviceCommState<L>
where
    L: Library,
{
    fn like(&self) -> Tensor {
        self.like.lock().shallow_clone()
    }

    fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        self.membership.error(operation, reason)
    }

    /// Returns true once the operation with the event `done` is complete, or why it cannot be.
    fn progress(&self, participants: Participants, done: &Event) -> Result<bool, String> {
        let failure = self.streams[&participants].comm.failure();
        // The caller of `abort` reports the failure.
        if self.aborted.load(Ordering::SeqCst) {
            return Ok(true);
        }
        match failure {
            Some(reason) => Err(reason),
            None => done.is_done().map_err(|e| e.to_string()),
        }
    }
}

/// Reduces the parts of all ranks `[size, ...]` in rank order to `result`, once they have arrived.
fn reduce_parts(parts: Tensor, result: &Tensor, op: ReduceOp) -> WaitHook {
    let mut result = result.shallow_clone();
    Some(Box::new(move || {
        tch::no_grad(|| {
            let first = [0i64].as_slice();
            result.copy_(&match op {
                ReduceOp::Sum => parts.sum_dim_intlist(first, false, parts.kind()),
                ReduceOp::Min => parts.amin(first, false),
                ReduceOp::Max => parts.amax(first, false),
            });
        });
    }))
}

impl<L> Communicator for DeviceComm<L>
where
    L: Library,
{
    fn backend(&self) -> &'static str {
        L::NAME
    }
    fn is_stream_ordered(&self) -> bool {
        true
    }
    fn rank(&self) -> usize {
        self.0.membership.position
    }
    fn size(&self) -> usize {
        self.0.membership.members.len()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        let data = tensor.data_ptr();
        let elements = Elements::of(tensor);
        let library = self.0.library;
        if library.supports_reduction(elements.kind, "all_reduce") {
            return self.collective("all_reduce", &[tensor], |library, target| {
                // SAFETY: the tensor is kept until the operation is complete.
                unsafe { library.all_reduce(target, data, elements, op) }
            });
        }
        let parts = self.parts_like(tensor);
        let all = parts.data_ptr();
        let kept = vec![tensor.shallow_clone(), parts.shallow_clone()];
        let reduce = reduce_parts(parts, tensor, op);
        let gather = |library: &L, target: &LaunchTarget<L>| {
            // SAFETY: as above; there is one part for each rank.
            unsafe { library.all_gather(target, all, data, elements) }
        };
        self.queue("all_reduce", Participants::All, kept, gather, reduce)
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        let data = tensor.data_ptr();
        let elements = Elements::of(tensor);
        self.collective("broadcast", &[tensor], |library, target| {
            // SAFETY: the tensor is kept until the operation is complete.
            unsafe { library.broadcast(target, data, elements, root) }
        })
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.check_parts("all_gather", output, input)?;
        if input.numel() == 0 {
            return Ok(Work::done());
        }
        let out = output.data_ptr();
        let data = input.data_ptr();
        let elements = Elements::of(input);
        self.collective("all_gather", &[output, input], |library, target| {
            // SAFETY: the tensors are kept until the operation is complete; their sizes match.
            unsafe { library.all_gather(target, out, data, elements) }
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.check_parts("reduce_scatter", input, output)?;
        if output.numel() == 0 {
            return Ok(Work::done());
        }
        let data = input.data_ptr();
        let elements = Elements::of(output);
        let library = self.0.library;
        if library.supports_reduction(elements.kind, "reduce_scatter") {
            let out = output.data_ptr();
            return self.collective("reduce_scatter", &[output, input], |library, target| {
                // SAFETY: the tensors are kept until the operation is complete; their sizes match.
                unsafe { library.reduce_scatter(target, out, data, elements, op) }
            });
        }
        let parts = self.parts_like(output);
        let kept = vec![parts.shallow_clone(), input.shallow_clone()];
        let counts = vec![elements.count; self.size()];
        let counts = counts.as_slice();
        let out = Parts {
            data: parts.data_ptr(),
            counts,
        };
        let data = Parts { data, counts };
        let reduce = reduce_parts(parts, output, op);
        let exchange_parts = |library: &L, target: &LaunchTarget<L>| {
            // SAFETY: as above; there is one part for each rank.
            unsafe { library.all_to_all(target, out, data, elements.kind) }
        };
        self.queue(
            "reduce_scatter",
            Participants::All,
            kept,
            exchange_parts,
            reduce,
        )
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        check_splits(output, input, output_splits, input_splits, self.size())
            .map_err(|e| self.0.error("all_to_all", e))?;
        let counts = |tensor: &Tensor, splits: &[i64]| -> Vec<usize> {
            let row = tensor.size().iter().skip(1).product::<i64>();
            splits.iter().map(|rows| (rows * row) as usize).collect()
        };
        let receive = counts(output, output_splits);
        let send = counts(input, input_splits);
        // The address of an empty tensor is null, which libraries refuse.
        let stand_in = self.0.like();
        let data_ptr = |tensor: &Tensor| {
            if tensor.numel() == 0 {
                stand_in.data_ptr()
            } else {
                tensor.data_ptr()
            }
        };
        let out = Parts {
            data: data_ptr(output),
            counts: &receive,
        };
        let data = Parts {
            data: data_ptr(input),
            counts: &send,
        };
        let kind = input.kind();
        self.collective("all_to_all", &[output, input], |library, target| {
            // SAFETY: the tensors are kept until the operation is complete; the splits match them.
            unsafe { library.all_to_all(target, out, data, kind) }
        })
    }
    /// Messages from one rank to another arrive in the order in which they were sent, whatever
    /// their tags. Both sides must name the same messages in the same order; the pipeline's
    /// schedules are checked for that.
    fn send(&self, tensor: &Tensor, to: usize, _tag: i32) -> Result<Work, CommError> {
        self.point_to_point("send", tensor, to)
    }
    fn recv(&self, tensor: &Tensor, from: usize, _tag: i32) -> Result<Work, CommError> {
        self.point_to_point("recv", tensor, from)
    }
    fn exchange(
        &self,
        sends: &[(&Tensor, usize)],
        receives: &[(&Tensor, usize)],
        _tag: i32,
    ) -> Result<Work, CommError> {
        let mut messages = Vec::new();
        let mut tensors = Vec::new();
        for (is_send, side) in [(true, sends), (false, receives)] {
            for &(tensor, peer) in side.iter().filter(|(tensor, _)| tensor.numel() > 0) {
                messages.push(Message {
                    is_send,
                    data: tensor.data_ptr(),
                    elements: Elements::of(tensor),
                    peer,
                });
                tensors.push(tensor);
            }
        }
        self.collective("exchange", &tensors, |library, target| {
            if messages.is_empty() {
                return Ok(());
            }
            // SAFETY: the tensors are kept until the operation is complete.
            unsafe { library.messages(target, &messages) }
        })
    }
    fn barrier(&self) -> Result<Work, CommError> {
        // `HybridComm` uses the host's communicator instead.
        Err(self.0.error("barrier", "a device has no barrier"))
    }
    fn check(&self) -> Result<(), CommError> {
        if self.0.aborted.load(Ordering::SeqCst) {
            let operation = "an operation on the device";
            return Err(self.0.error(operation, "the group was aborted"));
        }
        Ok(())
    }
    fn abort(&self) {
        if self.0.aborted.swap(true, Ordering::SeqCst) {
            return;
        }
        let device = self.0.like().device();
        // At the same time: an abort may wait in the driver until another one has ended.
        std::thread::scope(|scope| {
            for device_stream in self.0.streams.values() {
                scope.spawn(move || {
                    // Without its device, the abort is still the best that can be done.
                    let _ = torch_ext::use_device(device);
                    if let Ok(stream) = device_stream.stream.handle() {
                        device_stream.comm.abort(stream);
                    }
                });
            }
        });
    }
}
