//! Assignment of parameters to gradient buckets.

use std::cmp::Reverse;

/// The parameters of one gradient bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketPlan {
    /// Index of the group of ranks that hold the same parameters.
    pub group: usize,
    /// Indices of the parameters, in the order of the buffer.
    pub members: Vec<usize>,
    /// Total number of elements.
    pub len: usize,
}

/// Packs parameters, given as (elements, group), into buckets from the last to the first.
///
/// A bucket holds parameters of one group and at most `capacity` elements, unless a single
/// parameter is larger. Buckets are in the order in which backward completes them.
pub fn plan_buckets(parameters: &[(usize, usize)], capacity: usize) -> Vec<BucketPlan> {
    let mut done: Vec<BucketPlan> = Vec::new();
    let mut open: Vec<BucketPlan> = Vec::new();
    for (index, &(len, group)) in parameters.iter().enumerate().rev() {
        if let Some(position) = open.iter().position(|bucket| bucket.group == group) {
            let bucket = &mut open[position];
            if bucket.len + len <= capacity {
                bucket.members.push(index);
                bucket.len += len;
                continue;
            }
            done.push(open.remove(position));
        }
        open.push(BucketPlan {
            group,
            members: vec![index],
            len,
        });
    }
    done.extend(open);
    // Backward reaches the parameter with the lowest index last.
    done.sort_by_key(|bucket| Reverse(bucket.members.iter().min().copied()));
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn every_parameter_is_in_one_bucket_of_its_group(
            parameters in prop::collection::vec((1usize..200, 0usize..3), 0..60),
            capacity in 1usize..500,
        ) {
            let plan = plan_buckets(&parameters, capacity);
            let mut count = vec![0; parameters.len()];
            for bucket in &plan {
                let lengths = bucket
                    .members
                    .iter()
                    .map(|&member| parameters[member].0);
                prop_assert_eq!(bucket.len, lengths.sum::<usize>());
                prop_assert!(bucket.len <= capacity || bucket.members.len() == 1);
                for &member in &bucket.members {
                    count[member] += 1;
                    prop_assert_eq!(parameters[member].1, bucket.group);
                }
            }
            prop_assert!(count.iter().all(|&n| n == 1));
            let first = |bucket: &BucketPlan| *bucket.members.iter().min().unwrap();
            let complete: Vec<_> = plan.iter().map(first).collect();
            prop_assert!(complete.is_sorted_by(|a, b| a > b));
        }
    }
}
