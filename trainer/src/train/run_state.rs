//! The part of a run's state that is no tensor: a checkpoint's manifest contains it.

use crate::{
    config::Config,
    data::{eod_token::DocumentTokens, fingerprints::DataFingerprints},
    optim::StateStarts,
};
use dataset::order::OrderVersion;
use serde::{Deserialize, Serialize};

/// Position of a run, expert placement and configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RunState {
    /// Number of completed optimizer steps.
    pub(crate) step: u64,
    /// Samples drawn: the position in the data.
    pub(crate) samples: u64,
    /// Tokens trained on so far.
    pub(crate) tokens: u64,
    /// Number of ranks that saved.
    pub(crate) ranks: usize,
    /// Routed tokens from which least-loaded dispatch lends an expert.
    #[serde(default)]
    pub(crate) min_tokens: Option<i64>,
    #[serde(default)]
    pub(crate) placement: Option<PlacementState>,
    /// Position since which the batches have the sizes of `config`. Earlier versions lack it.
    #[serde(default)]
    pub(crate) counted_from: Option<CountedFrom>,
    /// Steps after which the optimizer's state of some parameters began.
    #[serde(default, skip_serializing_if = "StateStarts::is_empty")]
    pub(crate) state_starts: StateStarts,
    /// The order of the samples. Earlier versions lack it: theirs is the first.
    #[serde(default)]
    pub(crate) order: Option<OrderVersion>,
    /// Fingerprints of the data. Earlier versions lack them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) data: Option<DataFingerprints>,
    /// Tokens at the ends of documents. Earlier versions lack them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) document_tokens: Option<DocumentTokens>,
    pub(crate) config: serde_json::Value,
}

/// A position from which steps, samples and tokens follow from the configuration alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CountedFrom {
    pub(crate) step: u64,
    pub(crate) samples: u64,
    pub(crate) tokens: u64,
    /// Samples of skipped batches since.
    pub(crate) skipped: u64,
}

impl CountedFrom {
    /// Returns the tokens and samples after step `step`, if there is such a position.
    fn position_at(&self, step: u64, config: &Config) -> Option<(u64, u64)> {
        let steps = step.checked_sub(self.step)?;
        let tokens = config.tokens_after(self.tokens, steps);
        let drawn = tokens.checked_sub(self.tokens)? / config.data.sequence_length as u64;
        let samples = self.samples.checked_add(self.skipped)?;
        Some((tokens, samples.checked_add(drawn)?))
    }
}

impl RunState {
    /// Returns the order in which the run draws its samples.
    pub(crate) fn order(&self) -> OrderVersion {
        let drawn = match self.samples {
            0 => OrderVersion::default(),
            _ => OrderVersion::Blocks,
        };
        self.order.unwrap_or(drawn)
    }

    /// Returns the reason why steps, samples and tokens contradict each other under `config`, the
    /// configuration of the state.
    pub(crate) fn position_problem(&self, config: &Config) -> Option<String> {
        let RunState {
            step,
            samples,
            tokens,
            ..
        } = *self;
        let contradiction = |expected: &str| {
            Some(format!(
                "step {step}, samples {samples} and tokens {tokens} do not agree: {expected}"
            ))
        };
        if let Some((name, start)) = self.state_starts.iter().find(|(_, start)| **start > step) {
            return Some(format!(
                "the optimizer's state of {name} begins in step {start}, after step {step}"
            ));
        }
        let from = self.counted_from.unwrap_or_default();
        let Some((expected_tokens, expected_samples)) = from.position_at(step, config) else {
            return contradiction("they begin after this step");
        };
        if self.counted_from.is_some() {
            let agrees = tokens == expected_tokens && samples == expected_samples;
            let expected = format!("its batches make {expected_samples} and {expected_tokens}");
            return if agrees {
                None
            } else {
                contradiction(&expected)
            };
        }
        // An earlier version did not record changes of the batch, and samples that it skipped.
        if tokens != expected_tokens {
            return (samples < step)
                .then(|| contradiction("each step draws a sample"))
                .flatten();
        }
        let skipped = samples.checked_sub(expected_samples);
        let stages = config.train.global_batch.stages();
        let is_of_batches = |skipped: u64| {
            skipped == 0
                || stages
                    .iter()
                    .any(|stage| skipped.is_multiple_of(stage.sequences as u64))
        };
        if skipped.is_some_and(is_of_batches) {
            return None;
        }
        contradiction(&format!("its batches make {expected_samples} samples"))
    }
}

/// Physical slots and loads of all experts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PlacementState {
    /// For each MoE layer of the model, the physical slot of each expert.
    #[serde(alias = "positions")]
    pub(crate) physical_slots: Vec<Vec<i64>>,
    /// For each MoE layer, the smoothed routed tokens of each expert per step.
    pub(crate) loads: Vec<Vec<f64>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::schedule::tests::config;

    fn state(step: u64, samples: u64, tokens: u64, from: Option<CountedFrom>) -> RunState {
        RunState {
            step,
            samples,
            tokens,
            ranks: 1,
            min_tokens: None,
            placement: None,
            counted_from: from,
            state_starts: StateStarts::new(),
            order: None,
            data: None,
            document_tokens: None,
            config: serde_json::Value::Null,
        }
    }

    #[test]
    fn positions_agree_with_the_batches() {
        let constant = config("steps: 100, global_batch: 4 | constant: {lr: 1.0}");
        let length = constant.data.sequence_length as u64;
        let start = Some(CountedFrom::default());
        let problem = |step, samples, tokens, from| {
            state(step, samples, tokens, from).position_problem(&constant)
        };
        assert_eq!(problem(20, 80, 80 * length, start), None);
        assert!(problem(20, 88, 80 * length, start).is_some());
        assert!(problem(4, 80, 80 * length, start).is_some());
        let begun = |step| RunState {
            state_starts: [("norm".to_string(), step)].into(),
            ..state(20, 80, 80 * length, start)
        };
        assert_eq!(begun(20).position_problem(&constant), None);
        assert!(begun(21).position_problem(&constant).is_some());
        assert!(problem(20, 80, 80 * length + 1, start).is_some());
        let skipped = Some(CountedFrom {
            skipped: 8,
            ..CountedFrom::default()
        });
        assert_eq!(problem(20, 88, 80 * length, skipped), None);
        assert!(problem(20, 80, 80 * length, skipped).is_some());
        // The batch was smaller in the first 10 steps.
        let changed = Some(CountedFrom {
            step: 10,
            samples: 20,
            tokens: 20 * length,
            skipped: 0,
        });
        assert_eq!(problem(20, 60, 60 * length, changed), None);
        assert!(problem(9, 60, 60 * length, changed).is_some());
        let huge = Some(CountedFrom {
            samples: u64::MAX,
            ..CountedFrom::default()
        });
        assert!(problem(20, 80, 80 * length, huge).is_some());
    }

    #[test]
    fn a_state_without_an_order_has_the_first_one() {
        let order = |samples, order| {
            let state = state(1, samples, 0, None);
            RunState { order, ..state }.order()
        };
        assert_eq!(order(8, None), OrderVersion::Blocks);
        assert_eq!(order(8, Some(OrderVersion::Exact)), OrderVersion::Exact);
        // Nothing was drawn yet.
        assert_eq!(order(0, None), OrderVersion::Exact);
    }

    #[test]
    fn a_ramp_counts_its_stages() {
        let ramp = "steps: 100, \
                    global_batch: [{tokens: 0, sequences: 2}, {tokens: 32, sequences: 4}] \
                    | constant: {lr: 1.0}";
        let ramp = config(ramp);
        let length = ramp.data.sequence_length as u64;
        let mut tokens = 0;
        for step in 0..30 {
            let state = state(step, tokens / length, tokens, Some(CountedFrom::default()));
            assert_eq!(state.position_problem(&ramp), None, "step {step}");
            tokens += ramp.step_tokens_at(tokens);
        }
    }

    #[test]
    fn states_of_earlier_versions_may_have_skipped_batches() {
        let constant = config("steps: 100, global_batch: 4 | constant: {lr: 1.0}");
        let length = constant.data.sequence_length as u64;
        let problem =
            |step, samples, tokens| state(step, samples, tokens, None).position_problem(&constant);
        assert_eq!(problem(20, 80, 80 * length), None);
        assert_eq!(problem(20, 84, 80 * length), None);
        assert!(problem(20, 83, 80 * length).is_some());
        assert!(problem(20, 76, 80 * length).is_some());
        // Another batch was used before.
        assert_eq!(problem(20, 40, 40 * length), None);
        assert!(problem(200, 40, 40 * length).is_some());
    }
}
