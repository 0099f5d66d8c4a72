//! Which rank holds which expert, from how busy experts have been: the alternative to lending them in every step.
//!
//! Every owner holds as many experts. Experts of the most loaded owner change places with others' while that makes loads more
//! even, so that few move (Pangu Ultra MoE, arXiv 2505.04519, device-level load balancing).

/// For each of `physical_slots` (of an expert; the first owner holds the first ones) a better one, from the experts' `loads` and
/// the number of `owners`; None where the most loaded owner's load would not fall by the share `min_gain` of it.
pub fn rebalance_experts(
    loads: &[f64],
    physical_slots: &[i64],
    owners: usize,
    min_gain: f64,
) -> Option<Vec<i64>> {
    let experts = loads.len();
    let local = experts / owners;
    let mut physical_slots = physical_slots.to_vec();
    let owner = |physical_slot: i64| physical_slot as usize / local;
    let mut owner_loads = vec![0.0; owners];
    physical_slots
        .iter()
        .zip(loads)
        .for_each(|(&physical_slot, load)| owner_loads[owner(physical_slot)] += load);
    let before = largest(&owner_loads);
    // Each exchange makes the sum of squares smaller; there are seldom more than a few for each owner.
    for _ in 0..4 * experts {
        let most_loaded = (0..owners)
            .max_by(|&a, &b| owner_loads[a].total_cmp(&owner_loads[b]).then(b.cmp(&a)))?;
        let on_most_loaded =
            (0..experts).filter(|&expert| owner(physical_slots[expert]) == most_loaded);
        let mut best: Option<(f64, usize, usize)> = None;
        for expert in on_most_loaded {
            for other in (0..experts).filter(|&other| owner(physical_slots[other]) != most_loaded) {
                let less = loads[expert] - loads[other];
                let room = owner_loads[most_loaded] - owner_loads[owner(physical_slots[other])];
                // What the sum of squares falls by, halved.
                let gain = less * (room - less);
                if gain > 1e-9 * before * before && best.is_none_or(|(most, _, _)| gain > most) {
                    best = Some((gain, expert, other));
                }
            }
        }
        let Some((_, expert, other)) = best else {
            break;
        };
        let less = loads[expert] - loads[other];
        owner_loads[most_loaded] -= less;
        owner_loads[owner(physical_slots[other])] += less;
        physical_slots.swap(expert, other);
    }
    (before > 0.0
        && largest(&owner_loads) < before
        && largest(&owner_loads) <= before * (1.0 - min_gain))
        .then_some(physical_slots)
}

fn largest(loads: &[f64]) -> f64 {
    loads.iter().copied().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn owner_loads(loads: &[f64], physical_slots: &[i64], owners: usize) -> Vec<f64> {
        let mut sums = vec![0.0; owners];
        let local = loads.len() / owners;
        physical_slots
            .iter()
            .zip(loads)
            .for_each(|(&physical_slot, load)| sums[physical_slot as usize / local] += load);
        sums
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn experts_are_swapped_and_the_most_loaded_owner_gets_less(
            owners in 1usize..9, local in 1usize..9, drawn in prop::collection::vec(0.0f64..100.0, 64), min_gain in 0.0f64..0.5,
        ) {
            let loads = &drawn[..owners * local];
            let start: Vec<i64> = (0..loads.len() as i64).rev().collect();
            let before = largest(&owner_loads(loads, &start, owners));
            if let Some(physical_slots) = rebalance_experts(loads, &start, owners, min_gain) {
                let mut sorted = physical_slots.clone();
                sorted.sort_unstable();
                prop_assert_eq!(sorted, (0..loads.len() as i64).collect::<Vec<_>>());
                let after = largest(&owner_loads(loads, &physical_slots, owners));
                prop_assert!(after < before && after <= before * (1.0 - min_gain) + 1e-9);
                prop_assert_eq!(rebalance_experts(loads, &physical_slots, owners, 0.01), None, "then they stay");
            }
        }
    }

    #[test]
    fn two_hot_experts_of_one_owner_are_parted_and_no_others_move() {
        let loads = [10.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        let physical_slots = rebalance_experts(&loads, &[0, 1, 2, 3, 4, 5, 6, 7], 4, 0.05).unwrap();
        assert_eq!(
            physical_slots
                .iter()
                .enumerate()
                .filter(|&(expert, &at)| expert as i64 != at)
                .count(),
            2
        );
        assert_ne!(physical_slots[0] / 2, physical_slots[1] / 2);
        assert_eq!(
            rebalance_experts(&[1.0; 8], &[0, 1, 2, 3, 4, 5, 6, 7], 4, 0.0),
            None,
            "even loads move nothing"
        );
        assert_eq!(
            rebalance_experts(&[0.0; 8], &[0, 1, 2, 3, 4, 5, 6, 7], 4, 0.0),
            None
        );
    }
}
