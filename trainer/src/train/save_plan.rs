//! The share of each rank in saving the state: every element once, in even shares.
//!
//! The ranks that hold the same slices follow from mesh and configuration, and hold them in the
//! same order. Each computes the shares of all of them and takes its own, so the ranks exchange
//! nothing. [`Coverage`] proves that the shares add up: its size is the same for any number of
//! ranks.

use checkpoint::TensorSlice;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

/// Returns the rank that saves each slice.
///
/// Each slice comes with its bytes and the set of ranks that hold it, which `holders` lists. All of
/// them hold the set's slices in the same order, and list its ranks in the same order. The largest
/// slices come first, each assigned to the rank of its set with the least to save so far.
pub(crate) fn savers<Set>(slices: &[(Set, u64)], holders: impl Fn(Set) -> Vec<usize>) -> Vec<usize>
where
    Set: Ord + Copy,
{
    let mut sets: BTreeMap<Set, Vec<usize>> = BTreeMap::new();
    for (index, (set, _)) in slices.iter().enumerate() {
        sets.entry(*set).or_default().push(index);
    }
    let mut savers = vec![0; slices.len()];
    for (set, mut members) in sets {
        let ranks = holders(set);
        members.sort_by_key(|&index| Reverse(slices[index].1));
        let mut least: BinaryHeap<Reverse<(u64, usize)>> = (0..ranks.len())
            .map(|position| Reverse((0, position)))
            .collect();
        for index in members {
            if let Some(mut least) = least.peek_mut() {
                let Reverse((bytes, position)) = &mut *least;
                *bytes += slices[index].1;
                savers[index] = ranks[*position];
            }
        }
    }
    savers
}

/// A Mersenne prime, so that a product of two residues fits into 128 bits.
const PRIME: u64 = (1 << 61) - 1;

/// Bits of the lower half of a residue. Sums of halves over four million ranks are exact in fp64.
const HALF_BITS: u32 = 31;

/// Which elements a set of slices has, as two numbers: how many, and a sum over them in which each
/// element of each tensor has a weight of its own.
///
/// The weight of element (i, j) of a tensor is `h a^i b^j` modulo a prime, with residues `h`, `a`
/// and `b` that are hashes of the tensor's name. As a polynomial in these, the difference of two
/// sets is zero only if they are equal, and of other differences about one in 2^40 is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Coverage {
    elements: u64,
    digest: u64,
}

impl Coverage {
    /// Numbers in which a coverage is summed over ranks.
    pub(crate) const NUMBERS: usize = 3;

    /// Returns the coverage of disjoint slices.
    pub(crate) fn of<'a>(slices: impl IntoIterator<Item = &'a TensorSlice>) -> Coverage {
        let mut coverage = Coverage::default();
        for slice in slices {
            coverage.add(slice);
        }
        coverage
    }

    /// Adds the elements of a slice.
    fn add(&mut self, slice: &TensorSlice) {
        let TensorSlice {
            name,
            offset,
            shape,
            ..
        } = slice;
        let seed = hash(name);
        let mut weights = residue(seed);
        for (dim, (&start, &len)) in offset.iter().zip(shape).enumerate() {
            // The sum of a geometric series, but for a constant divisor.
            let base = residue(seed ^ mix(dim as u64 + 1));
            let first = power(base, start as u64);
            let after = power(base, (start + len) as u64);
            weights = times(weights, (after + PRIME - first) % PRIME);
        }
        self.elements += shape.iter().product::<i64>() as u64;
        self.digest = (self.digest + weights) % PRIME;
    }

    /// Returns numbers whose sums over ranks [`Coverage::from_sums`] takes.
    pub(crate) fn to_numbers(self) -> [f64; Coverage::NUMBERS] {
        let high = self.digest >> HALF_BITS;
        let low = self.digest & ((1 << HALF_BITS) - 1);
        [self.elements as f64, high as f64, low as f64]
    }

    /// Returns the coverage of all ranks' slices together.
    ///
    /// # Panics
    /// If there are not [`Coverage::NUMBERS`] sums.
    pub(crate) fn from_sums(sums: &[f64]) -> Coverage {
        let sums: [f64; Coverage::NUMBERS] = sums.try_into().expect("as many as numbers");
        let [elements, high, low] = sums.map(|sum| sum as u64);
        let digest = (u128::from(high) << HALF_BITS) + u128::from(low);
        Coverage {
            elements,
            digest: (digest % u128::from(PRIME)) as u64,
        }
    }

    /// Compares the coverage of what all ranks save with that of the whole state.
    ///
    /// # Errors
    /// The difference, if there is one.
    pub(crate) fn check(self, expected: Coverage) -> Result<(), String> {
        if self == expected {
            return Ok(());
        }
        let numbers = if self.elements == expected.elements {
            "some values twice and others not at all".to_string()
        } else {
            format!("{} values of {}", self.elements, expected.elements)
        };
        Err(format!(
            "the ranks would save {numbers}, so nothing is saved; this is an error in moerun, \
             please report it with the configuration"
        ))
    }
}

impl std::ops::Add for Coverage {
    type Output = Coverage;

    fn add(self, other: Coverage) -> Coverage {
        Coverage {
            elements: self.elements + other.elements,
            digest: (self.digest + other.digest) % PRIME,
        }
    }
}

/// Returns the FNV-1a hash of a name, mixed.
fn hash(name: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    mix(name.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// Mixes all bits of a number (the finalizer of SplitMix64).
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// Returns a residue other than 0 and 1, which have no different powers.
fn residue(seed: u64) -> u64 {
    2 + mix(seed) % (PRIME - 2)
}

fn times(one: u64, other: u64) -> u64 {
    (u128::from(one) * u128::from(other) % u128::from(PRIME)) as u64
}

fn power(base: u64, mut exponent: u64) -> u64 {
    let mut square = base;
    let mut result = 1;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = times(result, square);
        }
        square = times(square, square);
        exponent >>= 1;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::ParallelConfig,
        model::{
            replicas::Replicas,
            slices::{slice, slices_of_rows},
        },
        replica_ranks::replica_ranks,
    };
    use parallel::{Mesh, MeshShape, own_rows};
    use proptest::prelude::*;

    fn shapes() -> impl Strategy<Value = MeshShape> {
        let sizes = (1usize..5, 1usize..4, 1usize..4, 1usize..3);
        let pick = any::<prop::sample::Index>();
        (sizes, pick).prop_map(|((data, tensor, pipeline, context), pick)| {
            let stage = data * tensor * context;
            let pairs = (1..=stage).flat_map(|expert| (1..=stage).map(move |part| (expert, part)));
            let fits = |&(expert, part): &(usize, usize)| stage.is_multiple_of(expert * part);
            let fitting: Vec<_> = pairs.filter(fits).collect();
            let (expert, expert_tensor) = fitting[pick.index(fitting.len())];
            MeshShape {
                data,
                tensor,
                pipeline,
                context,
                expert,
                expert_tensor,
            }
        })
    }

    /// A layout and sizes of a made-up model.
    #[derive(Debug, Clone)]
    struct Run {
        shape: MeshShape,
        parallel: ParallelConfig,
        is_tied: bool,
        /// Rows of a matrix on each rank that splits it.
        rows: i64,
        /// The expert in each physical slot, two slots for each owner.
        expert_of_slot: Vec<usize>,
    }

    fn runs() -> impl Strategy<Value = Run> {
        let zero = (0u8..4, any::<prop::sample::Index>());
        (shapes(), zero, any::<bool>(), 1i64..5, any::<u64>()).prop_map(
            |(shape, (zero, pick), is_tied, rows, seed)| {
                let replicas = shape.data * shape.context;
                let sizes = (1..=replicas).filter(|size| replicas.is_multiple_of(*size));
                let sizes: Vec<usize> = sizes.collect();
                let parallel = ParallelConfig {
                    zero,
                    zero_group_size: (zero > 0).then(|| sizes[pick.index(sizes.len())]),
                    ..ParallelConfig::default()
                };
                let mut expert_of_slot: Vec<usize> = (0..2 * shape.expert).collect();
                // Experts that have moved.
                expert_of_slot.sort_by_key(|&expert| mix(seed ^ expert as u64));
                Run {
                    shape,
                    parallel,
                    is_tied,
                    rows,
                    expert_of_slot,
                }
            },
        )
    }

    impl Run {
        fn num_ranks(&self) -> usize {
            self.shape.data * self.shape.context * self.shape.tensor * self.shape.pipeline
        }

        fn tied_ranks(&self) -> Vec<usize> {
            let last = self.shape.pipeline - 1;
            if self.is_tied && last > 0 {
                vec![0, last]
            } else {
                Vec::new()
            }
        }

        /// Returns the whole tensors of the model.
        fn tensors(&self) -> Vec<TensorSlice> {
            let MeshShape {
                tensor,
                pipeline,
                expert_tensor,
                ..
            } = self.shape;
            let split = self.rows * tensor as i64;
            let columns = 2 * expert_tensor as i64;
            let mut tensors = vec![TensorSlice::whole("embedding", &[split, 3])];
            for stage in 0..pipeline {
                tensors.push(TensorSlice::whole(format!("{stage}.norm"), &[7]));
                tensors.push(TensorSlice::whole(format!("{stage}.query"), &[split, 2]));
                tensors.push(TensorSlice::whole(format!("{stage}.output"), &[5, split]));
                for expert in &self.expert_of_slot {
                    let name = format!("{stage}.expert.{expert}");
                    tensors.push(TensorSlice::whole(name, &[4, columns]));
                }
            }
            tensors
        }

        /// Returns the parameters of a rank: the slices of its rows, and the ranks that hold them.
        fn parameters(&self, mesh: &Mesh) -> Vec<(Vec<TensorSlice>, Replicas)> {
            let at = mesh.coordinates();
            let split = self.rows * self.shape.tensor as i64;
            let part = self.rows * at.tensor as i64..self.rows * (at.tensor as i64 + 1);
            let stage = at.pipeline;
            let is_tied = self.tied_ranks().contains(&stage);
            let mut parameters = Vec::new();
            if stage == 0 || is_tied {
                let replicas = if is_tied {
                    Replicas::TiedEmbedding
                } else {
                    Replicas::Dense
                };
                let embedding = slice("embedding", &[split, 3], 0, &part);
                parameters.push((vec![embedding], replicas));
            }
            let norm = TensorSlice::whole(format!("{stage}.norm"), &[7]);
            parameters.push((vec![norm], Replicas::Stage));
            let query = slice(&format!("{stage}.query"), &[split, 2], 0, &part);
            parameters.push((vec![query], Replicas::Dense));
            let output = slice(&format!("{stage}.output"), &[5, split], 1, &part);
            parameters.push((vec![output], Replicas::Dense));
            let columns = 2 * at.expert_tensor as i64..2 * at.expert_tensor as i64 + 2;
            let all = 2 * self.shape.expert_tensor as i64;
            let slots = &self.expert_of_slot[2 * at.expert..2 * at.expert + 2];
            let experts = slots.iter().map(|expert| {
                let name = format!("{stage}.expert.{expert}");
                slice(&name, &[4, all], 1, &columns)
            });
            parameters.push((experts.collect(), Replicas::Expert));
            parameters
        }

        /// Returns the slices that a rank holds, each with its set of holders.
        fn held(&self, mesh: &Mesh) -> Vec<(TensorSlice, Replicas)> {
            let mut held = Vec::new();
            for (slices, replicas) in self.parameters(mesh) {
                let rows = slices.iter().map(|slice| slice.shape[0]).sum();
                let shards =
                    replica_ranks(mesh, &self.parallel, &self.tied_ranks(), replicas).shards;
                let position = shards.iter().position(|&rank| rank == mesh.rank()).unwrap();
                let own = own_rows(rows, position, shards.len());
                let slices = slices_of_rows(slices, &own);
                held.extend(slices.into_iter().map(|slice| (slice, replicas)));
            }
            held
        }

        fn holders(&self, mesh: &Mesh, replicas: Replicas) -> Vec<usize> {
            replica_ranks(mesh, &self.parallel, &self.tied_ranks(), replicas).replicas
        }
    }

    /// A whole tensor, and the number of times that each of its elements is saved.
    struct SavedTensor {
        shape: Vec<i64>,
        counts: Vec<u32>,
    }

    /// The ranks that hold a slice, and those that save it.
    #[derive(Default)]
    struct SliceRanks {
        holders: Vec<usize>,
        savers: Vec<usize>,
    }

    fn bytes(slice: &TensorSlice) -> u64 {
        slice.shape.iter().product::<i64>() as u64
    }

    fn owned(run: &Run, mesh: &Mesh) -> Vec<TensorSlice> {
        let held = run.held(mesh);
        let sizes: Vec<(usize, u64)> = held
            .iter()
            .map(|(slice, replicas)| (*replicas as usize, bytes(slice)))
            .collect();
        let savers = savers(&sizes, |set| run.holders(mesh, Replicas::ALL[set]));
        let held = held.into_iter().zip(savers);
        held.filter_map(|((slice, _), saver)| (saver == mesh.rank()).then_some(slice))
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn each_element_is_saved_once_and_replicas_share_evenly(run in runs()) {
            let ranks = run.num_ranks();
            let meshes: Vec<Mesh> = (0..ranks)
                .map(|rank| Mesh::new(run.shape, rank, ranks).unwrap())
                .collect();
            let mut saved_tensors: BTreeMap<String, SavedTensor> = run
                .tensors()
                .into_iter()
                .map(|whole| {
                    let saved = SavedTensor {
                        counts: vec![0; bytes(&whole) as usize],
                        shape: whole.shape,
                    };
                    (whole.name, saved)
                })
                .collect();
            let mut sums = [0.0; Coverage::NUMBERS];
            let mut slices: BTreeMap<TensorSlice, SliceRanks> = BTreeMap::new();
            for mesh in &meshes {
                for (slice, _) in run.held(mesh) {
                    slices
                        .entry(slice)
                        .or_default()
                        .holders
                        .push(mesh.rank());
                }
                let own = owned(&run, mesh);
                let coverage = Coverage::of(&own);
                for slice in own {
                    let SavedTensor { shape, counts } = saved_tensors
                        .get_mut(&slice.name)
                        .unwrap();
                    prop_assert_eq!(&slice.global_shape, &*shape);
                    let columns = shape
                        .get(1)
                        .copied()
                        .unwrap_or(1);
                    let width = slice
                        .shape
                        .get(1)
                        .copied()
                        .unwrap_or(1);
                    let left = slice
                        .offset
                        .get(1)
                        .copied()
                        .unwrap_or(0);
                    let top = slice.offset[0];
                    for row in top..top + slice.shape[0] {
                        for column in left..left + width {
                            let element = row * columns + column;
                            counts[element as usize] += 1;
                        }
                    }
                    slices
                        .get_mut(&slice)
                        .unwrap()
                        .savers
                        .push(mesh.rank());
                }
                for (sum, number) in sums
                    .iter_mut()
                    .zip(coverage.to_numbers())
                {
                    *sum += number;
                }
            }
            for (name, saved) in &saved_tensors {
                let counts = &saved.counts;
                prop_assert!(
                    counts
                        .iter()
                        .all(|&count| count == 1),
                    "{}: {:?}",
                    name,
                    counts
                );
            }
            // The guarantee of a plan that is made of all ranks' slices.
            for (slice, ranks) in &slices {
                let SliceRanks { holders, savers } = ranks;
                prop_assert_eq!(savers.len(), 1, "{:?}", slice);
                prop_assert!(holders.contains(&savers[0]));
            }
            let whole = Coverage::of(&run.tensors());
            prop_assert_eq!(Coverage::from_sums(&sums).check(whole), Ok(()));
            // Among ranks that hold the same, no share exceeds the mean by more than a slice.
            for mesh in &meshes {
                let own = owned(&run, mesh);
                let held = run.held(mesh);
                for replicas in Replicas::ALL {
                    let of_set: Vec<_> = held
                        .iter()
                        .filter(|(_, set)| *set == replicas)
                        .collect();
                    let holders = run.holders(mesh, replicas).len() as u64;
                    let total: u64 = of_set
                        .iter()
                        .map(|(slice, _)| bytes(slice))
                        .sum();
                    let largest = of_set
                        .iter()
                        .map(|(slice, _)| bytes(slice))
                        .max()
                        .unwrap_or(0);
                    let is_own = |slice: &&&(TensorSlice, Replicas)| own.contains(&slice.0);
                    let saved = of_set.iter().filter(is_own);
                    let saved: u64 = saved
                        .map(|(slice, _)| bytes(slice))
                        .sum();
                    prop_assert!(saved <= total / holders + largest);
                }
            }
        }

        #[test]
        fn a_changed_share_is_noticed(
            run in runs(),
            rank in any::<prop::sample::Index>(),
            changed in any::<prop::sample::Index>(),
            other in any::<prop::sample::Index>(),
            way in 0usize..4,
        ) {
            let ranks = run.num_ranks();
            let mesh = Mesh::new(run.shape, rank.index(ranks), ranks).unwrap();
            let mut own = owned(&run, &mesh);
            prop_assume!(!own.is_empty());
            let before = Coverage::of(&own);
            let index = changed.index(own.len());
            match way {
                // Saved twice, not at all, in place of another one, or moved by a row.
                0 => own.push(own[index].clone()),
                1 => drop(own.remove(index)),
                2 => {
                    let other = own[other.index(own.len())].clone();
                    prop_assume!(other != own[index]);
                    own[index] = other;
                }
                _ => own[index].offset[0] += 1,
            }
            let refused = Coverage::of(&own)
                .check(before)
                .unwrap_err();
            prop_assert!(refused.contains("nothing is saved"), "{}", refused);
        }
    }

    #[test]
    fn a_sum_of_ranks_does_not_depend_on_how_elements_are_split() {
        let whole = TensorSlice::whole("w", &[6, 1 << 20]);
        let of_whole = Coverage::of([&whole]);
        let mut of_parts = [0.0; Coverage::NUMBERS];
        for rows in [0..1, 1..6] {
            for columns in [0..77, 77..1 << 20] {
                let mut part = slice("w", &whole.shape, 0, &rows);
                part.offset[1] = columns.start;
                part.shape[1] = columns.end - columns.start;
                let of_part = Coverage::of([&part]);
                for (sum, number) in of_parts.iter_mut().zip(of_part.to_numbers()) {
                    *sum += number;
                }
            }
        }
        assert_eq!(Coverage::from_sums(&of_parts), of_whole);
    }

    #[test]
    fn large_slices_are_assigned_first() {
        let sizes = [1, 5, 3, 4, 2].map(|bytes| (0, bytes));
        // 5, then 4, 3 to the second, 2 to the first, 1 to either.
        assert_eq!(savers(&sizes, |_| vec![7, 9]), [7, 7, 9, 9, 7]);
    }
}
