//! One generation of ranks while it runs: watches ranks, keepers and signals until it ends.

use super::{
    checkpoint_writer::{CheckpointWriter, Finished},
    failure::Failure,
    keepers::{KeeperMessage, Keepers, NumberedMessage},
    machines::Machines,
    recovery::find_candidates,
    tracker::{Action, Tracker},
};
use crate::{hint::hinted, signals::Signals};
use anyhow::{Result, anyhow};
use checkpoint::keeper::{Event, SnapshotId, Topology};
use nix::sys::signal::Signal;
use std::{
    path::Path,
    time::{Duration, Instant},
};
use trainer::config::Config;

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The time in which the real cause of a failure may still show up after a rank or keeper is gone.
const SETTLE_TIME: Duration = Duration::from_millis(400);

pub(super) enum AttemptOutcome {
    Done,
    /// A second SIGINT came, or the ranks did not stop in time after the first.
    Killed,
    Failed(Failure),
}

/// The parts of the launcher that an attempt works with.
pub(super) struct AttemptParts<'s, 'a> {
    pub(super) config: &'s Config,
    pub(super) dir: &'s Path,
    pub(super) machines: &'s mut Machines<'a>,
    pub(super) keepers: &'s mut Option<Keepers>,
    pub(super) writer: &'s mut CheckpointWriter,
    pub(super) signals: &'s Signals,
}

pub(super) struct Attempt<'s, 'a> {
    parts: AttemptParts<'s, 'a>,
    tracker: Tracker,
    standby_started: bool,
    /// The time of the first signal.
    stop_requested: Option<Instant>,
}

impl<'s, 'a> Attempt<'s, 'a> {
    pub(super) fn new(parts: AttemptParts<'s, 'a>, topology: Topology) -> Attempt<'s, 'a> {
        Attempt {
            parts,
            tracker: Tracker::new(topology),
            standby_started: false,
            stop_requested: None,
        }
    }

    /// Returns the number of steps done in the run.
    pub(super) fn step(&self) -> u64 {
        self.tracker.step
    }

    pub(super) fn watch(&mut self) -> AttemptOutcome {
        loop {
            if let Some(outcome) = self.check_ranks() {
                return outcome;
            }
            if self.must_kill() {
                return AttemptOutcome::Killed;
            }
            self.poll_keepers();
            if let Some(failure) = Failure::of_hang(&self.tracker, &self.parts.config.restart) {
                return AttemptOutcome::Failed(failure);
            }
            self.start_standbys();
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.parts.config.run.timeout_s)
    }

    /// Returns the outcome if a rank failed or all have finished.
    fn check_ranks(&mut self) -> Option<AttemptOutcome> {
        let mut failed = self.parts.machines.failed();
        if failed.is_empty() {
            let is_done = self.parts.machines.running() == 0;
            return is_done.then_some(AttemptOutcome::Done);
        }
        // A killed rank is the cause. Ranks that failed by themselves may not be the first, which
        // is still about to report.
        if !failed.iter().any(|failed| failed.signal().is_some()) {
            std::thread::sleep(SETTLE_TIME);
            failed = self.parts.machines.failed();
        }
        let failure = Failure::of_ranks(&failed, self.parts.dir);
        Some(AttemptOutcome::Failed(failure))
    }

    /// Stops the ranks at the first signal. Returns true at the second, or if they take too long.
    fn must_kill(&mut self) -> bool {
        let signals = self.parts.signals.stop_count();
        match self.stop_requested {
            None if signals > 0 => {
                eprintln!(
                    "stopping after this step and writing a checkpoint; \
                     a second Ctrl-C stops at once"
                );
                self.parts.machines.signal(Signal::SIGTERM);
                self.stop_requested = Some(Instant::now());
                false
            }
            Some(since) => signals > 1 || since.elapsed() > self.timeout(),
            None => false,
        }
    }

    /// Starts standby processes once the ranks train: before, they would take their processors.
    fn start_standbys(&mut self) {
        let is_wanted = self.parts.config.restart.standby && self.parts.keepers.is_some();
        if is_wanted && !self.standby_started && self.tracker.step > 0 {
            self.standby_started = true;
            self.parts.machines.stand_by();
        }
    }

    /// Sleeps for one interval, then acts on the keepers' messages and the checkpoint writer.
    fn poll_keepers(&mut self) {
        // Not in the channel's own wait, which spins first: the processors belong to the ranks.
        std::thread::sleep(POLL_INTERVAL);
        let Some(keepers) = self.parts.keepers else {
            return;
        };
        while let Ok(NumberedMessage { number, message }) = keepers.messages.try_recv() {
            let Some(node) = keepers.node_of(number) else {
                continue;
            };
            match message {
                KeeperMessage::Event(event) => {
                    let writer = &mut *self.parts.writer;
                    handle_event(&mut self.tracker, keepers, writer, node, event);
                }
                KeeperMessage::Gone(reason) => {
                    self.replace_keeper(node, &reason);
                    return;
                }
            }
        }
        if let Some(id) = self.tracker.take_expired() {
            keepers.ask_all(|peer| peer.abandon(id));
        }
        if let Some(finished) = self.parts.writer.take_finished(keepers) {
            self.on_checkpoint(finished);
        }
        if let (Some(newest), Some(keepers)) = (self.tracker.newest, &mut self.parts.keepers) {
            let holders = self.tracker.rank_nodes();
            self.parts.writer.begin(keepers, newest, &holders);
        }
    }

    fn on_checkpoint(&mut self, finished: Finished) {
        let Finished { step, result } = finished;
        match result {
            Ok(path) => tracing::info!("checkpoint {}", path.display()),
            Err(error) => {
                let error = anyhow!("no checkpoint at step {step}: {error:#}");
                let is_last = step >= self.parts.config.train.steps;
                if !is_last && self.parts.machines.running() > 0 {
                    eprintln!("warning: {error}; training continues");
                }
                self.parts.writer.last_error = Some(error);
            }
        }
    }

    /// Replaces a lost keeper if its ranks live. Otherwise the node is lost, and its ranks' end is
    /// the failure.
    fn replace_keeper(&mut self, node: usize, reason: &str) {
        let ranks_end = self.ranks_end_soon();
        let Some(keepers) = &mut self.parts.keepers else {
            return;
        };
        keepers.mark_lost(node);
        if ranks_end {
            return;
        }
        eprintln!(
            "warning: the keeper of node {node} is gone ({reason}); starting another, training \
             continues"
        );
        if let Err(error) = self.restart_keeper(node) {
            eprintln!("warning: no snapshots on node {node}: {error:#}");
        }
    }

    /// True if ranks have ended, or do within the settle time: a process with much memory takes
    /// some time to die.
    fn ranks_end_soon(&mut self) -> bool {
        let machines = &mut self.parts.machines;
        let mut have_ended = || !machines.failed().is_empty() || machines.running() == 0;
        let began = Instant::now();
        while began.elapsed() < SETTLE_TIME {
            if have_ended() {
                return true;
            }
            std::thread::sleep(SETTLE_TIME / 40);
        }
        have_ended()
    }

    fn restart_keeper(&mut self, node: usize) -> Result<()> {
        let abandoned = self.tracker.take_pending();
        let Some(keepers) = &mut self.parts.keepers else {
            return Ok(());
        };
        keepers.restart(node, self.parts.machines)?;
        let topology = &mut self.tracker.topology;
        for (node, address) in topology.nodes.iter_mut().zip(keepers.addresses()) {
            node.address = address;
        }
        for id in abandoned {
            keepers.ask_all(|peer| peer.abandon(id));
        }
        keepers.set_up(topology);
        keepers.save()
    }

    /// Completes and writes the last snapshot once the ranks are done, and stops the keepers.
    ///
    /// # Errors
    /// If it cannot be written. It stays in the keepers' memory then.
    pub(super) fn finish(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.timeout();
        let signals_before = self.parts.signals.stop_count();
        let mut tried = false;
        while self.parts.keepers.is_some() {
            self.poll_keepers();
            if self.parts.signals.stop_count() > signals_before {
                return Err(hinted(
                    anyhow!("stopped while writing the last checkpoint"),
                    "the state is still in memory: run the same command to write it",
                ));
            }
            let newest = self.newest_of_generation();
            let is_complete = newest.is_none_or(|id| self.tracker.newest >= Some(id));
            if !is_complete && Instant::now() > deadline {
                let timeout = self.timeout();
                return Err(hinted(
                    anyhow!("the last snapshot was not complete within {timeout:.0?}"),
                    "run the same command to try again",
                ));
            }
            if !is_complete || !self.parts.writer.is_idle() {
                // A slow disk has no deadline.
                continue;
            }
            let on_disk = self.parts.writer.newest_step_on_disk();
            match newest.filter(|id| on_disk < Some(id.step)) {
                None => break,
                Some(id) if !tried => {
                    tried = true;
                    self.parts.writer.request(id);
                }
                Some(_) => {
                    let error = self.parts.writer.last_error.take();
                    let error = error.unwrap_or_else(|| anyhow!("no checkpoint at the last step"));
                    return Err(hinted(
                        error,
                        "the state is still in memory: free disk space and run the same command \
                         again",
                    ));
                }
            }
        }
        if let Some(keepers) = self.parts.keepers.take() {
            let newest = self.parts.writer.newest_on_disk();
            if let (Some(_), Some(path)) = (self.tracker.newest, newest) {
                eprintln!("checkpoint {}", path.display());
            }
            keepers.stop();
        }
        Ok(())
    }

    /// Returns the newest snapshot in memory that this generation made.
    fn newest_of_generation(&mut self) -> Option<SnapshotId> {
        let keepers = self.parts.keepers.as_mut()?;
        let newest = find_candidates(keepers).newest()?;
        let generation = self.tracker.topology.generation;
        (newest.generation == generation).then_some(newest)
    }
}

fn handle_event(
    tracker: &mut Tracker,
    keepers: &mut Keepers,
    writer: &mut CheckpointWriter,
    node: usize,
    event: Event,
) {
    match tracker.on_event(node, event) {
        Action::Commit { snapshot, durable } => {
            keepers.ask_all(|peer| peer.commit(&snapshot));
            if durable {
                writer.request(snapshot.id);
            }
            // Before a newer one is complete, whose report may already have arrived.
            writer.begin(keepers, snapshot.id, &tracker.rank_nodes());
        }
        Action::Abandon { id, reason } => {
            let step = id.step;
            tracing::warn!("abandoned the snapshot of step {step}: {reason}");
            keepers.ask_all(|peer| peer.abandon(id));
        }
        Action::Nothing => {}
    }
}
