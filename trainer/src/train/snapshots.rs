//! Snapshots: the state after one step, copied into the keeper's memory during the next step.
//!
//! State does not change between two updates, that is, during a whole forward and backward
//! (DataStates-LLM's principle). In that time a thread copies it chunk by chunk, and computes
//! checksums while a chunk is in the cache. The next update waits for the copy; the wait is
//! measured and usually zero. Either all ranks take a snapshot or none does: the figures of the
//! step include whether each rank has a free slot.

use super::{
    checkpointing::SavePlan,
    copy_thread::{CopyCommand, CopyPlan, CopyRequest, CopyThread, HEARTBEAT_INTERVAL, Mailbox},
    progress_counter::ProgressCounter,
    run_state::RunState,
    slot_writer::{SlotWriter, keeper_failed},
};
use crate::{Error, config::SnapshotEvery, lines::WrittenLines};
use checkpoint::{
    ImageHeader, ImageLayout, PartSource, TensorSlice,
    keeper::{self, KeeperClient, Secret, SlotMemory, SnapshotId},
};
use parallel::Accelerator;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel},
    },
    time::{Duration, Instant},
};
use tch::Tensor;

/// Slots per rank: one complete, one being filled, and one that may be being written to disk.
pub(crate) const SLOTS: usize = 3;

/// Interval between attempts to reach a keeper that is gone.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);

/// Fraction of the time that snapshots may cost with `snapshot.every: auto`.
const MAX_OVERHEAD: f64 = 0.02;
/// Limit for the steps between snapshots with `snapshot.every: auto`.
const MAX_INTERVAL: u64 = 1000;

/// Steps for which a due checkpoint waits for a slot before the ranks write it themselves.
const MAX_OVERDUE_STEPS: u64 = 50;

/// Address, secret and task of a rank at its node's keeper.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeeperAccess {
    /// Name of the keeper's socket.
    pub socket: String,
    /// Secret of the run.
    pub secret: Secret,
    /// Generation of the run.
    pub generation: u64,
    /// Bytes of a chunk.
    pub chunk: usize,
    /// Snapshot to restore and its number of ranks; `None` to resume from the newest checkpoint.
    pub restore: Option<(SnapshotId, usize)>,
}

/// Measured cost of the last snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct SnapshotCost {
    /// Seconds of the training thread: to hand over, and to wait.
    pub(crate) stall: f64,
    /// Seconds of the copying thread.
    pub(crate) copy: f64,
    pub(crate) bytes: u64,
}

/// A slot for the snapshot of a step.
pub(crate) struct ReservedSlot {
    /// Index of the slot, if this rank has one.
    pub(crate) slot: Option<usize>,
    /// True if every rank has a slot.
    pub(crate) on_all_ranks: bool,
    /// True if a checkpoint is due.
    pub(crate) checkpoint: bool,
}

impl ReservedSlot {
    /// True if this rank has no slot.
    pub(crate) fn is_lacking(&self) -> bool {
        self.slot.is_none()
    }
}

/// A rank's side of snapshots.
pub(crate) struct Snapshots {
    access: KeeperAccess,
    rank: usize,
    every: SnapshotEvery,
    /// True if copying takes processors from computing.
    on_host: bool,
    /// `None` while the keeper cannot be reached.
    keeper: Option<KeeperConnection>,
    /// Bytes of this rank's part; `None` if its tensors need a new plan.
    bytes: Option<u64>,
    /// For a copying thread that starts later.
    plan: Option<Arc<Mutex<CopyPlan>>>,
    /// Steps between snapshots with `snapshot.every: auto`.
    interval: u64,
    /// Step of the last snapshot.
    last: Option<u64>,
    /// True if the last snapshot was copied.
    copied: bool,
    /// Steps since a checkpoint was due and a rank had no slot.
    overdue_steps: Option<u64>,
    pub(crate) skipped: u64,
    pub(crate) cost: SnapshotCost,
    pub(crate) progress: ProgressCounter,
    last_attempt: Instant,
    /// A thread that tries to reach the keeper again. One that hangs must not stop the training.
    attempt: Option<Receiver<Result<KeeperClient, keeper::Error>>>,
}

/// The parts of a snapshot that this node's keeper has, or fetches from others.
pub(crate) struct KeptParts {
    client: KeeperClient,
    step: u64,
}

impl KeptParts {
    fn name(&self, rank: usize) -> String {
        format!("part {rank} of the snapshot of step {}", self.step)
    }

    fn unreadable(&self, rank: usize, error: &keeper::Error) -> checkpoint::Error {
        checkpoint::Error::Io {
            action: "cannot read",
            path: self.name(rank),
            cause: std::io::Error::other(error.to_string()),
        }
    }
}

impl PartSource for KeptParts {
    fn header(&mut self, rank: usize) -> Result<ImageHeader, checkpoint::Error> {
        let bytes = self.client.header(rank);
        let bytes = bytes.map_err(|error| self.unreadable(rank, &error))?;
        ImageHeader::read(&bytes, Path::new(&self.name(rank)))
    }

    fn open(&mut self, rank: usize) -> Result<File, checkpoint::Error> {
        let file = self.client.open(rank);
        file.map_err(|error| self.unreadable(rank, &error))
    }
}

struct KeeperConnection {
    client: KeeperClient,
    slots: Vec<SlotMemory>,
    mailbox: Arc<Mailbox>,
    copied: Receiver<Result<f64, Error>>,
    is_copying: bool,
}

impl Snapshots {
    /// Creates the rank's side without a connection; [`Snapshots::plan`] connects to the keeper.
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
            keeper: None,
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
            attempt: None,
        }
    }

    /// Returns the snapshot to restore and its number of parts, if there is one.
    pub(crate) fn to_restore(&self) -> Option<(SnapshotId, usize)> {
        self.access.restore
    }

    /// Connects to the keeper for the parts of the snapshot to restore.
    ///
    /// # Errors
    /// If the keeper cannot be reached.
    pub(crate) fn connect_for_parts(&self, id: SnapshotId) -> Result<KeptParts, Error> {
        let KeeperAccess { socket, secret, .. } = &self.access;
        let client = KeeperClient::connect(socket, secret, self.rank);
        let step = id.step;
        let failed = |error| Error::Keeper(format!("the snapshot of step {step}: {error}"));
        Ok(KeptParts {
            client: client.map_err(failed)?,
            step,
        })
    }

    /// Plans what this rank saves of `tensors`, whose memory must stay, and reserves slots for it.
    ///
    /// # Errors
    /// [`Error::KeeperAway`] if the keeper cannot be reached: [`Snapshots::reserve`] tries again.
    /// [`Error::Keeper`] if it has too little memory.
    pub(crate) fn plan(
        &mut self,
        save_plan: &SavePlan,
        tensors: &[(TensorSlice, Tensor)],
        state: &RunState,
        device: &dyn Accelerator,
    ) -> Result<(), Error> {
        let state = serde_json::to_value(state).expect("plain data");
        let planned = save_plan.own.iter();
        let slices: Vec<_> = planned
            .map(|planned| (planned.slice.clone(), planned.kind))
            .collect();
        let image = ImageLayout::plan(
            &slices,
            save_plan.num_tensors,
            &save_plan.companions,
            &state,
        )?;
        let placed = save_plan.own.iter().zip(image.offsets());
        let mut tensors: Vec<(u64, Tensor)> = placed
            .map(|(planned, &offset)| (offset, tensors[planned.index].1.shallow_clone()))
            .collect();
        tensors.sort_by_key(|(offset, _)| *offset);
        self.bytes = Some(image.bytes());
        self.cost.bytes = image.bytes();
        self.plan = Some(Arc::new(Mutex::new(CopyPlan { image, tensors })));
        self.connect(device)
    }

    /// True if [`Snapshots::plan`] must be called before the next snapshot.
    pub(crate) fn needs_plan(&self) -> bool {
        self.bytes.is_none()
    }

    /// Discards the plan, after the rank's tensors got other global names.
    pub(crate) fn forget_plan(&mut self) {
        self.bytes = None;
        self.plan = None;
    }

    fn connect(&mut self, device: &dyn Accelerator) -> Result<(), Error> {
        let Some(bytes) = self.bytes else {
            return Ok(());
        };
        let Some(plan) = self.plan.clone() else {
            return Ok(());
        };
        if let Some(keeper) = &self.keeper
            && keeper.slots.iter().all(|slot| slot.len() as u64 >= bytes)
            && Mailbox::put(&keeper.mailbox, CopyCommand::Plan(plan))
        {
            return Ok(());
        }
        self.disconnect();
        let KeeperAccess { socket, secret, .. } = &self.access;
        let client = KeeperClient::connect(socket, secret, self.rank).map_err(keeper_failed)?;
        self.use_keeper(client, device)
    }

    /// Closes the connection once the copy has ended: what it reads must not change meanwhile.
    fn disconnect(&mut self) {
        self.wait();
        self.keeper = None;
    }

    /// Connects again to a keeper that may have been restarted, without waiting for it.
    fn reconnect(&mut self, device: &dyn Accelerator) -> Result<(), Error> {
        let Some(attempt) = self.attempt.take() else {
            if self.last_attempt.elapsed() > RECONNECT_INTERVAL {
                self.last_attempt = Instant::now();
                self.attempt = Some(self.start_attempt());
            }
            return Ok(());
        };
        match attempt.try_recv() {
            Ok(client) => self.use_keeper(client.map_err(keeper_failed)?, device),
            Err(TryRecvError::Empty) => {
                self.attempt = Some(attempt);
                Ok(())
            }
            Err(TryRecvError::Disconnected) => Ok(()),
        }
    }

    fn start_attempt(&self) -> Receiver<Result<KeeperClient, keeper::Error>> {
        let KeeperAccess { socket, secret, .. } = self.access.clone();
        let rank = self.rank;
        let (sender, attempt) = channel();
        std::thread::spawn(move || {
            // The receiver may have given up.
            let _ = sender.send(KeeperClient::connect(&socket, &secret, rank));
        });
        attempt
    }

    /// Gets slots from a keeper, and starts the thread that fills them.
    fn use_keeper(
        &mut self,
        mut client: KeeperClient,
        device: &dyn Accelerator,
    ) -> Result<(), Error> {
        let Some((bytes, plan)) = self.bytes.zip(self.plan.clone()) else {
            return Ok(());
        };
        let KeeperAccess {
            socket,
            secret,
            chunk,
            ..
        } = &self.access;
        let writer = SlotWriter::connect(socket, secret, &client, *chunk, device)?;
        let slots = client.allocate(bytes, SLOTS).map_err(keeper_failed)?;
        let mailbox = Arc::new(Mailbox::default());
        let thread = CopyThread {
            writer,
            progress: self.progress.clone(),
            plan,
        };
        let thread_mailbox = mailbox.clone();
        let (done, copied) = channel();
        std::thread::spawn(move || thread.run(thread_mailbox, &done));
        self.keeper = Some(KeeperConnection {
            client,
            slots,
            mailbox,
            copied,
            is_copying: false,
        });
        Ok(())
    }

    /// True if a snapshot is due after step `step`. With `checkpoint`, a checkpoint of it is due.
    pub(crate) fn due(&self, step: u64, checkpoint: bool) -> bool {
        let is_due = match self.every {
            SnapshotEvery::Steps(every) => step.is_multiple_of(every),
            SnapshotEvery::Auto(_) => self.last.is_none_or(|last| step >= last + self.interval),
        };
        checkpoint || self.overdue_steps.is_some() || is_due
    }

    /// Returns the name of this generation's snapshot of step `step`.
    fn id(&self, step: u64) -> SnapshotId {
        SnapshotId {
            generation: self.access.generation,
            step,
        }
    }

    /// Reserves a slot for the snapshot of step `step`, if one is free.
    pub(crate) fn reserve(
        &mut self,
        step: u64,
        durable: bool,
        device: &dyn Accelerator,
    ) -> Option<usize> {
        if self.keeper.is_none()
            && let Err(error) = self.reconnect(device)
        {
            // A later snapshot tries again.
            tracing::warn!("{error}");
        }
        let id = self.id(step);
        let bytes = self.bytes?;
        let durable = durable || self.overdue_steps.is_some();
        match self.keeper.as_mut()?.client.reserve(id, bytes, durable) {
            Ok(slot) => slot,
            Err(error) => {
                tracing::warn!("the keeper of this node: {error}");
                self.disconnect();
                None
            }
        }
    }

    /// Skips a snapshot because a rank has no slot, and releases this rank's slot.
    pub(crate) fn skip(&mut self, slot: Option<usize>, durable: bool) {
        self.overdue_steps = match self.overdue_steps {
            None => durable.then_some(0),
            Some(steps) => Some(steps + 1),
        };
        self.skipped += 1;
        if let (Some(keeper), Some(slot)) = (&mut self.keeper, slot)
            && keeper.client.release(slot).is_err()
        {
            self.keeper = None;
        }
    }

    /// Waits until the keeper knows the snapshot of step `step`. Returns false if the keeper does
    /// not have it.
    pub(crate) fn wait_until_stored(&mut self, step: u64) -> bool {
        if self.last != Some(step) || !(self.wait() || self.copied) {
            return false;
        }
        let id = self.id(step);
        let Some(keeper) = &mut self.keeper else {
            return false;
        };
        // The keeper answers after all that the thread has reported.
        let (sender, answer) = channel();
        Mailbox::put(&keeper.mailbox, CopyCommand::IsComplete(id, sender));
        keeper.mailbox.wake();
        loop {
            match answer.recv_timeout(HEARTBEAT_INTERVAL) {
                Ok(is_complete) => return is_complete,
                // A thread that has exited leaves the command, and its sender, in the mailbox.
                Err(RecvTimeoutError::Timeout) if Mailbox::is_shared(&keeper.mailbox) => {}
                Err(_) => return false,
            }
        }
    }

    /// True if the keeper can be reached.
    pub(crate) fn is_connected(&self) -> bool {
        self.keeper.is_some()
    }

    /// True, once, if a checkpoint is overdue for so long that the ranks must write it themselves.
    /// The same on all ranks.
    pub(crate) fn take_overdue(&mut self) -> bool {
        let is_overdue = self
            .overdue_steps
            .is_some_and(|steps| steps >= MAX_OVERDUE_STEPS);
        if is_overdue {
            self.overdue_steps = None;
        }
        is_overdue
    }

    /// Starts to copy the state of step `state.step`, once `lines` are in their files. Tensors must
    /// not change until [`Snapshots::wait`] returns.
    pub(crate) fn take(
        &mut self,
        slot: usize,
        state: RunState,
        generator: Tensor,
        lines: Vec<WrittenLines>,
    ) {
        self.overdue_steps = None;
        self.last = Some(state.step);
        self.copied = false;
        let Some(keeper) = &mut self.keeper else {
            return;
        };
        let request = CopyRequest {
            slot,
            memory: keeper.slots[slot].clone(),
            state,
            generator,
            lines,
        };
        if Mailbox::put(&keeper.mailbox, CopyCommand::Copy(Box::new(request))) {
            keeper.is_copying = true;
        } else {
            self.keeper = None;
        }
    }

    /// Waits until the current copy ends, after which tensors may change. Returns true if the
    /// snapshot was copied.
    pub(crate) fn wait(&mut self) -> bool {
        let Some(keeper) = self.keeper.as_mut().filter(|keeper| keeper.is_copying) else {
            return false;
        };
        let begun = Instant::now();
        keeper.is_copying = false;
        keeper.mailbox.wake();
        match keeper.copied.recv() {
            Ok(Ok(seconds)) => {
                self.cost.copy = seconds;
                self.copied = true;
                self.cost.stall += begun.elapsed().as_secs_f64();
                return true;
            }
            Ok(Err(error)) => tracing::warn!("snapshot failed: {error}"),
            Err(_) => tracing::warn!("snapshot failed: the copying thread has exited"),
        }
        self.keeper = None;
        false
    }

    /// Returns the seconds that the last snapshot added to a step.
    pub(crate) fn cost_seconds(&self) -> f64 {
        let copying = if self.on_host { self.cost.copy } else { 0.0 };
        self.cost.stall + copying
    }

    /// Sets the interval from the cost of a snapshot and the duration of a step, which all ranks
    /// agree on.
    pub(crate) fn choose_interval(&mut self, cost: f64, step_seconds: f64) {
        self.interval = interval(cost, step_seconds);
    }
}

/// Returns the steps between snapshots that keep their cost below [`MAX_OVERHEAD`] of the time.
fn interval(cost: f64, step_seconds: f64) -> u64 {
    let steps = cost / (MAX_OVERHEAD * step_seconds.max(1e-9));
    (steps.ceil() as u64).clamp(1, MAX_INTERVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::keeper::serve::{self, Settings};
    use parallel::Cpu;

    fn snapshots(socket: &str, secret: &Secret) -> Snapshots {
        let access = KeeperAccess {
            socket: socket.into(),
            secret: secret.clone(),
            generation: 1,
            chunk: 1 << 20,
            restore: None,
        };
        let mut snapshots = Snapshots::new(access, 0, SnapshotEvery::Steps(1), &Cpu);
        let image = ImageLayout::plan(&[], 0, &[], &serde_json::json!({})).unwrap();
        snapshots.bytes = Some(image.bytes());
        let tensors = Vec::new();
        snapshots.plan = Some(Arc::new(Mutex::new(CopyPlan { image, tensors })));
        snapshots
    }

    fn serve_keeper(socket: &str, secret: &Secret, memory: u64) {
        let settings = Settings {
            socket: socket.into(),
            secret: secret.clone(),
            listen: ([127, 0, 0, 1], 0).into(),
            memory_limit: Some(memory),
            orphan_timeout: Duration::from_secs(60),
        };
        let (sender, ready) = channel();
        std::thread::spawn(move || {
            serve::run(settings, |_| {
                let _ = sender.send(());
                Ok(())
            })
        });
        ready.recv().unwrap();
    }

    #[test]
    fn a_keeper_that_comes_later_is_used() {
        let socket = format!("moerun-test-later-{}", std::process::id());
        let secret = Secret::random().unwrap();
        let mut snapshots = snapshots(&socket, &secret);
        let away = snapshots.connect(&Cpu);
        assert!(matches!(away, Err(Error::KeeperAway(_))), "{away:?}");
        serve_keeper(&socket, &secret, 1 << 30);
        let began = Instant::now();
        while !snapshots.is_connected() {
            assert!(began.elapsed() < Duration::from_secs(30));
            snapshots.reserve(1, false, &Cpu);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_keeper_without_memory_is_not_away() {
        let socket = format!("moerun-test-small-{}", std::process::id());
        let secret = Secret::random().unwrap();
        serve_keeper(&socket, &secret, 1);
        let refused = snapshots(&socket, &secret).connect(&Cpu);
        assert!(matches!(refused, Err(Error::Keeper(_))), "{refused:?}");
    }

    #[test]
    fn the_interval_keeps_to_the_budget() {
        assert_eq!(interval(0.0, 0.1), 1);
        assert_eq!(interval(0.001, 0.1), 1);
        assert_eq!(interval(0.05, 0.1), 25);
        assert_eq!(interval(1.0, 0.0), 1000);
    }
}
