//! Which rank holds which expert, from how busy experts have been: the alternative to lending them in every step.
//!
//! Every owner holds as many experts. Experts of the fullest owner change places with others' while that makes loads more
//! even, so that few move (Pangu Ultra MoE, arXiv 2505.04519, device-level load balancing).

/// For each of `positions` (of an expert; the first owner holds the first ones) a better one, from the experts' `loads` and
/// the number of `owners`; None where the fullest owner's load would not fall by the share `min_gain` of it.
pub fn replace(loads: &[f64], positions: &[i64], owners: usize, min_gain: f64) -> Option<Vec<i64>> {
    let experts = loads.len();
    let local = experts / owners;
    let mut positions = positions.to_vec();
    let owner = |position: i64| position as usize / local;
    let mut of_owners = vec![0.0; owners];
    positions
        .iter()
        .zip(loads)
        .for_each(|(&position, load)| of_owners[owner(position)] += load);
    let before = largest(&of_owners);
    // Each exchange makes the sum of squares smaller; there are seldom more than a few for each owner.
    for _ in 0..4 * experts {
        let fullest =
            (0..owners).max_by(|&a, &b| of_owners[a].total_cmp(&of_owners[b]).then(b.cmp(&a)))?;
        let on_fullest = (0..experts).filter(|&expert| owner(positions[expert]) == fullest);
        let mut best: Option<(f64, usize, usize)> = None;
        for expert in on_fullest {
            for other in (0..experts).filter(|&other| owner(positions[other]) != fullest) {
                let less = loads[expert] - loads[other];
                let room = of_owners[fullest] - of_owners[owner(positions[other])];
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
        of_owners[fullest] -= less;
        of_owners[owner(positions[other])] += less;
        positions.swap(expert, other);
    }
    (before > 0.0
        && largest(&of_owners) < before
        && largest(&of_owners) <= before * (1.0 - min_gain))
        .then_some(positions)
}

fn largest(loads: &[f64]) -> f64 {
    loads.iter().copied().fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of_owners(loads: &[f64], positions: &[i64], owners: usize) -> Vec<f64> {
        let mut sums = vec![0.0; owners];
        let local = loads.len() / owners;
        positions
            .iter()
            .zip(loads)
            .for_each(|(&position, load)| sums[position as usize / local] += load);
        sums
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn experts_change_places_and_the_fullest_owner_gets_less(
            owners in 1usize..9, local in 1usize..9, drawn in prop::collection::vec(0.0f64..100.0, 64), min_gain in 0.0f64..0.5,
        ) {
            let loads = &drawn[..owners * local];
            let start: Vec<i64> = (0..loads.len() as i64).rev().collect();
            let before = largest(&of_owners(loads, &start, owners));
            if let Some(positions) = replace(loads, &start, owners, min_gain) {
                let mut sorted = positions.clone();
                sorted.sort_unstable();
                prop_assert_eq!(sorted, (0..loads.len() as i64).collect::<Vec<_>>());
                let after = largest(&of_owners(loads, &positions, owners));
                prop_assert!(after < before && after <= before * (1.0 - min_gain) + 1e-9);
                prop_assert_eq!(replace(loads, &positions, owners, 0.01), None, "then they stay");
            }
        }
    }

    #[test]
    fn two_hot_experts_of_one_owner_are_parted_and_no_others_move() {
        let loads = [10.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        let positions = replace(&loads, &[0, 1, 2, 3, 4, 5, 6, 7], 4, 0.05).unwrap();
        assert_eq!(
            positions
                .iter()
                .enumerate()
                .filter(|&(expert, &at)| expert as i64 != at)
                .count(),
            2
        );
        assert_ne!(positions[0] / 2, positions[1] / 2);
        assert_eq!(
            replace(&[1.0; 8], &[0, 1, 2, 3, 4, 5, 6, 7], 4, 0.0),
            None,
            "even loads move nothing"
        );
        assert_eq!(replace(&[0.0; 8], &[0, 1, 2, 3, 4, 5, 6, 7], 4, 0.0), None);
    }
}
