//! Chooses the state that ranks start from: the newest snapshot that can be made whole, else the
//! newest checkpoint.

use super::{
    Engine, Next, Stage,
    command::{Command, KeeperRequest},
    keepers::KeeperId,
    reassembly::{Progress, Reassembled, Reassembly},
    requests::{Purpose, Recipient},
    restart_record::RestartRecord,
    setting_up::SettingUp,
};
use checkpoint::keeper::{
    InventoryPool, SnapshotId,
    recover::{Candidate, candidates},
};
use std::collections::BTreeMap;

/// Number of failures after which a snapshot is of no use.
const MAX_FAILURES: u32 = 2;

/// The state that ranks start from.
#[derive(Debug, Clone, Copy)]
pub(super) struct RestoredSnapshot {
    pub(super) id: SnapshotId,
    /// Number of ranks that made it.
    pub(super) ranks: usize,
}

/// A failure that the run recovers from.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) failure: String,
    pub(super) steps_done: u64,
    pub(super) skipped: Option<u64>,
}

#[derive(Debug)]
enum Step {
    /// The launcher asks for the keepers' inventories.
    Asking,
    Reassembling(Box<Reassembly>),
    /// The disk is searched for the newest checkpoint.
    Surveying,
}

#[derive(Debug)]
pub(super) struct Recovering {
    /// Snapshots of this many steps and more are not trusted.
    distrusted_from: Option<u64>,
    /// Number of snapshots in memory that are not trusted.
    distrusted: usize,
    /// None if another launcher's run is taken over.
    recovered: Option<Recovered>,
    /// Notes about lost nodes, for the message of the restart.
    notes: Option<String>,
    candidates: Vec<Candidate>,
    /// Keepers that answered, in the order in which candidates count them.
    keepers: Vec<KeeperId>,
    failures: Failures,
    /// The reasons why newer states are of no use.
    reasons: Vec<String>,
    /// Keepers that did not list what they hold, with their reasons.
    refusals: Vec<String>,
    step: Step,
}

impl Recovering {
    pub(super) fn begin(
        engine: &mut Engine,
        distrusted_from: Option<u64>,
        recovered: Option<Recovered>,
        notes: Option<String>,
    ) -> Recovering {
        engine.ask_for_inventories();
        Recovering {
            distrusted_from,
            distrusted: 0,
            recovered,
            notes,
            candidates: Vec::new(),
            keepers: Vec::new(),
            failures: Failures::default(),
            reasons: Vec::new(),
            refusals: Vec::new(),
            step: Step::Asking,
        }
    }
}

impl Recovering {
    fn take(&mut self, held: Held) {
        let Held {
            candidates,
            keepers,
            refusals,
        } = held;
        self.keepers = keepers;
        self.candidates = candidates;
        let distrusted_from = self.distrusted_from.unwrap_or(u64::MAX);
        let is_trusted = |candidate: &Candidate| candidate.snapshot.id.step < distrusted_from;
        let held = self.candidates.len();
        self.candidates.retain(is_trusted);
        self.distrusted = held - self.candidates.len();
        self.failures.drop_unusable(&mut self.candidates);
        self.refusals = refusals;
    }
}

/// The snapshots in memory, newest first, and the keepers that hold them.
pub(super) struct Held {
    pub(super) candidates: Vec<Candidate>,
    pub(super) keepers: Vec<KeeperId>,
    /// Keepers that did not list what they hold, with their reasons.
    pub(super) refusals: Vec<String>,
}

/// Number of times that each snapshot could not be made whole.
///
/// One failure says little: a keeper may hang, or be gone, before the launcher knows it. Once all
/// keepers were asked again, that is known.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<SnapshotId, u32>);

impl Failures {
    /// Counts a failure. True if the snapshot may be tried again.
    pub(super) fn may_try_again(&mut self, id: SnapshotId) -> bool {
        let count = self.0.entry(id).or_default();
        *count += 1;
        *count < MAX_FAILURES
    }

    /// Drops the snapshots that may not be tried again.
    pub(super) fn drop_unusable(&self, candidates: &mut Vec<Candidate>) {
        let failures = |candidate: &Candidate| self.0.get(&candidate.snapshot.id).copied();
        candidates.retain(|candidate| failures(candidate) < Some(MAX_FAILURES));
    }
}

impl Engine {
    pub(super) fn ask_for_inventories(&mut self) {
        self.inventory_pool = InventoryPool::default();
        for id in self.keepers.ready() {
            if let Some(keeper) = self.keepers.get_mut(id) {
                keeper.inventory = None;
                keeper.refusals.clear();
            }
            self.ask(id, Purpose::Inventory(id), KeeperRequest::Inventory);
        }
    }

    /// True while keepers have not told what they hold.
    pub(super) fn awaits_inventories(&self) -> bool {
        self.requests
            .any(|purpose| matches!(purpose, Purpose::Inventory(_)))
    }

    /// True if one of these keepers cannot be asked any more.
    pub(super) fn has_lost_one_of(&self, keepers: &[KeeperId]) -> bool {
        keepers.iter().any(|&keeper| !self.keepers.is_ready(keeper))
    }

    pub(super) fn held(&self) -> Held {
        let mut keepers = Vec::new();
        let mut inventories = Vec::new();
        let mut refusals = Vec::new();
        for id in self.keepers.ready() {
            let Some(keeper) = self.keepers.get(id) else {
                continue;
            };
            if let Some(inventory) = &keeper.inventory {
                keepers.push(id);
                inventories.push(inventory.clone());
            } else if let Some(reason) = keeper.refusals.last() {
                let name = self.name_of(id);
                refusals.push(format!("{name} did not list what it holds: {reason}"));
            }
        }
        let candidates = candidates(&inventories);
        Held {
            candidates,
            keepers,
            refusals,
        }
    }

    pub(super) fn recover(&mut self, mut recovering: Recovering) -> Next {
        if self.stops.first().is_some() {
            return self.stop_before_the_first_step();
        }
        loop {
            match std::mem::replace(&mut recovering.step, Step::Asking) {
                Step::Asking => {
                    self.reconnect_to_silent_keepers();
                    if self.awaits_inventories() || self.is_reconnecting() {
                        return Next::Wait(Stage::Recovering(recovering));
                    }
                    let held = self.held();
                    recovering.take(held);
                    recovering.step = self.next_candidate(&mut recovering);
                }
                Step::Reassembling(reassembly) => match reassembly.advance(self) {
                    Progress::Waiting(reassembly) => {
                        recovering.step = Step::Reassembling(Box::new(reassembly));
                        return Next::Wait(Stage::Recovering(recovering));
                    }
                    Progress::Done(Ok(whole)) => return self.restored(recovering, whole),
                    Progress::Done(Err(_)) if self.has_lost_one_of(&recovering.keepers) => {
                        // Its parts may be rebuilt from others.
                        self.ask_for_inventories();
                    }
                    Progress::Done(Err(reason)) => {
                        let failed = recovering.candidates.remove(0).snapshot.id;
                        if recovering.failures.may_try_again(failed) {
                            self.ask_for_inventories();
                            continue;
                        }
                        let step = failed.step;
                        recovering
                            .reasons
                            .push(format!("the snapshot of step {step} is unusable: {reason}"));
                        recovering.step = self.next_candidate(&mut recovering);
                    }
                },
                Step::Surveying => {
                    if self.requests.any(|purpose| purpose == Purpose::Survey) {
                        recovering.step = Step::Surveying;
                        return Next::Wait(Stage::Recovering(recovering));
                    }
                    return self.recover_from_checkpoint(recovering);
                }
            }
        }
    }

    fn next_candidate(&mut self, recovering: &mut Recovering) -> Step {
        if let Some(candidate) = recovering.candidates.first() {
            let keepers = recovering.keepers.clone();
            let reassembly = Reassembly::begin(self, candidate.clone(), keepers);
            return Step::Reassembling(Box::new(reassembly));
        }
        if recovering.distrusted > 0 {
            recovering
                .reasons
                .push("the snapshots in memory did not help".into());
        } else if recovering.reasons.is_empty() {
            recovering
                .reasons
                .push("no complete snapshot is left in memory".into());
        }
        for keeper in self.keepers.ready() {
            let request = KeeperRequest::SelectRestore {
                snapshot: None,
                holders: Vec::new(),
            };
            self.ask(keeper, Purpose::Notify(keeper), request);
        }
        self.survey();
        Step::Surveying
    }

    /// Asks for the newest checkpoint that can be read.
    pub(super) fn survey(&mut self) {
        self.checkpoints.on_survey_begun();
        let id = self.requests.issue(Recipient::Disk, Purpose::Survey, None);
        self.commands.push(Command::Survey { id });
    }

    fn restored(&mut self, mut recovering: Recovering, whole: Reassembled) -> Next {
        if recovering.distrusted > 0 {
            let distrusted = recovering.distrusted;
            let s = if distrusted == 1 { "" } else { "s" };
            let reason = format!("{distrusted} newer snapshot{s} did not help");
            recovering.reasons.push(reason);
        }
        let step = whole.id.step;
        let how = whole.how;
        let message = format!("resuming from the snapshot of step {step} ({how})");
        let snapshot = RestoredSnapshot {
            id: whole.id,
            ranks: whole.holders.len(),
        };
        self.resume(recovering, Some(snapshot), message)
    }

    fn recover_from_checkpoint(&mut self, recovering: Recovering) -> Next {
        let message = match &self.checkpoints.newest {
            Some(saved) => format!("resuming from checkpoint {}", saved.path.display()),
            None => "no checkpoint, starting over".into(),
        };
        self.resume(recovering, None, message)
    }

    fn resume(
        &mut self,
        recovering: Recovering,
        snapshot: Option<RestoredSnapshot>,
        message: String,
    ) -> Next {
        let reasons = recovering.reasons.into_iter();
        let notes = recovering.notes.into_iter();
        let refusals = recovering.refusals.into_iter();
        let parts = notes.chain([message]).chain(reasons).chain(refusals);
        let parts: Vec<String> = parts.collect();
        let message = parts.join("; ");
        match recovering.recovered {
            None => self.print(format!("found keepers of an earlier launcher; {message}")),
            Some(recovered) => {
                let record = RestartRecord {
                    generation: self.generation + 1,
                    failure: recovered.failure.clone(),
                    steps_done: recovered.steps_done,
                    snapshot_step: snapshot.map(|snapshot| snapshot.id.step),
                    resumed_from: message.clone(),
                    skipped_step: recovered.skipped,
                };
                self.commands.push(Command::RecordRestart(record));
                let skipped = match recovered.skipped {
                    Some(step) => format!("; skipping the batch of step {step}"),
                    None => String::new(),
                };
                self.print(format!("{}; {message}{skipped}", recovered.failure));
            }
        }
        self.restored = snapshot;
        // Newer ones are given up, and keepers forget them.
        self.newest_complete = snapshot.map(|snapshot| snapshot.id.step);
        self.has_lost_keeper = false;
        Next::Go(Stage::SettingUp(SettingUp::new(self.now)))
    }
}
