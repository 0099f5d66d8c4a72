//! The learning-rate schedules, and the one that a configuration without a schedule has.

use super::Config;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most steps of warm-up that a default gives.
const MAX_DEFAULT_WARMUP: u64 = 100;
/// A default warm-up is this fraction of the run's steps, rounded up.
const STEPS_PER_WARMUP_STEP: u64 = 10;
/// The default decay is this fraction of the run's steps.
const STEPS_PER_DECAY_STEP: u64 = 5;
/// The default rate of a model of width [`DEFAULT_RATE_WIDTH`].
/// `docs/explanation/learning-rates.md` has the sweep that it was chosen by.
const DEFAULT_RATE: f64 = 1e-3;
/// The width of [`DEFAULT_RATE`].
const DEFAULT_RATE_WIDTH: f64 = 256.0;
/// Widths of the sweep. Narrower and wider models have the rate of the nearest one.
const SWEPT_WIDTHS: [f64; 2] = [64.0, 1024.0];

/// The learning-rate schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleConfig {
    /// The Power scheduler (arXiv 2408.13359): `min(max_lr, beta * a * n^b)` after `n` tokens,
    /// where `beta` is the number of tokens of the step, in units of 4096.
    Power(PowerConfig),
    /// Warm-up, a constant rate, and decay at the end of the run.
    Wsd(WsdConfig),
    /// Warm-up, then half a cosine from `lr` to `lr * final_ratio`.
    Cosine(RampConfig),
    /// Warm-up, then a straight line from `lr` to `lr * final_ratio`.
    Linear(RampConfig),
    /// Warm-up, then a constant rate.
    Constant(ConstantConfig),
}

/// Constants of the Power scheduler. The defaults are those of arXiv 2408.13359, which were fitted
/// for models with `model.mup`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PowerConfig {
    /// Amplitude of the power law.
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub a: f64,
    /// Exponent of the power law, a negative number.
    #[schemars(range(min = -10.0), extend("exclusiveMaximum" = 0))]
    pub b: f64,
    /// Upper limit of the learning rate.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub max_lr: f64,
    /// Steps of linear warm-up. It ends at the rate that the power law gives there. Without
    /// `warmup_tokens` the default is a tenth of the run, and at most 100 steps.
    pub warmup_steps: Option<u64>,
    /// Tokens of linear warm-up, instead of `warmup_steps`.
    pub warmup_tokens: Option<u64>,
    /// Steps of exponential decay at the end of the run. The rate would reach zero one step after
    /// the last.
    pub decay_steps: Option<u64>,
    /// Tokens of exponential decay, instead of `decay_steps`.
    pub decay_tokens: Option<u64>,
}

impl Default for PowerConfig {
    fn default() -> PowerConfig {
        PowerConfig {
            a: 4.0,
            b: -0.51,
            max_lr: 0.02,
            warmup_steps: None,
            warmup_tokens: None,
            decay_steps: None,
            decay_tokens: None,
        }
    }
}

/// Warm-up, stable rate, decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WsdConfig {
    /// Learning rate between warm-up and decay.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Steps of linear warm-up; none by default.
    #[serde(default)]
    pub warmup_steps: Option<u64>,
    /// Tokens of linear warm-up, instead of `warmup_steps`.
    #[serde(default)]
    pub warmup_tokens: Option<u64>,
    /// Steps of decay at the end of the run, along `1 - sqrt(x)`. The rate would reach zero one
    /// step after the last. This key or `decay_tokens` is needed.
    #[serde(default)]
    pub decay_steps: Option<u64>,
    /// Tokens of decay, instead of `decay_steps`.
    #[serde(default)]
    pub decay_tokens: Option<u64>,
}

/// A rate that falls until the end of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RampConfig {
    /// Learning rate after warm-up.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Steps of linear warm-up; none by default. The rate then falls by steps.
    #[serde(default)]
    pub warmup_steps: Option<u64>,
    /// Tokens of linear warm-up, instead of `warmup_steps`. The rate then falls by tokens.
    #[serde(default)]
    pub warmup_tokens: Option<u64>,
    /// The rate of the last step over `lr`. With 0 the rate would reach zero one step after it.
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(default)]
    pub final_ratio: f64,
}

/// A constant rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConstantConfig {
    /// Learning rate after warm-up.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Steps of linear warm-up; none by default.
    #[serde(default)]
    pub warmup_steps: Option<u64>,
    /// Tokens of linear warm-up, instead of `warmup_steps`.
    #[serde(default)]
    pub warmup_tokens: Option<u64>,
}

/// The length of a phase of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Length {
    Steps(u64),
    Tokens(u64),
}

impl Length {
    fn new(steps: Option<u64>, tokens: Option<u64>) -> Option<Length> {
        let tokens = tokens.map(Length::Tokens);
        tokens.or(steps.map(Length::Steps))
    }
}

/// The keys for the lengths of a schedule's phases, as they are set.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LengthKeys {
    pub(crate) warmup_steps: Option<u64>,
    pub(crate) warmup_tokens: Option<u64>,
    pub(crate) decay_steps: Option<u64>,
    pub(crate) decay_tokens: Option<u64>,
}

impl LengthKeys {
    pub(crate) fn warmup(&self) -> Option<Length> {
        Length::new(self.warmup_steps, self.warmup_tokens)
    }

    pub(crate) fn decay(&self) -> Option<Length> {
        Length::new(self.decay_steps, self.decay_tokens)
    }
}

impl ScheduleConfig {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            ScheduleConfig::Power(_) => "power",
            ScheduleConfig::Wsd(_) => "wsd",
            ScheduleConfig::Cosine(_) => "cosine",
            ScheduleConfig::Linear(_) => "linear",
            ScheduleConfig::Constant(_) => "constant",
        }
    }

    pub(crate) fn length_keys(&self) -> LengthKeys {
        match self {
            ScheduleConfig::Power(power) => LengthKeys {
                warmup_steps: power.warmup_steps,
                warmup_tokens: power.warmup_tokens,
                decay_steps: power.decay_steps,
                decay_tokens: power.decay_tokens,
            },
            ScheduleConfig::Wsd(wsd) => LengthKeys {
                warmup_steps: wsd.warmup_steps,
                warmup_tokens: wsd.warmup_tokens,
                decay_steps: wsd.decay_steps,
                decay_tokens: wsd.decay_tokens,
            },
            ScheduleConfig::Cosine(ramp) | ScheduleConfig::Linear(ramp) => LengthKeys {
                warmup_steps: ramp.warmup_steps,
                warmup_tokens: ramp.warmup_tokens,
                ..LengthKeys::default()
            },
            ScheduleConfig::Constant(constant) => LengthKeys {
                warmup_steps: constant.warmup_steps,
                warmup_tokens: constant.warmup_tokens,
                ..LengthKeys::default()
            },
        }
    }
}

impl Config {
    /// Returns the schedule of the run: the configured one, or by default warm-up, a constant rate
    /// that depends on the model's width, and decay over the last fifth.
    pub fn schedule(&self) -> ScheduleConfig {
        let mut schedule = match &self.schedule {
            Some(schedule) => schedule.clone(),
            None => ScheduleConfig::Wsd(WsdConfig {
                lr: self.default_rate(),
                warmup_steps: Some(self.default_warmup()),
                warmup_tokens: None,
                decay_steps: Some(self.train.steps / STEPS_PER_DECAY_STEP),
                decay_tokens: None,
            }),
        };
        if let ScheduleConfig::Power(power) = &mut schedule
            && power.warmup_steps.or(power.warmup_tokens).is_none()
        {
            let decay_from = match Length::new(power.decay_steps, power.decay_tokens) {
                Some(Length::Steps(steps)) => self.train.steps.saturating_sub(steps),
                Some(Length::Tokens(tokens)) => {
                    let total = self.tokens_after(0, self.train.steps);
                    self.steps_within(total.saturating_sub(tokens))
                }
                None => self.train.steps,
            };
            power.warmup_steps = Some(self.default_warmup().min(decay_from));
        }
        schedule
    }

    fn default_warmup(&self) -> u64 {
        let tenth = self.train.steps.div_ceil(STEPS_PER_WARMUP_STEP);
        tenth.clamp(1, MAX_DEFAULT_WARMUP)
    }

    /// Returns the peak rate of a configuration without a schedule. With `model.mup` it is that of
    /// the base width, from which the rates of hidden matrices are scaled.
    pub(super) fn default_rate(&self) -> f64 {
        let hidden = self.model.hidden as f64;
        let width = match &self.model.mup {
            Some(mup) => hidden / mup.width,
            None => hidden,
        };
        let [narrowest, widest] = SWEPT_WIDTHS;
        let rate = DEFAULT_RATE * DEFAULT_RATE_WIDTH / width.clamp(narrowest, widest);
        two_digits(rate)
    }
}

/// Rounds a positive number to two significant digits, so that it can be read and written.
fn two_digits(number: f64) -> f64 {
    let rounded = format!("{number:.1e}");
    rounded.parse().expect("a number in exponent form")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config(hidden: usize, extra: &str, schedule: &str) -> Config {
        let text = format!(
            "run: {{dir: x}}\n\
             model: {{vocab_size: 8, hidden: {hidden}, layers: 1, heads: 1, ffn: 8{extra}}}\n\
             data: {{train: [{{path: x}}], sequence_length: 4096}}\n\
             train: {{steps: 300, global_batch: 16, micro_batch: 1}}\n\
             {schedule}\n"
        );
        serde_saphyr::from_str(&text).unwrap()
    }

    #[test]
    fn the_default_rate_falls_with_the_width() {
        for (hidden, rate) in [
            (32, 4e-3),
            (64, 4e-3),
            (128, 2e-3),
            (256, 1e-3),
            (384, 6.7e-4),
            (1024, 2.5e-4),
            (4096, 2.5e-4),
        ] {
            assert_eq!(config(hidden, "", "").default_rate(), rate, "{hidden}");
        }
        // Maximal update parametrization divides the rates of hidden matrices itself.
        assert_eq!(config(1024, ", mup: {width: 4}", "").default_rate(), 1e-3);
    }

    #[test]
    fn the_default_is_wsd_with_lengths_of_the_run() {
        let ScheduleConfig::Wsd(wsd) = config(256, "", "").schedule() else {
            panic!("not wsd");
        };
        assert_eq!(
            (wsd.lr, wsd.warmup_steps, wsd.decay_steps),
            (1e-3, Some(30), Some(60))
        );
    }

    #[test]
    fn warmup_defaults_leave_room_for_the_decay() {
        let warmup = |power: &str| {
            let schedule = format!("schedule: {{power: {power}}}");
            config(256, "", &schedule).schedule().length_keys().warmup()
        };
        let per_step = 16 * 4096;
        assert_eq!(warmup("{}"), Some(Length::Steps(30)));
        assert_eq!(warmup("{decay_steps: 290}"), Some(Length::Steps(10)));
        let tokens = format!("{{decay_tokens: {}}}", 295 * per_step);
        assert_eq!(warmup(&tokens), Some(Length::Steps(5)));
        assert_eq!(warmup("{warmup_tokens: 9}"), Some(Length::Tokens(9)));
    }

    #[test]
    fn published_constants_without_mup_are_warned_about() {
        let warnings = |extra: &str, schedule: &str| config(512, extra, schedule).warnings();
        let published = "schedule: {power: {}}";
        let said = warnings("", published).join("\n");
        assert!(said.contains("fitted with model.mup"), "{said}");
        assert!(
            said.contains("2.00e-2") && said.contains("5.0e-4"),
            "{said}"
        );
        // The limit alone is published, and the law reaches it; and the law alone.
        assert_eq!(warnings("", "schedule: {power: {a: 21.9}}").len(), 1);
        assert_eq!(warnings("", "schedule: {power: {max_lr: 1.0}}").len(), 1);
        for (extra, schedule) in [
            (", mup: {width: 2}", published),
            ("", ""),
            ("", "schedule: {power: {a: 0.2}}"),
            ("", "schedule: {power: {a: 21.9, max_lr: 1e-3}}"),
            ("", "schedule: {wsd: {lr: 0.02, decay_steps: 0}}"),
        ] {
            assert_eq!(
                warnings(extra, schedule),
                Vec::<String>::new(),
                "{schedule}"
            );
        }
    }

    #[test]
    fn lengths_that_contradict_are_refused() {
        for (schedule, problem) in [
            ("{wsd: {lr: 1e-3}}", "needs decay_steps or decay_tokens"),
            (
                "{wsd: {lr: 1e-3, decay_steps: 1, decay_tokens: 1}}",
                "schedule.wsd has decay_steps and decay_tokens",
            ),
            (
                "{cosine: {lr: 1e-3, warmup_steps: 1, warmup_tokens: 1}}",
                "schedule.cosine has warmup_steps and warmup_tokens",
            ),
            (
                "{power: {warmup_steps: 200, decay_steps: 101}}",
                "200 + decay_steps 101 = 301 is more than",
            ),
            (
                "{power: {warmup_tokens: 20000000}}",
                "warm-up of 20000000 tokens and decay of 0 tokens are more than the 19660800",
            ),
            ("{constant: {lr: 11}}", "schedule.constant.lr is 11"),
        ] {
            let problems = config(256, "", &format!("schedule: {schedule}")).problems(1);
            assert_eq!(problems.len(), 1, "{schedule}: {problems:?}");
            assert!(problems[0].contains(problem), "{problems:?}");
        }
    }

    #[test]
    fn stages_of_a_ramp_are_checked() {
        for (stages, problem) in [
            ("[]", "train.global_batch is an empty list"),
            (
                "[{tokens: 5, sequences: 2}]",
                "train.global_batch[0].tokens is 5",
            ),
            (
                "[{tokens: 0, sequences: 2}, {tokens: 0, sequences: 4}]",
                "train.global_batch[1].tokens is 0; it must be more than",
            ),
            (
                "[{tokens: 0, sequences: 2}, {tokens: 9, sequences: 0}]",
                "train.global_batch[1].sequences is 0; it must be",
            ),
        ] {
            let mut config = config(256, "", "");
            config.train.global_batch = serde_saphyr::from_str(stages).unwrap();
            let problems = config.problems(1);
            assert_eq!(problems.len(), 1, "{stages}: {problems:?}");
            assert!(problems[0].contains(problem), "{problems:?}");
        }
        let mut config = config(256, "", "");
        config.train.micro_batch = 2;
        let stages =
            "[{tokens: 0, sequences: 3}, {tokens: 9, sequences: 4}, {tokens: 10, sequences: 5}]";
        config.train.global_batch = serde_saphyr::from_str(stages).unwrap();
        let problems = config.problems(1);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("train.global_batch[0].sequences 3"));
        assert!(problems[1].starts_with("train.global_batch[2].sequences 5"));
    }
}
