//! Division of a corpus into shards, and of shards among machines. Pure.

use super::count::FileCount;
use crate::Error;
use std::{fmt, ops::Range, str::FromStr};

/// Most parts and most shards.
pub const MAX_PARTS: usize = 100_000;

/// Division of the documents among pairs of token files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shards {
    /// One pair for all documents.
    One,
    /// This many pairs with equal shares of the text.
    Equal(usize),
    /// A pair for each input file.
    PerInput,
}

/// One machine's share of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Number of the part, from 0 on.
    pub index: usize,
    /// Number of parts that the work is divided into.
    pub of: usize,
}

/// Documents of a file for one shard. Documents without text have no number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ShardRange {
    pub(super) shard: usize,
    pub(super) documents: Range<u64>,
}

/// The work on a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileWork {
    pub(super) file: usize,
    /// The documents to tokenize, ascending. The last range may be open: `start..u64::MAX`.
    pub(super) ranges: Vec<ShardRange>,
    /// True if this work accounts for what is skipped or repaired in the file.
    pub(super) counts: bool,
    /// Reading stops before this document. `u64::MAX` without a limit.
    pub(super) stop: u64,
    /// The documents that were counted in the file, up to the limit of text.
    pub(super) known: Option<u64>,
}

/// The work of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// Shards that this command writes.
    pub(super) shards: Range<usize>,
    pub(super) work: Vec<FileWork>,
    /// The number of each file's first document, or None if it is known only after reading the
    /// files before.
    pub(super) first_documents: Option<Vec<u64>>,
}

/// Returns true if the documents must be counted before [`plan`] can divide them.
pub(super) fn needs_count(
    shards: Shards,
    part: Option<Part>,
    is_limited: bool,
    holds_out: bool,
) -> bool {
    if is_limited {
        return true;
    }
    match shards {
        Shards::One => part.is_some_and(|part| part.of > 1),
        Shards::Equal(_) => true,
        // The numbers of documents decide only on validation.
        Shards::PerInput => holds_out && part.is_some_and(|part| part.of > 1),
    }
}

/// Checks that every part has a shard: parts without one have no pairs that could be merged.
///
/// # Errors
/// If there are more parts than shards.
pub(super) fn check_part(files: usize, shards: Shards, part: Option<Part>) -> Result<(), Error> {
    let Some(part) = part else {
        return Ok(());
    };
    let (count, kind) = match shards {
        Shards::One => return Ok(()),
        Shards::Equal(shards) => (shards, "shards"),
        Shards::PerInput => (files, "input files"),
    };
    if part.of <= count {
        return Ok(());
    }
    Err(Error::Options(format!(
        "--part {part}: there are only {count} {kind}; make at most as many parts"
    )))
}

/// Divides `files` files, of which `counts` are known if [`needs_count`] says so.
pub(super) fn plan(
    files: usize,
    counts: Option<&[FileCount]>,
    shards: Shards,
    part: Option<Part>,
) -> Plan {
    let part = part.unwrap_or(Part { index: 0, of: 1 });
    let first_documents = counts.map(|counts| {
        let mut first = 0;
        counts
            .iter()
            .map(|count| {
                let this = first;
                first += count.documents;
                this
            })
            .collect()
    });
    let (cuts, own) = match shards {
        // A part is like a shard, but all parts have the same names.
        Shards::One => {
            let counts = counts.unwrap_or(&[]);
            let cuts = cuts(files, counts, part.of);
            let own = cuts[part.index]..cuts[part.index + 1];
            (vec![own.start, own.end], 0..1)
        }
        Shards::Equal(shards) => (cuts(files, counts.unwrap_or(&[]), shards), part.of(shards)),
        Shards::PerInput => ((0..=files).map(Position::of_file).collect(), part.of(files)),
    };
    let mut work: Vec<FileWork> = Vec::new();
    for shard in own.clone() {
        let range = cuts[shard]..cuts[shard + 1];
        for file in range.start.file..files.min(range.end.file + 1) {
            let start = if file == range.start.file {
                range.start.document
            } else {
                0
            };
            let known = counts.map_or(u64::MAX, |counts| counts[file].documents);
            let end = if file == range.end.file {
                range.end.document
            } else {
                known
            };
            // Reading the first document, or a file without one, includes its counts.
            let counts_file = start == 0 && (file < range.end.file || end > 0);
            let is_limited = counts.is_some_and(|counts| counts[file].is_cut);
            let is_unread = is_limited && known == 0;
            if is_unread || (start >= end && !counts_file) {
                continue;
            }
            let same = work.last_mut().filter(|work| work.file == file);
            let ranges = Some(ShardRange {
                shard,
                documents: start..end,
            });
            let ranges = ranges.filter(|range| !range.documents.is_empty());
            match same {
                Some(work) => work.ranges.extend(ranges),
                None => work.push(FileWork {
                    file,
                    ranges: ranges.into_iter().collect(),
                    counts: counts_file,
                    stop: if is_limited { known } else { u64::MAX },
                    known: counts.is_some().then_some(known),
                }),
            }
        }
    }
    Plan {
        shards: own,
        work,
        first_documents,
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl FromStr for Part {
    type Err = Error;

    fn from_str(text: &str) -> Result<Part, Error> {
        let parsed = text.split_once('/').and_then(|(index, of)| {
            let index = index.parse().ok()?;
            let of = of.parse().ok()?;
            (index < of && of <= MAX_PARTS).then_some(Part { index, of })
        });
        parsed.ok_or_else(|| {
            Error::Options(format!(
                "{text:?} is no part: write 0/N to (N-1)/N, with N at most {MAX_PARTS}"
            ))
        })
    }
}

impl Part {
    /// Returns this part's range of `count` shards.
    fn of(self, count: usize) -> Range<usize> {
        let at = |index: usize| (count as u128 * index as u128 / self.of as u128) as usize;
        at(self.index)..at(self.index + 1)
    }
}

/// A place between documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    file: usize,
    document: u64,
}

impl Position {
    fn of_file(file: usize) -> Position {
        Position { file, document: 0 }
    }
}

/// Returns the borders of `shards` shards with equal text, as near as the counts tell.
fn cuts(files: usize, counts: &[FileCount], shards: usize) -> Vec<Position> {
    let total: u64 = counts.iter().map(|count| count.bytes).sum();
    let mut cuts = vec![Position::of_file(0)];
    let mut before = 0;
    let mut file = 0;
    for shard in 1..shards {
        let wanted = (u128::from(total) * shard as u128 / shards as u128) as u64;
        while file < counts.len() && before + counts[file].bytes <= wanted {
            before += counts[file].bytes;
            file += 1;
        }
        let marks = counts.get(file).map_or(&[][..], |count| &count.marks);
        let next = marks.partition_point(|mark| before + mark.bytes < wanted);
        cuts.push(match (marks.get(next), file < counts.len()) {
            (Some(mark), _) => Position {
                file,
                document: mark.document,
            },
            (None, true) => Position::of_file(file + 1),
            (None, false) => Position::of_file(files),
        });
    }
    cuts.push(Position::of_file(files));
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Returns the counts of files whose documents have these sizes.
    fn counted(files: &[Vec<u64>]) -> Vec<FileCount> {
        files.iter().map(|sizes| FileCount::of(sizes)).collect()
    }

    /// Shards by the file and the number of a document.
    type Assigned = BTreeMap<(usize, u64), Vec<usize>>;

    /// Returns the shard of each document, and the number of parts that account for each file.
    fn assigned(plans: &[Plan]) -> (Assigned, BTreeMap<usize, usize>) {
        let mut shards = Assigned::new();
        let mut counting = BTreeMap::new();
        for (part, plan) in plans.iter().enumerate() {
            for work in &plan.work {
                *counting.entry(work.file).or_default() += usize::from(work.counts);
                for range in &work.ranges {
                    // Parts of a single pair have one shard each.
                    let shard = if plan.shards == (0..1) {
                        part
                    } else {
                        range.shard
                    };
                    for document in range.documents.clone() {
                        shards.entry((work.file, document)).or_default().push(shard);
                    }
                }
            }
        }
        (shards, counting)
    }

    proptest! {
        #[test]
        fn parts_and_shards_cover_every_document_once(
            files in prop::collection::vec(prop::collection::vec(1u64..50, 0..12), 1..8),
            shards in 1usize..6,
            parts in 1usize..5,
            kind in 0..3,
        ) {
            let counts = counted(&files);
            let shards = match kind {
                0 => Shards::One,
                1 => Shards::Equal(shards),
                _ => Shards::PerInput,
            };
            let part = |index| Some(Part { index, of: parts });
            let plans: Vec<Plan> = (0..parts)
                .map(|index| plan(files.len(), Some(&counts), shards, part(index)))
                .collect();
            let (found, counting) = assigned(&plans);
            let all = files.iter().enumerate().flat_map(|(file, sizes)| {
                (0..sizes.len() as u64).map(move |document| (file, document))
            });
            prop_assert_eq!(found.keys().copied().collect::<Vec<_>>(), all.collect::<Vec<_>>());
            prop_assert!(found.values().all(|shards| shards.len() == 1));
            // In order, so that pairs can be joined.
            prop_assert!(found.values().is_sorted());
            for file in 0..files.len() {
                prop_assert_eq!(counting.get(&file), Some(&1), "file {}", file);
            }
        }

        #[test]
        fn shards_are_as_equal_as_documents_allow(
            sizes in prop::collection::vec(1u64..50, 1..200),
            shards in 1usize..10,
        ) {
            let counts = counted(std::slice::from_ref(&sizes));
            let plan = plan(1, Some(&counts), Shards::Equal(shards), None);
            let total: u64 = sizes.iter().sum();
            let largest = sizes.iter().max().unwrap();
            for range in plan.work.iter().flat_map(|work| &work.ranges) {
                let documents = range.documents.start as usize..range.documents.end as usize;
                let bytes: u64 = sizes[documents].iter().sum();
                prop_assert!(bytes <= total / shards as u64 + 1 + largest);
            }
        }
    }

    #[test]
    fn a_limit_ends_the_last_file() {
        let mut counts = counted(&[vec![10, 10], vec![10, 10], vec![]]);
        counts[1].is_cut = true;
        counts[2].is_cut = true;
        let plan = plan(3, Some(&counts), Shards::One, None);
        let stops: Vec<(usize, u64)> = plan
            .work
            .iter()
            .map(|work| (work.file, work.stop))
            .collect();
        assert_eq!(stops, [(0, u64::MAX), (1, 2)]);
    }

    #[test]
    fn every_part_has_a_shard() {
        let part = Some(Part { index: 0, of: 4 });
        assert!(check_part(1, Shards::One, part).is_ok());
        assert!(check_part(1, Shards::Equal(4), part).is_ok());
        assert!(check_part(4, Shards::PerInput, part).is_ok());
        let refused = |shards| check_part(3, shards, part).unwrap_err().to_string();
        assert!(refused(Shards::Equal(3)).contains("only 3 shards"));
        assert!(refused(Shards::PerInput).contains("only 3 input files"));
    }

    #[test]
    fn parts_are_read_as_they_are_written() {
        assert_eq!("1/3".parse::<Part>().unwrap().to_string(), "1/3");
        for wrong in ["3/3", "1", "a/b", "-1/2", "0/0", "0/1000000"] {
            assert!(wrong.parse::<Part>().is_err(), "{wrong}");
        }
    }
}
