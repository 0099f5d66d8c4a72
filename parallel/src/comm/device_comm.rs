//! Communicators whose operations a device is_stream_ordered: what NCCL and HCCL have in common.
//!
//! Each operation goes to a stream of its communicator. It begins when the work that this thread has queued so far is done, and
//! what this thread is_stream_ordered after [`Work::wait`] begins when it is done; the host waits for neither. So a tensor may be freed after
//! [`Work::wait`]: whatever takes its memory is queued later. (c10d's ProcessGroupNCCL has the same discipline.)
//!
//! A failure can therefore only come later: the flight recorder looks for it, and [`Communicator::check`] tells it.

use super::{CommError, Communicator, Membership, ReduceOp, Work, check_splits};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};
use torch_ext::{Event, Store, Stream};

/// A vendor's library of collectives. Its functions queue operations on a stream and return.
///
/// # Safety
/// What is `unsafe` reads and writes device memory of the size that is named, until the stream has done it.
pub(crate) trait Library: Send + Sync + 'static {
    /// A vendor's communicator.
    type Comm: Send + Sync;

    /// `nccl`, `hccl`.
    const NAME: &'static str;

    /// Makes what tells the members of one communicator from all others.
    fn new_id(&self) -> Result<Vec<u8>, String>;

    /// Joins a communicator; all its ranks do so about now.
    fn join(&self, id: &[u8], rank: usize, size: usize) -> Result<Self::Comm, String>;

    /// Gives up all that is queued, from any thread, so that the stream goes on as far as the library can do that.
    fn abort(&self, comm: &Self::Comm, stream: *mut c_void);

    /// Why operations that were queued cannot be completed; None as long as they can.
    fn failure(&self, comm: &Self::Comm) -> Option<String>;

    /// Whether the library sums (or else compares) such elements in such an operation.
    fn supports_reduction(&self, kind: Kind, operation: &str) -> bool;

    unsafe fn all_reduce(
        &self,
        to: &LaunchTarget<Self>,
        data: *mut c_void,
        run: Elements,
        op: ReduceOp,
    ) -> Result<(), String>;

    unsafe fn broadcast(
        &self,
        to: &LaunchTarget<Self>,
        data: *mut c_void,
        run: Elements,
        root: usize,
    ) -> Result<(), String>;

    /// `run` counts what each rank gives.
    unsafe fn all_gather(
        &self,
        to: &LaunchTarget<Self>,
        out: *mut c_void,
        data: *mut c_void,
        run: Elements,
    ) -> Result<(), String>;

    /// `run` counts what each rank gets.
    unsafe fn reduce_scatter(
        &self,
        to: &LaunchTarget<Self>,
        out: *mut c_void,
        data: *mut c_void,
        run: Elements,
        op: ReduceOp,
    ) -> Result<(), String>;

    /// Runs of what is received, and of what is sent, lie behind one another, one for each rank.
    unsafe fn all_to_all(
        &self,
        to: &LaunchTarget<Self>,
        out: (*mut c_void, &[usize]),
        data: (*mut c_void, &[usize]),
        kind: Kind,
    ) -> Result<(), String>;

    /// Sends and receives, as one operation.
    unsafe fn messages(&self, to: &LaunchTarget<Self>, messages: &[Message]) -> Result<(), String>;
}

/// Where an operation goes.
pub(crate) struct LaunchTarget<'a, L: Library + ?Sized> {
    pub(crate) comm: &'a L::Comm,
    pub(crate) stream: *mut c_void,
}

/// So many elements of a kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Elements {
    pub(crate) count: usize,
    pub(crate) kind: Kind,
}

/// A message of an exchange.
pub(crate) struct Message {
    pub(crate) sends: bool,
    pub(crate) data: *mut c_void,
    pub(crate) run: Elements,
    pub(crate) peer: usize,
}

/// Who takes part in a vendor's communicator: the whole group, or a sender and a receiver, for all messages from one to the other.
/// Were both directions in one, a rank that sends and then receives would wait for one that does the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Participants {
    All,
    Pair { from: usize, to: usize },
}

/// The pairs of a rank with its neighbours in the ring of the group, in an order that all ranks of the group agree on, so that none
/// waits for another in a circle while they are made.
fn neighbor_pairs(rank: usize, size: usize) -> Vec<Participants> {
    let mut all: Vec<(usize, usize)> = (0..size)
        .flat_map(|from| [(from, (from + 1) % size), ((from + 1) % size, from)])
        .collect();
    all.sort_by_key(|&(from, to)| (from.min(to), from.max(to), from));
    all.dedup();
    all.retain(|&(from, to)| from != to && (from == rank || to == rank));
    all.into_iter()
        .map(|(from, to)| Participants::Pair { from, to })
        .collect()
}

/// A vendor's communicator and the stream that its operations go to.
struct DeviceStream<L: Library> {
    comm: L::Comm,
    stream: Stream,
    /// Held while an operation is queued between its two events.
    queueing: Mutex<()>,
}

/// A group of ranks whose tensors are on a device.
pub(crate) struct DeviceComm<L: Library>(Arc<DeviceCommState<L>>);

struct DeviceCommState<L: Library> {
    library: &'static L,
    membership: Membership,
    /// A tensor of the device.
    like: Mutex<Tensor>,
    streams: BTreeMap<Participants, DeviceStream<L>>,
    aborted: AtomicBool,
}

/// An operation that is queued, with the tensors that it reads and writes.
struct Pending {
    done: Arc<Event>,
    /// The last of them is there for the device it is on.
    tensors: Vec<Tensor>,
    waited: bool,
}

impl Pending {
    /// From here on this thread's work comes after it.
    fn wait_on_current_stream(&mut self) -> Result<(), torch_ext::Error> {
        self.waited = true;
        Stream::current(&self.tensors[self.tensors.len() - 1])?.wait_for(&self.done)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Nobody waited; the tensors' memory may be taken again only after the operation all the same.
        if !self.waited {
            let _ = self.wait_on_current_stream();
        }
    }
}

impl<L: Library> DeviceComm<L> {
    /// Joins the group of `membership`, of which each member does so now; `store` is the group's own, and `like` a tensor of the
    /// device. A `chain`'s ranks can send to their neighbours, and receive from them.
    ///
    /// All vendor's communicators are made here: making one waits for its other ranks, and an operation must not, since those may
    /// do something else first that waits for this rank.
    ///
    /// # Errors
    /// When the others do not come within `timeout`, or the library refuses.
    pub(crate) fn join(
        library: &'static L,
        membership: Membership,
        store: &Store,
        timeout: Duration,
        like: Tensor,
        chain: bool,
    ) -> Result<DeviceComm<L>, CommError> {
        let rank = membership.position;
        let size = membership.members.len();
        let failed = |reason: String| membership.error("joining", reason);
        torch_ext::set_device(&like).map_err(|e| failed(e.to_string()))?;
        let mut streams = BTreeMap::new();
        for participants in std::iter::once(Participants::All).chain(if chain {
            neighbor_pairs(rank, size)
        } else {
            Vec::new()
        }) {
            streams.insert(
                participants,
                DeviceStream::make(library, participants, &membership, store, timeout, &like)
                    .map_err(failed)?,
            );
        }
        Ok(DeviceComm(Arc::new(DeviceCommState {
            library,
            membership,
            like: Mutex::new(like),
            streams,
            aborted: false.into(),
        })))
    }

    /// Queues an operation on `tensors` for `participants`; `after` is run by [`Work::wait`].
    fn queue(
        &self,
        operation: &'static str,
        participants: Participants,
        mut tensors: Vec<Tensor>,
        enqueue: impl FnOnce(&L, &LaunchTarget<L>) -> Result<(), String>,
        after: WaitHook,
    ) -> Result<Work, CommError> {
        let shared = &self.0;
        let failed = |reason: String| shared.membership.error(operation, reason);
        let torch = |error: torch_ext::Error| shared.membership.error(operation, error);
        if let Some(tensor) = tensors.iter().find(|tensor| !tensor.is_contiguous()) {
            return Err(failed(format!(
                "a tensor of shape {:?} is not contiguous",
                tensor.size()
            )));
        }
        let like = shared.like();
        torch_ext::set_device(&like).map_err(torch)?;
        let device_stream = shared.streams.get(&participants).ok_or_else(|| {
            failed("these ranks are no neighbours in a chain: World::chain makes one, whose neighbours can send".into())
        })?;
        if shared.aborted.load(Ordering::SeqCst) {
            return Err(failed("the group was aborted".into()));
        }
        let queueing = device_stream.queueing.lock();
        let so_far = Stream::current(&like)
            .and_then(|stream| stream.record())
            .map_err(torch)?;
        device_stream.stream.wait_for(&so_far).map_err(torch)?;
        // Asked for each time: torch_npu hands queued work over to the stream before it gives it away.
        let stream = device_stream.stream.handle().map_err(torch)?;
        enqueue(
            shared.library,
            &LaunchTarget {
                comm: &device_stream.comm,
                stream,
            },
        )
        .map_err(failed)?;
        let done = Arc::new(device_stream.stream.record().map_err(torch)?);
        drop(queueing);
        tensors.push(like);
        let mut pending = Pending {
            done: done.clone(),
            tensors,
            waited: false,
        };
        let watched = shared.clone();
        let progress = move || match watched
            .library
            .failure(&watched.streams[&participants].comm)
        {
            // Whoever aborted knows.
            _ if watched.aborted.load(Ordering::SeqCst) => Ok(true),
            Some(reason) => Err(reason),
            None => done.is_done().map_err(|e| e.to_string()),
        };
        let shared = shared.clone();
        let finish = move || {
            pending
                .wait_on_current_stream()
                .map_err(|error| shared.membership.error(operation, error))?;
            if let Some(after) = after {
                after();
            }
            Ok(())
        };
        Ok(Work::queued(finish, progress))
    }

    /// Room for as much as `own` of every rank.
    fn parts(&self, own: &Tensor) -> Tensor {
        Tensor::empty(
            [&[self.size() as i64], &*own.size()].concat(),
            (own.kind(), own.device()),
        )
    }

    fn check_compatible(
        &self,
        operation: &'static str,
        output: &Tensor,
        input: &Tensor,
        fits: bool,
    ) -> Result<(), CommError> {
        if fits && output.kind() == input.kind() {
            return Ok(());
        }
        let of = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
        let reason = format!(
            "{} and {} do not fit for {} ranks",
            of(output),
            of(input),
            self.size()
        );
        Err(self.0.membership.error(operation, reason))
    }

    fn message(
        &self,
        operation: &'static str,
        tensor: &Tensor,
        peer: usize,
        sends: bool,
    ) -> Result<Work, CommError> {
        let own = self.rank();
        if peer >= self.size() || peer == own {
            let reason = format!("rank {peer} of {} is no other rank", self.size());
            return Err(self.0.membership.error(operation, reason));
        }
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        let (from, to) = if sends { (own, peer) } else { (peer, own) };
        let message = Message {
            sends,
            data: tensor.data_ptr(),
            run: run(tensor),
            peer: usize::from(sends),
        };
        self.queue(
            operation,
            Participants::Pair { from, to },
            vec![tensor.shallow_clone()],
            // SAFETY: the tensor is kept until the operation is done.
            |library, place| unsafe { library.messages(place, &[message]) },
            None,
        )
    }
}

impl<L: Library> DeviceCommState<L> {
    fn like(&self) -> Tensor {
        self.like.lock().shallow_clone()
    }
}

impl<L: Library> DeviceStream<L> {
    fn make(
        library: &L,
        participants: Participants,
        membership: &Membership,
        store: &Store,
        timeout: Duration,
        like: &Tensor,
    ) -> Result<DeviceStream<L>, String> {
        let (rank, size, name) = match participants {
            Participants::All => (
                membership.position,
                membership.members.len(),
                "all".to_string(),
            ),
            Participants::Pair { from, to } => (
                usize::from(to == membership.position),
                2,
                format!("{from}-{to}"),
            ),
        };
        let text = |e: torch_ext::Error| e.to_string();
        if rank == 0 {
            store
                .set(&format!("{name}/id"), &library.new_id()?)
                .map_err(text)?;
        }
        // A vendor's library would wait for a rank that is missing, and could not be told to stop.
        let here = format!("{name}/here");
        let began = Instant::now();
        let mut present = store.add(&here, 1).map_err(text)?;
        while present < size as i64 {
            if began.elapsed() > timeout {
                return Err(format!(
                    "{present} of {size} ranks came within {timeout:.1?}"
                ));
            }
            std::thread::sleep(Duration::from_millis(2));
            present = store.add(&here, 0).map_err(text)?;
        }
        let id = store.get(&format!("{name}/id")).map_err(text)?;
        let stream = Stream::from_pool(like).map_err(text)?;
        let comm = library.join(&id, rank, size)?;
        Ok(DeviceStream {
            comm,
            stream,
            queueing: Mutex::default(),
        })
    }
}

fn run(tensor: &Tensor) -> Elements {
    Elements {
        count: tensor.numel(),
        kind: tensor.kind(),
    }
}

type WaitHook = Option<Box<dyn FnOnce() + Send>>;

/// Combines the parts of all ranks `[size, ...]` in rank order, into `result`, once they are there.
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

impl<L: Library> Communicator for DeviceComm<L> {
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
        let run = run(tensor);
        if self.0.library.supports_reduction(run.kind, "all_reduce") {
            let kept = vec![tensor.shallow_clone()];
            // SAFETY: the tensor is kept until the operation is done.
            let enqueue = |library: &L, to: &LaunchTarget<L>| unsafe {
                library.all_reduce(to, data, run, op)
            };
            return self.queue("all_reduce", Participants::All, kept, enqueue, None);
        }
        let parts = self.parts(tensor);
        let all = parts.data_ptr();
        let kept = vec![tensor.shallow_clone(), parts.shallow_clone()];
        // SAFETY: as above; the parts have room for all.
        let enqueue =
            |library: &L, to: &LaunchTarget<L>| unsafe { library.all_gather(to, all, data, run) };
        self.queue(
            "all_reduce",
            Participants::All,
            kept,
            enqueue,
            reduce_parts(parts, tensor, op),
        )
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        if tensor.numel() == 0 {
            return Ok(Work::done());
        }
        let data = tensor.data_ptr();
        let run = run(tensor);
        // SAFETY: the tensor is kept until the operation is done.
        let enqueue =
            |library: &L, to: &LaunchTarget<L>| unsafe { library.broadcast(to, data, run, root) };
        self.queue(
            "broadcast",
            Participants::All,
            vec![tensor.shallow_clone()],
            enqueue,
            None,
        )
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.check_compatible(
            "all_gather",
            output,
            input,
            output.numel() == input.numel() * self.size(),
        )?;
        if input.numel() == 0 {
            return Ok(Work::done());
        }
        let out = output.data_ptr();
        let data = input.data_ptr();
        let run = run(input);
        // SAFETY: the tensors are kept until the operation is done, and their sizes were compared.
        let enqueue =
            |library: &L, to: &LaunchTarget<L>| unsafe { library.all_gather(to, out, data, run) };
        self.queue(
            "all_gather",
            Participants::All,
            vec![output.shallow_clone(), input.shallow_clone()],
            enqueue,
            None,
        )
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.check_compatible(
            "reduce_scatter",
            output,
            input,
            input.numel() == output.numel() * self.size(),
        )?;
        if output.numel() == 0 {
            return Ok(Work::done());
        }
        let data = input.data_ptr();
        let run = run(output);
        if self
            .0
            .library
            .supports_reduction(run.kind, "reduce_scatter")
        {
            let out = output.data_ptr();
            // SAFETY: the tensors are kept until the operation is done, and their sizes were compared.
            let enqueue = |library: &L, to: &LaunchTarget<L>| unsafe {
                library.reduce_scatter(to, out, data, run, op)
            };
            let kept = vec![output.shallow_clone(), input.shallow_clone()];
            return self.queue("reduce_scatter", Participants::All, kept, enqueue, None);
        }
        let parts = self.parts(output);
        let all = parts.data_ptr();
        let kept = vec![parts.shallow_clone(), input.shallow_clone()];
        let counts = vec![run.count; self.size()];
        // SAFETY: as above; the parts have room for all.
        let enqueue = |library: &L, to: &LaunchTarget<L>| unsafe {
            library.all_to_all(to, (all, &counts), (data, &counts), run.kind)
        };
        self.queue(
            "reduce_scatter",
            Participants::All,
            kept,
            enqueue,
            reduce_parts(parts, output, op),
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
            .map_err(|e| self.0.membership.error("all_to_all", e))?;
        let counts = |tensor: &Tensor, splits: &[i64]| -> Vec<usize> {
            let row = tensor.size().iter().skip(1).product::<i64>();
            splits.iter().map(|rows| (rows * row) as usize).collect()
        };
        let receive = counts(output, output_splits);
        let send = counts(input, input_splits);
        // Memory of a tensor without elements is nowhere, which libraries refuse.
        let somewhere = self.0.like();
        let place = |tensor: &Tensor| {
            if tensor.numel() == 0 {
                somewhere.data_ptr()
            } else {
                tensor.data_ptr()
            }
        };
        let out = place(output);
        let data = place(input);
        let kind = input.kind();
        // SAFETY: the tensors are kept until the operation is done; the splits were checked against them.
        let enqueue = |library: &L, to: &LaunchTarget<L>| unsafe {
            library.all_to_all(to, (out, &receive), (data, &send), kind)
        };
        self.queue(
            "all_to_all",
            Participants::All,
            vec![output.shallow_clone(), input.shallow_clone()],
            enqueue,
            None,
        )
    }
    /// Messages from one rank to another arrive in the order in which they were sent, whatever their tags: both sides name the
    /// same messages in the same order. (The schedules of a pipeline are checked for that.)
    fn send(&self, tensor: &Tensor, to: usize, _tag: i32) -> Result<Work, CommError> {
        self.message("send", tensor, to, true)
    }
    fn recv(&self, tensor: &Tensor, from: usize, _tag: i32) -> Result<Work, CommError> {
        self.message("recv", tensor, from, false)
    }
    fn exchange(
        &self,
        sends: &[(&Tensor, usize)],
        receives: &[(&Tensor, usize)],
        _tag: i32,
    ) -> Result<Work, CommError> {
        let of = |sends: bool| {
            move |&(tensor, peer): &(&Tensor, usize)| {
                (
                    Message {
                        sends,
                        data: tensor.data_ptr(),
                        run: run(tensor),
                        peer,
                    },
                    tensor.shallow_clone(),
                )
            }
        };
        let all = sends
            .iter()
            .map(of(true))
            .chain(receives.iter().map(of(false)));
        let (messages, tensors): (Vec<Message>, Vec<Tensor>) =
            all.filter(|(message, _)| message.run.count > 0).unzip();
        let enqueue = |library: &L, to: &LaunchTarget<L>| {
            if messages.is_empty() {
                Ok(())
            } else {
                // SAFETY: the tensors are kept until the operation is done.
                unsafe { library.messages(to, &messages) }
            }
        };
        self.queue("exchange", Participants::All, tensors, enqueue, None)
    }
    fn barrier(&self) -> Result<Work, CommError> {
        // The host's communicator does that: see `HybridComm`.
        Err(self.0.membership.error("barrier", "a device has none"))
    }
    fn check(&self) -> Result<(), CommError> {
        if self.0.aborted.load(Ordering::SeqCst) {
            Err(self
                .0
                .membership
                .error("an operation on the device", "the group was aborted"))
        } else {
            Ok(())
        }
    }
    fn abort(&self) {
        if self.0.aborted.swap(true, Ordering::SeqCst) {
            return;
        }
        for device_stream in self.0.streams.values() {
            if let Ok(stream) = device_stream.stream.handle() {
                self.0.library.abort(&device_stream.comm, stream);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether ranks that each make their pairs in their order come to an end.
    fn all_are_made(size: usize) -> bool {
        let mut left: Vec<Vec<Participants>> =
            (0..size).map(|rank| neighbor_pairs(rank, size)).collect();
        loop {
            let ready = |rank: usize, left: &Vec<Vec<Participants>>| match left[rank].first() {
                Some(&participants @ Participants::Pair { from, to }) => {
                    let other = if from == rank { to } else { from };
                    (left[other].first() == Some(&participants)).then_some((rank, other))
                }
                _ => None,
            };
            let Some((one, other)) = (0..size).find_map(|rank| ready(rank, &left)) else {
                break;
            };
            left[one].remove(0);
            left[other].remove(0);
        }
        left.iter().all(Vec::is_empty)
    }

    #[test]
    fn neighbours_make_their_communicators_without_waiting_in_a_circle() {
        assert_eq!(neighbor_pairs(0, 1), []);
        assert_eq!(
            neighbor_pairs(0, 2),
            [
                Participants::Pair { from: 0, to: 1 },
                Participants::Pair { from: 1, to: 0 }
            ]
        );
        assert_eq!(neighbor_pairs(1, 4).len(), 4);
        for size in 1..40 {
            assert!(all_are_made(size), "{size} ranks");
        }
    }
}
