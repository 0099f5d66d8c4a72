//! The levels of a group's tree: small groups of ranks, then of their first ranks, and so on.

/// The most ranks of a group of one level.
pub(super) const MAX_FANOUT: usize = 16;

/// A group of one level, in which this rank takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Level {
    /// The level's number in the tree. A rank that is alone on its machine skips levels.
    pub(super) number: usize,
    /// Positions in the tree's order. The first takes part in the next level, too.
    pub(super) members: Vec<usize>,
    /// The number of ranks that each member speaks for, itself included.
    pub(super) counts: Vec<usize>,
}

/// The part of a rank in the tree of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TreePlan {
    /// The group's ranks by position in the tree: machine by machine.
    pub(super) order: Vec<usize>,
    /// The index of this rank in `order`.
    pub(super) position: usize,
    /// This rank's levels. It is the first member of all but the last of them, and of that only at
    /// the root.
    pub(super) levels: Vec<Level>,
}

impl TreePlan {
    /// Plans for `rank`, given the machine of each rank of the group.
    ///
    /// Groups stay on one machine as long as it has more than one rank to speak for.
    pub(super) fn new(machines: &[u32], rank: usize, fanout: usize) -> TreePlan {
        let mut order: Vec<usize> = (0..machines.len()).collect();
        order.sort_by_key(|&rank| machines[rank]);
        let machine_of = |position: usize| machines[order[position]];
        let own = order
            .iter()
            .position(|&other| other == rank)
            .expect("the rank is in its group");
        let mut speakers: Vec<usize> = (0..order.len()).collect();
        let mut levels = Vec::new();
        let mut number = 0;
        while speakers.len() > 1 {
            let crowded = speakers.chunk_by(|&one, &next| machine_of(one) == machine_of(next));
            let is_crowded = crowded.clone().any(|machine| machine.len() > 1);
            let groups: Vec<&[usize]> = if is_crowded {
                crowded.flat_map(|machine| machine.chunks(fanout)).collect()
            } else {
                speakers.chunks(fanout).collect()
            };
            if let Some(group) = groups.iter().find(|group| group.contains(&own))
                && group.len() > 1
            {
                let end_of = |speaker: usize| {
                    let next = speakers.iter().find(|&&other| other > speaker);
                    next.copied().unwrap_or(order.len())
                };
                levels.push(Level {
                    number,
                    members: group.to_vec(),
                    counts: group.iter().map(|&one| end_of(one) - one).collect(),
                });
            }
            speakers = groups.iter().map(|group| group[0]).collect();
            number += 1;
        }
        TreePlan {
            position: own,
            levels,
            order,
        }
    }

    /// True if this rank is the first member of a level.
    pub(super) fn leads(&self, level: &Level) -> bool {
        level.members[0] == self.position
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn machines_gather_before_they_exchange() {
        // Two machines, with ranks placed in turn.
        let plan = TreePlan::new(&[0, 1, 0, 1], 0, 16);
        assert_eq!(plan.order, [0, 2, 1, 3]);
        let level = |number, members: &[usize], counts: &[usize]| Level {
            number,
            members: members.to_vec(),
            counts: counts.to_vec(),
        };
        assert_eq!(
            plan.levels,
            [level(0, &[0, 1], &[1, 1]), level(1, &[0, 2], &[2, 2])]
        );
        let plan = TreePlan::new(&[0, 1, 0, 1], 3, 16);
        assert_eq!(plan.levels, [level(0, &[2, 3], &[1, 1])]);
    }

    #[test]
    fn the_depth_of_a_large_tree_is_small() {
        let machines: Vec<u32> = (0..16_384).map(|rank| rank / 8).collect();
        let root = TreePlan::new(&machines, 0, MAX_FANOUT);
        assert_eq!(root.levels.len(), 4);
        let connections: usize = root
            .levels
            .iter()
            .map(|level| level.members.len() - 1)
            .sum();
        assert!(connections < 60, "{connections}");
    }

    proptest! {
        #[test]
        fn each_rank_hands_over_all_it_speaks_for_once(
            machines in prop::collection::vec(0u32..6, 1..80),
            fanout in 2usize..7,
        ) {
            let ranks = machines.len();
            let plan = |rank| TreePlan::new(&machines, rank, fanout);
            let plans: Vec<TreePlan> = (0..ranks).map(plan).collect();
            let order = &plans[0].order;
            for (rank, plan) in plans.iter().enumerate() {
                prop_assert_eq!(&plan.order, order);
                prop_assert_eq!(order[plan.position], rank);
                let mut spoken_for = 1;
                for (index, level) in plan.levels.iter().enumerate() {
                    prop_assert!((2..=fanout).contains(&level.members.len()));
                    let own = level
                        .members
                        .iter()
                        .position(|&one| one == plan.position);
                    prop_assert_eq!(level.counts[own.unwrap()], spoken_for);
                    // Adjacent, so that gathered values are in the tree's order.
                    for (pair, count) in level
                        .members
                        .windows(2)
                        .zip(&level.counts)
                    {
                        prop_assert_eq!(pair[0] + count, pair[1]);
                    }
                    if plan.leads(level) {
                        spoken_for = level.counts.iter().sum();
                    } else {
                        prop_assert_eq!(index + 1, plan.levels.len());
                    }
                    // All members have the same group.
                    for &member in &level.members {
                        prop_assert!(
                            plans[order[member]]
                                .levels
                                .contains(level)
                        );
                    }
                }
                prop_assert_eq!(spoken_for == ranks, plan.position == 0 || ranks == 1);
            }
        }
    }
}
