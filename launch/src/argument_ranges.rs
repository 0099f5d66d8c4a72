//! Ranges of numbers on the command line.

use dataset::argument_ranges::float;
pub(crate) use dataset::argument_ranges::{megabytes, whole};

/// Most ranks of a machine: each is a process.
pub(crate) const MAX_LOCAL_RANKS: u64 = 4096;
/// Most ranks of a plan, and most machines.
pub(crate) const MAX_RANKS: u64 = 65_536;
/// Largest number of seconds, hours or days.
const MAX_TIME: f64 = 1e9;

/// Accepts times above 0.
pub(crate) fn positive_time(text: &str) -> Result<f64, String> {
    float(text, "above 0 and at most 1e9", |time| {
        time > 0.0 && time <= MAX_TIME
    })
}

/// Accepts times from 0.
pub(crate) fn time(text: &str) -> Result<f64, String> {
    float(text, "from 0 to 1e9", |time| {
        (0.0..=MAX_TIME).contains(&time)
    })
}

/// Accepts shapes of a Weibull distribution whose moments are finite.
pub(crate) fn weibull_shape(text: &str) -> Result<f64, String> {
    float(text, "from 0.1 to 100", |shape| {
        (0.1..=100.0).contains(&shape)
    })
}

/// Accepts times of passes: in one step the longest may be a million times the shortest.
pub(crate) fn pass_time(text: &str) -> Result<f64, String> {
    float(text, "0, or from 0.001 to 1000", |time| {
        time == 0.0 || (1e-3..=1e3).contains(&time)
    })
}

/// Accepts temperatures, which divide logits.
pub(crate) fn temperature(text: &str) -> Result<f64, String> {
    float(text, "0, or from 0.0001 to 10000", |value| {
        value == 0.0 || (1e-4..=1e4).contains(&value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_of_their_range_are_refused() {
        for accepts in [positive_time, time, weibull_shape, pass_time, temperature] {
            for wrong in ["nan", "inf", "-inf", "-1", "1e308", "", "x"] {
                let error = accepts(wrong).unwrap_err();
                assert!(
                    error.starts_with("it must be a number "),
                    "{wrong}: {error}"
                );
            }
            assert_eq!(accepts("0.5"), Ok(0.5));
        }
        assert_eq!(time("0"), Ok(0.0));
        assert!(positive_time("0").is_err() && pass_time("1e-9").is_err());
    }
}
