//! The plan by which ranks transform whole matrices: which rank owns each matrix, and which parts
//! of it are exchanged.
//!
//! Ranks hold parts of a matrix: columns or rows by tensor parallelism, rows by ZeRO, and copies of
//! either. One rank gathers the parts, transforms the matrix once, and scatters the result. The
//! plan is a pure function of the parts, so all ranks have the same.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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
    /// From the owned matrices to the ranks' tensors, one after the other.
    pub(crate) scatters: Vec<Transfer>,
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
/// round, or one matrix. It sends up to as many in a transfer of results, and receives up to as
/// many, or one part.
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
    let mut planner = Planner {
        own,
        most_elements,
        rounds: Vec::new(),
        scattered: Vec::new(),
        gathered: vec![0; ranks],
    };
    let mut filled = vec![RoundFill::default(); ranks];
    for (matrix, owner) in matrices().zip(owners) {
        let number = filled[owner].next(matrix.rows * matrix.columns, round_elements);
        planner.add_matrix(number, &matrix, owner);
    }
    planner.rounds
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

/// Elements that each rank sends and receives in a transfer.
#[derive(Debug, Default)]
struct TransferFill {
    sent: HashMap<usize, i64>,
    received: HashMap<usize, i64>,
}

impl TransferFill {
    /// Adds elements unless a rank would then send or receive more than `most` and several parts.
    fn add(&mut self, from: usize, to: usize, elements: i64, most: i64) -> bool {
        let sent = self.sent.entry(from).or_default();
        let received = self.received.entry(to).or_default();
        let fits = |filled: i64| filled == 0 || filled + elements <= most;
        let is_added = fits(*sent) && fits(*received);
        if is_added {
            *sent += elements;
            *received += elements;
        }
        is_added
    }
}

/// The rounds of a rank, and what all ranks send in them.
struct Planner {
    own: usize,
    most_elements: i64,
    rounds: Vec<Round>,
    /// Elements in each transfer of results, by round.
    scattered: Vec<Vec<TransferFill>>,
    /// Elements that each rank sends to owners.
    gathered: Vec<i64>,
}

impl Planner {
    /// Adds the transfers of a matrix that `owner` transforms in round `number`.
    fn add_matrix(&mut self, number: usize, matrix: &SplitMatrix, owner: usize) {
        if self.rounds.len() <= number {
            self.rounds.resize_with(number + 1, Round::default);
            self.scattered.resize_with(number + 1, Vec::new);
        }
        let round = &mut self.rounds[number];
        let tensor = round.owned.len();
        if owner == self.own {
            round.owned.push([matrix.rows, matrix.columns]);
        }
        let of_owner = |part: &Part| OnRank {
            rank: owner,
            place: Place {
                tensor,
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
            let cheapest =
                |part: &&&Part| (part.rank != owner, self.gathered[part.rank], part.rank);
            if let Some(part) = copies.iter().min_by_key(cheapest) {
                if part.rank != owner {
                    self.gathered[part.rank] += part.of_matrix.elements();
                }
                round.gather.add(self.own, of_holder(part), of_owner(part));
            }
        }
        let fills = &mut self.scattered[number];
        for part in &matrix.parts {
            let transfer = if part.rank == owner {
                0
            } else {
                first_fit(fills, owner, part, self.most_elements)
            };
            if round.scatters.len() <= transfer {
                round.scatters.resize_with(transfer + 1, Transfer::default);
            }
            round.scatters[transfer].add(self.own, of_owner(part), of_holder(part));
        }
    }
}

/// Returns the first transfer with room for a part that `owner` sends, and adds it there.
fn first_fit(fills: &mut Vec<TransferFill>, owner: usize, part: &Part, most: i64) -> usize {
    let elements = part.of_matrix.elements();
    let mut fits = |fill: &mut TransferFill| fill.add(owner, part.rank, elements, most);
    if let Some(transfer) = fills.iter_mut().position(&mut fits) {
        return transfer;
    }
    let mut fill = TransferFill::default();
    fits(&mut fill);
    fills.push(fill);
    fills.len() - 1
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

        #[test]
        fn transfers_are_bounded_and_the_ranks_agree(
            (ranks, matrices) in held(),
            block in 1usize..5,
            replicated: bool,
            most_elements in prop::sample::select(vec![1i64, 30, 200, 1 << 20]),
        ) {
            let split = || matrices.iter().enumerate().map(|(tensor, &(rows, at))| {
                let first = if at == ranks { 0 } else { at / block * block };
                let last = if at == ranks { ranks } else { (first + block).min(ranks) };
                split_matrix(tensor, i64::from(rows), first..last, replicated)
            });
            let plans: Vec<Vec<Round>> = (0..ranks)
                .map(|own| plan(split, own, ranks, most_elements))
                .collect();
            let count = |places: &[Place]| places.iter().map(|p| p.at.elements()).sum::<i64>();
            for (number, round) in plans[0].iter().enumerate() {
                for scatter in 0..round.scatters.len() {
                    let of_rank = |rank: usize| &plans[rank][number].scatters[scatter];
                    for rank in 0..ranks {
                        let Transfer { sends, receives, .. } = of_rank(rank);
                        for places in [sends, receives] {
                            let elements: i64 = places.values().map(|p| count(p)).sum();
                            let parts: usize = places.values().map(Vec::len).sum();
                            prop_assert!(elements <= most_elements || parts == 1);
                        }
                        for (&to, places) in sends {
                            prop_assert_eq!(count(places), count(&of_rank(to).receives[&rank]));
                        }
                    }
                }
            }
            for plan in &plans {
                prop_assert_eq!(plan.len(), plans[0].len());
                let transfers = |plan: &[Round]| -> Vec<usize> {
                    plan.iter().map(|round| round.scatters.len()).collect()
                };
                prop_assert_eq!(transfers(plan), transfers(&plans[0]));
            }
        }
    }

    /// Returns a matrix of which each of `holders` holds some rows, or all of them.
    fn split_matrix(
        tensor: usize,
        rows: i64,
        holders: std::ops::Range<usize>,
        replicated: bool,
    ) -> SplitMatrix {
        let count = holders.len() as i64;
        let part = |rank: usize| {
            let number = (rank - holders.start) as i64;
            let rows = if replicated {
                0..rows
            } else {
                number * rows / count..(number + 1) * rows / count
            };
            let at = |rows| Rectangle {
                rows,
                columns: 0..3,
            };
            Part {
                rank,
                of_tensor: at(0..rows.end - rows.start),
                of_matrix: at(rows),
            }
        };
        let has_rows = |part: &Part| part.of_matrix.elements() > 0;
        SplitMatrix {
            tensor,
            rows,
            columns: 3,
            cost: rows as f64,
            parts: holders.clone().map(part).filter(has_rows).collect(),
        }
    }
}
