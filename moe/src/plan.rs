//! Dispatch plans: the destination of every row, as pure functions of plain numbers.
//!
//! Sent rows are ordered by destination rank, then by expert, then by token. So the counts of all
//! ranks and an [`Assignment`] identify every received row, and no expert number needs to be sent.

use crate::lending::assignment::{
    Assignment, LocatedTokens, Location, Share, Transfer, match_sources_to_shares,
};
use std::ops::Range;

/// Distribution of a layer's experts over ranks and nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertTopology {
    /// Number of neighboring ranks that split the same experts: together they are an owner.
    pub slices: usize,
    /// The node of each rank; the ranks of a node are neighbors.
    pub nodes: Vec<usize>,
}

impl ExpertTopology {
    /// Returns a topology with all ranks on one node.
    pub fn on_one_node(ranks: usize, slices: usize) -> ExpertTopology {
        ExpertTopology {
            slices,
            nodes: vec![0; ranks],
        }
    }

    /// Returns the number of ranks.
    pub fn ranks(&self) -> usize {
        self.nodes.len()
    }

    /// Returns the number of owners.
    pub fn owners(&self) -> usize {
        self.ranks() / self.slices
    }

    /// Returns the node of each owner.
    pub fn owner_nodes(&self) -> Vec<usize> {
        self.nodes.iter().step_by(self.slices).copied().collect()
    }
}

/// Routing of a layer's tokens, as one rank sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankPlan {
    /// Tokens are sent in chunks, so that one chunk is in flight while another is computed.
    pub chunks: Vec<ChunkPlan>,
    /// The experts that this rank computes: its own, then lent ones.
    pub computed_experts: Vec<usize>,
    /// Number of this rank's own experts.
    pub num_local: usize,
    /// Weights that are sent between owners.
    pub transfers: Vec<Transfer>,
}

impl RankPlan {
    /// Returns the plan of the only rank, which has all experts and whose routes are known.
    pub(crate) fn of_single_rank(num_experts: usize, chunks: usize) -> RankPlan {
        RankPlan {
            chunks: vec![ChunkPlan::default(); chunks],
            computed_experts: (0..num_experts).collect(),
            num_local: num_experts,
            transfers: Vec::new(),
        }
    }
}

/// Routing of one chunk of a rank's tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChunkPlan {
    /// Sorted by expert. The first routed tokens of an expert go to its first destination.
    pub destinations: Vec<Destination>,
    /// Rows that this rank computes, sorted by source rank and then by expert.
    pub incoming: Vec<IncomingRows>,
}

/// The owner that computes some of this rank's routed tokens of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    pub expert: usize,
    pub owner: usize,
    pub routed_tokens: i64,
}

/// Rows of one expert that a rank sends to this one. The order of the fields is the sort order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct IncomingRows {
    pub rank: usize,
    pub expert: usize,
    pub rows: i64,
}

/// Returns the range of chunk `chunk` of `tokens` tokens in `chunks` chunks.
pub fn chunk_range(tokens: usize, chunk: usize, chunks: usize) -> Range<usize> {
    tokens * chunk / chunks..tokens * (chunk + 1) / chunks
}

/// Numbers of routed tokens `[ranks * chunks * E]`.
struct ChunkCounts<'a> {
    counts: &'a [i64],
    chunks: usize,
    experts: usize,
}

impl ChunkCounts<'_> {
    fn get(&self, rank: usize, chunk: usize, expert: usize) -> i64 {
        self.counts[(rank * self.chunks + chunk) * self.experts + expert]
    }

    fn over_chunks(&self, rank: usize, expert: usize) -> i64 {
        (0..self.chunks)
            .map(|chunk| self.get(rank, chunk, expert))
            .sum()
    }
}

/// Routed tokens of one expert that `source` sends to `owner` in one chunk.
struct Flow {
    chunk: usize,
    source: usize,
    owner: usize,
    routed_tokens: i64,
}

/// Plans what `rank` sends and computes. `counts` `[ranks * chunks * E]` are the routed tokens of
/// each expert in each chunk of every rank's tokens.
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
    let own = rank / topology.slices;
    let counts = ChunkCounts {
        counts,
        chunks,
        experts,
    };
    let mut chunk_plans = vec![ChunkPlan::default(); chunks];
    for expert in 0..experts {
        let mut add = |flow: Flow| {
            let plan = &mut chunk_plans[flow.chunk];
            if flow.source == rank && flow.routed_tokens > 0 {
                plan.destinations.push(Destination {
                    expert,
                    owner: flow.owner,
                    routed_tokens: flow.routed_tokens,
                });
            }
            if flow.owner == own && flow.routed_tokens > 0 {
                plan.incoming.push(IncomingRows {
                    rank: flow.source,
                    expert,
                    rows: flow.routed_tokens,
                });
            }
        };
        let mut add_all_of = |source: usize, owner: usize| {
            for chunk in 0..chunks {
                add(Flow {
                    chunk,
                    source,
                    owner,
                    routed_tokens: counts.get(source, chunk, expert),
                });
            }
        };
        match assignment.expert_shares(expert) {
            [] => {}
            [only] if only.owner == own => {
                for source in 0..ranks {
                    add_all_of(source, own);
                }
            }
            [only] => add_all_of(rank, only.owner),
            shares => split_over_shares(&counts, expert, shares, topology, &nodes, add),
        }
    }
    for plan in &mut chunk_plans {
        plan.incoming.sort_unstable();
    }
    let local = (0..experts).filter(|&expert| assignment.home(expert) == own);
    let mut computed_experts: Vec<usize> = local.collect();
    let num_local = computed_experts.len();
    let lent = assignment
        .shares()
        .iter()
        .filter(|share| share.owner == own)
        .map(|share| share.expert)
        .filter(|&expert| assignment.home(expert) != own);
    computed_experts.extend(lent);
    RankPlan {
        chunks: chunk_plans,
        computed_experts,
        num_local,
        transfers: assignment.transfers(),
    }
}

/// Calls `add` for every flow of an expert that several owners compute.
fn split_over_shares(
    counts: &ChunkCounts,
    expert: usize,
    shares: &[Share],
    topology: &ExpertTopology,
    nodes: &[usize],
    mut add: impl FnMut(Flow),
) {
    let located = |owner: usize, routed_tokens: i64| LocatedTokens {
        location: Location {
            owner,
            node: nodes[owner],
        },
        routed_tokens,
    };
    let sources: Vec<LocatedTokens> = (0..topology.ranks())
        .map(|rank| located(rank / topology.slices, counts.over_chunks(rank, expert)))
        .collect();
    let targets: Vec<LocatedTokens> = shares
        .iter()
        .map(|share| located(share.owner, share.routed_tokens))
        .collect();
    // A rank's routed tokens in order, chunk after chunk, fill its shares in order.
    let mut start = 0;
    let mut previous = usize::MAX;
    for matched in match_sources_to_shares(&sources, &targets) {
        let source = matched.source;
        start = if source == previous { start } else { 0 };
        previous = source;
        let end = start + matched.routed_tokens;
        let mut chunk_start = 0;
        for chunk in 0..counts.chunks {
            let chunk_end = chunk_start + counts.get(source, chunk, expert);
            let common = chunk_end.min(end) - chunk_start.max(start);
            add(Flow {
                chunk,
                source,
                owner: shares[matched.share].owner,
                routed_tokens: common.max(0),
            });
            chunk_start = chunk_end;
        }
        start = end;
    }
}

impl ChunkPlan {
    /// Lays out the rows of this chunk's routed tokens in one pass, without a list of targets.
    ///
    /// `experts` `[T * K]` are numbered by the router, and `physical_slots` gives the number of
    /// each in this plan. A routed token has a row for each slice of its expert.
    pub fn send_plan(
        &self,
        experts: &[i64],
        top_k: usize,
        physical_slots: &[i64],
        topology: &ExpertTopology,
    ) -> SendPlan {
        let slices = topology.slices;
        let num_experts = physical_slots.len();
        let mut counts = vec![0i64; topology.ranks() * num_experts];
        let mut next_destinations = vec![NextDestination::default(); num_experts];
        for (index, destination) in self.destinations.iter().enumerate().rev() {
            let &Destination {
                expert,
                owner,
                routed_tokens,
            } = destination;
            next_destinations[expert] = NextDestination {
                index,
                left: routed_tokens,
            };
            for rank in owner * slices..(owner + 1) * slices {
                counts[rank * num_experts + expert] += routed_tokens;
            }
        }
        let mut next_rows = exclusive_sum(&counts);
        let input_splits = rows_per_rank(&counts, num_experts);
        let mut token_of_row = vec![0; experts.len() * slices];
        let mut row_of_routed_token = Vec::with_capacity(experts.len() * slices);
        for (token, experts) in experts.chunks(top_k).enumerate() {
            for &expert in experts {
                let slot = physical_slots[expert as usize] as usize;
                let owner = next_destinations[slot].take(&self.destinations);
                for rank in owner * slices..(owner + 1) * slices {
                    let row = &mut next_rows[rank * num_experts + slot];
                    token_of_row[*row as usize] = token as i32;
                    row_of_routed_token.push(*row);
                    *row += 1;
                }
            }
        }
        SendPlan {
            token_of_row,
            row_of_routed_token,
            input_splits,
            counts,
        }
    }

    /// Returns the owner that computes each of `experts`, this rank's routed tokens in order.
    pub fn owners(&self, experts: &[i64], num_experts: usize) -> Vec<usize> {
        let mut next = vec![NextDestination::default(); num_experts];
        for (index, first) in self.destinations.iter().enumerate().rev() {
            next[first.expert] = NextDestination {
                index,
                left: first.routed_tokens,
            };
        }
        let owner = |&expert: &i64| next[expert as usize].take(&self.destinations);
        experts.iter().map(owner).collect()
    }
}

/// The destination of an expert's next routed token.
#[derive(Clone, Copy, Default)]
struct NextDestination {
    /// Index among the destinations.
    index: usize,
    /// Routed tokens that the destination still takes.
    left: i64,
}

impl NextDestination {
    /// Returns the owner of the next routed token.
    fn take(&mut self, destinations: &[Destination]) -> usize {
        if self.left == 0 {
            self.index += 1;
            self.left = destinations[self.index].routed_tokens;
        }
        self.left -= 1;
        destinations[self.index].owner
    }
}

/// Destination of a row: a rank of the process group that sends it, and an expert there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RowTarget {
    pub rank: usize,
    pub expert: usize,
}

/// Destinations of the routed tokens of a range of tokens, token-major.
#[derive(Debug, Clone)]
pub struct RoutedTokens {
    /// `[T * C]`; None for a routed token that is not sent.
    pub targets: Vec<Option<RowTarget>>,
    /// Routed tokens per token, C.
    pub per_token: usize,
    /// Experts of the layer, E.
    pub num_experts: usize,
}

/// Layout of rows for sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendPlan {
    /// The token of each row, `[N]`.
    pub token_of_row: Vec<i32>,
    /// The row of each routed token, token-major, `[T * C]`; -1 if it is not sent.
    pub row_of_routed_token: Vec<i32>,
    /// Rows for each rank.
    pub input_splits: Vec<i64>,
    /// Rows for each rank and expert, `[ranks * E]`.
    pub counts: Vec<i64>,
}

/// Sorts routed tokens by rank, then by expert.
pub fn plan_send(routed: &RoutedTokens, ranks: usize) -> SendPlan {
    let RoutedTokens {
        targets,
        per_token,
        num_experts,
    } = routed;
    let mut counts = vec![0i64; ranks * num_experts];
    for RowTarget { rank, expert } in targets.iter().flatten() {
        counts[rank * num_experts + expert] += 1;
    }
    let mut next = exclusive_sum(&counts);
    let input_splits = rows_per_rank(&counts, *num_experts);
    let rows = input_splits.iter().sum::<i64>() as usize;
    let mut token_of_row = vec![0; rows];
    let mut row_of_routed_token = vec![-1; targets.len()];
    for (index, target) in targets.iter().enumerate() {
        let Some(RowTarget { rank, expert }) = target else {
            continue;
        };
        let row = &mut next[rank * num_experts + expert];
        token_of_row[*row as usize] = (index / per_token) as i32;
        row_of_routed_token[index] = *row;
        *row += 1;
    }
    SendPlan {
        token_of_row,
        row_of_routed_token,
        input_splits,
        counts,
    }
}

/// Sums counts `[ranks * E]` over the experts.
fn rows_per_rank(counts: &[i64], num_experts: usize) -> Vec<i64> {
    counts
        .chunks(num_experts)
        .map(|rank| rank.iter().sum())
        .collect()
}

/// Order of received rows for the experts. Rows arrive by rank, then by expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivePlan {
    /// Rows from each rank.
    pub output_splits: Vec<i64>,
    /// The received row at each position in the order of the computed experts.
    pub order: Vec<i32>,
    /// The position of each received row in the order of the computed experts.
    pub inverse: Vec<i32>,
    /// Rows of each expert of `computed_experts`.
    pub counts: Vec<i64>,
}

/// Plans the order of `incoming` rows, which are sorted by rank and then by expert.
pub fn plan_receive(
    incoming: &[IncomingRows],
    computed_experts: &[usize],
    ranks: usize,
    num_experts: usize,
) -> ReceivePlan {
    /// Received rows of one rank for one expert. The order of the fields is the sort order.
    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    struct Run {
        position: usize,
        rank: usize,
        start: i64,
        rows: i64,
    }

    let mut position_of = vec![usize::MAX; num_experts];
    for (position, &expert) in computed_experts.iter().enumerate() {
        position_of[expert] = position;
    }
    let mut output_splits = vec![0; ranks];
    let mut counts = vec![0; computed_experts.len()];
    let mut runs = Vec::with_capacity(incoming.len());
    let mut start = 0;
    for &IncomingRows { rank, expert, rows } in incoming {
        let position = position_of[expert];
        output_splits[rank] += rows;
        counts[position] += rows;
        runs.push(Run {
            position,
            rank,
            start,
            rows,
        });
        start += rows;
    }
    runs.sort_unstable();
    let mut order = Vec::with_capacity(start as usize);
    let mut inverse = vec![0; start as usize];
    for Run { start, rows, .. } in runs {
        for row in start..start + rows {
            inverse[row as usize] = order.len() as i32;
            order.push(row as i32);
        }
    }
    ReceivePlan {
        output_splits,
        order,
        inverse,
        counts,
    }
}

/// Counts the routed tokens of each expert.
pub fn count_tokens_per_expert(experts: &[i64], num_experts: usize) -> Vec<i64> {
    let mut counts = vec![0; num_experts];
    for &expert in experts {
        counts[expert as usize] += 1;
    }
    counts
}

/// Returns the range of a rank's rows in each of `groups` groups of `per_group` rows. The rank has
/// `rows` rows, the first of which is row `start` of all.
pub fn group_ranges(
    start: usize,
    rows: usize,
    per_group: usize,
    groups: usize,
) -> Vec<Range<usize>> {
    let clamp = |row: usize| row.clamp(start, start + rows) - start;
    (0..groups)
        .map(|group| clamp(group * per_group)..clamp((group + 1) * per_group))
        .collect()
}

/// Counts the routed tokens of each expert in each group of tokens: `[G * E]`.
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

/// Returns the first row of each of consecutive groups.
fn exclusive_sum(counts: &[i64]) -> Vec<i32> {
    let mut sum = 0;
    let mut starts = Vec::with_capacity(counts.len());
    for &count in counts {
        starts.push(sum);
        sum += count as i32;
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lending::least_loaded::{Imbalance, Planner};
    use proptest::prelude::*;

    /// The experts of up to 20 tokens per rank, skewed, `top_k` distinct ones each.
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
                let token = prop::collection::vec(expert, 8)
                    .prop_map(move |drawn| distinct(drawn, num_experts, top_k));
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

    /// The first `top_k` distinct experts of `drawn`, filled up with the first experts.
    fn distinct(drawn: Vec<usize>, num_experts: usize, top_k: usize) -> Vec<i64> {
        let mut token: Vec<i64> = Vec::new();
        for expert in drawn.into_iter().chain(0..num_experts) {
            let expert = expert as i64;
            if !token.contains(&expert) && token.len() < top_k {
                token.push(expert);
            }
        }
        token
    }

    impl Case {
        fn chunk(&self, experts: &[i64], chunk: usize, chunks: usize) -> Vec<i64> {
            let tokens = chunk_range(experts.len() / self.top_k, chunk, chunks);
            experts[tokens.start * self.top_k..tokens.end * self.top_k].to_vec()
        }

        fn counts(&self, chunks: usize) -> Vec<i64> {
            let mut counts = Vec::new();
            for experts in &self.chosen {
                for chunk in 0..chunks {
                    let experts = self.chunk(experts, chunk, chunks);
                    counts.extend(count_tokens_per_expert(&experts, self.num_experts));
                }
            }
            counts
        }

        fn send_plan(&self, experts: &[i64], chunk_plan: &ChunkPlan) -> SendPlan {
            let slices = self.topology.slices;
            let owners = chunk_plan.owners(experts, self.num_experts);
            let targets = experts.iter().zip(owners).flat_map(|(&expert, owner)| {
                (0..slices).map(move |slice| {
                    Some(RowTarget {
                        rank: owner * slices + slice,
                        expert: expert as usize,
                    })
                })
            });
            let routed = RoutedTokens {
                targets: targets.collect(),
                per_token: self.top_k * slices,
                num_experts: self.num_experts,
            };
            let plan = plan_send(&routed, self.topology.ranks());
            // The same in one pass, with experts that the router numbers in reverse.
            let last = self.num_experts as i64 - 1;
            let reversed: Vec<i64> = (0..=last).rev().collect();
            let renumbered = experts
                .iter()
                .map(|expert| last - expert)
                .collect::<Vec<i64>>();
            let in_one_pass =
                chunk_plan.send_plan(&renumbered, self.top_k, &reversed, &self.topology);
            assert_eq!(in_one_pass, plan);
            plan
        }
    }

    fn check_that_every_routed_token_arrives_once(case: &Case, chunks: usize) {
        let Case {
            topology,
            num_experts,
            chosen,
            ..
        } = case;
        let ranks = topology.ranks();
        let counts = case.counts(chunks);
        let loads: Vec<i64> = (0..*num_experts)
            .map(|e| counts.iter().skip(e).step_by(*num_experts).sum())
            .collect();
        let assignment = case.planner.plan(&loads, topology.owners());
        let rank_plans: Vec<RankPlan> = (0..ranks)
            .map(|rank| rank_plan(&counts, chunks, &assignment, topology, rank))
            .collect();
        let rank_loads: Vec<i64> = rank_plans
            .iter()
            .map(|plan| plan.chunks.iter().flat_map(|chunk| &chunk.incoming))
            .map(|incoming| incoming.map(|incoming| incoming.rows).sum())
            .collect();
        let owner_loads = rank_loads.into_iter().step_by(topology.slices);
        assert_eq!(owner_loads.collect::<Vec<_>>(), assignment.loads());
        for chunk in 0..chunks {
            let chosen: Vec<Vec<i64>> = chosen
                .iter()
                .map(|experts| case.chunk(experts, chunk, chunks))
                .collect();
            check_chunk(case, &rank_plans, &chosen, chunk);
        }
    }

    fn check_chunk(case: &Case, rank_plans: &[RankPlan], chosen: &[Vec<i64>], chunk: usize) {
        let sends: Vec<SendPlan> = chosen
            .iter()
            .zip(rank_plans)
            .map(|(experts, plan)| case.send_plan(experts, &plan.chunks[chunk]))
            .collect();
        for (rank, plan) in rank_plans.iter().enumerate() {
            assert_eq!(plan.transfers, rank_plans[0].transfers);
            assert!(plan.computed_experts[plan.num_local..].is_sorted());
            let incoming = &plan.chunks[chunk].incoming;
            let receive = plan_receive(
                incoming,
                &plan.computed_experts,
                rank_plans.len(),
                case.num_experts,
            );
            for (source, send) in sends.iter().enumerate() {
                assert_eq!(send.input_splits[rank], receive.output_splits[source]);
            }
            let arrived = arrived_rows(case, plan, chosen, &sends, rank);
            let ordered: Vec<_> = receive
                .order
                .iter()
                .map(|&row| arrived[row as usize])
                .collect();
            assert!(ordered.is_sorted());
            for (row, &index) in receive.inverse.iter().enumerate() {
                assert_eq!(receive.order[index as usize], row as i32);
            }
            assert_eq!(receive.counts.iter().sum::<i64>() as usize, arrived.len());
        }
        for (experts, send) in chosen.iter().zip(&sends) {
            let mut rows = send.row_of_routed_token.clone();
            rows.sort_unstable();
            let all = 0..(experts.len() * case.topology.slices) as i32;
            assert_eq!(rows, all.collect::<Vec<_>>());
        }
    }

    /// Rows that arrive at `rank`: position in the computed experts, source rank, token.
    fn arrived_rows(
        case: &Case,
        plan: &RankPlan,
        chosen: &[Vec<i64>],
        sends: &[SendPlan],
        rank: usize,
    ) -> Vec<(usize, usize, i32)> {
        let mut arrived = Vec::new();
        for (source, send) in sends.iter().enumerate() {
            let first: i64 = send.input_splits[..rank].iter().sum();
            let mut row = first as usize;
            for expert in 0..case.num_experts {
                for _ in 0..send.counts[rank * case.num_experts + expert] {
                    let position = plan
                        .computed_experts
                        .iter()
                        .position(|&computed| computed == expert)
                        .unwrap_or_else(|| panic!("rank {rank} has no weights of expert {expert}"));
                    let token = send.token_of_row[row];
                    let own = &chosen[source][token as usize * case.top_k..][..case.top_k];
                    assert!(own.contains(&(expert as i64)));
                    arrived.push((position, source, token));
                    row += 1;
                }
            }
        }
        arrived
    }

    fn check_that_unsent_routed_tokens_have_no_row(
        per_token: usize,
        targets: &[Option<(usize, usize)>],
    ) {
        let targets: Vec<Option<RowTarget>> = targets[..targets.len() / per_token * per_token]
            .iter()
            .map(|target| target.map(|(rank, expert)| RowTarget { rank, expert }))
            .collect();
        let routed = RoutedTokens {
            targets,
            per_token,
            num_experts: 4,
        };
        let plan = plan_send(&routed, 3);
        let targets = &routed.targets;
        assert_eq!(plan.token_of_row.len(), targets.iter().flatten().count());
        let mut by_row = vec![None; plan.token_of_row.len()];
        for (index, &row) in plan.row_of_routed_token.iter().enumerate() {
            assert_eq!(row >= 0, targets[index].is_some());
            if row >= 0 {
                let row = row as usize;
                assert_eq!(plan.token_of_row[row] as usize, index / per_token);
                assert!(by_row[row].replace(targets[index].unwrap()).is_none());
            }
        }
        assert!(by_row.is_sorted());
    }

    fn check_counts_by_group(top_k: usize, experts: &[i64], per_group: usize, ranks: usize) {
        let tokens = experts.len() / top_k / (per_group * ranks) * (per_group * ranks);
        let groups = tokens / per_group;
        let all = &experts[..tokens * top_k];
        let ranges = group_ranges(0, tokens, per_group, groups);
        let whole = count_tokens_by_group(all, top_k, &ranges, 7);
        assert_eq!(whole.iter().sum::<f32>() as usize, all.len());
        let mut summed = vec![0f32; whole.len()];
        let len = tokens / ranks;
        for rank in 0..ranks {
            let start = rank * tokens / ranks;
            let own = &all[start * top_k..(start + len) * top_k];
            let ranges = group_ranges(start, len, per_group, groups);
            let counts = count_tokens_by_group(own, top_k, &ranges, 7);
            for (sum, count) in summed.iter_mut().zip(counts) {
                *sum += count;
            }
        }
        assert_eq!(whole, summed);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn every_routed_token_reaches_a_rank_with_its_expert_once(
            case in cases(),
            chunks in 1usize..4,
        ) {
            check_that_every_routed_token_arrives_once(&case, chunks);
        }

        #[test]
        fn routed_tokens_without_a_target_have_no_row(
            per_token in 1usize..5,
            targets in prop::collection::vec(prop::option::of((0usize..3, 0usize..4)), 0..60),
        ) {
            check_that_unsent_routed_tokens_have_no_row(per_token, &targets);
        }

        #[test]
        fn counts_by_group_do_not_depend_on_how_ranks_split_the_tokens(
            top_k in 1usize..4,
            experts in prop::collection::vec(0i64..7, 0..120),
            per_group in 1usize..9,
            ranks in 1usize..5,
        ) {
            check_counts_by_group(top_k, &experts, per_group, ranks);
        }
    }
}
