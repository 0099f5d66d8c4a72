//! The number of sequences per step, which may grow with the tokens seen.

use super::{Config, limits::MAX_SEQUENCES};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Sequences per step, over all ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "a number of sequences, or a list of stages such as {tokens: 0, sequences: 16}"
)]
pub enum BatchSize {
    /// A constant number of sequences.
    Constant(#[schemars(range(min = 1, max = MAX_SEQUENCES))] usize),
    /// A batch ramp: stages in the order of `tokens`. The first one begins at 0.
    Ramp(Vec<BatchStage>),
}

/// A stage of a batch ramp.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchStage {
    /// Tokens seen when the stage begins: it applies to steps that start at or after them.
    pub tokens: u64,
    /// Sequences per step, over all ranks.
    #[schemars(range(min = 1, max = MAX_SEQUENCES))]
    pub sequences: usize,
}

impl BatchSize {
    /// Returns the stages in their order; a constant batch is one stage.
    pub fn stages(&self) -> Cow<'_, [BatchStage]> {
        match self {
            BatchSize::Constant(sequences) => Cow::Owned(vec![BatchStage {
                tokens: 0,
                sequences: *sequences,
            }]),
            BatchSize::Ramp(stages) => Cow::Borrowed(stages),
        }
    }
}

impl Config {
    /// Returns the sequences of a step before which `tokens` tokens were seen.
    pub fn batch_at(&self, tokens: u64) -> usize {
        let stages = self.train.global_batch.stages();
        let begun = stages.iter().take_while(|stage| stage.tokens <= tokens);
        begun.last().map_or(1, |stage| stage.sequences)
    }

    /// Returns the sequences of the largest step.
    pub fn largest_batch(&self) -> usize {
        let stages = self.train.global_batch.stages();
        let sequences = stages.iter().map(|stage| stage.sequences);
        sequences.max().unwrap_or(1)
    }

    /// Returns the tokens of a step before which `tokens` tokens were seen.
    pub fn step_tokens_at(&self, tokens: u64) -> u64 {
        self.tokens_of(self.batch_at(tokens))
    }

    /// Returns the tokens seen after `steps` more steps, if `tokens` were seen before them.
    pub fn tokens_after(&self, tokens: u64, steps: u64) -> u64 {
        let stages = self.train.global_batch.stages();
        let mut seen = tokens;
        let mut left = steps;
        for (index, stage) in stages.iter().enumerate() {
            let per_step = self.tokens_of(stage.sequences);
            let Some(next) = stages.get(index + 1) else {
                return seen.saturating_add(left.saturating_mul(per_step));
            };
            if let Some(missing) = next.tokens.checked_sub(seen) {
                let steps = missing.div_ceil(per_step).min(left);
                seen = seen.saturating_add(steps.saturating_mul(per_step));
                left -= steps;
            }
        }
        seen
    }

    /// Returns the number of steps in which a new run sees at most `tokens` tokens.
    pub(crate) fn steps_within(&self, tokens: u64) -> u64 {
        let stages = self.train.global_batch.stages();
        let mut seen: u64 = 0;
        let mut steps: u64 = 0;
        for (index, stage) in stages.iter().enumerate() {
            if stage.tokens > seen {
                break;
            }
            let per_step = self.tokens_of(stage.sequences);
            let affordable = tokens.saturating_sub(seen) / per_step;
            let in_stage = stages.get(index + 1).map_or(affordable, |next| {
                let left = next.tokens.saturating_sub(seen);
                left.div_ceil(per_step).min(affordable)
            });
            steps = steps.saturating_add(in_stage);
            seen = seen.saturating_add(in_stage.saturating_mul(per_step));
        }
        steps
    }

    fn tokens_of(&self, sequences: usize) -> u64 {
        let length = self.data.sequence_length as u64;
        length.saturating_mul(sequences as u64).max(1)
    }
}
