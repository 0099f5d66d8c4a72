//! Checks of the learning-rate schedule.

use crate::{
    config::{Config, Length, ScheduleConfig},
    problems::Problems,
};

impl Config {
    pub(super) fn check_schedule(&self, problems: &mut Problems) {
        // The default fits every run.
        let Some(schedule) = &self.schedule else {
            return;
        };
        let name = schedule.name();
        let keys = schedule.length_keys();
        for (phase, steps, tokens) in [
            ("warmup", keys.warmup_steps, keys.warmup_tokens),
            ("decay", keys.decay_steps, keys.decay_tokens),
        ] {
            if steps.is_some() && tokens.is_some() {
                problems.add(format!(
                    "schedule.{name} has {phase}_steps and {phase}_tokens: leave one of them out"
                ));
            }
        }
        let decay = keys.decay();
        if matches!(schedule, ScheduleConfig::Wsd(_)) && decay.is_none() {
            problems
                .add("schedule.wsd needs decay_steps or decay_tokens; 0 keeps the rate to the end");
        }
        let warmup = keys.warmup().unwrap_or(Length::Steps(0));
        self.check_lengths(warmup, decay.unwrap_or(Length::Steps(0)), problems);
    }

    fn check_lengths(&self, warmup: Length, decay: Length, problems: &mut Problems) {
        let steps = self.train.steps;
        if let (Length::Steps(warmup_steps), Length::Steps(decay_steps)) = (warmup, decay) {
            let scheduled = warmup_steps.saturating_add(decay_steps);
            if scheduled > steps {
                problems.add(format!(
                    "the schedule's warmup_steps {warmup_steps} + decay_steps {decay_steps} = \
                     {scheduled} is more than train.steps {steps}"
                ));
            }
            return;
        }
        let total = self.tokens_after(0, steps);
        let warmup_tokens = match warmup {
            Length::Steps(steps) => self.tokens_after(0, steps),
            Length::Tokens(tokens) => tokens,
        };
        let decay_tokens = match decay {
            Length::Steps(decay) => {
                total - self.tokens_after(0, steps.saturating_sub(decay)).min(total)
            }
            Length::Tokens(tokens) => tokens,
        };
        if warmup_tokens.saturating_add(decay_tokens) > total {
            problems.add(format!(
                "the schedule's warm-up of {warmup_tokens} tokens and decay of {decay_tokens} \
                 tokens are more than the {total} tokens of the run's {steps} steps"
            ));
        }
    }
}
