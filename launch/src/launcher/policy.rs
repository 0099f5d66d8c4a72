//! What to do after a failure: a pure function of what has happened so far.

use std::collections::{BTreeMap, VecDeque};
use trainer::config::{OnDivergence, RestartConfig};

/// Failures at one step, without progress beyond it, after which the run is given up.
const MAX_FAILURES_PER_STEP: usize = 5;

/// What failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cause {
    /// A rank was killed or hung, a node was lost, or a peer was gone: trying again may help.
    Transient,
    /// The loss was not finite in the step after those that were done.
    Diverged { step: u64 },
    /// A rank says what is wrong with its own work, before it has done a step: it will say so again.
    Permanent,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// From the newest state there is, past the first `older` of them.
    Restart { older: usize, skipped: Option<u64> },
    /// Why not.
    GiveUp(String),
}

/// What has happened so far.
#[derive(Debug, Default)]
pub(super) struct History {
    /// Seconds since the start at which the run was restarted.
    restarts: VecDeque<f64>,
    /// The step that failed last, and how often without progress.
    at: Option<(u64, usize)>,
    pub(super) skipped_batches: BTreeMap<u64, u64>,
}

impl History {
    /// Decides about a failure at `now` seconds, with `done` steps done.
    pub(super) fn decide(
        &mut self,
        cause: &Cause,
        done: u64,
        now: f64,
        config: &RestartConfig,
    ) -> Verdict {
        if *cause == Cause::Permanent || config.max_restarts == 0 {
            return Verdict::GiveUp(String::new());
        }
        if let (Cause::Diverged { step }, OnDivergence::Stop) = (cause, config.on_divergence) {
            return Verdict::GiveUp(format!(
                "restart.on_divergence is stop, and the loss of step {step} is not finite"
            ));
        }
        let failing = match cause {
            Cause::Diverged { step } => *step,
            _ => done + 1,
        };
        // A failure at an earlier step, after going back, is no progress either.
        let times = match self.at {
            Some((step, times)) if failing <= step => times + 1,
            _ => 1,
        };
        self.at = Some((
            self.at
                .map_or(failing, |(step, _)| if times > 1 { step } else { failing }),
            times,
        ));
        if times >= MAX_FAILURES_PER_STEP {
            return Verdict::GiveUp(format!(
                "step {failing} fails again and again ({times} times now)"
            ));
        }
        self.restarts
            .retain(|&at| now - at < config.window_s as f64);
        if self.restarts.len() >= config.max_restarts {
            return Verdict::GiveUp(format!(
                "there were {} restarts in {} s, as many as restart.max_restarts allows",
                self.restarts.len(),
                config.window_s
            ));
        }
        self.restarts.push_back(now);
        // The batch is to blame first; if it happens again, the state is.
        let skipped = match cause {
            Cause::Diverged { step } if times == 1 => Some(*step),
            _ => None,
        };
        if let Some(step) = skipped {
            *self.skipped_batches.entry(step).or_insert(0) += 1;
        }
        Verdict::Restart {
            older: times - 1,
            skipped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restart(older: usize) -> Verdict {
        Verdict::Restart {
            older,
            skipped: None,
        }
    }

    #[test]
    fn a_step_that_fails_again_is_tried_from_older_states_and_then_given_up() {
        let config = RestartConfig::default();
        let mut history = History::default();
        assert_eq!(
            history.decide(&Cause::Transient, 7, 0.0, &config),
            restart(0)
        );
        assert_eq!(
            history.decide(&Cause::Transient, 7, 1.0, &config),
            restart(1)
        );
        // Back at an older state, it does not even come so far.
        assert_eq!(
            history.decide(&Cause::Transient, 5, 2.0, &config),
            restart(2)
        );
        // Progress: all is forgotten.
        assert_eq!(
            history.decide(&Cause::Transient, 8, 3.0, &config),
            restart(0)
        );
        for older in 1..4 {
            assert_eq!(
                history.decide(&Cause::Transient, 8, 4.0, &config),
                restart(older)
            );
        }
        let Verdict::GiveUp(reason) = history.decide(&Cause::Transient, 8, 5.0, &config) else {
            panic!("it goes on")
        };
        assert_eq!(reason, "step 9 fails again and again (5 times now)");
    }

    #[test]
    fn a_bad_batch_is_left_out_once_and_then_the_state_is_to_blame() {
        let config = RestartConfig::default();
        let mut history = History::default();
        let cause = Cause::Diverged { step: 4 };
        assert_eq!(
            history.decide(&cause, 3, 0.0, &config),
            Verdict::Restart {
                older: 0,
                skipped: Some(4)
            }
        );
        assert_eq!(history.decide(&cause, 3, 1.0, &config), restart(1));
        assert_eq!(history.skipped_batches, BTreeMap::from([(4, 1)]));
        let stop = RestartConfig {
            on_divergence: OnDivergence::Stop,
            ..config
        };
        assert!(matches!(
            History::default().decide(&cause, 3, 0.0, &stop),
            Verdict::GiveUp(_)
        ));
    }

    #[test]
    fn restarts_are_counted_over_a_window() {
        let config = RestartConfig {
            max_restarts: 2,
            window_s: 10,
            ..RestartConfig::default()
        };
        let mut history = History::default();
        let verdicts: Vec<Verdict> = [(1, 0.0), (2, 1.0), (3, 2.0)]
            .map(|(done, now)| history.decide(&Cause::Transient, done, now, &config))
            .into();
        assert_eq!(verdicts[..2], [restart(0), restart(0)]);
        assert!(
            matches!(&verdicts[2], Verdict::GiveUp(reason) if reason.starts_with("there were 2 restarts in 10 s"))
        );
        assert_eq!(
            history.decide(&Cause::Transient, 9, 11.5, &config),
            restart(0)
        );
        let none = RestartConfig {
            max_restarts: 0,
            ..RestartConfig::default()
        };
        assert_eq!(
            History::default().decide(&Cause::Transient, 1, 0.0, &none),
            Verdict::GiveUp(String::new())
        );
        assert_eq!(
            History::default().decide(&Cause::Permanent, 0, 0.0, &config),
            Verdict::GiveUp(String::new())
        );
    }
}
