//! The shared-memory communicator, for ranks on one machine and tensors in host memory.
//!
//! A rank copies what others need into rings that they read. The second copy costs little while a
//! ring fits into the processor's cache. An operation waits for bytes, never for a thread of
//! another rank: a thread that starts an operation or waits for one advances all operations of its
//! group. A progress thread advances those that no thread waits for.

mod buffer;
mod collective;
mod engine;
mod messages;
mod process;
mod progress;
mod reduce;
mod segment;
mod state;

use super::{
    CommError, Communicator, Membership, ReduceOp, Staged, Work, arrival::Arrival, check_splits,
};
use buffer::{Buffer, Completion};
use collective::{Collective, Rings};
use engine::Engine;
use messages::Messages;
use parking_lot::Mutex;
use process::process_identity;
use progress::spawn_progress_thread;
use segment::{Ring, Segment};
use state::ShmState;
use std::{
    fs::{File, OpenOptions},
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tch::Tensor;
use torch_ext::Store;

/// A group of ranks on one machine.
pub(crate) struct Shm {
    state: Arc<ShmState>,
}

/// The segment that the first rank of a group offers to the others.
#[derive(serde::Serialize, serde::Deserialize)]
struct Offer {
    process: u32,
    file: i32,
    nonce: u64,
}

/// A segment that this rank created, and what keeps it open until the others have opened it.
struct CreatedSegment {
    segment: Segment,
    file: File,
    offer: Offer,
}

impl CreatedSegment {
    fn new(members: usize) -> Option<CreatedSegment> {
        let process = std::process::id();
        let nonce = getrandom::u64().unwrap_or_else(|_| u64::from(process));
        let (segment, file) = Segment::create(members, nonce).ok()?;
        let offer = Offer {
            process,
            file: file.as_raw_fd(),
            nonce,
        };
        Some(CreatedSegment {
            segment,
            file,
            offer,
        })
    }
}

impl Offer {
    fn open(&self, members: usize) -> Option<Segment> {
        // If the file belongs to another process, this fails, or the nonce differs.
        let path = format!("/proc/{}/fd/{}", self.process, self.file);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(path).ok()?;
        Segment::open(&file, members, self.nonce).ok()
    }
}

impl Shm {
    /// Joins a group, or returns `None` on all of its ranks if they cannot share memory.
    ///
    /// # Collective
    /// All members.
    ///
    /// # Errors
    /// If a member does not reach the store in time.
    pub(crate) fn join(
        store: &Store,
        membership: &Membership,
        timeout: Duration,
    ) -> Result<Option<Shm>, CommError> {
        let rank = membership.position;
        let size = membership.members.len();
        let failed = |error: torch_ext::Error| membership.error("joining", error);
        let mut offered_file = None;
        let segment = if rank == 0 {
            let created = CreatedSegment::new(size);
            // An empty offer tells the others that there is no segment.
            let offer = created.as_ref().map(|created| &created.offer);
            let offer = offer.and_then(|offer| serde_json::to_vec(offer).ok());
            store
                .set("shm", &offer.unwrap_or_default())
                .map_err(failed)?;
            created.map(|created| {
                offered_file = Some(created.file);
                created.segment
            })
        } else {
            let offer = store.get("shm").map_err(failed)?;
            let offer: Option<Offer> = serde_json::from_slice(&offer).ok();
            offer.and_then(|offer| offer.open(size))
        };
        if let Some(segment) = &segment {
            let process = segment.process(rank);
            process.store(process_identity(), Ordering::SeqCst);
        }
        let key = "shm/opened";
        let arrival = Arrival { store, key, size };
        let all_have_it = arrival.agree(segment.is_some()).map_err(failed)?;
        // All ranks have opened it by now.
        drop(offered_file);
        let Some(segment) = segment.filter(|_| all_have_it) else {
            return Ok(None);
        };
        let segment = Arc::new(segment);
        let ring = |writer, channel| Ring::new(&segment, writer, channel);
        let rings = Rings::new(rank, size, ring);
        let messages = Messages::new(rank, &segment);
        let state = Arc::new(ShmState {
            membership: membership.clone(),
            timeout,
            segment,
            engine: Mutex::new(Engine::new(rings, messages)),
        });
        spawn_progress_thread(&state);
        Ok(Some(Shm { state }))
    }

    /// Starts an operation on `tensors`; `writes` is true if it writes the first of them.
    fn start(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        writes: bool,
        start: impl FnOnce(&mut Engine, &[Buffer], Completion) -> Result<(), String>,
    ) -> Result<Work, CommError> {
        let state = self.state.clone();
        let error = |reason: String| state.membership.error(operation, reason);
        if tensors.iter().any(|tensor| !tensor.is_contiguous()) {
            return Err(error("a tensor is not contiguous".into()));
        }
        let staged = Staged::new(tensors, writes);
        let buffers: Vec<Buffer> = staged.host.iter().map(Buffer::new).collect();
        let completion = Completion::default();
        let rank = state.membership.position;
        {
            let mut engine = state.engine.lock();
            if let Some(reason) = &engine.abort_reason {
                return Err(error(reason.clone()));
            }
            let before = engine.in_flight();
            start(&mut engine, &buffers, completion.clone()).map_err(error)?;
            let started = (engine.in_flight() - before) as u32;
            let waiters = state.segment.waiters(rank);
            waiters.fetch_add(1, Ordering::SeqCst);
            let pending = state.segment.pending(rank);
            pending.fetch_add(started, Ordering::SeqCst);
            state.finish_waiting(&mut engine);
        }
        Ok(Work::new(move || {
            let result = state.wait(&completion);
            result.map_err(|reason| state.membership.error(operation, reason))?;
            staged.finish();
            Ok(())
        }))
    }

    fn collective(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        make: impl FnOnce(&Rings, &[Buffer]) -> Result<Collective, String>,
    ) -> Result<Work, CommError> {
        self.start(operation, tensors, true, |engine, buffers, completion| {
            let collective = make(&engine.rings, buffers)?;
            engine.collectives.push_back((collective, completion));
            Ok(())
        })
    }

    fn error(&self, operation: &'static str, reason: impl ToString) -> CommError {
        self.state.membership.error(operation, reason)
    }

    /// Rejects tensors unless `whole` has one `part` per rank.
    fn check_parts(
        &self,
        operation: &'static str,
        whole: &Tensor,
        part: &Tensor,
    ) -> Result<(), CommError> {
        let size = self.size();
        if whole.kind() == part.kind() && whole.numel() == part.numel() * size {
            return Ok(());
        }
        let describe = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
        let whole = describe(whole);
        let part = describe(part);
        let reason = format!("{whole} does not have one part {part} for each of {size} ranks");
        Err(self.error(operation, reason))
    }

    fn check_kind(&self, operation: &'static str, tensor: &Tensor) -> Result<(), CommError> {
        let kind = tensor.kind();
        if reduce::supports_kind(kind) {
            return Ok(());
        }
        Err(self.error(operation, format!("{kind:?} cannot be reduced")))
    }
}

/// Divides a buffer into the given numbers of rows.
fn split_rows(buffer: &Buffer, splits: &[i64]) -> Vec<Buffer> {
    let rows = splits.iter().sum::<i64>().max(1) as usize;
    let row_bytes = buffer.len() / rows;
    let mut start = 0;
    let mut parts = Vec::with_capacity(splits.len());
    for &rows in splits {
        let len = rows as usize * row_bytes;
        parts.push(buffer.part(start, len));
        start += len;
    }
    parts
}

impl Communicator for Shm {
    fn backend(&self) -> &'static str {
        "shm"
    }
    fn rank(&self) -> usize {
        self.state.membership.position
    }
    fn size(&self) -> usize {
        self.state.membership.members.len()
    }
    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.check_kind("all_reduce", tensor)?;
        let kind = tensor.kind();
        self.collective("all_reduce", &[tensor], |rings, data| {
            Ok(Collective::all_reduce(rings, &data[0], kind, op))
        })
    }
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        if root >= self.size() {
            return Err(self.error("broadcast", format!("no rank {root} in the group")));
        }
        self.collective("broadcast", &[tensor], |rings, data| {
            Ok(Collective::broadcast(rings, &data[0], root))
        })
    }
    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.check_parts("all_gather", output, input)?;
        self.collective("all_gather", &[output, input], |rings, data| {
            Ok(Collective::all_gather(rings, &data[0], &data[1]))
        })
    }
    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.check_parts("reduce_scatter", input, output)?;
        self.check_kind("reduce_scatter", output)?;
        let kind = output.kind();
        self.collective("reduce_scatter", &[output, input], |rings, data| {
            Ok(Collective::reduce_scatter(
                rings, &data[0], &data[1], kind, op,
            ))
        })
    }
    fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
    ) -> Result<Work, CommError> {
        check_splits(output, input, output_splits, input_splits, self.size())
            .map_err(|e| self.error("all_to_all", e))?;
        let own = self.rank();
        self.collective("all_to_all", &[output, input], |rings, data| {
            let outputs = split_rows(&data[0], output_splits);
            let inputs = split_rows(&data[1], input_splits);
            if outputs[own].len() != inputs[own].len() {
                let sent = input_splits[own];
                let received = output_splits[own];
                return Err(format!(
                    "rank {own} of the group sends {sent} rows to itself but receives {received}"
                ));
            }
            Ok(Collective::all_to_all(rings, &outputs, &inputs))
        })
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.start("send", &[tensor], false, |engine, data, completion| {
            engine.messages.send(to, tag, data[0].clone(), completion)
        })
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.start("recv", &[tensor], true, |engine, data, completion| {
            engine
                .messages
                .receive(from, tag, data[0].clone(), completion)
        })
    }
    fn barrier(&self) -> Result<Work, CommError> {
        let one = Tensor::from_slice(&[1u8]);
        let all = Tensor::from_slice(&vec![0u8; self.size()]);
        self.collective("barrier", &[&all, &one], |rings, data| {
            Ok(Collective::all_gather(rings, &data[0], &data[1]))
        })
    }
    fn abort(&self) {
        self.state.abort_with("the group was aborted");
    }
}
