//! Assignment of writers: a tensor that several ranks hold is written once, in even shares.

use std::cmp::Reverse;

/// Returns the rank that writes each tensor, given as its bytes and the ranks that hold it.
///
/// The largest tensors come first, each assigned to the holder with the least to write so far.
/// Every rank computes the same answer.
///
/// # Panics
/// If a tensor has no holder.
pub fn assign_owners(tensors: &[(u64, Vec<usize>)], num_ranks: usize) -> Vec<usize> {
    let mut load = vec![0u64; num_ranks];
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| (Reverse(tensors[index].0), index));
    let mut owners = vec![0; tensors.len()];
    for index in order {
        let (bytes, holders) = &tensors[index];
        let owner = *holders
            .iter()
            .min_by_key(|&&rank| (load[rank], rank))
            .expect("every tensor is held by a rank");
        owners[index] = owner;
        load[owner] += bytes;
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn owners_hold_what_they_write_and_loads_are_even(
            sizes in prop::collection::vec(1u64..1000, 1..60),
            num_ranks in 1usize..9,
        ) {
            let everywhere: Vec<(u64, Vec<usize>)> = sizes
                .iter()
                .map(|&size| (size, (0..num_ranks).collect()))
                .collect();
            let owners = assign_owners(&everywhere, num_ranks);
            let mut load = vec![0u64; num_ranks];
            for (owner, size) in owners.iter().zip(&sizes) {
                load[*owner] += size;
            }
            // A greedy assignment exceeds the mean by at most the largest tensor.
            let mean = sizes.iter().sum::<u64>() / num_ranks as u64;
            let limit = mean + sizes.iter().max().unwrap();
            prop_assert!(load.iter().all(|&bytes| bytes <= limit));
            let alone: Vec<(u64, Vec<usize>)> = sizes
                .iter()
                .map(|&size| (size, vec![size as usize % num_ranks]))
                .collect();
            let owners = assign_owners(&alone, num_ranks);
            for (owner, (_, holders)) in owners.iter().zip(&alone) {
                prop_assert_eq!(*owner, holders[0]);
            }
        }
    }
}
