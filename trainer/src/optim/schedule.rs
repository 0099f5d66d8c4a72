//! Learning-rate schedules: pure functions of the step.

use crate::config::ScheduleConfig;

/// Unit of a batch in the Power scheduler, in tokens (arXiv 2408.13359, section 3).
const POWER_SEQUENCE: f64 = 4096.0;

/// Returns the learning rate of step `step` (0 is the first) of `steps`.
///
/// Tokens count from the end of the step, so that the first step's rate is not zero.
pub(crate) fn learning_rate(
    config: &ScheduleConfig,
    step: u64,
    steps: u64,
    tokens_per_step: u64,
) -> f64 {
    let at = step + 1;
    let warmup = |warmup: u64| {
        if at < warmup {
            at as f64 / warmup as f64
        } else {
            1.0
        }
    };
    let progress = |warmup: u64| {
        let span = steps.saturating_sub(warmup).max(1) as f64;
        (step.saturating_sub(warmup) as f64 / span).min(1.0)
    };
    match config {
        ScheduleConfig::Power(power) => {
            let tokens = |step: u64| step as f64 * tokens_per_step as f64;
            let law = |tokens: f64| {
                power_law(
                    power.a,
                    power.b,
                    power.max_lr,
                    tokens_per_step as f64,
                    tokens,
                )
            };
            let decay_from = steps.saturating_sub(power.decay_steps);
            if at < power.warmup_steps {
                warmup(power.warmup_steps) * law(tokens(power.warmup_steps))
            } else if power.decay_steps > 0 && at > decay_from {
                let x = (at - decay_from) as f64 / power.decay_steps as f64;
                exponential_to_zero(x) * law(tokens(decay_from.max(1)))
            } else {
                law(tokens(at))
            }
        }
        ScheduleConfig::Wsd(wsd) => {
            let decay_from = steps.saturating_sub(wsd.decay_steps);
            let decay = if wsd.decay_steps > 0 && at > decay_from {
                1.0 - ((at - decay_from) as f64 / wsd.decay_steps as f64)
                    .min(1.0)
                    .sqrt()
            } else {
                1.0
            };
            wsd.lr * warmup(wsd.warmup_steps) * decay
        }
        ScheduleConfig::Cosine(ramp) => {
            let half = (1.0 + (std::f64::consts::PI * progress(ramp.warmup_steps)).cos()) / 2.0;
            ramp.lr
                * warmup(ramp.warmup_steps)
                * (ramp.final_ratio + (1.0 - ramp.final_ratio) * half)
        }
        ScheduleConfig::Linear(ramp) => {
            let left = 1.0 - progress(ramp.warmup_steps);
            ramp.lr
                * warmup(ramp.warmup_steps)
                * (ramp.final_ratio + (1.0 - ramp.final_ratio) * left)
        }
        ScheduleConfig::Constant(constant) => constant.lr * warmup(constant.warmup_steps),
    }
}

/// Returns `min(max_lr, beta * a * n^b)` after `tokens` tokens, in steps of `batch_tokens` (arXiv
/// 2408.13359, eq. 6).
pub(crate) fn power_law(a: f64, b: f64, max_lr: f64, batch_tokens: f64, tokens: f64) -> f64 {
    (batch_tokens / POWER_SEQUENCE * a * tokens.powf(b)).min(max_lr)
}

/// Returns `(e^(1-x) - 1) / (e - 1)`, which falls from 1 at 0 to 0 at 1.
fn exponential_to_zero(x: f64) -> f64 {
    ((1.0 - x.min(1.0)).exp() - 1.0) / (std::f64::consts::E - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConstantConfig, PowerConfig, RampConfig, WsdConfig};

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-6 * b.abs().max(1e-12), "{a} is not {b}");
    }

    #[test]
    fn the_power_law_has_the_values_of_the_paper() {
        let paper = |beta: f64, tokens: f64| power_law(4.0, -0.51, 0.02, beta * 4096.0, tokens);
        for (beta, tokens, expected) in [
            (32.0, 1e9, 3.290107e-3),
            (32.0, 1e10, 1.016740e-3),
            (128.0, 1e8, 2.0e-2),
            (128.0, 1e9, 1.316043e-2),
            (128.0, 2e9, 9.241547e-3),
            (128.0, 1e11, 1.256811e-3),
            (128.0, 1.28e11, 1.108136e-3),
            (512.0, 1e10, 1.626784e-2),
            (512.0, 1.28e11, 4.432542e-3),
            (1024.0, 1e10, 2.0e-2),
            (1024.0, 1.28e11, 8.865084e-3),
            (1024.0, 1e12, 3.107134e-3),
        ] {
            close(paper(beta, tokens), expected);
        }
    }

    #[test]
    fn power_warms_up_to_the_law_and_decays_to_zero() {
        let config = ScheduleConfig::Power(PowerConfig {
            warmup_steps: 10,
            decay_steps: 20,
            max_lr: 1.0,
            ..Default::default()
        });
        let rate = |step| learning_rate(&config, step, 100, 4096);
        let law = |steps: f64| power_law(4.0, -0.51, 1.0, 4096.0, steps * 4096.0);
        close(rate(0), law(10.0) / 10.0);
        close(rate(9), law(10.0));
        close(rate(49), law(50.0));
        close(rate(84), law(80.0) * 0.650068);
        assert_eq!(rate(99), 0.0);
        // Neither the warm-up nor the middle depends on the length of the run.
        close(learning_rate(&config, 49, 1000, 4096), rate(49));
    }

    #[test]
    fn other_schedules_match_values_computed_by_hand() {
        let wsd = ScheduleConfig::Wsd(WsdConfig {
            lr: 1.0,
            warmup_steps: 4,
            decay_steps: 4,
        });
        let rates: Vec<f64> = [0, 3, 10, 16, 19]
            .map(|s| learning_rate(&wsd, s, 20, 1))
            .to_vec();
        close(rates[0], 0.25);
        assert_eq!(rates[1..3], [1.0, 1.0]);
        close(rates[3], 0.5);
        assert_eq!(rates[4], 0.0);
        let ramp = RampConfig {
            lr: 2.0,
            warmup_steps: 0,
            final_ratio: 0.1,
        };
        let cosine = ScheduleConfig::Cosine(ramp.clone());
        close(learning_rate(&cosine, 0, 10, 1), 2.0);
        close(learning_rate(&cosine, 5, 10, 1), 1.1);
        close(learning_rate(&cosine, 10, 10, 1), 0.2);
        let linear = ScheduleConfig::Linear(ramp);
        close(learning_rate(&linear, 5, 10, 1), 1.1);
        let constant = ScheduleConfig::Constant(ConstantConfig {
            lr: 3.0,
            warmup_steps: 3,
        });
        close(learning_rate(&constant, 0, 10, 1), 1.0);
        close(learning_rate(&constant, 7, 10, 1), 3.0);
    }
}
