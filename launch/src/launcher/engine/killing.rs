//! After a failure: ranks are killed, and the policy decides how the run continues.

use super::{
    Engine, Next, Stage,
    command::Command,
    failure::Failure,
    policy::{Cause, Verdict},
    recovering::Recovered,
    seating::Seating,
};
use std::time::Duration;

/// The time within which killed ranks must be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Killing {
    failure: Failure,
    ranks: RanksEnd,
}

/// Waits for the end of killed ranks. Ranks of the next generation must not meet those of the last.
#[derive(Debug)]
pub(super) struct RanksEnd {
    deadline: Duration,
}

impl Engine {
    /// Kills every rank on all machines; with `standby` also the standby processes.
    pub(super) fn kill_ranks(&mut self, standby: bool) -> RanksEnd {
        let mut machines = vec![0];
        machines.extend(self.machines.present_others());
        let number = self.ranks.kill(machines.iter().copied());
        for machine in machines {
            self.commands.push(Command::KillRanks {
                machine,
                number,
                standby,
            });
        }
        RanksEnd {
            deadline: self.now + KILL_TIMEOUT,
        }
    }

    /// True once killed ranks are gone. A machine that does not confirm it in time is lost.
    pub(super) fn ranks_are_gone(&mut self, ranks: &RanksEnd) -> bool {
        let busy = self.ranks.busy_machines();
        if busy.is_empty() {
            return true;
        }
        if self.now < ranks.deadline {
            return false;
        }
        for machine in busy {
            if machine == 0 {
                // A killed process runs no more code, even if the kernel still blocks it.
                self.print(
                    "warning: killed ranks of this machine do not end: blocked in the kernel?"
                        .into(),
                );
            } else {
                self.lose_machine(machine, "its ranks did not end");
            }
        }
        true
    }

    /// Ends the attempt after a failure.
    pub(super) fn fail(&mut self, failure: Failure) -> Next {
        let ranks = self.kill_ranks(false);
        Next::Go(Stage::Killing(Killing { failure, ranks }))
    }

    pub(super) fn kill(&mut self, killing: Killing) -> Next {
        if !self.ranks_are_gone(&killing.ranks) {
            return Next::Wait(Stage::Killing(killing));
        }
        let failure = killing.failure;
        if let Some(tracker) = self.tracker.take() {
            self.steps_done = self.steps_done.max(tracker.step);
        }
        let done = self.restored.map_or(0, |restored| restored.id.step);
        let done = self.steps_done.max(done);
        if self.stops.first().is_some() || !self.has_keepers() {
            // A run that is to stop does not restart.
            return self.end_failed(failure.into_problem());
        }
        let now = self.now.as_secs_f64();
        let config = &self.settings.config.restart;
        let restored = self.restored.map(|restored| restored.id.step);
        let cause = self.cause_of(&failure);
        match self.history.decide(&cause, done, restored, now, config) {
            Verdict::GiveUp(reason) => {
                let problem = failure.into_problem();
                self.end_failed(match reason {
                    Some(reason) => problem.because(&reason),
                    None => problem,
                })
            }
            Verdict::Restart {
                distrusted_from,
                skipped,
            } => {
                let recovered = Recovered {
                    failure: failure.brief().to_string(),
                    steps_done: done,
                    skipped,
                };
                let seating = Seating::after_failure(self, distrusted_from, recovered);
                Next::Go(Stage::Seating(seating))
            }
        }
    }

    /// A state that ranks cannot read may be whole: its keeper may be gone.
    fn cause_of(&self, failure: &Failure) -> Cause {
        match failure.cause {
            Cause::Restore if self.has_lost_keeper => Cause::Transient,
            ref cause => cause.clone(),
        }
    }
}
