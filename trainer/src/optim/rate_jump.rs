//! Jumps of the learning rate when a run resumes with another configuration.

use super::schedule::{Position, learning_rate};
use crate::config::Config;

/// Largest relative change of the rate from one step to the next that needs no warning.
const TOLERATED_JUMP: f64 = 0.2;

/// Returns the rate of the last completed step under the configuration `saved` and that of the
/// next step, at `position`, under `now`, if a changed key makes them differ by more than a fifth.
pub(crate) fn rate_jump(saved: &Config, now: &Config, position: Position) -> Option<(f64, f64)> {
    if position.step >= now.train.steps {
        return None;
    }
    let before = learning_rate(saved, last_step(saved, position)?);
    let after = learning_rate(now, position);
    // A warm-up may rise by more than that in each step.
    let is_usual =
        position.step < saved.train.steps && !jumps(learning_rate(saved, position), after);
    (jumps(before, after) && !is_usual).then_some((before, after))
}

fn jumps(before: f64, after: f64) -> bool {
    (after - before).abs() > TOLERATED_JUMP * before
}

/// Returns the beginning of the last completed step, if there is one.
fn last_step(config: &Config, position: Position) -> Option<Position> {
    let step = position.step.checked_sub(1)?;
    let stages = config.train.global_batch.stages();
    let begin = |stage_tokens: u64| {
        let batch = config.step_tokens_at(stage_tokens);
        position.tokens.checked_sub(batch)
    };
    let begins = stages.iter().filter_map(|stage| begin(stage.tokens));
    let fits = |begin: &u64| begin + config.step_tokens_at(*begin) == position.tokens;
    let tokens = begins.rev().find(fits);
    Some(Position {
        step,
        tokens: tokens.unwrap_or_else(|| begin(position.tokens).unwrap_or(0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::schedule::tests::config;

    fn jump(saved: &str, now: &str, position: Position) -> Option<(f64, f64)> {
        rate_jump(&config(saved), &config(now), position)
    }

    #[test]
    fn a_longer_run_after_its_decay_jumps() {
        let saved = "steps: 10, global_batch: 4 | wsd: {lr: 1.0, decay_steps: 4}";
        let now = "steps: 20, global_batch: 4 | wsd: {lr: 1.0, decay_steps: 4}";
        let at = |step| Position {
            step,
            tokens: step * 32,
        };
        let (before, after) = jump(saved, now, at(10)).unwrap();
        assert!((before - (1.0 - 0.8f64.sqrt())).abs() < 1e-12);
        assert_eq!(after, 1.0);
        // Before the decay both have the same rate, and in its first step they do not.
        assert_eq!(jump(saved, now, at(5)), None);
        assert!(jump(saved, now, at(7)).is_some());
        // The run is over, or has not begun.
        assert_eq!(jump(saved, saved, at(10)), None);
        assert_eq!(jump(saved, now, at(0)), None);
    }

    #[test]
    fn a_warmup_does_not_jump_by_itself() {
        let saved = "steps: 40, global_batch: 4 | constant: {lr: 1.0, warmup_steps: 10}";
        let longer = "steps: 400, global_batch: 4 | constant: {lr: 1.0, warmup_steps: 10}";
        let higher = "steps: 40, global_batch: 4 | constant: {lr: 1.5, warmup_steps: 10}";
        let position = Position {
            step: 2,
            tokens: 64,
        };
        assert_eq!(jump(saved, longer, position), None);
        let (before, after) = jump(saved, higher, position).unwrap();
        assert!((before - 0.2).abs() < 1e-12 && (after - 0.45).abs() < 1e-12);
    }

    #[test]
    fn a_larger_batch_makes_power_jump() {
        let saved = "steps: 40, global_batch: 4 | power: {max_lr: 10.0, warmup_steps: 1}";
        let ramp = "steps: 40, global_batch: [{tokens: 0, sequences: 4}, {tokens: 320, \
                    sequences: 16}] | power: {max_lr: 10.0, warmup_steps: 1}";
        let position = Position {
            step: 10,
            tokens: 320,
        };
        let (before, after) = jump(saved, ramp, position).unwrap();
        assert!(after > 3.0 * before, "{before} {after}");
        // A ramp itself is no change.
        assert_eq!(jump(ramp, ramp, position), None);
    }
}
