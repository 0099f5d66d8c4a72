//! Lists of ranks as ranges with strides, such as `0..4096 by 16`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The most ranges that a message prints.
const PRINTED_RANGES: usize = 6;

/// Ranks in a given order, as ranges: regular groups of any size take little memory and text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRanges(Vec<Range>);

/// Ranks with equal differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    first: usize,
    count: usize,
    stride: usize,
}

impl MemberRanges {
    /// Returns the ranks in ranges.
    pub fn new(ranks: &[usize]) -> MemberRanges {
        let mut ranges = Vec::new();
        let mut rest = ranks;
        while let Some(range) = Range::longest(rest) {
            rest = &rest[range.count..];
            ranges.push(range);
        }
        MemberRanges(ranges)
    }

    /// Returns the ranks from 0 to `count`.
    pub(crate) fn first(count: usize) -> MemberRanges {
        let range = Range {
            first: 0,
            count,
            stride: 1,
        };
        MemberRanges(vec![range])
    }

    /// Returns the number of ranks.
    pub fn count(&self) -> usize {
        self.0.iter().map(|range| range.count).sum()
    }

    /// Returns the ranks in their order.
    pub fn ranks(&self) -> impl Iterator<Item = usize> {
        let ranks = |range: &Range| {
            let Range { first, stride, .. } = *range;
            (0..range.count).map(move |index| first + index * stride)
        };
        self.0.iter().flat_map(ranks)
    }

    /// Returns the text of the first `most` ranges, and the number of ranks that follow.
    pub(crate) fn text(&self, most: usize) -> String {
        let printed = &self.0[..self.0.len().min(most)];
        let mut texts = printed
            .iter()
            .map(Range::to_string)
            .collect::<Vec<String>>();
        let left = self.count() - printed.iter().map(|range| range.count).sum::<usize>();
        if left > 0 {
            texts.push(format!("and {left} more"));
        }
        texts.join(", ")
    }
}

impl Range {
    /// Returns the first rank, with the ranks that follow it in equal steps if there are enough for
    /// a range; `None` without ranks.
    fn longest(ranks: &[usize]) -> Option<Range> {
        let first = *ranks.first()?;
        let stride = ranks
            .get(1)
            .and_then(|second| second.checked_sub(first))
            .unwrap_or(0);
        let follows = |pair: &&[usize]| pair[1].checked_sub(pair[0]) == Some(stride);
        let count = 1 + ranks.windows(2).take_while(follows).count();
        let count = if count < 3 { 1 } else { count };
        Some(Range {
            first,
            count,
            stride,
        })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Range {
            first,
            count,
            stride,
        } = *self;
        let end = first + count * stride;
        match (count, stride) {
            (1, _) => write!(f, "{first}"),
            (_, 0) => write!(f, "{count} times {first}"),
            (_, 1) => write!(f, "{first}..{end}"),
            _ => write!(f, "{first}..{end} by {stride}"),
        }
    }
}

impl fmt::Display for MemberRanges {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}", self.text(PRINTED_RANGES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn regular_groups_are_one_range() {
        let text = |ranks: &[usize]| MemberRanges::new(ranks).to_string();
        assert_eq!(text(&[]), "");
        assert_eq!(text(&[0, 1]), "0, 1");
        assert_eq!(text(&[0, 1, 2]), "0..3");
        assert_eq!(text(&[0, 5, 6, 7, 3]), "0, 5..8, 3");
        let strided: Vec<usize> = (0..4096).step_by(16).collect();
        assert_eq!(text(&strided), "0..4096 by 16");
        assert_eq!(MemberRanges::first(3), MemberRanges::new(&[0, 1, 2]));
        let irregular: Vec<usize> = (0..100).map(|rank| rank * rank).collect();
        assert_eq!(text(&irregular), "0, 1, 4, 9, 16, 25, and 94 more");
    }

    proptest! {
        #[test]
        fn ranges_have_the_ranks_in_order(
            ranks in prop::collection::vec(0usize..40, 0..60),
            stride in 1usize..5,
        ) {
            let regular: Vec<usize> = (3..40).step_by(stride).collect();
            let all = [ranks, regular].concat();
            let ranges = MemberRanges::new(&all);
            prop_assert_eq!(ranges.count(), all.len());
            prop_assert!(
                ranges
                    .ranks()
                    .eq(all.iter().copied())
            );
            let text = serde_json::to_string(&ranges).unwrap();
            prop_assert_eq!(serde_json::from_str::<MemberRanges>(&text).unwrap(), ranges);
        }

        #[test]
        fn text_is_short_whatever_the_members_are(
            ranks in prop::collection::vec(0usize..1_000_000, 0..400),
        ) {
            prop_assert!(
                MemberRanges::new(&ranks)
                    .to_string()
                    .len()
                    < 300
            );
        }
    }
}
