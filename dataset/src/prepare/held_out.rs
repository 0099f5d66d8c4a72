//! Documents held out for validation.

use crate::Error;

/// Most decimal places of a fraction.
const DECIMALS: usize = 18;

/// Fraction of documents for validation, in exact decimal arithmetic.
///
/// Of the first `n` documents, `floor(n * fraction)` are held out, for every `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeldOut {
    numerator: u128,
    denominator: u128,
}

impl HeldOut {
    /// # Errors
    /// If the fraction is not in `0..1` or has too many decimal places.
    pub(super) fn new(fraction: f64) -> Result<HeldOut, Error> {
        if !(0.0..1.0).contains(&fraction) {
            return Err(Error::Options(format!(
                "--validation-fraction {fraction} is not between 0 and 1"
            )));
        }
        // The shortest decimal number that is read as this value: the one that the user gave.
        let text = fraction.to_string();
        let decimals = text.strip_prefix("0.").unwrap_or("");
        if decimals.len() > DECIMALS {
            return Err(Error::Options(format!(
                "--validation-fraction {fraction} has more than {DECIMALS} decimal places"
            )));
        }
        let digits = decimals.chars().filter_map(|digit| digit.to_digit(10));
        Ok(HeldOut {
            numerator: digits.fold(0, |number, digit| number * 10 + u128::from(digit)),
            denominator: 10u128.pow(decimals.len() as u32),
        })
    }

    /// True if no document is ever held out.
    pub(super) fn is_none(&self) -> bool {
        self.numerator == 0
    }

    /// True if document `number`, counted from 0, is for validation.
    pub(super) fn contains(&self, number: u64) -> bool {
        let below = |count: u128| count * self.numerator / self.denominator;
        below(u128::from(number) + 1) > below(u128::from(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fractions_are_exact() {
        for (fraction, documents, expected) in [
            (0.7, 100, 70),
            (0.3, 100, 30),
            (0.29, 100, 29),
            (0.58, 50, 29),
            (0.02, 49, 0),
            (0.02, 100, 2),
            (0.999, 1000, 999),
            (0.0, 1000, 0),
            (1e-6, 1_000_000, 1),
        ] {
            let held_out = HeldOut::new(fraction).unwrap();
            let count = (0..documents).filter(|&n| held_out.contains(n)).count();
            assert_eq!(count, expected, "{fraction} of {documents}");
        }
        for wrong in [1.0, -0.1, f64::NAN, 1e-30] {
            assert!(HeldOut::new(wrong).is_err(), "{wrong}");
        }
        assert!(HeldOut::new(0.5).unwrap().contains(u64::MAX));
    }

    #[test]
    fn every_nth_document_for_reciprocals() {
        let held_out = HeldOut::new(0.25).unwrap();
        let numbers: Vec<u64> = (0..12).filter(|&n| held_out.contains(n)).collect();
        assert_eq!(numbers, [3, 7, 11]);
    }

    proptest! {
        #[test]
        fn counts_are_floors(thousandths in 0u64..1000, documents in 0u64..3000) {
            let held_out = HeldOut::new(thousandths as f64 / 1000.0).unwrap();
            let count = (0..documents).filter(|&n| held_out.contains(n)).count() as u64;
            prop_assert_eq!(count, documents * thousandths / 1000);
        }
    }
}
