//! ShmState memory: the communicator of ranks that are on one machine, whose tensors are in its memory.
//!
//! A rank copies what others need into rings that they read; while the ring is short enough for the processor's cache, the
//! second copy costs little. Nothing waits for a thread of another rank but for bytes: whoever begins an operation of a group or waits
//! for one gets on with all operations of it, and a thread of the group looks after those that nobody waits for.

mod collective;
mod messages;
mod progress;
mod reduce;
mod segment;

use super::{CommError, Communicator, Membership, ReduceOp, Staged, Work, check_splits};
use crate::background;
use collective::{Collective, Rings};
use messages::Messages;
use parking_lot::{Mutex, MutexGuard};
use segment::{Doorbell, Ring, Segment};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tch::Tensor;
use torch_ext::Store;

/// How often a waiting thread looks before it lets others have the processor, and before it sleeps, where nothing is computed
/// meanwhile.
const SPIN_LIMITS: (usize, usize) = (50, 100);
/// Pieces with which whoever begins an operation, or has waited for one, gets on himself: as many as a ring holds. More would keep it
/// from what it computes.
const MAX_PROGRESS_CALLS: usize = 8;
/// How often a sleeping thread looks whether the others are still there.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(200);

/// A group of ranks on one machine.
pub(crate) struct Shm {
    shared: Arc<ShmState>,
}

struct ShmState {
    membership: Membership,
    timeout: Duration,
    segment: Arc<Segment>,
    engine: Mutex<Engine>,
}

/// What is under way in a group. Collectives are done one after the other, messages background them.
struct Engine {
    rings: Rings,
    collectives: VecDeque<(Collective, Completion)>,
    messages: Messages,
    /// Why nothing goes on here.
    abort_reason: Option<String>,
}

/// A tensor that is kept for its bytes.
struct SyncTensor(Tensor);

// SAFETY: of a tensor that is shared nothing is used but where its bytes are; who may touch those is settled by `Buffer`.
unsafe impl Sync for SyncTensor {}

/// Bytes of a tensor, which lives as long.
#[derive(Clone)]
struct Buffer {
    tensor: Arc<SyncTensor>,
    start: usize,
    len: usize,
}

/// What has become of an operation.
#[derive(Clone, Default)]
struct Completion(Arc<OnceLock<Result<(), String>>>);

impl Completion {
    fn set(&self, result: Result<(), String>) {
        let _ = self.0.set(result);
    }
}

impl Buffer {
    fn new(tensor: &Tensor) -> Buffer {
        let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
        Buffer {
            tensor: Arc::new(SyncTensor(tensor.shallow_clone())),
            start: 0,
            len,
        }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn part(&self, start: usize, len: usize) -> Buffer {
        assert!(start + len <= self.len, "bytes of the tensor");
        Buffer {
            tensor: self.tensor.clone(),
            start: self.start + start,
            len,
        }
    }

    fn data(&self) -> *mut u8 {
        // SAFETY: inside the tensor, as `part` has checked. (Of an empty one it may be null, which gains nothing here.)
        unsafe { self.tensor.0.data_ptr().cast::<u8>().add(self.start) }
    }

    /// # Safety
    /// Nobody writes them meanwhile.
    unsafe fn bytes(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: a contiguous tensor in host memory (`Shm::start` has checked) has these bytes; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.data(), self.len) }
    }

    /// # Safety
    /// Nobody reads or writes them meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn bytes_mut(&self) -> &mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.data(), self.len) }
    }

    fn copy_from(&self, other: &Buffer) {
        if self.len > 0 {
            assert_eq!(self.len, other.len);
            // SAFETY: both have so many bytes; they may be the same ones.
            unsafe { std::ptr::copy(other.data(), self.data(), self.len) };
        }
    }
}

impl Engine {
    /// Gets on with everything by a piece: whether anything was possible. Tells those whom it concerns.
    fn make_progress(&mut self, segment: &Segment, others_wait: bool) -> bool {
        let before = self.in_flight();
        let mut moved = false;
        if let Some((collective, done)) = self.collectives.front_mut() {
            moved |= collective.make_progress(&mut self.rings);
            if collective.is_done() {
                done.set(Ok(()));
                self.collectives.pop_front();
                moved = true;
            }
        }
        moved |= self.messages.make_progress(&mut self.rings.touched);
        for (rank, touched) in self.rings.touched.iter_mut().enumerate() {
            if std::mem::take(touched) {
                segment.ring_doorbell(rank);
            }
        }
        let done = before - self.in_flight();
        if done > 0 {
            segment
                .pending(self.rings.rank)
                .fetch_sub(done as u32, Ordering::SeqCst);
            if others_wait {
                segment.ring_doorbell(self.rings.rank);
            }
        }
        moved
    }

    fn in_flight(&self) -> usize {
        self.collectives.len() + self.messages.in_flight()
    }
}

fn lock(engine: &Mutex<Engine>) -> MutexGuard<'_, Engine> {
    engine.lock()
}

/// What the first rank of a group offers the others.
#[derive(serde::Serialize, serde::Deserialize)]
struct Offer {
    process: u32,
    file: i32,
    nonce: u64,
}

impl Shm {
    /// Joins the group of `membership`, whose operations then have `timeout`, or says that it cannot be had: None for every rank of
    /// it where one of them is elsewhere.
    ///
    /// # Errors
    /// When the others do not come to the store.
    pub(crate) fn join(
        store: &Store,
        membership: &Membership,
        timeout: Duration,
    ) -> Result<Option<Shm>, CommError> {
        let rank = membership.position;
        let size = membership.members.len();
        let failed = |error: torch_ext::Error| membership.error("joining", error);
        let mut file = None;
        let segment = match rank {
            0 => {
                let nonce = getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()));
                let made = Segment::create(size, nonce).ok().map(|(segment, memory)| {
                    let memory = file.insert(memory);
                    let offer = Offer {
                        process: std::process::id(),
                        file: memory.as_raw_fd(),
                        nonce,
                    };
                    (segment, serde_json::to_vec(&offer).unwrap_or_default())
                });
                let (segment, offer) = made.unzip();
                store
                    .set("shm", &offer.unwrap_or_default())
                    .map_err(failed)?;
                segment
            }
            _ => {
                let offer = store.get("shm").map_err(failed)?;
                serde_json::from_slice::<Offer>(&offer)
                    .ok()
                    .and_then(|offer| offer.open(size))
            }
        };
        if let Some(segment) = &segment {
            segment
                .process(rank)
                .store(progress::process_identity(), Ordering::SeqCst);
        }
        store
            .set(&format!("shm/{rank}"), &[segment.is_some().into()])
            .map_err(failed)?;
        let mut all = true;
        for other in 0..size {
            all &= store.get(&format!("shm/{other}")).map_err(failed)? == [1];
        }
        // All have opened it.
        drop::<Option<File>>(file);
        let Some(segment) = segment.filter(|_| all) else {
            return Ok(None);
        };
        let segment = Arc::new(segment);
        let ring = |writer, channel| Ring::new(&segment, writer, channel);
        let rings = Rings::new(rank, size, ring);
        let messages = Messages::new(rank, size, ring);
        let engine = Mutex::new(Engine {
            rings,
            collectives: VecDeque::new(),
            messages,
            abort_reason: None,
        });
        let membership = membership.clone();
        let shared = Arc::new(ShmState {
            membership,
            timeout,
            segment,
            engine,
        });
        progress::spawn_progress_thread(&shared);
        Ok(Some(Shm { shared }))
    }

    /// Starts an operation on `tensors`, the first of which it may write.
    fn start(
        &self,
        operation: &'static str,
        tensors: &[&Tensor],
        writes: bool,
        start: impl FnOnce(&mut Engine, &[Buffer], Completion) -> Result<(), String>,
    ) -> Result<Work, CommError> {
        let shared = self.shared.clone();
        let error = |reason: String| shared.membership.error(operation, reason);
        if tensors.iter().any(|tensor| !tensor.is_contiguous()) {
            return Err(error("a tensor is not contiguous".into()));
        }
        let staged = Staged::new(tensors, writes);
        let buffers: Vec<Buffer> = staged.host.iter().map(Buffer::new).collect();
        let done = Completion::default();
        let rank = shared.membership.position;
        {
            let mut engine = lock(&shared.engine);
            if let Some(reason) = &engine.abort_reason {
                return Err(error(reason.clone()));
            }
            let before = engine.in_flight();
            start(&mut engine, &buffers, done.clone()).map_err(error)?;
            let begun = engine.in_flight() - before;
            shared.segment.waiters(rank).fetch_add(1, Ordering::SeqCst);
            shared
                .segment
                .pending(rank)
                .fetch_add(begun as u32, Ordering::SeqCst);
            shared.finish_waiting(&mut engine);
        }
        Ok(Work::new(move || {
            shared
                .wait(&done)
                .map_err(|reason| shared.membership.error(operation, reason))?;
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
        self.start(operation, tensors, true, |engine, buffers, done| {
            let collective = make(&engine.rings, buffers)?;
            engine.collectives.push_back((collective, done));
            Ok(())
        })
    }

    fn refuse(&self, operation: &'static str, reason: impl ToString) -> CommError {
        self.shared.membership.error(operation, reason)
    }

    /// Refuses what does not fit together: `whole` has one `part` for each rank.
    fn check_parts(
        &self,
        operation: &'static str,
        whole: &Tensor,
        part: &Tensor,
    ) -> Result<(), CommError> {
        if whole.kind() != part.kind() || whole.numel() != part.numel() * self.size() {
            let a = whole.size();
            let b = part.size();
            let text = format!(
                "a tensor {a:?} of {:?} is not one {b:?} of {:?} for each of {} ranks",
                whole.kind(),
                part.kind(),
                self.size()
            );
            return Err(self.refuse(operation, text));
        }
        Ok(())
    }

    fn check_kind(&self, operation: &'static str, tensor: &Tensor) -> Result<(), CommError> {
        if reduce::supports_kind(tensor.kind()) {
            Ok(())
        } else {
            Err(self.refuse(
                operation,
                format!("numbers of {:?} cannot be combined", tensor.kind()),
            ))
        }
    }
}

impl Offer {
    fn open(&self, size: usize) -> Option<Segment> {
        // Of another process's file it is an error, or has another nonce.
        let path = format!("/proc/{}/fd/{}", self.process, self.file);
        let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        Segment::open(&file, size, self.nonce).ok()
    }
}

impl ShmState {
    /// Gets on with everything until `done` is.
    fn wait(&self, done: &Completion) -> Result<(), String> {
        if let Some(result) = done.0.get() {
            return result.clone();
        }
        self.segment
            .waiters(self.membership.position)
            .fetch_add(1, Ordering::SeqCst);
        let result = self.wait_until_done(done);
        self.finish_waiting(&mut lock(&self.engine));
        result
    }

    /// Whoever calls it was counted among those who wait, and is not any more. What is possible at once is done before: to wake the
    /// thread that looks after the rest takes as long as a small operation, and most are waited for as soon as they are begun.
    fn finish_waiting(&self, engine: &mut Engine) {
        let rank = self.membership.position;
        let doorbell_count = || self.segment.doorbell_count(rank, Doorbell::Waiting);
        // What was written to rings before this rank was counted is seen here.
        fence(Ordering::SeqCst);
        // The bell as it was when nothing more was possible.
        let mut still = None;
        for _ in 0..MAX_PROGRESS_CALLS {
            let seen = doorbell_count();
            if !engine.make_progress(&self.segment, true) && doorbell_count() == seen {
                still = Some(seen);
                break;
            }
        }
        self.segment.waiters(rank).fetch_sub(1, Ordering::SeqCst);
        // Others have doorbell_count for those who wait, perhaps for this one alone.
        if still != Some(doorbell_count()) {
            self.segment.ring_doorbell(rank);
        }
    }

    fn wait_until_done(&self, done: &Completion) -> Result<(), String> {
        let rank = self.membership.position;
        let looks = if background::is_background() {
            (0, 0)
        } else {
            SPIN_LIMITS
        };
        let mut idle = 0;
        let mut began = None;
        let mut looked = None;
        let mut gone = None;
        loop {
            let seen = self.segment.doorbell_count(rank, Doorbell::Waiting);
            let moved = {
                let mut engine = lock(&self.engine);
                let moved = engine.make_progress(
                    &self.segment,
                    self.segment.waiters(rank).load(Ordering::SeqCst) > 1,
                );
                if let Some(result) = done.0.get() {
                    return result.clone();
                }
                if let Some(reason) = &engine.abort_reason {
                    return Err(reason.clone());
                }
                moved
            };
            if let Some(gone) = gone.take().filter(|_| !moved) {
                let gone = self.membership.members[gone];
                self.abort_with(&format!("rank {gone} of the group has ended"));
                continue;
            }
            if moved {
                idle = 0;
                continue;
            }
            idle += 1;
            match idle {
                _ if idle < looks.0 => std::hint::spin_loop(),
                _ if idle < looks.1 => std::thread::yield_now(),
                _ => {
                    let began = *began.get_or_insert_with(Instant::now);
                    self.segment
                        .sleep(rank, Doorbell::Waiting, seen, Some(LIVENESS_INTERVAL));
                    if began.elapsed() > self.timeout {
                        self.abort_with(&format!("timed out after {:.1?}", self.timeout));
                    }
                    if looked.get_or_insert(began).elapsed() >= LIVENESS_INTERVAL {
                        looked = Some(Instant::now());
                        // What it has left behind is taken first.
                        gone = self.gone();
                    }
                }
            }
        }
    }

    /// A rank that something under way depends_on and whose process is not there any more.
    fn gone(&self) -> Option<usize> {
        let engine = lock(&self.engine);
        let needed = |rank: &usize| {
            let collective = engine
                .collectives
                .front()
                .is_some_and(|(collective, _)| collective.depends_on(*rank));
            collective || engine.messages.depends_on(*rank)
        };
        let is_gone =
            |rank: &usize| !progress::is_alive(self.segment.process(*rank).load(Ordering::SeqCst));
        (0..self.membership.members.len())
            .filter(needed)
            .find(is_gone)
    }

    /// Nothing goes on in this group, and nothing is written any more to tensors that were given to it.
    fn abort_with(&self, reason: &str) {
        let mut engine = lock(&self.engine);
        engine
            .abort_reason
            .get_or_insert_with(|| reason.to_string());
        engine.collectives.clear();
        engine.messages.clear();
        self.segment
            .pending(self.membership.position)
            .store(0, Ordering::SeqCst);
        drop(engine);
        self.segment.ring_doorbell(self.membership.position);
    }
}

impl Drop for ShmState {
    fn drop(&mut self) {
        self.segment.wake_progress_thread(self.membership.position);
    }
}

impl Communicator for Shm {
    fn backend(&self) -> &'static str {
        "shm"
    }
    fn rank(&self) -> usize {
        self.shared.membership.position
    }
    fn size(&self) -> usize {
        self.shared.membership.members.len()
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
            return Err(self.refuse("broadcast", format!("there is no rank {root} in the group")));
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
            .map_err(|e| self.refuse("all_to_all", e))?;
        let own = self.rank();
        self.collective("all_to_all", &[output, input], |rings, data| {
            let parts = |buffer: &Buffer, splits: &[i64]| {
                let row = buffer.len() / (splits.iter().sum::<i64>().max(1) as usize);
                let mut start = 0;
                let part = |&rows: &i64| {
                    let len = rows as usize * row;
                    start += len;
                    buffer.part(start - len, len)
                };
                splits.iter().map(part).collect::<Vec<Buffer>>()
            };
            let outputs = parts(&data[0], output_splits);
            let inputs = parts(&data[1], input_splits);
            if outputs[own].len() != inputs[own].len() {
                return Err(format!(
                    "rank {own} of the group sends itself another number of rows than it receives"
                ));
            }
            Ok(Collective::all_to_all(rings, &outputs, &inputs))
        })
    }
    fn send(&self, tensor: &Tensor, to: usize, tag: i32) -> Result<Work, CommError> {
        self.start("send", &[tensor], false, |engine, data, done| {
            engine.messages.send(to, tag, data[0].clone(), done)
        })
    }
    fn recv(&self, tensor: &Tensor, from: usize, tag: i32) -> Result<Work, CommError> {
        self.start("recv", &[tensor], true, |engine, data, done| {
            engine.messages.receive(from, tag, data[0].clone(), done)
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
        self.shared.abort_with("the group was aborted");
    }
}
