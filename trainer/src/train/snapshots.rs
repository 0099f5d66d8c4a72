//! Snapshots: the state of one step, copied into the keeper's memory while the next step is computed.
//!
//! State does not change between the end of a step's update and the next update, that is, during a whole forward and
//! backward (DataStates-LLM's principle). A thread of its own copies in that time, chunk by chunk, with checksums taken while
//! a chunk is in the cache; the next update waits for it, which is counted, and hardly ever happens. All ranks take a
//! snapshot or none does: whether each has a free slot travels with the figures of the step.

use crate::Error;
use crate::config::SnapshotEvery;
use crate::train::checkpointing::{RunState, SavePlan};
use checkpoint::keeper::{FillReporter, KeeperClient, Secret, SlotMemory, SnapshotId};
use checkpoint::{ImageHeader, ImageLayout, PartOpener, TensorSlice};
use parallel::{Accelerator, Copier};
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

/// Slots of a rank: one complete, one being filled, and one that may be being written to disk.
const SLOTS: usize = 3;

/// How often a rank says that it lives.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);
/// How often the copying thread looks for work; one who waits for it wakes it.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Chunks that are reported together.
const CHUNKS_PER_REPORT: usize = 16;
/// The share of the time that snapshots may cost where they are taken as often as is cheap.
const MAX_OVERHEAD: f64 = 0.02;
/// Steps for which a due checkpoint waits for a keeper that is gone.
const MAX_OVERDUE_STEPS: u64 = 50;
/// Steps between snapshots at most, where their cost decides.
const MAX_INTERVAL: u64 = 1000;

/// How a rank reaches its node's keeper.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeeperAccess {
    /// The name of its socket.
    pub socket: String,
    /// The run's secret.
    pub secret: Secret,
    /// This attempt of the run.
    pub generation: u64,
    /// Bytes of a chunk.
    pub chunk: usize,
    /// The snapshot to start from, and how many ranks made it; None: from the newest checkpoint.
    pub restore: Option<(SnapshotId, usize)>,
}

/// What has been measured of snapshots.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct SnapshotCost {
    /// Seconds of the training thread: to hand over, and to wait.
    pub(crate) stall: f64,
    /// Seconds of the copying thread.
    pub(crate) copy: f64,
    /// Bytes.
    pub(crate) bytes: u64,
}

/// Says that the rank gets on, from anywhere in its work.
#[derive(Debug, Clone, Default)]
pub(crate) struct ProgressCounter {
    step: Arc<AtomicU64>,
    ticks: Arc<AtomicU64>,
}

impl ProgressCounter {
    /// It got on.
    pub(crate) fn tick(&self) {
        self.ticks.fetch_add(1, Ordering::Relaxed);
    }

    /// It has done `step` steps.
    pub(crate) fn step_done(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.tick();
    }
}

/// A rank's side of snapshots.
pub(crate) struct Snapshots {
    access: KeeperAccess,
    rank: usize,
    every: SnapshotEvery,
    /// Whether copying takes processors that would compute.
    on_host: bool,
    /// None while the keeper cannot be reached.
    open: Option<KeeperConnection>,
    /// Bytes of this rank's part; None where its tensors have to be laid out anew.
    bytes: Option<u64>,
    /// What is laid out, for a copying thread that is started later.
    plan: Option<Arc<Mutex<Plan>>>,
    /// Steps between snapshots, as cost decided; nothing is known at first.
    interval: u64,
    last: Option<u64>,
    /// Whether the last one was copied.
    copied: bool,
    /// A checkpoint was due and there was no slot: for so many steps.
    overdue_steps: Option<u64>,
    pub(crate) skipped: u64,
    pub(crate) cost: SnapshotCost,
    pub(crate) progress: ProgressCounter,
    last_attempt: Instant,
}

struct KeeperConnection {
    link: KeeperClient,
    slots: Vec<SlotMemory>,
    requests: Arc<Mailbox>,
    copied: Receiver<Result<f64, String>>,
    copying: bool,
}

/// What is handed to the copying thread. Putting something in wakes nobody: on a machine whose processors are all at work the
/// woken thread would take the one of him who puts it in, and training would stand still. The thread looks by itself.
#[derive(Default)]
struct Mailbox {
    work: Mutex<VecDeque<CopierCommand>>,
    wake: Condvar,
}

impl Mailbox {
    /// Whether the copying thread is there to take it.
    fn put(mailbox: &Arc<Mailbox>, work: CopierCommand) -> bool {
        mailbox.work.lock().push_back(work);
        Arc::strong_count(mailbox) > 1
    }

    /// Somebody waits for what is in it.
    fn wake(&self) {
        self.wake.notify_one();
    }

    fn take(&self) -> Option<CopierCommand> {
        let mut work = self.work.lock();
        self.wake
            .wait_while_for(&mut work, |work| work.is_empty(), POLL_INTERVAL);
        work.pop_front()
    }
}

enum CopierCommand {
    Copy(Box<CopyRequest>),
    /// Something else is to be copied from here on.
    Plan(Arc<Mutex<Plan>>),
    /// Say so when the keeper knows all that was copied before.
    Sync(Sender<()>),
}

struct CopyRequest {
    slot: usize,
    memory: SlotMemory,
    state: RunState,
    generator: Tensor,
}

/// What this rank saves: where everything is, and the memory that it is copied from, in the order of the image.
struct Plan {
    image: ImageLayout,
    tensors: Vec<(u64, Tensor)>,
}

impl Snapshots {
    /// Connects. Slots come with [`Snapshots::plan`].
    pub(crate) fn new(
        access: KeeperAccess,
        rank: usize,
        every: SnapshotEvery,
        device: &dyn Accelerator,
    ) -> Snapshots {
        Snapshots {
            access,
            rank,
            every,
            on_host: device.computes_on_host(),
            open: None,
            bytes: None,
            plan: None,
            interval: 1,
            last: None,
            copied: false,
            overdue_steps: None,
            skipped: 0,
            cost: SnapshotCost::default(),
            progress: ProgressCounter::default(),
            last_attempt: Instant::now(),
        }
    }

    /// The parts of the snapshot to restore: headers, and what opens them.
    pub(crate) fn restored(
        &self,
    ) -> Result<Option<(SnapshotId, Vec<ImageHeader>, PartOpener)>, Error> {
        let Some((id, parts)) = self.access.restore else {
            return Ok(None);
        };
        let failed = |e: checkpoint::keeper::Error| {
            Error::Keeper(format!("the snapshot of step {}: {e}", id.step))
        };
        let mut link = KeeperClient::connect(&self.access.socket, &self.access.secret, self.rank)
            .map_err(failed)?;
        let head = |part: usize| {
            let bytes = link.head(part).map_err(failed)?;
            Ok(ImageHeader::read(
                &bytes,
                Path::new(&format!("part {part} of the snapshot of step {}", id.step)),
            )?)
        };
        let heads = (0..parts).map(head).collect::<Result<Vec<_>, Error>>()?;
        let open: PartOpener = Box::new(move |part| {
            link.open(part).map_err(|e| checkpoint::Error::Damaged {
                path: format!("part {part} of the snapshot of step {}", id.step),
                reason: e.to_string(),
            })
        });
        Ok(Some((id, heads, open)))
    }

    /// Lays out what this rank saves of `tensors`, which keep their memory, and takes slots for it.
    pub(crate) fn plan(
        &mut self,
        save_plan: &SavePlan,
        tensors: &[(TensorSlice, Tensor)],
        state: &RunState,
        device: &dyn Accelerator,
    ) -> Result<(), Error> {
        let state = serde_json::to_value(state).expect("plain data");
        let held: Vec<_> = save_plan
            .own
            .iter()
            .map(|(_, place, kind)| (place.clone(), *kind))
            .collect();
        let image = ImageLayout::plan(&held, save_plan.tensors, &state)?;
        let own = save_plan.own.iter().zip(image.offsets());
        let mut tensors: Vec<(u64, Tensor)> = own
            .map(|((index, _, _), &offset)| (offset, tensors[*index].1.shallow_clone()))
            .collect();
        tensors.sort_by_key(|(offset, _)| *offset);
        self.bytes = Some(image.bytes());
        self.cost.bytes = image.bytes();
        self.plan = Some(Arc::new(Mutex::new(Plan { image, tensors })));
        self.connect(device)
    }

    /// Whether another plan is needed: nobody knows yet what this rank saves.
    pub(crate) fn needs_plan(&self) -> bool {
        self.bytes.is_none()
    }

    /// What it holds is called something else now.
    pub(crate) fn forget_plan(&mut self) {
        self.bytes = None;
        self.plan = None;
    }

    fn connect(&mut self, device: &dyn Accelerator) -> Result<(), Error> {
        self.last_attempt = Instant::now();
        let (Some(bytes), Some(plan)) = (self.bytes, self.plan.clone()) else {
            return Ok(());
        };
        let failed =
            |e: checkpoint::keeper::Error| Error::Keeper(format!("the keeper of this node: {e}"));
        if let Some(open) = &self.open
            && open.slots.iter().all(|slot| slot.len() as u64 >= bytes)
            && Mailbox::put(&open.requests, CopierCommand::Plan(plan.clone()))
        {
            return Ok(());
        }
        self.open = None;
        let KeeperAccess {
            socket,
            secret,
            chunk,
            ..
        } = &self.access;
        let mut link = KeeperClient::connect(socket, secret, self.rank).map_err(failed)?;
        let filler = FillReporter::connect(socket, secret, self.rank).map_err(failed)?;
        let slots = link.allocate(bytes, SLOTS).map_err(failed)?;
        let requests = Arc::new(Mailbox::default());
        let todo = requests.clone();
        let (done, copied) = channel();
        let copier = device.copier()?;
        let worker = Worker {
            filler,
            copier,
            chunk: *chunk,
            progress: self.progress.clone(),
            plan,
        };
        std::thread::spawn(move || worker.run(todo, &done));
        self.open = Some(KeeperConnection {
            link,
            slots,
            requests,
            copied,
            copying: false,
        });
        Ok(())
    }

    /// Whether a snapshot is due after step `step`; `checkpoint`: because one is to be written to disk.
    pub(crate) fn due(&self, step: u64, checkpoint: bool) -> bool {
        let by_steps = match self.every {
            SnapshotEvery::Steps(every) => step.is_multiple_of(every),
            SnapshotEvery::Auto(_) => self.last.is_none_or(|last| step >= last + self.interval),
        };
        checkpoint || self.overdue_steps.is_some() || by_steps
    }

    /// A slot for the snapshot of step `step`, if there is one.
    pub(crate) fn reserve(
        &mut self,
        step: u64,
        durable: bool,
        device: &dyn Accelerator,
    ) -> Option<usize> {
        if self.open.is_none() && self.last_attempt.elapsed() > Duration::from_secs(1) {
            // A keeper that was started anew; where it is not there yet, the next snapshot tries again.
            if let Err(error) = self.connect(device) {
                tracing::warn!("{error}");
            }
        }
        let id = SnapshotId {
            generation: self.access.generation,
            step,
        };
        let bytes = self.bytes?;
        let durable = durable || self.overdue_steps.is_some();
        match self.open.as_mut()?.link.reserve(id, bytes, durable) {
            Ok(slot) => slot,
            Err(error) => {
                tracing::warn!("the keeper of this node: {error}");
                self.open = None;
                None
            }
        }
    }

    /// Another rank has no slot: this snapshot is left out.
    pub(crate) fn skip(&mut self, slot: Option<usize>, durable: bool) {
        self.overdue_steps = match self.overdue_steps {
            None => durable.then_some(0),
            Some(steps) => Some(steps + 1),
        };
        self.skipped += 1;
        if let (Some(open), Some(slot)) = (&mut self.open, slot)
            && open.link.release(slot).is_err()
        {
            self.open = None;
        }
    }

    /// Waits until the snapshot of step `step` is copied and its keeper knows it: whether there is one.
    pub(crate) fn wait_until_stored(&mut self, step: u64) -> bool {
        if self.last != Some(step) || !(self.wait() || self.copied) {
            return false;
        }
        // The keeper answers what the copying thread asks after all that it has reported.
        let Some(open) = &mut self.open else {
            return false;
        };
        let (sender, known) = channel();
        Mailbox::put(&open.requests, CopierCommand::Sync(sender));
        open.requests.wake();
        loop {
            match known.recv_timeout(HEARTBEAT_INTERVAL) {
                Ok(()) => return true,
                // What nobody takes out any more would be waited for in vain.
                Err(RecvTimeoutError::Timeout) if Arc::strong_count(&open.requests) > 1 => {}
                Err(_) => return false,
            }
        }
    }

    /// Whether the keeper can be reached.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether a checkpoint has been due for so long that it has to be written without the keeper; the same on all ranks.
    pub(crate) fn is_overdue(&mut self) -> bool {
        let overdue = self
            .overdue_steps
            .is_some_and(|steps| steps >= MAX_OVERDUE_STEPS);
        if overdue {
            self.overdue_steps = None;
        }
        overdue
    }

    /// Starts to copy: all values are those of one step, and stay until [`Snapshots::wait`] returns. `generator` is the state of
    /// the random generator, of which there is a new tensor every time.
    pub(crate) fn take(&mut self, slot: usize, state: RunState, generator: Tensor) {
        self.overdue_steps = None;
        self.last = Some(state.step);
        self.copied = false;
        let Some(open) = &mut self.open else { return };
        let job = CopyRequest {
            slot,
            memory: open.slots[slot].clone(),
            state,
            generator,
        };
        if Mailbox::put(&open.requests, CopierCommand::Copy(Box::new(job))) {
            open.copying = true;
        } else {
            self.open = None;
        }
    }

    /// Waits until what was handed over is copied: its values may change then.
    /// Whether it was copied.
    pub(crate) fn wait(&mut self) -> bool {
        let Some(open) = self.open.as_mut().filter(|open| open.copying) else {
            return false;
        };
        let begun = Instant::now();
        open.copying = false;
        open.requests.wake();
        match open.copied.recv() {
            Ok(Ok(seconds)) => {
                self.cost.copy = seconds;
                self.copied = true;
                self.cost.stall += begun.elapsed().as_secs_f64();
                return true;
            }
            Ok(Err(reason)) => tracing::warn!("a snapshot was not taken: {reason}"),
            Err(_) => tracing::warn!("a snapshot was not taken: the copying thread has ended"),
        }
        self.open = None;
        false
    }

    /// What a snapshot cost here, in seconds of the step.
    pub(crate) fn cost_seconds(&self) -> f64 {
        let copying = if self.on_host { self.cost.copy } else { 0.0 };
        self.cost.stall + copying
    }

    /// Decides how often, by what a snapshot cost and a step took: figures that all ranks agree on.
    pub(crate) fn choose_interval(&mut self, cost: f64, step_seconds: f64) {
        self.interval = interval(cost, step_seconds);
    }
}

/// Steps between snapshots that cost `cost` seconds each, so that they take less than [`MAX_OVERHEAD`] of the time.
fn interval(cost: f64, step_seconds: f64) -> u64 {
    let steps = cost / (MAX_OVERHEAD * step_seconds.max(1e-9));
    (steps.ceil() as u64).clamp(1, MAX_INTERVAL)
}

struct Worker {
    filler: FillReporter,
    copier: Box<dyn Copier>,
    chunk: usize,
    progress: ProgressCounter,
    plan: Arc<Mutex<Plan>>,
}

impl Worker {
    /// Until nobody is left who would put something in, or the keeper is gone; the training thread finds out with its next
    /// snapshot.
    fn run(mut self, requests: Arc<Mailbox>, done: &Sender<Result<f64, String>>) {
        let mut beaten = Instant::now();
        while Arc::strong_count(&requests) > 1 {
            let work = requests.take();
            let busy = work.is_some();
            match work {
                Some(CopierCommand::Plan(plan)) => self.plan = plan,
                Some(CopierCommand::Sync(known)) => {
                    if self.filler.sync().is_err() {
                        return;
                    }
                    // Its asker waits.
                    let _ = known.send(());
                }
                Some(CopierCommand::Copy(job)) => {
                    let copied = self.copy(&job);
                    let failed = copied.is_err();
                    if done.send(copied).is_err() || failed {
                        return;
                    }
                }
                None => {}
            }
            if busy || beaten.elapsed() > HEARTBEAT_INTERVAL {
                beaten = Instant::now();
                let step = &self.progress.step;
                let ticks = &self.progress.ticks;
                if self
                    .filler
                    .heartbeat(step.load(Ordering::Relaxed), ticks.load(Ordering::Relaxed))
                    .is_err()
                {
                    return;
                }
            }
        }
    }

    /// Copies chunk by chunk: seconds.
    fn copy(&mut self, job: &CopyRequest) -> Result<f64, String> {
        let begun = Instant::now();
        let plan = self.plan.clone();
        let plan = plan.lock();
        let state = serde_json::to_value(&job.state).expect("plain data");
        let head = plan.image.head(&state).map_err(|e| e.to_string())?;
        // The generator's state is the one tensor of bytes, and so the last.
        let fixed = plan
            .tensors
            .iter()
            .map(|(offset, tensor)| match tensor.kind() {
                Kind::Uint8 => (*offset, &job.generator),
                _ => (*offset, tensor),
            });
        let flat: Vec<(u64, Tensor, usize)> = fixed
            .map(|(offset, tensor)| (offset, tensor.view(-1), tensor.kind().elt_size_in_bytes()))
            .collect();
        self.fill(job.slot, &job.memory, &head, &flat, plan.image.bytes())?;
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Fills a slot with `head` and tensors, given with their places and sizes of values.
    fn fill(
        &mut self,
        slot: usize,
        memory: &SlotMemory,
        head: &[u8],
        flat: &[(u64, Tensor, usize)],
        bytes: u64,
    ) -> Result<(), String> {
        let ends =
            |(offset, tensor, size): &(u64, Tensor, usize)| offset + (tensor.numel() * size) as u64;
        let mut next = 0;
        let mut crcs = Vec::new();
        let chunks = bytes.div_ceil(self.chunk as u64);
        for chunk in 0..chunks {
            let start = chunk * self.chunk as u64;
            let end = (start + self.chunk as u64).min(bytes);
            let copier = &mut self.copier;
            let crc = memory.write(start as usize, (end - start) as usize, |into| {
                let head = head.get(start as usize..).unwrap_or_default();
                let head = &head[..head.len().min(into.len())];
                into[..head.len()].copy_from_slice(head);
                // Tensors that lie in this chunk; the first may have begun before it, the last may end after it.
                while next < flat.len() && ends(&flat[next]) <= start {
                    next += 1;
                }
                for (offset, tensor, size) in flat[next..]
                    .iter()
                    .take_while(|(offset, _, _)| *offset < end)
                {
                    let from = start.max(*offset);
                    let to = end.min(offset + (tensor.numel() * size) as u64);
                    let part = tensor.narrow(
                        0,
                        (from - offset) as i64 / *size as i64,
                        (to - from) as i64 / *size as i64,
                    );
                    copier.copy(
                        &part,
                        &mut into[(from - start) as usize..(to - start) as usize],
                    )?;
                }
                Ok::<u32, torch_ext::Error>(checkpoint::crc32c(into))
            });
            crcs.push(crc.map_err(|e| e.to_string())?);
            if crcs.len() == CHUNKS_PER_REPORT || chunk + 1 == chunks {
                self.filler
                    .filled(slot, end, std::mem::take(&mut crcs))
                    .map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}

/// Times the copying of a rank's state, without a run around it. For benchmarks.
pub struct CopyTimer {
    link: KeeperClient,
    worker: Worker,
    slots: Vec<SlotMemory>,
    tensors: Vec<Tensor>,
}

impl CopyTimer {
    /// A state of `mib` MiB in 16 tensors, whose keeper is reached by `access`.
    ///
    /// # Errors
    /// When the keeper is not there, or has too little memory.
    pub fn new(
        access: KeeperAccess,
        device: &dyn Accelerator,
        mib: usize,
    ) -> Result<CopyTimer, Error> {
        let failed = |e: checkpoint::keeper::Error| Error::Keeper(format!("the keeper: {e}"));
        let mut link = KeeperClient::connect(&access.socket, &access.secret, 0).map_err(failed)?;
        let filler = FillReporter::connect(&access.socket, &access.secret, 0).map_err(failed)?;
        let slots = link.allocate((mib as u64) << 20, SLOTS).map_err(failed)?;
        let progress = ProgressCounter::default();
        let image = ImageLayout::plan(&[], 0, &serde_json::Value::Null)?;
        let plan = Arc::new(Mutex::new(Plan {
            image,
            tensors: Vec::new(),
        }));
        let worker = Worker {
            filler,
            copier: device.copier()?,
            chunk: access.chunk,
            progress,
            plan,
        };
        let values = (mib << 20) as i64 / 64;
        let tensors = (0..16)
            .map(|value| device.zeros(&[values], tch::Kind::Float) + value)
            .collect();
        Ok(CopyTimer {
            link,
            worker,
            slots,
            tensors,
        })
    }

    /// Copies all of it as the snapshot of step `step`: seconds.
    ///
    /// # Errors
    /// When the keeper has no slot: nobody has said that the earlier snapshots are complete.
    pub fn copy(&mut self, step: u64) -> Result<f64, Error> {
        let failed = |e: checkpoint::keeper::Error| Error::Keeper(format!("the keeper: {e}"));
        let mut offset = 0;
        let place = |tensor: &Tensor| {
            let at = offset;
            offset += 4 * tensor.numel() as u64;
            (at, tensor.shallow_clone(), 4)
        };
        let tensors: Vec<(u64, Tensor, usize)> = self.tensors.iter().map(place).collect();
        let id = SnapshotId {
            generation: 1,
            step,
        };
        let slot = self.link.reserve(id, offset, false).map_err(failed)?;
        let slot = slot.ok_or_else(|| Error::Keeper("the keeper has no free slot".into()))?;
        let begun = Instant::now();
        self.worker
            .fill(slot, &self.slots[slot], &[], &tensors, offset)
            .map_err(Error::Keeper)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.worker.filler.sync().map_err(failed)?;
        self.link.release(slot).map_err(failed)?;
        Ok(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::interval;

    #[test]
    fn the_interval_keeps_to_the_budget() {
        assert_eq!(interval(0.0, 0.1), 1);
        assert_eq!(interval(0.001, 0.1), 1);
        assert_eq!(interval(0.05, 0.1), 25);
        assert_eq!(interval(1.0, 0.0), 1000);
    }
}
