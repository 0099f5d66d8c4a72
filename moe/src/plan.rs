//! Dispatch plans: which row goes where, as pure functions of plain numbers.
//!
//! A *slot* is one (token, choice) pair on its way. Slots are ordered by the rank they go to, within it by expert, and
//! within an expert by token. So the counts of all ranks and an [`Assignment`] say what every row is: no expert's number
//! travels.

use crate::assignment::{Assignment, Place, Transfer, split};
use std::ops::Range;

/// Who the ranks are that share a layer's experts out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sites {
    /// Neighbours that split the same experts: together they are an owner.
    pub slices: usize,
    /// The node of each rank; ranks of a node are neighbours.
    pub nodes: Vec<usize>,
}

impl Sites {
    /// Ranks that are all on one node.
    pub fn on_one_node(ranks: usize, slices: usize) -> Sites {
        Sites {
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

/// Where the choices of a layer go, as one rank sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Tokens travel in so many parts, one while another is worked on.
    pub parts: Vec<Part>,
    /// The experts that this rank works on: those that it holds, then others.
    pub work: Vec<usize>,
    /// How many of them it holds.
    pub held: usize,
    /// Which weights go where, between owners.
    pub transfers: Vec<Transfer>,
}

/// Part of a rank's tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Part {
    /// (expert, owner, choices): where this rank's choices go, by expert. Of one expert, the first choices go to the first
    /// owner.
    pub ways: Vec<(usize, usize, i64)>,
    /// (rank, expert, choices): what this rank works on, by rank and then expert.
    pub incoming: Vec<(usize, usize, i64)>,
}

/// The tokens, of `tokens`, of part `part` of `parts`.
pub fn part_of(tokens: usize, part: usize, parts: usize) -> Range<usize> {
    tokens * part / parts..tokens * (part + 1) / parts
}

/// Where rank `rank` sends its choices, and what it works on, from the choices of each expert in each of `parts` parts of
/// every rank's tokens, `counts` `[ranks * parts * E]`, and who works on them.
pub fn route(
    counts: &[i64],
    parts: usize,
    assignment: &Assignment,
    sites: &Sites,
    rank: usize,
) -> Route {
    let ranks = sites.ranks();
    let experts = assignment.experts();
    let nodes = sites.owner_nodes();
    let place = |owner: usize| Place {
        owner,
        node: nodes[owner],
    };
    let own = rank / sites.slices;
    let mut routed = vec![Part::default(); parts];
    for expert in 0..experts {
        let of = |rank: usize, part: usize| counts[(rank * parts + part) * experts + expert];
        let mut add = |part: usize, source: usize, owner: usize, choices: i64| {
            if source == rank && choices > 0 {
                routed[part].ways.push((expert, owner, choices));
            }
            if owner == own && choices > 0 {
                routed[part].incoming.push((source, expert, choices));
            }
        };
        match assignment.of_expert(expert) {
            [] => {}
            [only] if only.owner == own => {
                (0..ranks).for_each(|source| {
                    (0..parts).for_each(|part| add(part, source, own, of(source, part)))
                });
            }
            [only] => (0..parts).for_each(|part| add(part, rank, only.owner, of(rank, part))),
            shares => {
                let total = |rank: usize| (0..parts).map(|part| of(rank, part)).sum::<i64>();
                let sources: Vec<_> = (0..ranks)
                    .map(|rank| (place(rank / sites.slices), total(rank)))
                    .collect();
                let places: Vec<_> = shares
                    .iter()
                    .map(|share| (place(share.owner), share.choices))
                    .collect();
                // A rank's choices in order, part after part, go to its shares in order.
                let mut start = 0;
                let mut before = usize::MAX;
                for (source, share, choices) in split(&sources, &places) {
                    start = if source == before { start } else { 0 };
                    before = source;
                    let mut first = 0;
                    for part in 0..parts {
                        let end = first + of(source, part);
                        let common = end.min(start + choices) - first.max(start);
                        add(part, source, shares[share].owner, common.max(0));
                        first = end;
                    }
                    start += choices;
                }
            }
        }
    }
    routed
        .iter_mut()
        .for_each(|part| part.incoming.sort_unstable());
    let mut work: Vec<usize> = (0..experts)
        .filter(|&expert| assignment.home(expert) == own)
        .collect();
    let held = work.len();
    let foreign = assignment
        .shares()
        .iter()
        .filter(|share| share.owner == own);
    work.extend(
        foreign
            .map(|share| share.expert)
            .filter(|&expert| assignment.home(expert) != own),
    );
    Route {
        parts: routed,
        work,
        held,
        transfers: assignment.transfers(),
    }
}

impl Part {
    /// The owner that works on each of `experts`, this rank's choices in order.
    pub fn owners(&self, experts: &[i64], num_experts: usize) -> Vec<usize> {
        // For each expert, the way that its next choice goes, and how many more go there.
        let mut next = vec![(0, 0); num_experts];
        for (index, &(expert, _, choices)) in self.ways.iter().enumerate().rev() {
            next[expert] = (index, choices);
        }
        let owner = |&expert: &i64| {
            let (way, left) = &mut next[expert as usize];
            if *left == 0 {
                *way += 1;
                *left = self.ways[*way].2;
            }
            *left -= 1;
            self.ways[*way].1
        };
        experts.iter().map(owner).collect()
    }
}

/// How rows are laid out for sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendPlan {
    /// The token of each slot, `[N]`.
    pub token_of_slot: Vec<i64>,
    /// The slot of each (token, choice), token-major, `[T * C]`; -1 where there is none.
    pub slot_of_choice: Vec<i64>,
    /// Rows for each rank.
    pub rows_to: Vec<i64>,
    /// Rows for each rank and expert, `[ranks * E]`.
    pub counts: Vec<i64>,
}

/// Sorts choices, `per_token` for each token, by where they go: (rank, expert), or None for a choice that goes nowhere.
pub fn plan_send(
    choices: &[Option<(usize, usize)>],
    per_token: usize,
    ranks: usize,
    num_experts: usize,
) -> SendPlan {
    let mut counts = vec![0i64; ranks * num_experts];
    for (rank, expert) in choices.iter().flatten() {
        counts[rank * num_experts + expert] += 1;
    }
    let mut next = exclusive_sum(&counts);
    let rows_to: Vec<i64> = counts
        .chunks(num_experts)
        .map(|rank| rank.iter().sum())
        .collect();
    let mut token_of_slot = vec![0i64; rows_to.iter().sum::<i64>() as usize];
    let mut slot_of_choice = vec![-1i64; choices.len()];
    for (choice, to) in choices.iter().enumerate() {
        let Some((rank, expert)) = to else { continue };
        let slot = &mut next[rank * num_experts + expert];
        token_of_slot[*slot as usize] = (choice / per_token) as i64;
        slot_of_choice[choice] = *slot;
        *slot += 1;
    }
    SendPlan {
        token_of_slot,
        slot_of_choice,
        rows_to,
        counts,
    }
}

/// How received rows, which come rank by rank and for each rank expert by expert, are laid out as they are worked on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivePlan {
    /// Rows from each rank.
    pub rows_from: Vec<i64>,
    /// For each place in the order of work, the received row that belongs there.
    pub order: Vec<i64>,
    /// For each received row, its place in the order of work.
    pub place: Vec<i64>,
    /// Rows of each expert of `work`.
    pub counts: Vec<i64>,
}

/// From what comes, (rank, expert, rows) by rank and then expert, and the experts that are worked on.
pub fn plan_receive(
    incoming: &[(usize, usize, i64)],
    work: &[usize],
    ranks: usize,
    num_experts: usize,
) -> ReceivePlan {
    let mut position = vec![usize::MAX; num_experts];
    work.iter()
        .enumerate()
        .for_each(|(index, &expert)| position[expert] = index);
    let mut rows_from = vec![0; ranks];
    let mut counts = vec![0; work.len()];
    // Where each part begins as received, by (place in the work, rank).
    let mut parts = Vec::with_capacity(incoming.len());
    let mut start = 0;
    for &(rank, expert, rows) in incoming {
        rows_from[rank] += rows;
        counts[position[expert]] += rows;
        parts.push((position[expert], rank, start, rows));
        start += rows;
    }
    parts.sort_unstable();
    let mut order = Vec::with_capacity(start as usize);
    let mut place = vec![0i64; start as usize];
    for (_, _, start, rows) in parts {
        for row in start..start + rows {
            place[row as usize] = order.len() as i64;
            order.push(row);
        }
    }
    ReceivePlan {
        rows_from,
        order,
        place,
        counts,
    }
}

/// Choices of each expert.
pub fn count(experts: &[i64], num_experts: usize) -> Vec<i64> {
    let mut counts = vec![0; num_experts];
    experts
        .iter()
        .for_each(|&expert| counts[expert as usize] += 1);
    counts
}

/// Which of a rank's rows belong to each of `groups` groups of `per_group` rows, where its `rows` rows begin at `start`.
pub fn segments(start: usize, rows: usize, per_group: usize, groups: usize) -> Vec<Range<usize>> {
    let inside = |row: usize| row.clamp(start, start + rows) - start;
    (0..groups)
        .map(|group| inside(group * per_group)..inside((group + 1) * per_group))
        .collect()
}

/// Choices of each expert among the tokens of each group, group-major `[G * E]`.
pub fn count_choices(
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
    use crate::least_loaded::{Imbalance, Planner};
    use proptest::prelude::*;

    /// Experts chosen on each rank: so many tokens a rank, skewed, `top_k` distinct ones each.
    #[derive(Debug, Clone)]
    struct Case {
        sites: Sites,
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
                    sites: Sites {
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
        fn every_choice_reaches_a_rank_with_its_expert_once(case in cases(), parts in 1usize..4) {
            let Case { sites, num_experts, top_k, chosen, planner } = case;
            let ranks = sites.ranks();
            let part = |experts: &Vec<i64>, part: usize| {
                let tokens = part_of(experts.len() / top_k, part, parts);
                experts[tokens.start * top_k..tokens.end * top_k].to_vec()
            };
            let all: Vec<Vec<i64>> =
                chosen.iter().flat_map(|experts| (0..parts).map(move |number| part(experts, number))).collect();
            let counts: Vec<i64> = all.iter().flat_map(|experts| count(experts, num_experts)).collect();
            let loads: Vec<i64> =
                (0..num_experts).map(|e| counts.iter().skip(e).step_by(num_experts).sum()).collect();
            let assignment = planner.plan(&loads, sites.owners());
            let routes: Vec<Route> = (0..ranks).map(|rank| route(&counts, parts, &assignment, &sites, rank)).collect();
            let of_owners: Vec<i64> = (0..ranks).map(|rank| {
                routes[rank].parts.iter().flat_map(|part| &part.incoming).map(|incoming| incoming.2).sum()
            }).collect();
            prop_assert_eq!(of_owners.iter().step_by(sites.slices).copied().collect::<Vec<_>>(), assignment.loads());
            for number in 0..parts {
                let chosen: Vec<Vec<i64>> = chosen.iter().map(|experts| part(experts, number)).collect();
                let sends: Vec<SendPlan> = chosen.iter().zip(&routes).map(|(experts, route)| {
                    let owners = route.parts[number].owners(experts, num_experts);
                    let to = experts.iter().zip(owners).flat_map(|(&expert, owner)| {
                        (0..sites.slices).map(move |slice| Some((owner * sites.slices + slice, expert as usize)))
                    });
                    plan_send(&to.collect::<Vec<_>>(), top_k * sites.slices, ranks, num_experts)
                }).collect();
                for (rank, route) in routes.iter().enumerate() {
                    prop_assert_eq!(&route.transfers, &routes[0].transfers);
                    let receive = plan_receive(&route.parts[number].incoming, &route.work, ranks, num_experts);
                    // What arrives, as (place in the work, rank, token).
                    let mut arrived = Vec::new();
                    for (source, send) in sends.iter().enumerate() {
                        prop_assert_eq!(send.rows_to[rank], receive.rows_from[source]);
                        let first: i64 = send.rows_to[..rank].iter().sum();
                        let mut slot = first as usize;
                        for expert in 0..num_experts {
                            for _ in 0..send.counts[rank * num_experts + expert] {
                                let work = route.work.iter().position(|&e| e == expert);
                                prop_assert!(work.is_some(), "rank {rank} has no weights of expert {expert}");
                                let token = send.token_of_slot[slot];
                                let own = &chosen[source][token as usize * top_k..][..top_k];
                                prop_assert!(own.contains(&(expert as i64)));
                                arrived.push((work.unwrap(), source, token));
                                slot += 1;
                            }
                        }
                    }
                    let ordered: Vec<_> = receive.order.iter().map(|&row| arrived[row as usize]).collect();
                    prop_assert!(ordered.is_sorted());
                    for (row, &place) in receive.place.iter().enumerate() {
                        prop_assert_eq!(receive.order[place as usize], row as i64);
                    }
                    prop_assert_eq!(receive.counts.iter().sum::<i64>() as usize, arrived.len());
                    prop_assert!(route.work[route.held..].is_sorted());
                }
                for (experts, send) in chosen.iter().zip(&sends) {
                    let mut slots: Vec<i64> = send.slot_of_choice.clone();
                    slots.sort_unstable();
                    prop_assert_eq!(slots, (0..(experts.len() * sites.slices) as i64).collect::<Vec<_>>());
                }
            }
        }

        #[test]
        fn choices_that_go_nowhere_have_no_slot(
            per_token in 1usize..5,
            choices in prop::collection::vec(prop::option::of((0usize..3, 0usize..4)), 0..60),
        ) {
            let choices = &choices[..choices.len() / per_token * per_token];
            let plan = plan_send(choices, per_token, 3, 4);
            prop_assert_eq!(plan.token_of_slot.len(), choices.iter().flatten().count());
            let mut by_slot = vec![None; plan.token_of_slot.len()];
            for (choice, &slot) in plan.slot_of_choice.iter().enumerate() {
                prop_assert_eq!(slot >= 0, choices[choice].is_some());
                if slot >= 0 {
                    prop_assert_eq!(plan.token_of_slot[slot as usize] as usize, choice / per_token);
                    prop_assert!(by_slot[slot as usize].replace(choices[choice].unwrap()).is_none());
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
            let whole = count_choices(all, top_k, &segments(0, tokens, per_group, groups), 7);
            prop_assert_eq!(whole.iter().sum::<f32>() as usize, all.len());
            let mut summed = vec![0f32; whole.len()];
            for rank in 0..ranks {
                let (start, len) = (rank * tokens / ranks, tokens / ranks);
                let own = &all[start * top_k..(start + len) * top_k];
                let counts = count_choices(own, top_k, &segments(start, len, per_group, groups), 7);
                summed.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
            prop_assert_eq!(whole, summed);
        }
    }
}
