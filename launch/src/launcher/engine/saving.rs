//! Writes the newest state in memory to a checkpoint, unless one that can be read has the same step
//! or a newer one.

use super::{
    Engine,
    command::{Command, KeeperRequest, KeeperShare},
    event::Source,
    keepers::KeeperId,
    problem::Problem,
    reassembly::{Progress, Reassembled, Reassembly},
    recovering::Failures,
    requests::{Purpose, Recipient},
};
use checkpoint::keeper::{SnapshotId, recover::Candidate};
use std::collections::BTreeMap;

#[derive(Debug)]
enum Step {
    /// Keepers list what they hold, and the disk is searched.
    Asking,
    Reassembling(Box<Reassembly>),
    Writing(SnapshotId),
}

#[derive(Debug)]
pub(super) struct Saving {
    candidates: Vec<Candidate>,
    keepers: Vec<KeeperId>,
    failures: Failures,
    /// The reasons why the snapshots that were tried are of no use.
    reasons: Vec<String>,
    has_retried: bool,
    step: Step,
}

pub(super) enum Saved {
    /// There is nothing in memory that is not on disk.
    Nothing,
    /// The state of this step was written.
    Written(u64),
    Failed(Problem),
    /// A state is in memory that is not on disk, but too little of it can be reached.
    OutOfReach(Problem),
}

impl Saving {
    pub(super) fn begin(engine: &mut Engine) -> Saving {
        engine.checkpoints.forget_due();
        engine.ask_for_inventories();
        engine.survey();
        Saving {
            candidates: Vec::new(),
            keepers: Vec::new(),
            failures: Failures::default(),
            reasons: Vec::new(),
            has_retried: false,
            step: Step::Asking,
        }
    }

    pub(super) fn advance(mut self, engine: &mut Engine) -> Progress<Saving, Saved> {
        loop {
            match std::mem::replace(&mut self.step, Step::Asking) {
                Step::Asking => {
                    engine.reconnect_to_silent_keepers();
                    let surveys = engine.requests.any(|purpose| purpose == Purpose::Survey);
                    let asks = engine.awaits_inventories() || engine.is_reconnecting();
                    if asks || surveys || !engine.checkpoints.is_idle() {
                        return Progress::Waiting(self);
                    }
                    let held = engine.held();
                    self.candidates = held.candidates;
                    self.keepers = held.keepers;
                    self.failures.drop_unusable(&mut self.candidates);
                    match self.next_candidate(engine) {
                        Some(step) => self.step = step,
                        None => return Progress::Done(self.nothing(engine)),
                    }
                }
                Step::Reassembling(reassembly) => match reassembly.advance(engine) {
                    Progress::Waiting(reassembly) => {
                        self.step = Step::Reassembling(Box::new(reassembly));
                        return Progress::Waiting(self);
                    }
                    Progress::Done(Ok(whole)) => self.step = engine.write(&whole),
                    Progress::Done(Err(_)) if engine.has_lost_one_of(&self.keepers) => {
                        // Its parts may be rebuilt from others.
                        engine.ask_for_inventories();
                    }
                    Progress::Done(Err(reason)) => {
                        let failed = self.candidates.remove(0).snapshot.id;
                        if self.failures.may_try_again(failed) {
                            engine.ask_for_inventories();
                            continue;
                        }
                        let step = failed.step;
                        let reason = format!("the snapshot of step {step} is unusable: {reason}");
                        engine.print(format!("warning: {reason}"));
                        self.reasons.push(reason);
                        match self.next_candidate(engine) {
                            Some(step) => self.step = step,
                            None => return Progress::Done(self.nothing(engine)),
                        }
                    }
                },
                Step::Writing(id) => {
                    if engine.checkpoints.writing.is_some() {
                        self.step = Step::Writing(id);
                        return Progress::Waiting(self);
                    }
                    let failed = engine.checkpoints.last_error.is_some();
                    // The parts of a lost keeper may be rebuilt from others.
                    let has_lost_one = engine.has_lost_one_of(&self.keepers);
                    if failed && (has_lost_one || !self.has_retried) {
                        self.has_retried = true;
                        engine.ask_for_inventories();
                        continue;
                    }
                    return Progress::Done(written(engine, id));
                }
            }
        }
    }

    /// Returns the outcome without a candidate that is newer than everything on disk.
    fn nothing(&self, engine: &Engine) -> Saved {
        let on_disk = engine.checkpoints.newest_step();
        let newest = engine.newest_complete.filter(|&step| Some(step) > on_disk);
        let reason = match (self.reasons.first(), newest) {
            (Some(reason), _) => reason.clone(),
            (None, Some(step)) => format!(
                "the state of step {step} is not on disk: too many of its parts are out of reach"
            ),
            (None, None) => return Saved::Nothing,
        };
        let hint = format!(
            "what is left stays in memory for {}: run the same command to try again",
            engine.keeper_lifetime()
        );
        Saved::OutOfReach(Problem::new(reason).hint(hint))
    }

    /// Begins with the next candidate that is newer than everything on disk.
    fn next_candidate(&self, engine: &mut Engine) -> Option<Step> {
        let candidate = self.candidates.first()?.clone();
        let is_newer = |step| candidate.snapshot.id.step > step;
        if !engine.checkpoints.newest_step().is_none_or(is_newer) {
            return None;
        }
        let reassembly = Reassembly::begin(engine, candidate, self.keepers.clone());
        Some(Step::Reassembling(Box::new(reassembly)))
    }
}

fn written(engine: &mut Engine, id: SnapshotId) -> Saved {
    let step = id.step;
    match engine.checkpoints.last_error.take() {
        None => Saved::Written(step),
        Some(reason) => {
            let message = format!("cannot write step {step}, which is only in memory: {reason}");
            let hint = "the state is still in memory: free disk space and run the same command \
                        again";
            Saved::Failed(Problem::new(message).hint(hint))
        }
    }
}

impl Engine {
    /// Returns how long keepers stay without a launcher. A signal to one shortens it.
    fn keeper_lifetime(&self) -> &'static str {
        match self.stops.first().map(|first| first.source) {
            Some(Source::Keeper(_)) => "20 s",
            _ => "an hour",
        }
    }

    fn write(&mut self, whole: &Reassembled) -> Step {
        self.checkpoints.request(whole.id);
        self.write_checkpoint(whole.id, &whole.holders);
        Step::Writing(whole.id)
    }

    /// Starts to write `newest`, the newest complete snapshot, if one is due and the disk is free.
    ///
    /// `holders` has for each rank the keeper that holds its part.
    pub(super) fn write_checkpoint(&mut self, newest: SnapshotId, holders: &[KeeperId]) {
        if !self.checkpoints.begin(newest) {
            return;
        }
        // Before a newer snapshot is complete: until then this one cannot be overwritten.
        self.notify_all(|| KeeperRequest::Pin(newest));
        let mut held: BTreeMap<KeeperId, Vec<usize>> = BTreeMap::new();
        for (rank, &keeper) in holders.iter().enumerate() {
            held.entry(keeper).or_default().push(rank);
        }
        let held = held.into_iter();
        let shares = held
            .map(|(keeper, ranks)| KeeperShare { keeper, ranks })
            .collect();
        // A slow disk has no deadline.
        let purpose = Purpose::WriteCheckpoint(newest);
        let id = self.requests.issue(Recipient::Disk, purpose, None);
        self.commands.push(Command::WriteCheckpoint {
            id,
            snapshot: newest,
            shares,
        });
    }

    /// Tells all keepers something whose replies nothing waits for.
    pub(super) fn notify_all(&mut self, request: impl Fn() -> KeeperRequest) {
        for keeper in self.keepers.ready() {
            self.ask(keeper, Purpose::Notify(keeper), request());
        }
    }
}
