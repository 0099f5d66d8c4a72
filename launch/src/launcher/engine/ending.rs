//! The end of a run: the newest state becomes a checkpoint, and keepers end last.

use super::{
    Engine, Next, Stage,
    command::Command,
    failure::Failure,
    killing::RanksEnd,
    problem::Problem,
    reassembly::Progress,
    requests::Purpose,
    saving::{Saved, Saving},
    settings::REMINDER_INTERVAL,
};
use std::time::Duration;

#[derive(Debug)]
pub(super) struct Ending {
    status: u8,
    problem: Option<Problem>,
    /// True if all ranks ended in order, with a snapshot of their last step.
    is_orderly: bool,
    reminded: Duration,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Killing(RanksEnd),
    /// The last snapshot is still being copied and encoded.
    Completing {
        deadline: Duration,
    },
    Saving(Box<Saving>),
    /// The disk does not take the names of the keepers, which stay because it does not take the
    /// state either.
    RecordingKeepers {
        retry: Duration,
    },
    StoppingKeepers,
}

impl Engine {
    fn begin_to_end(&mut self, status: u8, problem: Option<Problem>, is_orderly: bool) -> Next {
        let step = Step::Killing(self.kill_ranks(true));
        Next::Go(Stage::Ending(Ending {
            status,
            problem,
            is_orderly,
            reminded: self.now,
            step,
        }))
    }

    /// Ends a run whose ranks have ended in order.
    pub(super) fn end_in_order(&mut self) -> Next {
        let status = self.stops.status().unwrap_or(0);
        self.begin_to_end(status, None, true)
    }

    /// Ends a run that cannot continue.
    pub(super) fn end_failed(&mut self, problem: Problem) -> Next {
        let status = self.stops.status().unwrap_or(1);
        self.begin_to_end(status, Some(problem), false)
    }

    /// Ends a run that was asked to stop while no ranks ran.
    pub(super) fn end_stopped(&mut self, problem: Problem) -> Next {
        self.end_failed(problem)
    }

    pub(super) fn stop_before_the_first_step(&mut self) -> Next {
        self.end_stopped(Problem::new("stopped while no ranks were running"))
    }

    pub(super) fn end(&mut self, mut ending: Ending) -> Next {
        if self.stops.insists && !matches!(ending.step, Step::Killing(_)) && self.has_keepers() {
            let problem = Problem::new("stopped while writing the last checkpoint");
            let hint = if self.is_recorded() {
                "the state is still in memory: run the same command to write it"
            } else {
                "the state is lost: the disk did not take keepers.json, by which the same command \
                 would find it in memory"
            };
            return self.exit(self.stops.status().unwrap_or(1), Some(problem.hint(hint)));
        }
        match ending.step {
            Step::Killing(ref ranks) => {
                if !self.ranks_are_gone(ranks) {
                    return Next::Wait(Stage::Ending(ending));
                }
                let deadline = self.now + self.settings.timeout();
                ending.step = Step::Completing { deadline };
                Next::Go(Stage::Ending(ending))
            }
            Step::Completing { deadline } => self.complete(ending, deadline),
            Step::Saving(saving) => match saving.advance(self) {
                Progress::Waiting(saving) => {
                    ending.step = Step::Saving(Box::new(saving));
                    self.remind_of_the_disk(&mut ending);
                    Next::Wait(Stage::Ending(ending))
                }
                Progress::Done(saved) => {
                    ending.step = Step::StoppingKeepers;
                    self.saved(ending, saved)
                }
            },
            Step::RecordingKeepers { retry } => self.record_keepers(ending, retry),
            Step::StoppingKeepers => {
                if !self.keepers_have_stopped() {
                    ending.step = Step::StoppingKeepers;
                    return Next::Wait(Stage::Ending(ending));
                }
                self.store_registry(None);
                self.exit(ending.status, ending.problem)
            }
        }
    }

    /// Waits until the last snapshot is complete.
    fn complete(&mut self, mut ending: Ending, deadline: Duration) -> Next {
        if !self.has_keepers() {
            return self.exit(ending.status, ending.problem);
        }
        let tracker = self.tracker.as_ref();
        let is_pending = tracker.is_some_and(|tracker| tracker.has_pending());
        let mut nodes = 0..self.keepers.seats.len();
        let can_complete = nodes.all(|node| self.keepers.ready_keeper(node).is_some());
        let copies = ending.is_orderly && is_pending && can_complete;
        if copies && self.now < deadline {
            return Next::Wait(Stage::Ending(ending));
        }
        ending.step = Step::Saving(Box::new(Saving::begin(self)));
        Next::Go(Stage::Ending(ending))
    }

    /// Waits until another launcher can find the keepers, then tries to write their state again.
    fn record_keepers(&mut self, mut ending: Ending, retry: Duration) -> Next {
        let is_saving = self
            .requests
            .any(|purpose| purpose == Purpose::SaveRegistry);
        if self.is_recorded() {
            ending.step = Step::Saving(Box::new(Saving::begin(self)));
            return Next::Go(Stage::Ending(ending));
        }
        let mut next = retry;
        if !is_saving && self.now >= retry {
            self.save_registry();
            next = self.now + REMINDER_INTERVAL;
        }
        ending.step = Step::RecordingKeepers { retry: next };
        Next::Wait(Stage::Ending(ending))
    }

    fn remind_of_the_disk(&mut self, ending: &mut Ending) {
        let is_writing = self.checkpoints.writing.is_some()
            || self.requests.any(|purpose| purpose == Purpose::Survey);
        if is_writing && self.now.saturating_sub(ending.reminded) > 6 * REMINDER_INTERVAL {
            ending.reminded = self.now;
            self.print("waiting for the disk to take the last checkpoint".into());
        }
    }

    fn saved(&mut self, mut ending: Ending, saved: Saved) -> Next {
        match saved {
            Saved::Failed(problem) | Saved::OutOfReach(problem) if !self.is_recorded() => {
                self.warn_once(format!(
                    "{}; waiting until the disk takes keepers.json, without which another launcher \
                     cannot find the state",
                    problem.message
                ));
                ending.step = Step::RecordingKeepers { retry: self.now };
                return Next::Go(Stage::Ending(ending));
            }
            Saved::Failed(problem) | Saved::OutOfReach(problem) => {
                // Keepers stay, and the same command tries again.
                let first = ending.problem.take();
                if let Some(first) = &first {
                    self.print(format!("warning: {}", problem.message));
                    return self.exit(ending.status, Some(first.clone()));
                }
                return self.exit(ending.status.max(1), Some(problem));
            }
            Saved::Written(step) if ending.is_orderly => {
                self.log(format!("wrote the state of step {step} to a checkpoint"));
            }
            Saved::Written(step) => {
                self.print(format!("wrote the state of step {step} to a checkpoint"));
            }
            Saved::Nothing => {}
        }
        if let Some(failure) = self.lost_the_end(&ending) {
            return self.fail(failure);
        }
        let is_done = self.checkpoints.newest_step() >= Some(self.settings.config.train.steps);
        if ending.is_orderly && !is_done {
            // The request to stop may have come after the last step.
            ending.status = self.stops.status().unwrap_or(ending.status);
        }
        match &self.checkpoints.newest {
            Some(newest) if ending.is_orderly => {
                let line = format!("checkpoint {}", newest.path.display());
                self.print(line);
            }
            None if !ending.is_orderly => {
                self.print("no checkpoint: no snapshot was complete, and none is on disk".into());
            }
            _ => {}
        }
        Next::Go(Stage::Ending(ending))
    }

    /// Returns a failure if ranks have done all steps, but the state of the last is lost.
    fn lost_the_end(&mut self, ending: &Ending) -> Option<Failure> {
        let is_done = ending.is_orderly && self.stops.first().is_none();
        let steps = self.settings.config.train.steps;
        let saved = self.checkpoints.newest_step();
        if saved >= Some(steps) || !ending.is_orderly {
            return None;
        }
        let what = match saved {
            Some(step) => format!("of the steps after {step}"),
            None => "of all steps".into(),
        };
        if is_done {
            return Some(Failure::transient(format!(
                "the state {what} was lost with a keeper"
            )));
        }
        if saved < Some(self.steps_done) {
            self.print(format!("warning: the state {what} was lost with a keeper"));
        }
        None
    }

    pub(super) fn exit(&mut self, status: u8, problem: Option<Problem>) -> Next {
        self.commands.push(Command::Exit { status, problem });
        Next::Wait(Stage::Ended)
    }
}
