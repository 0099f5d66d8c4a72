//! The plan by which ranks transform whole matrices: which rank owns each matrix, and which parts
//! of it are exchanged.
//!
//! Ranks hold parts of a matrix: columns or rows by tensor parallelism, rows by ZeRO, and copies of
//! either. One rank gathers the parts, transforms the matrix once, and scatters the result. The
//! plan is a pure function of the parts, so all ranks have the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// A rectangle of a matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rectangle {
    pub(crate) rows: Range<i64>,
    pub(crate) columns: Range<i64>,
}

impl Rectangle {
    pub(crate) fn elements(&self) -> i64 {
        (self.rows.end - self.rows.start) * (self.columns.end - self.columns.start)
    }
}

/// A part of a matrix on a rank.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) rank: usize,
    /// The part, within the matrix.
    pub(crate) of_matrix: Rectangle,
    /// The part, within the rank's tensor.
    pub(crate) of_tensor: Rectangle,
}

/// A matrix whose parts several ranks hold.
#[derive(Debug, Clone)]
pub(crate) struct SplitMatrix {
    /// Index of the tensor that the matrix belongs to, on every rank.
    pub(crate) tensor: usize,
    pub(crate) rows: i64,
    pub(crate) columns: i64,
    /// Cost of the transformation.
    pub(crate) cost: f64,
    /// Parts that are equal, or have no element in common.
    pub(crate) parts: Vec<Part>,
}

/// A rectangle of one of several tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) tensor: usize,
    pub(crate) at: Rectangle,
}

/// A place in the tensors of a rank.
struct OnRank {
    rank: usize,
    place: Place,
}

/// Rectangles that are copied between two lists of tensors.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Transfer {
    /// Rectangles for each receiver, in its order.
    pub(crate) sends: BTreeMap<usize, Vec<Place>>,
    /// Rectangles from each sender, in its order.
    pub(crate) receives: BTreeMap<usize, Vec<Place>>,
    /// Rectangles that stay on the rank: source and target.
    pub(crate) kept: Vec<[Place; 2]>,
}

impl Transfer {
    /// Adds a rectangle that goes from one rank to another, as rank `own` sees it.
    fn add(&mut self, own: usize, from: OnRank, to: OnRank) {
        if from.rank == own && to.rank == own {
            self.kept.push([from.place, to.place]);
        } else if from.rank == own {
            self.sends.entry(to.rank).or_default().push(from.place);
        } else if to.rank == own {
            self.receives.entry(from.rank).or_default().push(to.place);
        }
    }
}

/// Matrices that ranks transform while those of the next round arrive.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Round {
    /// Rows and columns of the matrices that this rank owns.
    pub(crate) owned: Vec<[i64; 2]>,
    /// From the ranks' tensors to the owned matrices.
    pub(crate) gather: Transfer,
    /// From the owned matrices to the ranks' tensors.
    pub(crate) scatter: Transfer,
}

/// Assigns each matrix to one of the ranks that hold it, so that costs are balanced.
///
/// Matrices with few holders come first, then expensive ones; each goes to its holder with the
/// lowest cost so far.
pub(crate) fn owners(costs: &[f64], holders: &[Vec<usize>], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| {
        let fewer = holders[a].len().cmp(&holders[b].len());
        fewer.then(costs[b].total_cmp(&costs[a]))
    });
    let mut loads = vec![0.0; ranks];
    let mut owners = vec![0; costs.len()];
    for matrix in order {
        let lowest = |a: &&usize, b: &&usize| f64::total_cmp(&loads[**a], &loads[**b]);
        if let Some(&owner) = holders[matrix].iter().min_by(lowest) {
            loads[owner] += costs[matrix];
            owners[matrix] = owner;
        }
    }
    owners
}

/// Rounds in which a rank transforms its matrices if none is large, so that transfers overlap with
/// transformations.
pub(crate) const ROUNDS: i64 = 4;

/// Plans the rounds of rank `own` of `ranks`. A rank transforms up to `most_elements` elements in a
/// round, or one matrix.
///
/// `matrices` returns the matrices of the stage, in the same order on each call and each rank. It
/// is called twice, because all parts together may take much memory.
pub(crate) fn plan<I: Iterator<Item = SplitMatrix>>(
    matrices: impl Fn() -> I,
    own: usize,
    ranks: usize,
    most_elements: i64,
) -> Vec<Round> {
    let mut costs = Vec::new();
    let mut holders = Vec::new();
    let mut elements = 0;
    for matrix in matrices() {
        elements += matrix.rows * matrix.columns;
        costs.push(matrix.cost);
        let of_matrix: BTreeSet<usize> = matrix.parts.iter().map(|part| part.rank).collect();
        holders.push(Vec::from_iter(of_matrix));
    }
    let owners = owners(&costs, &holders, ranks);
    let round_elements = most_elements.min(elements / (ranks as i64 * ROUNDS));
    let mut rounds: Vec<Round> = Vec::new();
    let mut filled = vec![RoundFill::default(); ranks];
    let mut sent = vec![0; ranks];
    for (matrix, owner) in matrices().zip(owners) {
        let number = filled[owner].next(matrix.rows * matrix.columns, round_elements);
        if rounds.len() <= number {
            rounds.resize_with(number + 1, Round::default);
        }
        add_matrix(&mut rounds[number], &matrix, owner, own, &mut sent);
    }
    rounds
}

/// The round of the next matrix of an owner.
#[derive(Debug, Clone, Default)]
struct RoundFill {
    round: usize,
    elements: i64,
}

impl RoundFill {
    fn next(&mut self, elements: i64, round_elements: i64) -> usize {
        if self.elements > 0 && self.elements + elements > round_elements {
            self.round += 1;
            self.elements = 0;
        }
        self.elements += elements;
        self.round
    }
}

/// Adds the transfers of a matrix that `owner` transforms. `sent` are the elements that each rank
/// sends to owners.
fn add_matrix(round: &mut Round, matrix: &SplitMatrix, owner: usize, own: usize, sent: &mut [i64]) {
    let number = round.owned.len();
    if owner == own {
        round.owned.push([matrix.rows, matrix.columns]);
    }
    let of_owner = |part: &Part| OnRank {
        rank: owner,
        place: Place {
            tensor: number,
            at: part.of_matrix.clone(),
        },
    };
    let of_holder = |part: &Part| OnRank {
        rank: part.rank,
        place: Place {
            tensor: matrix.tensor,
            at: part.of_tensor.clone(),
        },
    };
    let mut copies: BTreeMap<[i64; 2], Vec<&Part>> = BTreeMap::new();
    for part in &matrix.parts {
        let Rectangle { rows, columns } = &part.of_matrix;
        let first = [rows.start, columns.start];
        copies.entry(first).or_default().push(part);
    }
    for copies in copies.into_values() {
        let cheapest = |part: &&&Part| (part.rank != owner, sent[part.rank], part.rank);
        if let Some(part) = copies.iter().min_by_key(cheapest) {
            if part.rank != owner {
                sent[part.rank] += part.of_matrix.elements();
            }
            round.gather.add(own, of_holder(part), of_owner(part));
        }
    }
    for part in &matrix.parts {
        round.scatter.add(own, of_owner(part), of_holder(part));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Costs of matrices and the ranks that hold each: one block of equally many neighbors, or all.
    fn held() -> impl Strategy<Value = (usize, Vec<(u32, usize)>)> {
        (1usize..13, 0usize..40).prop_flat_map(|(ranks, count)| {
            let matrix = (1u32..100, 0usize..ranks + 1);
            (Just(ranks), prop::collection::vec(matrix, count))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn costs_are_balanced_among_holders((ranks, matrices) in held(), block in 1usize..5) {
            let costs: Vec<f64> = matrices.iter().map(|(cost, _)| f64::from(*cost)).collect();
            let holders_of = |&(_, at): &(u32, usize)| {
                if at == ranks {
                    return (0..ranks).collect();
                }
                let start = at / block * block;
                (start..(start + block).min(ranks)).collect()
            };
            let holders: Vec<Vec<usize>> = matrices.iter().map(holders_of).collect();
            let owners = owners(&costs, &holders, ranks);
            let mut loads = vec![0.0; ranks];
            for (matrix, &owner) in owners.iter().enumerate() {
                prop_assert!(holders[matrix].contains(&owner));
                loads[owner] += costs[matrix];
            }
            // Without one of its matrices, a rank has no more than any holder of that matrix.
            for rank in 0..ranks {
                let mut own = (0..costs.len()).filter(|&matrix| owners[matrix] == rank).peekable();
                let is_even = |matrix: usize| {
                    let others = holders[matrix].iter();
                    let least = others.map(|&other| loads[other]).fold(f64::INFINITY, f64::min);
                    loads[rank] - costs[matrix] <= least
                };
                prop_assert!(own.peek().is_none() || own.any(is_even), "{loads:?}");
            }
        }
    }
}
