//! Snapshots and checkpoints of a run.

use super::{
    Trainer,
    checkpointing::{self, StateTensors},
    metrics::{records::Progress, step_figures::StepFigures},
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

impl Trainer {
    /// Uses the keeper of this node: takes snapshots from now on, and resumes from the one that
    /// `access` names.
    pub fn use_keeper(&mut self, access: KeeperAccess) {
        let rank = self.world.rank();
        let every = self.config.snapshot.every;
        self.snapshots = Some(Snapshots::new(access, rank, every, self.device.as_ref()));
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
        if self.snapshots.is_none() {
            return Ok(());
        }
        let planned = match self.plan_snapshots() {
            Err(Error::KeeperAway(reason)) => {
                tracing::warn!("{reason}; the next snapshots try again");
                Ok(())
            }
            planned => planned,
        };
        match agree(&self.world, planned) {
            Ok(()) => Ok(()),
            Err(Error::Comm(error)) => Err(error.into()),
            Err(error) => {
                warn(&format!(
                    "no snapshots in memory: {error}; after a failure the run resumes from a \
                     checkpoint. For snapshots use more memory or nodes, or a larger \
                     snapshot.memory_gib"
                ));
                self.snapshots = None;
                Ok(())
            }
        }
    }

    fn plan_snapshots(&mut self) -> Result<(), Error> {
        let (tensors, save_plan) = checkpointing::plan_save(&self.state_tensors(), &self.world)?;
        let state = self.state();
        match &mut self.snapshots {
            Some(snapshots) => snapshots.plan(&save_plan, &tensors, &state, self.device.as_ref()),
            None => Ok(()),
        }
    }

    /// Plans snapshots again after experts have moved. If the keeper cannot be reached or has too
    /// little memory, it has no slot afterwards.
    fn replan_snapshots(&mut self) -> Result<(), Error> {
        let needs_plan = self.snapshots.as_ref().is_some_and(Snapshots::needs_plan);
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
        let step = self.step + 1;
        let checkpoint = self.checkpoint_due(step);
        let snapshots = self.snapshots.as_ref();
        let is_due = snapshots.is_some_and(|snapshots| snapshots.due(step, checkpoint));
        if !is_due {
            return Ok(None);
        }
        self.replan_snapshots()?;
        let slot = match &mut self.snapshots {
            Some(snapshots) => snapshots.reserve(step, checkpoint, self.device.as_ref()),
            None => None,
        };
        Ok(Some(ReservedSlot {
            slot,
            on_all_ranks: false,
            checkpoint,
        }))
    }

    /// Waits for the copy of the last snapshot, whose tensors the update changes. With `is_due`,
    /// also chooses the interval to the next snapshot from the figures of the step.
    pub(super) fn finish_copy(&mut self, is_due: bool, figures: &StepFigures) {
        let ranks = self.world.size() as f64;
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.wait();
            if is_due {
                let cost = figures.snapshot_seconds / ranks;
                let step = figures.last_step_seconds / ranks;
                snapshots.choose_interval(cost, step);
            }
        }
    }

    /// Takes the snapshot of the last step in the slots that [`Trainer::train_step`] reserved. The
    /// step's lines are already queued: the snapshot waits for them, so that a resumed run does not
    /// miss them.
    fn take_reserved(&mut self) -> Result<(), Error> {
        let Some(reserved) = self.reserved.take() else {
            return Ok(());
        };
        let Some(snapshots) = &mut self.snapshots else {
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
        let generator = self.device.generator_state()?;
        let lines = self.files.position();
        if let Some(snapshots) = &mut self.snapshots {
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
        let deadline = Instant::now() + Duration::from_secs(self.config.run.timeout_s);
        loop {
            let Some(snapshots) = &mut self.snapshots else {
                return Ok(false);
            };
            let slot = snapshots.reserve(self.step, true, self.device.as_ref());
            let lacks_slot = self.count_ranks(slot.is_none())? > 0;
            if let Some(slot) = slot.filter(|_| !lacks_slot) {
                self.take_snapshot(slot)?;
                return self.all_stored();
            }
            let Some(snapshots) = &mut self.snapshots else {
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
        let snapshots = self.snapshots.as_mut();
        let is_stored = snapshots.is_some_and(|snapshots| snapshots.wait_until_stored(self.step));
        Ok(self.count_ranks(is_stored)? == self.world.size())
    }

    /// Returns the number of ranks on which `fact` is true.
    ///
    /// # Collective
    /// All ranks.
    fn count_ranks(&self, fact: bool) -> Result<usize, Error> {
        let own = f64::from(u8::from(fact));
        Ok(sum_over_ranks(&self.world, &[own])?[0] as usize)
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
        let keepers_write = match &mut self.snapshots {
            Some(_) if is_last => self.take_final_snapshot()?,
            Some(snapshots) => !snapshots.take_overdue(),
            None => false,
        };
        let is_requested = self.requested_checkpoint == Some(self.step);
        let is_due = self.snapshots.is_some() || is_last || self.checkpoint_due(self.step);
        if keepers_write || !is_due {
            return Ok(());
        }
        match self.save() {
            Ok(path) if self.is_rank_0() && (is_last || is_requested) => {
                progress.note(&format!("checkpoint {}", path.display()));
            }
            Ok(_) => {}
            Err(Error::Comm(error)) => return Err(error.into()),
            Err(error) if is_last => return Err(error),
            Err(error) if self.is_rank_0() => {
                progress.warn(&format!(
                    "no checkpoint at step {}: {error}; training continues",
                    self.step
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
        for lines in self.files.position() {
            lines.wait();
        }
        let path = checkpointing::save(&root, &self.state(), &tensors, &self.world)?;
        if self.is_rank_0() {
            self.retention
                .order(root, self.config.checkpoint.keep, self.step);
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
        is_regular || step == self.config.train.steps || self.requested_checkpoint == Some(step)
    }

    /// Chooses the step of the checkpoint that a rank was asked for.
    pub(super) fn agree_on_request(&mut self, figures: &StepFigures) {
        if figures.checkpoint_ranks > 0.0 {
            // Keepers need a slot, which ranks reserve before a step.
            let waits = self.snapshots.is_some();
            self.requested_checkpoint = Some(self.step + u64::from(waits));
        }
    }

    pub(super) fn state_tensors(&self) -> StateTensors<'_> {
        StateTensors {
            model: &self.model,
            optimizer: &self.optimizer,
            device: self.device.as_ref(),
            mesh: &self.mesh,
        }
    }

    fn state(&self) -> RunState {
        let placement = self.expert_placement.as_ref();
        RunState {
            step: self.step,
            samples: self.samples,
            tokens: self.tokens,
            ranks: self.world.size(),
            min_tokens: self.min_tokens(),
            placement: placement.map(|placement| placement.state().clone()),
            counted_from: Some(self.counted_from),
            config: serde_json::to_value(&self.config).expect("plain data"),
        }
    }
}
