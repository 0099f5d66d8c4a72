//! Placement of experts by their load over many steps: the alternative to lending in every step.
//!
//! Every owner holds an equal number of experts. Experts of the most loaded owner are swapped with
//! experts of other owners while that makes the loads more even. So few experts move (Pangu Ultra
//! MoE, arXiv 2505.04519, device-level load balancing).

/// Returns better physical slots for the experts, given their `loads`, present `physical_slots` and
/// the number of `owners`. The first owner holds the first slots, the next owner those that follow.
///
/// Returns None if the load of the most loaded owner would not fall by the share `min_gain` of it.
pub fn rebalance_experts(
    loads: &[f64],
    physical_slots: &[i64],
    owners: usize,
    min_gain: f64,
) -> Option<Vec<i64>> {
    let experts = loads.len();
    let local = experts / owners;
    let mut physical_slots = physical_slots.to_vec();
    let mut owner_loads = sum_by_owner(loads, &physical_slots, owners);
    let before = largest(&owner_loads);
    // Each swap reduces the sum of squares. Few owners need more than a few swaps.
    for _ in 0..4 * experts {
        let Some(swap) = best_swap(loads, &physical_slots, &owner_loads, before) else {
            break;
        };
        let owner = |expert: usize| physical_slots[expert] as usize / local;
        let less = loads[swap.expert] - loads[swap.other];
        owner_loads[owner(swap.expert)] -= less;
        owner_loads[owner(swap.other)] += less;
        physical_slots.swap(swap.expert, swap.other);
    }
    let after = largest(&owner_loads);
    let improved = before > 0.0 && after < before && after <= before * (1.0 - min_gain);
    improved.then_some(physical_slots)
}

/// A swap of an expert of the most loaded owner with one of another owner.
struct Swap {
    expert: usize,
    other: usize,
    gain: f64,
}

/// Returns the swap that reduces the sum of squared loads most, or None if none is worth it.
fn best_swap(
    loads: &[f64],
    physical_slots: &[i64],
    owner_loads: &[f64],
    load_before: f64,
) -> Option<Swap> {
    let local = loads.len() / owner_loads.len();
    let owner = |expert: usize| physical_slots[expert] as usize / local;
    let most_loaded = (0..owner_loads.len())
        .max_by(|&a, &b| owner_loads[a].total_cmp(&owner_loads[b]).then(b.cmp(&a)))?;
    let mut best: Option<Swap> = None;
    for expert in (0..loads.len()).filter(|&expert| owner(expert) == most_loaded) {
        for other in (0..loads.len()).filter(|&other| owner(other) != most_loaded) {
            let less = loads[expert] - loads[other];
            let room = owner_loads[most_loaded] - owner_loads[owner(other)];
            // Half of what the sum of squares falls by.
            let gain = less * (room - less);
            let is_better = best.as_ref().is_none_or(|best| gain > best.gain);
            if gain > 1e-9 * load_before * load_before && is_better {
                best = Some(Swap {
                    expert,
                    other,
                    gain,
                });
            }
        }
    }
    best
}

fn sum_by_owner(loads: &[f64], physical_slots: &[i64], owners: usize) -> Vec<f64> {
    let local = loads.len() / owners;
    let mut owner_loads = vec![0.0; owners];
    for (&physical_slot, load) in physical_slots.iter().zip(loads) {
        owner_loads[physical_slot as usize / local] += load;
    }
    owner_loads
}

fn largest(loads: &[f64]) -> f64 {
    loads.iter().copied().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check_rebalance(loads: &[f64], owners: usize, min_gain: f64) {
        let start: Vec<i64> = (0..loads.len() as i64).rev().collect();
        let Some(physical_slots) = rebalance_experts(loads, &start, owners, min_gain) else {
            return;
        };
        let mut sorted = physical_slots.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..loads.len() as i64).collect::<Vec<_>>());
        let before = largest(&sum_by_owner(loads, &start, owners));
        let after = largest(&sum_by_owner(loads, &physical_slots, owners));
        assert!(after < before && after <= before * (1.0 - min_gain) + 1e-9);
        let again = rebalance_experts(loads, &physical_slots, owners, 0.01);
        assert_eq!(again, None, "a second call moves nothing");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn experts_are_swapped_and_the_most_loaded_owner_gets_less(
            owners in 1usize..9,
            local in 1usize..9,
            drawn in prop::collection::vec(0.0f64..100.0, 64),
            min_gain in 0.0f64..0.5,
        ) {
            check_rebalance(&drawn[..owners * local], owners, min_gain);
        }
    }

    #[test]
    fn two_hot_experts_of_one_owner_are_separated_and_no_others_move() {
        let loads = [10.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        let start = [0, 1, 2, 3, 4, 5, 6, 7];
        let physical_slots = rebalance_experts(&loads, &start, 4, 0.05).unwrap();
        let moved = physical_slots.iter().zip(&start).filter(|(a, b)| a != b);
        assert_eq!(moved.count(), 2);
        assert_ne!(physical_slots[0] / 2, physical_slots[1] / 2);
        assert_eq!(rebalance_experts(&[1.0; 8], &start, 4, 0.0), None, "even");
        assert_eq!(rebalance_experts(&[0.0; 8], &start, 4, 0.0), None, "zero");
    }
}
