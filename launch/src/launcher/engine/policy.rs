//! Decides what to do after a failure: a pure function of the failures so far.

use std::collections::{BTreeMap, VecDeque};
use trainer::config::{OnDivergence, RestartConfig};

/// The number of failures without progress beyond a step after which the launcher gives up.
const MAX_FAILURES_PER_STEP: usize = 5;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A restart may help: a rank was killed or hung, a node was lost, or a peer was gone.
    Transient,
    /// The loss of this step, the first one not done, was not finite.
    Diverged { step: u64 },
    /// The ranks could not read the state that they were to resume from.
    Restore,
    /// A rank itself reported an error after its first step.
    Own,
    /// A rank failed by itself before its first step: it would fail again.
    Permanent,
}

impl Cause {
    /// True if the state may be the reason of the failure that came `times` times at one step.
    ///
    /// A rank that is killed or a machine that is lost says nothing about the state.
    fn implicates_state(&self, times: usize) -> bool {
        match self {
            Cause::Transient | Cause::Permanent => false,
            Cause::Restore => true,
            // The first suspect is the batch, or chance.
            Cause::Diverged { .. } | Cause::Own => times > 1,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Restart from the newest snapshot of fewer than `distrusted_from` steps, skipping the batch
    /// of one step.
    Restart {
        distrusted_from: Option<u64>,
        skipped: Option<u64>,
    },
    /// Give up; None if the failure itself is the reason.
    GiveUp(Option<String>),
}

#[derive(Debug, Default)]
pub(crate) struct History {
    /// Times of the restarts, in seconds since the start.
    restarts: VecDeque<f64>,
    failing: Option<FailingStep>,
    /// States of this many steps and more did not help with this step.
    distrusted_from: Option<u64>,
    pub(crate) skipped_batches: BTreeMap<u64, u64>,
}

/// The step that failed last, and the number of failures without progress beyond it.
#[derive(Debug, Clone, Copy)]
struct FailingStep {
    step: u64,
    times: usize,
}

impl History {
    /// Decides about a failure at `now` seconds, with `done` steps done, of ranks that were
    /// restored from the snapshot of step `restored`.
    pub(crate) fn decide(
        &mut self,
        cause: &Cause,
        done: u64,
        restored: Option<u64>,
        now: f64,
        config: &RestartConfig,
    ) -> Verdict {
        if *cause == Cause::Permanent || config.max_restarts == 0 {
            return Verdict::GiveUp(None);
        }
        if let (Cause::Diverged { .. }, OnDivergence::Stop) = (cause, config.on_divergence) {
            return Verdict::GiveUp(Some("restart.on_divergence is stop".into()));
        }
        let failed = match cause {
            Cause::Diverged { step } => *step,
            _ => done + 1,
        };
        let times = self.count_failure(failed);
        if times >= MAX_FAILURES_PER_STEP {
            return Verdict::GiveUp(Some(format!("step {failed} failed {times} times")));
        }
        let window_s = config.window_s;
        self.restarts.retain(|&at| now - at < window_s as f64);
        let restarts = self.restarts.len();
        if restarts >= config.max_restarts {
            return Verdict::GiveUp(Some(format!(
                "restart.max_restarts is reached: {restarts} restarts in {window_s} s"
            )));
        }
        self.restarts.push_back(now);
        let skipped = match cause {
            Cause::Diverged { step } if times == 1 => Some(*step),
            _ => None,
        };
        if let Some(step) = skipped {
            *self.skipped_batches.entry(step).or_insert(0) += 1;
        }
        if times == 1 {
            self.distrusted_from = None;
        }
        if cause.implicates_state(times) {
            let known = self.distrusted_from;
            self.distrusted_from = restored.map(|step| known.map_or(step, |known| known.min(step)));
        }
        Verdict::Restart {
            distrusted_from: self.distrusted_from,
            skipped,
        }
    }

    /// Returns the number of failures without progress, this one included.
    fn count_failure(&mut self, failed: u64) -> usize {
        let failing = match self.failing {
            // A failure at an earlier step, after going back, is no progress either.
            Some(FailingStep { step, times }) if failed <= step => FailingStep {
                step,
                times: times + 1,
            },
            _ => FailingStep {
                step: failed,
                times: 1,
            },
        };
        self.failing = Some(failing);
        failing.times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM_NEWEST: Verdict = Verdict::Restart {
        distrusted_from: None,
        skipped: None,
    };

    fn before(step: u64) -> Verdict {
        Verdict::Restart {
            distrusted_from: Some(step),
            skipped: None,
        }
    }

    /// Decides about a failure after `done` steps of a run that was restored at step `restored`.
    fn decide(history: &mut History, cause: Cause, done: u64, restored: u64) -> Verdict {
        history.decide(&cause, done, Some(restored), 0.0, &RestartConfig::default())
    }

    #[test]
    fn a_step_that_fails_again_is_tried_from_older_states_and_then_given_up() {
        let mut history = History::default();
        assert_eq!(decide(&mut history, Cause::Own, 7, 0), FROM_NEWEST);
        assert_eq!(decide(&mut history, Cause::Own, 7, 7), before(7));
        // From an older state, it fails even earlier.
        assert_eq!(decide(&mut history, Cause::Own, 5, 4), before(4));
        // Progress resets the count.
        assert_eq!(decide(&mut history, Cause::Own, 8, 3), FROM_NEWEST);
        for restored in [8, 7, 6] {
            let verdict = decide(&mut history, Cause::Own, 8, restored);
            assert_eq!(verdict, before(restored));
        }
        assert_eq!(
            decide(&mut history, Cause::Own, 8, 5),
            Verdict::GiveUp(Some("step 9 failed 5 times".into()))
        );
    }

    #[test]
    fn only_a_failure_that_implicates_the_state_makes_it_suspect() {
        let mut history = History::default();
        for _ in 0..2 {
            assert_eq!(decide(&mut history, Cause::Transient, 7, 7), FROM_NEWEST);
        }
        assert_eq!(decide(&mut history, Cause::Restore, 7, 7), before(7));
        // The state of step 6 was restored, and a rank is killed before the next step.
        assert_eq!(decide(&mut history, Cause::Transient, 7, 6), before(7));
        assert_eq!(decide(&mut history, Cause::Restore, 9, 9), before(9));
    }

    #[test]
    fn a_bad_batch_is_skipped_once_and_then_the_state_is_suspect() {
        let config = RestartConfig::default();
        let mut history = History::default();
        let cause = Cause::Diverged { step: 4 };
        let skipping = Verdict::Restart {
            distrusted_from: None,
            skipped: Some(4),
        };
        assert_eq!(history.decide(&cause, 3, Some(2), 0.0, &config), skipping);
        assert_eq!(history.decide(&cause, 3, Some(3), 1.0, &config), before(3));
        assert_eq!(history.skipped_batches, BTreeMap::from([(4, 1)]));
        let stop = RestartConfig {
            on_divergence: OnDivergence::Stop,
            ..config
        };
        let verdict = History::default().decide(&cause, 3, None, 0.0, &stop);
        assert!(matches!(verdict, Verdict::GiveUp(Some(_))));
    }

    #[test]
    fn restarts_are_counted_over_a_window() {
        let config = RestartConfig {
            max_restarts: 2,
            window_s: 10,
            ..RestartConfig::default()
        };
        let mut history = History::default();
        let verdicts = [(1, 0.0), (2, 1.0), (3, 2.0)]
            .map(|(done, now)| history.decide(&Cause::Transient, done, None, now, &config));
        assert_eq!(verdicts[..2], [FROM_NEWEST, FROM_NEWEST]);
        let reason = "restart.max_restarts is reached: 2 restarts in 10 s";
        assert_eq!(verdicts[2], Verdict::GiveUp(Some(reason.into())));
        let later = history.decide(&Cause::Transient, 9, None, 11.5, &config);
        assert_eq!(later, FROM_NEWEST);
        let none = RestartConfig {
            max_restarts: 0,
            ..RestartConfig::default()
        };
        let verdict = History::default().decide(&Cause::Transient, 1, None, 0.0, &none);
        assert_eq!(verdict, Verdict::GiveUp(None));
        let verdict = History::default().decide(&Cause::Permanent, 0, None, 0.0, &config);
        assert_eq!(verdict, Verdict::GiveUp(None));
    }
}
