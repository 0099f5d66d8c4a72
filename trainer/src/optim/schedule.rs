//! Learning-rate schedules: pure functions of the configuration and the position in the run.

use crate::config::{
    Config, ConstantConfig, Length, PowerConfig, RampConfig, ScheduleConfig, WsdConfig,
};
use std::f64::consts::{E, PI};

/// Unit of a batch in the Power scheduler, in tokens (arXiv 2408.13359, section 3).
const POWER_SEQUENCE: f64 = 4096.0;

/// The beginning of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// Number of completed steps.
    pub(crate) step: u64,
    /// Tokens seen before the step.
    pub(crate) tokens: u64,
}

/// Returns the learning rate of the step that begins at `position`.
///
/// Steps and tokens count to the end of the step, so that the first step's rate is not zero.
pub(crate) fn learning_rate(config: &Config, position: Position) -> f64 {
    let schedule = config.schedule();
    let keys = schedule.length_keys();
    let step = StepInRun {
        config,
        position,
        batch: config.step_tokens_at(position.tokens),
        warmup: keys.warmup().unwrap_or(Length::Steps(0)),
        decay: keys.decay().unwrap_or(Length::Steps(0)),
    };
    match &schedule {
        ScheduleConfig::Power(power) => step.power(power),
        ScheduleConfig::Wsd(WsdConfig { lr, .. }) => {
            lr * step.warmup_factor() * (1.0 - step.decayed().sqrt())
        }
        ScheduleConfig::Cosine(ramp) => {
            let half = (1.0 + (PI * step.fallen(ramp)).cos()) / 2.0;
            step.between(ramp, half)
        }
        ScheduleConfig::Linear(ramp) => step.between(ramp, 1.0 - step.fallen(ramp)),
        ScheduleConfig::Constant(ConstantConfig { lr, .. }) => lr * step.warmup_factor(),
    }
}

/// A step, with the lengths of the run's warm-up and decay.
struct StepInRun<'a> {
    config: &'a Config,
    position: Position,
    /// Tokens of the step.
    batch: u64,
    warmup: Length,
    decay: Length,
}

impl StepInRun<'_> {
    /// Number of steps, this one included.
    fn steps_done(&self) -> u64 {
        self.position.step.saturating_add(1)
    }

    /// Tokens seen, those of this step included.
    fn tokens_seen(&self) -> u64 {
        self.position.tokens.saturating_add(self.batch)
    }

    /// Tokens seen before the last step of the run, and after it.
    fn last_step(&self) -> std::ops::Range<u64> {
        let left = self.config.train.steps.saturating_sub(self.position.step);
        let before = |steps| self.config.tokens_after(self.position.tokens, steps);
        before(left.saturating_sub(1))..before(left.max(1))
    }

    /// Returns the part of the peak rate that the warm-up has reached.
    fn warmup_factor(&self) -> f64 {
        match self.warmup {
            Length::Steps(steps) if self.steps_done() < steps => {
                self.steps_done() as f64 / steps as f64
            }
            Length::Tokens(tokens) if self.tokens_seen() < tokens => {
                self.tokens_seen() as f64 / tokens as f64
            }
            _ => 1.0,
        }
    }

    fn is_warming_up(&self) -> bool {
        match self.warmup {
            Length::Steps(steps) => self.steps_done() < steps,
            Length::Tokens(tokens) => self.tokens_seen() < tokens,
        }
    }

    /// Returns the tokens at the end of the warm-up, if its other steps have this step's batch.
    fn warmup_end(&self) -> u64 {
        match self.warmup {
            Length::Steps(steps) => {
                let left = steps.saturating_sub(self.position.step);
                let tokens = left.saturating_mul(self.batch);
                self.position.tokens.saturating_add(tokens)
            }
            Length::Tokens(tokens) => tokens,
        }
    }

    /// Returns the part of the decay that is done: 0 before it, and below 1 in the last step.
    fn decayed(&self) -> f64 {
        match self.decay {
            Length::Steps(decay) => {
                let start = self.config.train.steps.saturating_sub(decay);
                let done = self.steps_done().saturating_sub(start);
                fraction(done, decay.saturating_add(1))
            }
            Length::Tokens(decay) => {
                let last = self.last_step();
                let start = last.end.saturating_sub(decay);
                let done = self.tokens_seen().saturating_sub(start);
                fraction(done, decay.saturating_add(last.end - last.start))
            }
        }
    }

    /// Returns the tokens seen at the start of the decay, for a step of the decay.
    fn decay_start(&self) -> u64 {
        let Position { step, tokens } = self.position;
        let start = match self.decay {
            Length::Steps(decay) => {
                let start = self.config.train.steps.saturating_sub(decay);
                // The checkpoint has no earlier counts: the batch sizes of now tell the difference.
                let planned = |steps| self.config.tokens_after(0, steps);
                let since = planned(step).saturating_sub(planned(start));
                tokens.saturating_sub(since)
            }
            Length::Tokens(decay) => self.last_step().end.saturating_sub(decay),
        };
        start.max(self.batch)
    }

    fn power(&self, power: &PowerConfig) -> f64 {
        let law = |tokens: u64| power_law(power, self.batch as f64, tokens as f64);
        let decayed = self.decayed();
        if self.is_warming_up() {
            self.warmup_factor() * law(self.warmup_end())
        } else if decayed > 0.0 {
            exponential_to_zero(decayed) * law(self.decay_start())
        } else {
            law(self.tokens_seen())
        }
    }

    /// Returns how far a rate without a constant phase has fallen: 0 at its peak, which is the end
    /// of the warm-up or else the first step. At the end it is 1, or almost 1 if `final_ratio` is
    /// 0.
    fn fallen(&self, ramp: &RampConfig) -> f64 {
        let ends_at_zero = ramp.final_ratio == 0.0;
        match self.warmup {
            Length::Steps(steps) => {
                let peak = steps.max(1);
                let beyond = u64::from(ends_at_zero);
                let span = self.config.train.steps.saturating_sub(peak);
                let done = self.steps_done().saturating_sub(peak);
                fraction(done, span.saturating_add(beyond))
            }
            Length::Tokens(tokens) => {
                let peak = tokens.max(self.config.step_tokens_at(0));
                let last = self.last_step();
                let beyond = if ends_at_zero {
                    last.end - last.start
                } else {
                    0
                };
                let span = last.end.saturating_sub(peak);
                let done = self.tokens_seen().saturating_sub(peak);
                fraction(done, span.saturating_add(beyond))
            }
        }
    }

    /// Returns the rate between `lr` (`left` is 1) and `lr * final_ratio` (`left` is 0).
    fn between(&self, ramp: &RampConfig, left: f64) -> f64 {
        ramp.lr * self.warmup_factor() * (ramp.final_ratio + (1.0 - ramp.final_ratio) * left)
    }
}

/// Returns `part / whole`, at most 1, or 0 of nothing.
fn fraction(part: u64, whole: u64) -> f64 {
    if part == 0 {
        return 0.0;
    }
    (part as f64 / whole as f64).min(1.0)
}

/// Returns `min(max_lr, beta * a * n^b)` after `tokens` tokens, in a step of `batch_tokens` (arXiv
/// 2408.13359, eq. 6).
fn power_law(power: &PowerConfig, batch_tokens: f64, tokens: f64) -> f64 {
    (batch_tokens / POWER_SEQUENCE * power.a * tokens.powf(power.b)).min(power.max_lr)
}

/// Returns the highest rate of a run with the Power scheduler; 0 with another one.
///
/// The law falls within each stage of a batch ramp, so it is highest at the end of the warm-up or
/// in the first step of a stage.
pub(crate) fn highest_power_rate(config: &Config) -> f64 {
    let ScheduleConfig::Power(power) = config.schedule() else {
        return 0.0;
    };
    let keys = config.schedule().length_keys();
    let warmup_end = match keys.warmup().unwrap_or(Length::Steps(0)) {
        Length::Steps(steps) => config.tokens_after(0, steps),
        Length::Tokens(tokens) => tokens,
    };
    let end = config.tokens_after(0, config.train.steps);
    let stages = config.train.global_batch.stages();
    let starts = stages.iter().map(|stage| stage.tokens.max(warmup_end));
    let rate = |tokens: u64| {
        let batch = config.step_tokens_at(tokens);
        power_law(&power, batch as f64, tokens.max(batch) as f64)
    };
    let within = starts.filter(|&start| start <= end);
    within.map(rate).fold(0.0, f64::max)
}

/// Returns `(e^(1-x) - 1) / (e - 1)`, which falls from 1 at 0 to 0 at 1.
fn exponential_to_zero(x: f64) -> f64 {
    ((1.0 - x.min(1.0)).exp() - 1.0) / (E - 1.0)
}

#[cfg(test)]
pub(crate) mod tests;
