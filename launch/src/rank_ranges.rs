//! Sets of ranks in few words: ranges with strides, repeated at equal distances.

use std::fmt::{Display, Formatter, Result};

/// Ranks at equal distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: usize,
    count: usize,
    stride: usize,
}

/// A run, and the starts of its repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RepeatedRun {
    run: Run,
    repetitions: Run,
}

/// A set of ranks whose text is short where the ranks are regular: `0..8`, `0..4096 by 16`, or
/// `0..4 every 16 below 4096`. Ends are exclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RankRanges(Vec<RepeatedRun>);

impl Run {
    fn last(self) -> usize {
        self.first + (self.count - 1) * self.stride
    }
}

/// Splits ascending numbers into runs of equal distances. A pair is no run unless its numbers are
/// neighbors.
fn runs(numbers: &[usize]) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut rest = numbers;
    while let Some(&first) = rest.first() {
        let stride = rest.get(1).map_or(1, |second| second - first);
        let equal = rest
            .windows(2)
            .take_while(|pair| pair[1] - pair[0] == stride);
        let count = match 1 + equal.count() {
            2 if stride > 1 => 1,
            count => count,
        };
        let stride = if count == 1 { 1 } else { stride };
        runs.push(Run {
            first,
            count,
            stride,
        });
        rest = &rest[count..];
    }
    runs
}

impl RankRanges {
    /// Describes `ranks`, which ascend.
    pub(crate) fn new(ranks: &[usize]) -> RankRanges {
        let runs = runs(ranks);
        let is_alike = |a: &Run, b: &Run| a.count == b.count && a.stride == b.stride;
        let mut repeated = Vec::new();
        for alike in runs.chunk_by(is_alike) {
            let firsts: Vec<usize> = alike.iter().map(|run| run.first).collect();
            repeated.extend(
                self::runs(&firsts)
                    .into_iter()
                    .map(|repetitions| RepeatedRun {
                        run: Run {
                            first: repetitions.first,
                            ..alike[0]
                        },
                        repetitions,
                    }),
            );
        }
        RankRanges(repeated)
    }
}

impl Display for RankRanges {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for (index, RepeatedRun { run, repetitions }) in self.0.iter().enumerate() {
            if index > 0 {
                write!(f, ", ")?;
            }
            let Run {
                first,
                count,
                stride,
            } = *run;
            match count {
                1 => write!(f, "{first}")?,
                _ => write!(f, "{first}..{}", run.last() + 1)?,
            }
            if stride > 1 {
                write!(f, " by {stride}")?;
            }
            if repetitions.count > 1 {
                let end = repetitions.last() + (run.last() - run.first) + 1;
                write!(f, " every {} below {end}", repetitions.stride)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(ranks: impl IntoIterator<Item = usize>) -> String {
        RankRanges::new(&ranks.into_iter().collect::<Vec<_>>()).to_string()
    }

    #[test]
    fn regular_ranks_are_one_range() {
        assert_eq!(text([]), "");
        assert_eq!(text([7]), "7");
        assert_eq!(text([7, 8]), "7..9");
        assert_eq!(text([7, 9]), "7, 9");
        assert_eq!(text(0..16_384), "0..16384");
        assert_eq!(text((3..4096).step_by(16)), "3..4084 by 16");
        let blocks = (0..4096).filter(|rank| rank % 16 < 4);
        assert_eq!(text(blocks), "0..4 every 16 below 4084");
        let grid = (0..1024).filter(|rank| rank % 64 < 32 && rank % 8 == 1);
        assert_eq!(text(grid), "1..26 by 8 every 64 below 986");
        assert_eq!(text([0, 1, 2, 5, 9, 10]), "0..3, 5, 9..11");
    }

    /// Reads the ranks back from their text.
    fn parse(text: &str) -> Vec<usize> {
        let number = |text: &str| text.trim().parse::<usize>().unwrap();
        let mut ranks = Vec::new();
        for part in text.split(", ").filter(|part| !part.is_empty()) {
            let (run, repetition) = part.split_once(" every ").unwrap_or((part, "1 below 0"));
            let (run, stride) = run.split_once(" by ").unwrap_or((run, "1"));
            let run = match run.split_once("..") {
                Some((first, end)) => number(first)..number(end),
                None => number(run)..number(run) + 1,
            };
            let (every, below) = repetition.split_once(" below ").unwrap();
            let starts = (run.start..number(below).max(run.start + 1)).step_by(number(every));
            for start in starts {
                let own = run.clone().step_by(number(stride));
                ranks.extend(own.map(|rank| rank - run.start + start));
            }
        }
        ranks
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn the_text_names_each_rank_once(
            ranks in prop::collection::btree_set(0usize..80, 0..80),
        ) {
            let ranks: Vec<usize> = ranks.into_iter().collect();
            prop_assert_eq!(parse(&text(ranks.iter().copied())), ranks);
        }
    }
}
