//! Who writes what: tensors that several ranks hold are written once, and the work is spread evenly.

/// For each tensor, given as (bytes, ranks that hold it), the rank that writes it: the largest first, each to the
/// holder with the least to write so far. The same answer on every rank.
///
/// # Panics
/// When a tensor has no holder.
pub fn assign_owners(tensors: &[(u64, Vec<usize>)], num_ranks: usize) -> Vec<usize> {
    let mut load = vec![0u64; num_ranks];
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(tensors[index].0), index));
    let mut owners = vec![0; tensors.len()];
    for index in order {
        let (bytes, holders) = &tensors[index];
        let owner = holders
            .iter()
            .copied()
            .min_by_key(|&rank| (load[rank], rank));
        owners[index] = owner.expect("every tensor is held by a rank");
        load[owners[index]] += bytes;
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
            let everywhere: Vec<_> = sizes.iter().map(|&size| (size, (0..num_ranks).collect())).collect();
            let owners = assign_owners(&everywhere, num_ranks);
            let mut load = vec![0u64; num_ranks];
            for (owner, size) in owners.iter().zip(&sizes) {
                load[*owner] += size;
            }
            // Greedy: no rank exceeds the mean by more than the largest tensor.
            let mean = sizes.iter().sum::<u64>() / num_ranks as u64;
            prop_assert!(load.iter().all(|&l| l <= mean + sizes.iter().max().unwrap()));
            let alone: Vec<_> = sizes.iter().map(|&size| (size, vec![size as usize % num_ranks])).collect();
            for (owner, (_, holders)) in assign_owners(&alone, num_ranks).iter().zip(&alone) {
                prop_assert_eq!(*owner, holders[0]);
            }
        }
    }
}
