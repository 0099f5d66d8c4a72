//! Dispatch plans: which row goes where, as pure functions of plain numbers.
//!
//! A *slot* is one (token, choice) pair in flight. Slots are ordered by the rank they go to, within it by expert, and
//! within an expert by token. So the counts of all ranks and an [`Assignment`] say what every row is: no expert's number
//! travels.

use crate::lending::assignment::{Assignment, Location, Transfer, split};
use std::ops::Range;

/// Who the ranks are that share a layer's experts out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertTopology {
    /// Neighbours that split the same experts: together they are an owner.
    pub slices: usize,
    /// The node of each rank; ranks of a node are neighbours.
    pub nodes: Vec<usize>,
}

impl ExpertTopology {
    /// Ranks that are all on one node.
    pub fn on_one_node(ranks: usize, slices: usize) -> ExpertTopology {
        ExpertTopology {
            slices,
            nodes: vec![0; ranks],
        }
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.nodes.len()
    }

    /// How many owners there are.
    pub fn owners(&self) -> usize {
        self.ranks() / self.slices
    }

    /// The node of each owner.
    pub fn owner_nodes(&self) -> Vec<usize> {
        self.nodes.iter().step_by(self.slices).copied().collect()
    }
}

/// Where the routed tokens of a layer go, as one rank sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankPlan {
    /// Tokens travel in so many chunks, one while another is worked on.
    pub chunks: Vec<ChunkPlan>,
    /// The experts that this rank works on: those that it holds, then others.
    pub computed_experts: Vec<usize>,
    /// How many of them it holds.
    pub num_local: usize,
    /// Which weights go where, between owners.
    pub transfers: Vec<Transfer>,
}

/// Routing of one chunk of a rank's tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChunkPlan {
    /// (expert, owner, routed tokens): where this rank's routed tokens go, by expert. Of one expert, the first routed tokens go to the first
    /// owner.
    pub destinations: Vec<(usize, usize, i64)>,
    /// (rank, expert, routed tokens): what this rank works on, by rank and then expert.
    pub incoming: Vec<(usize, usize, i64)>,
}

/// The tokens, of `tokens`, of chunk `chunk` of `chunks`.
pub fn chunk_range(tokens: usize, chunk: usize, chunks: usize) -> Range<usize> {
    tokens * chunk / chunks..tokens * (chunk + 1) / chunks
}

/// Where rank `rank` sends its routed tokens, and what it works on, from the routed tokens of each expert in each of `chunks` chunks of
/// every rank's tokens, `counts` `[ranks * chunks * E]`, and who works on them.
pub fn rank_plan(
    counts: &[i64],
    chunks: usize,
    assignment: &Assignment,
    topology: &ExpertTopology,
    rank: usize,
) -> RankPlan {
    let ranks = topology.ranks();
    let experts = assignment.experts();
    let nodes = topology.owner_nodes();
    let location = |owner: usize| Location {
        owner,
        node: nodes[owner],
    };
    let own = rank / topology.slices;
    let mut routed = vec![ChunkPlan::default(); chunks];
    for expert in 0..experts {
        let of = |rank: usize, chunk: usize| counts[(rank * chunks + chunk) * experts + expert];
        let mut add = |chunk: usize, source: usize, owner: usize, routed_tokens: i64| {
            if source == rank && routed_tokens > 0 {
                routed[chunk]
                    .destinations
                    .push((expert, owner, routed_tokens));
            }
            if owner == own && routed_tokens > 0 {
                routed[chunk].incoming.push((source, expert, routed_tokens));
            }
        };
        match assignment.expert_shares(expert) {
            [] => {}
            [only] if only.owner == own => {
                (0..ranks).for_each(|source| {
                    (0..chunks).for_each(|chunk| add(chunk, source, own, of(source, chunk)))
                });
            }
            [only] => (0..chunks).for_each(|chunk| add(chunk, rank, only.owner, of(rank, chunk))),
            shares => {
                let total = |rank: usize| (0..chunks).map(|chunk| of(rank, chunk)).sum::<i64>();
                let sources: Vec<_> = (0..ranks)
                    .map(|rank| (location(rank / topology.slices), total(rank)))
                    .collect();
                let locations: Vec<_> = shares
                    .iter()
                    .map(|share| (location(share.owner), share.routed_tokens))
                    .collect();
                // A rank's routed tokens in order, chunk after chunk, go to its shares in order.
                let mut start = 0;
                let mut before = usize::MAX;
                for (source, share, routed_tokens) in split(&sources, &locations) {
                    start = if source == before { start } else { 0 };
                    before = source;
                    let mut first = 0;
                    for chunk in 0..chunks {
                        let end = first + of(source, chunk);
                        let common = end.min(start + routed_tokens) - first.max(start);
                        add(chunk, source, shares[share].owner, common.max(0));
                        first = end;
                    }
                    start += routed_tokens;
                }
            }
        }
    }
    routed
        .iter_mut()
        .for_each(|chunk| chunk.incoming.sort_unstable());
    let mut computed_experts: Vec<usize> = (0..experts)
        .filter(|&expert| assignment.home(expert) == own)
        .collect();
    let num_local = computed_experts.len();
    let lent = assignment
        .shares()
        .iter()
        .filter(|share| share.owner == own);
    computed_experts.extend(
        lent.map(|share| share.expert)
            .filter(|&expert| assignment.home(expert) != own),
    );
    RankPlan {
        chunks: routed,
        computed_experts,
        num_local,
        transfers: assignment.transfers(),
    }
}

impl ChunkPlan {
    /// The owner that works on each of `experts`, this rank's routed tokens in order.
    pub fn owners(&self, experts: &[i64], num_experts: usize) -> Vec<usize> {
        // For each expert, the destination of its next routed token, and how many more go there.
        let mut next = vec![(0, 0); num_experts];
        for (index, &(expert, _, routed_tokens)) in self.destinations.iter().enumerate().rev() {
            next[expert] = (index, routed_tokens);
        }
        let owner = |&expert: &i64| {
            let (destination, left) = &mut next[expert as usize];
            if *left == 0 {
                *destination += 1;
                *left = self.destinations[*destination].2;
            }
            *left -= 1;
            self.destinations[*destination].1
        };
        experts.iter().map(owner).collect()
    }
}

/// How rows are laid out for sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendPlan {
    /// The token of each slot, `[N]`.
    pub token_of_row: Vec<i64>,
    /// The slot of each (token, choice), token-major, `[T * C]`; -1 where there is none.
    pub row_of_routed_token: Vec<i64>,
    /// Rows for each rank.
    pub input_splits: Vec<i64>,
    /// Rows for each rank and expert, `[ranks * E]`.
    pub counts: Vec<i64>,
}

/// Sorts routed tokens, `per_token` for each token, by where they go: (rank, expert), or None for a choice that goes nowhere.
pub fn plan_send(
    routed_tokens: &[Option<(usize, usize)>],
    per_token: usize,
    ranks: usize,
    num_experts: usize,
) -> SendPlan {
    let mut counts = vec![0i64; ranks * num_experts];
    for (rank, expert) in routed_tokens.iter().flatten() {
        counts[rank * num_experts + expert] += 1;
    }
    let mut next = exclusive_sum(&counts);
    let input_splits: Vec<i64> = counts
        .chunks(num_experts)
        .map(|rank| rank.iter().sum())
        .collect();
    let mut token_of_row = vec![0i64; input_splits.iter().sum::<i64>() as usize];
    let mut row_of_routed_token = vec![-1i64; routed_tokens.len()];
    for (choice, to) in routed_tokens.iter().enumerate() {
        let Some((rank, expert)) = to else { continue };
        let slot = &mut next[rank * num_experts + expert];
        token_of_row[*slot as usize] = (choice / per_token) as i64;
        row_of_routed_token[choice] = *slot;
        *slot += 1;
    }
    SendPlan {
        token_of_row,
        row_of_routed_token,
        input_splits,
        counts,
    }
}

/// How received rows, which come rank by rank and for each rank expert by expert, are laid out as they are worked on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivePlan {
    /// Rows from each rank.
    pub output_splits: Vec<i64>,
    /// For each place in the order of computed experts, the received row that belongs there.
    pub order: Vec<i64>,
    /// For each received row, its place in the order of computed experts.
    pub inverse: Vec<i64>,
    /// Rows of each expert of `computed_experts`.
    pub counts: Vec<i64>,
}

/// From what comes, (rank, expert, rows) by rank and then expert, and the experts that are worked on.
pub fn plan_receive(
    incoming: &[(usize, usize, i64)],
    computed_experts: &[usize],
    ranks: usize,
    num_experts: usize,
) -> ReceivePlan {
    let mut position = vec![usize::MAX; num_experts];
    computed_experts
        .iter()
        .enumerate()
        .for_each(|(index, &expert)| position[expert] = index);
    let mut output_splits = vec![0; ranks];
    let mut counts = vec![0; computed_experts.len()];
    // Where each run begins as received, by (place in the computed experts, rank).
    let mut chunks = Vec::with_capacity(incoming.len());
    let mut start = 0;
    for &(rank, expert, rows) in incoming {
        output_splits[rank] += rows;
        counts[position[expert]] += rows;
        chunks.push((position[expert], rank, start, rows));
        start += rows;
    }
    chunks.sort_unstable();
    let mut order = Vec::with_capacity(start as usize);
    let mut inverse = vec![0i64; start as usize];
    for (_, _, start, rows) in chunks {
        for row in start..start + rows {
            inverse[row as usize] = order.len() as i64;
            order.push(row);
        }
    }
    ReceivePlan {
        output_splits,
        order,
        inverse,
        counts,
    }
}

/// Choices of each expert.
pub fn count_tokens_per_expert(experts: &[i64], num_experts: usize) -> Vec<i64> {
    let mut counts = vec![0; num_experts];
    experts
        .iter()
        .for_each(|&expert| counts[expert as usize] += 1);
    counts
}

/// Which of a rank's rows belong to each of `groups` groups of `per_group` rows, where its `rows` rows begin at `start`.
pub fn group_ranges(
    start: usize,
    rows: usize,
    per_group: usize,
    groups: usize,
) -> Vec<Range<usize>> {
    let inside = |row: usize| row.clamp(start, start + rows) - start;
    (0..groups)
        .map(|group| inside(group * per_group)..inside((group + 1) * per_group))
        .collect()
}

/// Choices of each expert among the tokens of each group, group-major `[G * E]`.
pub fn count_tokens_by_group(
    experts: &[i64],
    top_k: usize,
    groups: &[Range<usize>],
    num_experts: usize,
) -> Vec<f32> {
    let mut counts = vec![0f32; groups.len() * num_experts];
    for (group, tokens) in groups.iter().enumerate() {
        for &expert in &experts[tokens.start * top_k..tokens.end * top_k] {
            counts[group * num_experts + expert as usize] += 1.0;
        }
    }
    counts
}

fn exclusive_sum(counts: &[i64]) -> Vec<i64> {
    counts
        .iter()
        .scan(0, |sum, &count| {
            let start = *sum;
            *sum += count;
            Some(start)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lending::least_loaded::{Imbalance, Planner};
    use proptest::prelude::*;

    /// Experts chosen on each rank: so many tokens a rank, skewed, `top_k` distinct ones each.
    #[derive(Debug, Clone)]
    struct Case {
        topology: ExpertTopology,
        num_experts: usize,
        top_k: usize,
        chosen: Vec<Vec<i64>>,
        planner: Planner,
    }

    fn cases() -> impl Strategy<Value = Case> {
        let sizes = (
            1usize..5,
            1usize..3,
            1usize..4,
            1usize..4,
            0usize..3,
            any::<bool>(),
        );
        sizes.prop_flat_map(|(owners, slices, local, per_node, hot, least_loaded)| {
            let ranks = owners * slices;
            let num_experts = owners * local;
            (1..=num_experts.min(4)).prop_flat_map(move |top_k| {
                let expert = prop_oneof![2 => 0..num_experts, 3 => Just(hot % num_experts)];
                let token = prop::collection::vec(expert, 8).prop_map(move |drawn| {
                    let mut token: Vec<i64> = Vec::new();
                    for expert in drawn
                        .into_iter()
                        .chain(0..num_experts)
                        .map(|expert| expert as i64)
                    {
                        if !token.contains(&expert) && token.len() < top_k {
                            token.push(expert);
                        }
                    }
                    token
                });
                let rank = prop::collection::vec(token, 0..20).prop_map(|tokens| tokens.concat());
                prop::collection::vec(rank, ranks).prop_map(move |chosen| Case {
                    topology: ExpertTopology {
                        slices,
                        nodes: (0..ranks).map(|rank| rank / slices / per_node).collect(),
                    },
                    num_experts,
                    top_k,
                    chosen,
                    planner: Planner {
                        capacity: 1.0,
                        min_tokens: 1,
                        threshold: if least_loaded { 1.0 } else { f64::INFINITY },
                        over: Imbalance::Device,
                        strict_paper: false,
                        nodes: vec![],
                    },
                })
            })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn every_choice_reaches_a_rank_with_its_expert_once(case in cases(), chunks in 1usize..4) {
            let Case { topology, num_experts, top_k, chosen, planner } = case;
            let ranks = topology.ranks();
            let chunk = |experts: &Vec<i64>, chunk: usize| {
                let tokens = chunk_range(experts.len() / top_k, chunk, chunks);
                experts[tokens.start * top_k..tokens.end * top_k].to_vec()
            };
            let all: Vec<Vec<i64>> =
                chosen.iter().flat_map(|experts| (0..chunks).map(move |number| chunk(experts, number))).collect();
            let counts: Vec<i64> = all.iter().flat_map(|experts| count_tokens_per_expert(experts, num_experts)).collect();
            let loads: Vec<i64> =
                (0..num_experts).map(|e| counts.iter().skip(e).step_by(num_experts).sum()).collect();
            let assignment = planner.plan(&loads, topology.owners());
            let rank_plans: Vec<RankPlan> = (0..ranks).map(|rank| rank_plan(&counts, chunks, &assignment, &topology, rank)).collect();
            let owner_loads: Vec<i64> = (0..ranks).map(|rank| {
                rank_plans[rank].chunks.iter().flat_map(|chunk| &chunk.incoming).map(|incoming| incoming.2).sum()
            }).collect();
            prop_assert_eq!(owner_loads.iter().step_by(topology.slices).copied().collect::<Vec<_>>(), assignment.loads());
            for number in 0..chunks {
                let chosen: Vec<Vec<i64>> = chosen.iter().map(|experts| chunk(experts, number)).collect();
                let sends: Vec<SendPlan> = chosen.iter().zip(&rank_plans).map(|(experts, rank_plan)| {
                    let owners = rank_plan.chunks[number].owners(experts, num_experts);
                    let to = experts.iter().zip(owners).flat_map(|(&expert, owner)| {
                        (0..topology.slices).map(move |slice| Some((owner * topology.slices + slice, expert as usize)))
                    });
                    plan_send(&to.collect::<Vec<_>>(), top_k * topology.slices, ranks, num_experts)
                }).collect();
                for (rank, rank_plan) in rank_plans.iter().enumerate() {
                    prop_assert_eq!(&rank_plan.transfers, &rank_plans[0].transfers);
                    let receive = plan_receive(&rank_plan.chunks[number].incoming, &rank_plan.computed_experts, ranks, num_experts);
                    // What arrives, as (place in the computed experts, rank, token).
                    let mut arrived = Vec::new();
                    for (source, send) in sends.iter().enumerate() {
                        prop_assert_eq!(send.input_splits[rank], receive.output_splits[source]);
                        let first: i64 = send.input_splits[..rank].iter().sum();
                        let mut slot = first as usize;
                        for expert in 0..num_experts {
                            for _ in 0..send.counts[rank * num_experts + expert] {
                                let computed_experts = rank_plan.computed_experts.iter().position(|&e| e == expert);
                                prop_assert!(computed_experts.is_some(), "rank {rank} has no weights of expert {expert}");
                                let token = send.token_of_row[slot];
                                let own = &chosen[source][token as usize * top_k..][..top_k];
                                prop_assert!(own.contains(&(expert as i64)));
                                arrived.push((computed_experts.unwrap(), source, token));
                                slot += 1;
                            }
                        }
                    }
                    let ordered: Vec<_> = receive.order.iter().map(|&row| arrived[row as usize]).collect();
                    prop_assert!(ordered.is_sorted());
                    for (row, &index) in receive.inverse.iter().enumerate() {
                        prop_assert_eq!(receive.order[index as usize], row as i64);
                    }
                    prop_assert_eq!(receive.counts.iter().sum::<i64>() as usize, arrived.len());
                    prop_assert!(rank_plan.computed_experts[rank_plan.num_local..].is_sorted());
                }
                for (experts, send) in chosen.iter().zip(&sends) {
                    let mut slots: Vec<i64> = send.row_of_routed_token.clone();
                    slots.sort_unstable();
                    prop_assert_eq!(slots, (0..(experts.len() * topology.slices) as i64).collect::<Vec<_>>());
                }
            }
        }

        #[test]
        fn choices_that_go_nowhere_have_no_slot(
            per_token in 1usize..5,
            routed_tokens in prop::collection::vec(prop::option::of((0usize..3, 0usize..4)), 0..60),
        ) {
            let routed_tokens = &routed_tokens[..routed_tokens.len() / per_token * per_token];
            let plan = plan_send(routed_tokens, per_token, 3, 4);
            prop_assert_eq!(plan.token_of_row.len(), routed_tokens.iter().flatten().count());
            let mut by_slot = vec![None; plan.token_of_row.len()];
            for (choice, &slot) in plan.row_of_routed_token.iter().enumerate() {
                prop_assert_eq!(slot >= 0, routed_tokens[choice].is_some());
                if slot >= 0 {
                    prop_assert_eq!(plan.token_of_row[slot as usize] as usize, choice / per_token);
                    prop_assert!(by_slot[slot as usize].replace(routed_tokens[choice].unwrap()).is_none());
                }
            }
            prop_assert!(by_slot.is_sorted());
        }

        #[test]
        fn choices_are_counted_by_group_however_ranks_split_the_tokens(
            top_k in 1usize..4, experts in prop::collection::vec(0i64..7, 0..120), per_group in 1usize..9, ranks in 1usize..5,
        ) {
            let tokens = experts.len() / top_k / (per_group * ranks) * (per_group * ranks);
            let groups = tokens / per_group;
            let all = &experts[..tokens * top_k];
            let whole = count_tokens_by_group(all, top_k, &group_ranges(0, tokens, per_group, groups), 7);
            prop_assert_eq!(whole.iter().sum::<f32>() as usize, all.len());
            let mut summed = vec![0f32; whole.len()];
            for rank in 0..ranks {
                let (start, len) = (rank * tokens / ranks, tokens / ranks);
                let own = &all[start * top_k..(start + len) * top_k];
                let counts = count_tokens_by_group(own, top_k, &group_ranges(start, len, per_group, groups), 7);
                summed.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
            prop_assert_eq!(whole, summed);
        }
    }
}
