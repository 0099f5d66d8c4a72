//! A rank's share of something that several ranks divide.

use std::ops::Range;

/// A rank among those that divide something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Index of this rank.
    pub rank: usize,
    /// Number of ranks that divide it.
    pub ranks: usize,
}

impl Share {
    /// Returns this rank's part of `0..total`: parts are as equal as possible.
    pub fn part(self, total: usize) -> Range<usize> {
        let start = |rank: usize| total * rank / self.ranks;
        start(self.rank)..start(self.rank + 1)
    }
}
