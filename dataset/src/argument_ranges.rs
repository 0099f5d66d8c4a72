//! Ranges of numbers on the command line.

use clap::builder::RangedU64ValueParser;
use std::ops::RangeInclusive;

/// Accepts whole numbers of a range.
pub fn whole(range: RangeInclusive<u64>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(range)
}

/// Accepts the share of something, but not all of it.
///
/// # Errors
/// If it is something else.
pub fn fraction(text: &str) -> Result<f64, String> {
    float(text, "from 0 to below 1", |value| {
        (0.0..1.0).contains(&value)
    })
}

/// Accepts numbers of MB or MiB.
///
/// # Errors
/// If it is something else.
pub fn megabytes(text: &str) -> Result<f64, String> {
    float(text, "above 0 and at most 1e12", |size| {
        size > 0.0 && size <= 1e12
    })
}

/// Accepts numbers inside of a range, which `range` describes.
///
/// # Errors
/// If it is something else.
pub fn float(text: &str, range: &str, is_inside: fn(f64) -> bool) -> Result<f64, String> {
    let number = text.parse().ok().filter(|&number| is_inside(number));
    number.ok_or_else(|| format!("it must be a number {range}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_of_their_range_are_refused() {
        for accepts in [fraction, megabytes] {
            for wrong in ["nan", "inf", "-inf", "-1", "1e308", "", "x"] {
                let error = accepts(wrong).unwrap_err();
                assert!(
                    error.starts_with("it must be a number "),
                    "{wrong}: {error}"
                );
            }
            assert_eq!(accepts("0.5"), Ok(0.5));
        }
        assert!(fraction("0").is_ok() && fraction("1").is_err() && megabytes("0").is_err());
    }
}
