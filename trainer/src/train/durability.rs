//! Snapshots and checkpoints of a run.

use super::{
    Trainer,
    checkpointing::{self, StateTensors},
    metrics::{
        records::{Progress, SnapshotMetrics},
        step_figures::StepFigures,
    },
    retention::Retention,
    run_state::RunState,
    snapshots::{KeeperAccess, ReservedSlot, Snapshots},
};
use crate::Error;
use parallel::agreement::{agree, sum_over_ranks};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// Interval at which the last snapshot tries again to reserve slots.
const RESERVE_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Snapshots and checkpoints of a run on this rank.
#[derive(Default)]
pub(super) struct Durability {
    pub(super) snapshots: Option<Snapshots>,
    /// For the snapshot of the last step.
    reserved: Option<ReservedSlot>,
    pub(super) requests: CheckpointRequests,
    /// Used on rank 0 only.
    retention: Retention,
    /// Seconds of the last step, of which snapshots may cost a fraction.
    pub(super) last_step_seconds: f64,
}

/// Requests for checkpoints while a run trains.
#[derive(Debug, Default)]
pub(super) struct CheckpointRequests {
    /// True if this rank was asked for a checkpoint.
    pub(super) is_asked: bool,
    /// The step after which the ranks write the checkpoint that one was asked for.
    pub(super) step: Option<u64>,
}

impl Durability {
    /// Waits for the copy of the last snapshot, whose tensors the update changes. With `is_due`,
    /// also chooses the interval to the next snapshot from the figures of the step, the sums of
    /// `ranks` ranks.
    pub(super) fn finish_copy(&mut self, is_due: bool, figures: &StepFigures, ranks: usize) {
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.wait();
            if is_due {
                let cost = figures.snapshot_seconds / ranks as f64;
                let step = figures.last_step_seconds / ranks as f64;
                snapshots.choose_interval(cost, step);
            }
        }
    }

    /// Notes that step `step` is done, keeps its `reserved` slot, and chooses the step of the
    /// checkpoint that a rank was asked for.
    pub(super) fn complete_step(
        &mut self,
        step: u64,
        reserved: Option<ReservedSlot>,
        figures: &StepFigures,
        moved_experts: Option<u64>,
    ) {
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.progress.step_done(step);
            if moved_experts.is_some_and(|moved| moved > 0) {
                snapshots.forget_plan();
            }
        }
        if figures.checkpoint_ranks > 0.0 {
            // Keepers need a slot, which ranks reserve before a step.
            let waits = self.snapshots.is_some();
            self.requests.step = Some(step + u64::from(waits));
        }
        self.reserved = reserved.map(|reserved| ReservedSlot {
            on_all_ranks: figures.ranks_without_slot == 0.0,
            ..reserved
        });
    }

    /// Returns the cost of the last snapshot.
    pub(super) fn metrics(&self) -> Option<SnapshotMetrics> {
        let snapshots = self.snapshots.as_ref()?;
        Some(SnapshotMetrics {
            stall_ms: snapshots.cost.stall * 1e3,
            copy_ms: snapshots.cost.copy * 1e3,
            bytes: snapshots.cost.bytes,
            skipped: snapshots.skipped,
        })
    }

    /// Waits until old checkpoints are removed, and reports failures.
    pub(super) fn finish(&self, progress: &mut dyn Progress) {
        let failures = self.retention.finish();
        if failures > 0 {
            progress.warn(&format!(
                "old checkpoints could not be removed {failures} times; the log says why"
            ));
        }
    }
}

impl Trainer {
    /// Uses the keeper of this node: takes snapshots from now on, and resumes from the one that
    /// `access` names.
    pub fn use_keeper(&mut self, access: KeeperAccess) {
        let rank = self.rank.world.rank();
        let every = self.config.snapshot.every;
        self.durability.snapshots = Some(Snapshots::new(
            access,
            rank,
            every,
            self.rank.device.as_ref(),
        ));
    }

    /// Reserves the memory that snapshots need. If a node has too little, disables snapshots and
    /// calls `warn`. A rank whose keeper cannot be reached tries again at its next snapshots,
    /// because the launcher may be replacing the keeper.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If another rank cannot be reached.
    pub fn begin_snapshots(&mut self, warn: &mut dyn FnMut(&str)) -> Result<(), Error> {
        if self.durability.snapshots.is_none() {
            return Ok(());
        }
        let planned = match self.plan_snapshots() {
            Err(Error::KeeperAway(reason)) => {
                tracing::warn!("{reason}; the next snapshots try again");
                Ok(())
            }
            planned => planned,
        };
        match agree(&self.rank.world, planned) {
            Ok(()) => Ok(()),
            Err(Error::Comm(error)) => Err(error.into()),
            Err(error) => {
                warn(&format!(
                    "no snapshots in memory: {error}; after a failure the run resumes from a \
                     checkpoint. For snapshots use more memory or nodes, or a larger \
                     snapshot.memory_gib"
                ));
                self.durability.snapshots = None;
                Ok(())
            }
        }
    }

    fn plan_snapshots(&mut self) -> Result<(), Error> {
        let (tensors, save_plan) =
            checkpointing::plan_save(&self.state_tensors(), &self.rank.world)?;
        let state = self.state();
        match &mut self.durability.snapshots {
            Some(snapshots) => {
                snapshots.plan(&save_plan, &tensors, &state, self.rank.device.as_ref())
            }
            None => Ok(()),
        }
    }

    /// Plans snapshots again after experts have moved. If the keeper cannot be reached or has too
    /// little memory, it has no slot afterwards.
    fn replan_snapshots(&mut self) -> Result<(), Error> {
        let needs_plan = self
            .durability
            .snapshots
            .as_ref()
            .is_some_and(Snapshots::needs_plan);
        if !needs_plan {
            return Ok(());
        }
        match self.plan_snapshots() {
            Err(Error::Keeper(reason) | Error::KeeperAway(reason)) => {
                tracing::warn!("{reason}");
                Ok(())
            }
            planned => planned,
        }
    }

    /// Reserves a slot for the snapshot of the next step, if a snapshot is due.
    pub(super) fn reserve_slot(&mut self) -> Result<Option<ReservedSlot>, Error> {
        let step = self.step() + 1;
        let checkpoint = self.checkpoint_due(step);
        let snapshots = self.durability.snapshots.as_ref();
        let is_due = snapshots.is_some_and(|snapshots| snapshots.due(step, checkpoint));
        if !is_due {
            return Ok(None);
        }
        self.replan_snapshots()?;
        let slot = match &mut self.durability.snapshots {
            Some(snapshots) => snapshots.reserve(step, checkpoint, self.rank.device.as_ref()),
            None => None,
        };
        Ok(Some(ReservedSlot {
            slot,
            on_all_ranks: false,
            checkpoint,
        }))
    }

    /// Takes the snapshot of the last step in the slots that [`Trainer::train_step`] reserved. The
    /// step's lines are already queued: the snapshot waits for them, so that a resumed run does not
    /// miss them.
    fn take_reserved(&mut self) -> Result<(), Error> {
        let Some(reserved) = self.durability.reserved.take() else {
            return Ok(());
        };
        let Some(snapshots) = &mut self.durability.snapshots else {
            return Ok(());
        };
        match reserved.slot {
            // After a move of experts, the slot was for tensors with other names.
            Some(slot) if reserved.on_all_ranks && !snapshots.needs_plan() => {
                self.take_snapshot(slot)
            }
            slot => {
                snapshots.skip(slot, reserved.checkpoint);
                Ok(())
            }
        }
    }

    /// Hands the current state to the copying thread.
    fn take_snapshot(&mut self, slot: usize) -> Result<(), Error> {
        let begun = Instant::now();
        let state = self.state();
        let generator = self.rank.device.generator_state()?;
        let lines = self.reports.files.position();
        if let Some(snapshots) = &mut self.durability.snapshots {
            snapshots.take(slot, state, generator, lines);
            snapshots.cost.stall = begun.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// Makes sure that the keepers have the current state, which the launcher writes to disk at the
    /// end of the run. Returns false if they do not have it.
    ///
    /// # Collective
    /// All ranks.
    fn take_final_snapshot(&mut self) -> Result<bool, Error> {
        if self.all_stored()? {
            // A snapshot of this step was due anyway.
            return Ok(true);
        }
        // The last step may have moved experts.
        self.replan_snapshots()?;
        let step = self.step();
        let deadline = Instant::now() + Duration::from_secs(self.config.run.timeout_s);
        loop {
            let Some(snapshots) = &mut self.durability.snapshots else {
                return Ok(false);
            };
            let slot = snapshots.reserve(step, true, self.rank.device.as_ref());
            let lacks_slot = self.count_ranks(slot.is_none())? > 0;
            if let Some(slot) = slot.filter(|_| !lacks_slot) {
                self.take_snapshot(slot)?;
                return self.all_stored();
            }
            let Some(snapshots) = &mut self.durability.snapshots else {
                return Ok(false);
            };
            snapshots.skip(slot, true);
            let gives_up = Instant::now() > deadline || !snapshots.is_connected();
            if self.count_ranks(gives_up)? > 0 {
                return Ok(false);
            }
            std::thread::sleep(RESERVE_RETRY_INTERVAL);
        }
    }

    /// True if the keepers have this step's snapshot of all ranks.
    ///
    /// # Collective
    /// All ranks.
    fn all_stored(&mut self) -> Result<bool, Error> {
        let step = self.step();
        let snapshots = self.durability.snapshots.as_mut();
        let is_stored = snapshots.is_some_and(|snapshots| snapshots.wait_until_stored(step));
        Ok(self.count_ranks(is_stored)? == self.rank.world.size())
    }

    /// Returns the number of ranks on which `fact` is true.
    ///
    /// # Collective
    /// All ranks.
    fn count_ranks(&self, fact: bool) -> Result<usize, Error> {
        let own = f64::from(u8::from(fact));
        Ok(sum_over_ranks(&self.rank.world, &[own])?[0] as usize)
    }

    /// Takes the snapshot of the last step and writes a checkpoint if one is due and the keepers do
    /// not write it.
    pub(super) fn persist(
        &mut self,
        is_last: bool,
        progress: &mut dyn Progress,
    ) -> Result<(), Error> {
        self.take_reserved()?;
        // With keepers, checkpoints are written from their memory while training continues.
        let keepers_write = match &mut self.durability.snapshots {
            Some(_) if is_last => self.take_final_snapshot()?,
            Some(snapshots) => !snapshots.take_overdue(),
            None => false,
        };
        let is_requested = self.durability.requests.step == Some(self.step());
        let is_due =
            self.durability.snapshots.is_some() || is_last || self.checkpoint_due(self.step());
        if keepers_write || !is_due {
            return Ok(());
        }
        match self.save() {
            Ok(path) if self.rank.is_first() && (is_last || is_requested) => {
                progress.note(&format!("checkpoint {}", path.display()));
            }
            Ok(_) => {}
            Err(Error::Comm(error)) => return Err(error.into()),
            Err(error) if is_last => return Err(error),
            Err(error) if self.rank.is_first() => {
                progress.warn(&format!(
                    "no checkpoint at step {}: {error}; training continues",
                    self.step()
                ));
            }
            Err(_) => {}
        }
        Ok(())
    }

    /// Writes a checkpoint of the current state, and has old ones removed in a thread. Like a
    /// snapshot, it waits for the lines so far, so that a run that resumes from it does not miss
    /// them.
    ///
    /// # Collective
    /// All ranks.
    ///
    /// # Errors
    /// If it cannot be written. Older checkpoints are then untouched.
    pub fn save(&self) -> Result<PathBuf, Error> {
        let root = self.checkpoint_dir();
        let tensors = self.state_tensors();
        for lines in self.reports.files.position() {
            lines.wait();
        }
        let path = checkpointing::save(&root, &self.state(), &tensors, &self.rank.world)?;
        if self.rank.is_first() {
            self.durability
                .retention
                .order(root, self.config.checkpoint.keep, self.step());
        }
        Ok(path)
    }

    pub(super) fn checkpoint_dir(&self) -> PathBuf {
        self.config.run.dir.join("checkpoints")
    }

    /// True if a checkpoint is due after step `step`, as far as is known before the step.
    fn checkpoint_due(&self, step: u64) -> bool {
        let every = self.config.checkpoint.every;
        let is_regular = every > 0 && step.is_multiple_of(every);
        is_regular || step == self.config.train.steps || self.durability.requests.step == Some(step)
    }

    pub(super) fn state_tensors(&self) -> StateTensors<'_> {
        StateTensors {
            model: &self.model,
            optimizer: &self.optimizer,
            device: self.rank.device.as_ref(),
            mesh: &self.rank.mesh,
        }
    }

    fn state(&self) -> RunState {
        let placement = self.experts.placement.as_ref();
        let position = &self.data.position;
        RunState {
            step: position.step,
            samples: position.samples,
            tokens: position.tokens,
            ranks: self.rank.world.size(),
            min_tokens: self.min_tokens(),
            placement: placement.map(|placement| placement.state().clone()),
            counted_from: Some(position.counted_from),
            state_starts: self.optimizer.state_starts().clone(),
            order: Some(self.data.order),
            data: Some(self.data.recorded.fingerprints.clone()),
            document_tokens: Some(self.data.recorded.tokens.clone()),
            config: serde_json::to_value(&self.config).expect("plain data"),
        }
    }
}
