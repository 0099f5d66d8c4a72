//! Combinations of keys that run as written but are probably not meant.

use super::{Config, PowerConfig, ScheduleConfig};
use crate::optim::schedule::highest_power_rate;

impl Config {
    /// Returns a warning for each combination of keys that runs but is probably not meant.
    pub fn warnings(&self) -> Vec<String> {
        self.power_without_mup().into_iter().collect()
    }

    /// Warns of constants that were fitted for `model.mup` in a model without it.
    fn power_without_mup(&self) -> Option<String> {
        let Some(ScheduleConfig::Power(power)) = &self.schedule else {
            return None;
        };
        if self.model.mup.is_some() {
            return None;
        }
        let published = PowerConfig::default();
        let rate = highest_power_rate(self);
        let is_limited = rate >= power.max_lr;
        let has_published_limit = is_limited && power.max_lr == published.max_lr;
        let has_published_law = !is_limited && power.a == published.a && power.b == published.b;
        if !has_published_limit && !has_published_law {
            return None;
        }
        Some(format!(
            "schedule.power has constants of arXiv 2408.13359, which were fitted with model.mup, \
             and this model has none: its highest rate is {rate:.2e}, where the default for \
             model.hidden {} is {:.1e}. Give model.mup, a smaller a and max_lr, or no schedule",
            self.model.hidden,
            self.default_rate()
        ))
    }
}
