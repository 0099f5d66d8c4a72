//! Frequencies of tokens, from which their entropy follows.

use std::collections::BTreeMap;

/// Ids below this are counted in a list; it takes 8 MiB at most.
const LISTED: u32 = 1 << 20;

/// Numbers of occurrences of token ids.
#[derive(Debug, Default)]
pub(super) struct TokenCounts {
    listed: Vec<u64>,
    others: BTreeMap<u32, u64>,
}

impl TokenCounts {
    pub(super) fn add(&mut self, tokens: &[u32]) {
        for &token in tokens {
            let index = token as usize;
            if let Some(count) = self.listed.get_mut(index) {
                *count += 1;
            } else if token < LISTED {
                self.listed.resize(index + 1, 0);
                self.listed[index] = 1;
            } else {
                *self.others.entry(token).or_default() += 1;
            }
        }
    }

    pub(super) fn merge(&mut self, other: TokenCounts) {
        if self.listed.len() < other.listed.len() {
            self.listed.resize(other.listed.len(), 0);
        }
        for (own, count) in self.listed.iter_mut().zip(other.listed) {
            *own += count;
        }
        for (token, count) in other.others {
            *self.others.entry(token).or_default() += count;
        }
    }

    /// Returns the entropy of the distribution with these counts, in nats, or 0 without tokens.
    pub(super) fn entropy(&self) -> f64 {
        let counts = || self.listed.iter().chain(self.others.values());
        let total = counts().sum::<u64>() as f64;
        let term = |&count: &u64| {
            let share = count as f64 / total;
            -share * share.ln()
        };
        let entropy: f64 = counts().filter(|&&count| count > 0).map(term).sum();
        // Of a single token it is -0.
        entropy.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_a_fair_coin_is_ln_two() {
        let mut counts = TokenCounts::default();
        counts.add(&[3, u32::MAX, 3, u32::MAX]);
        assert!((counts.entropy() - 2f64.ln()).abs() < 1e-12);
        assert_eq!(TokenCounts::default().entropy(), 0.0);
    }
}
