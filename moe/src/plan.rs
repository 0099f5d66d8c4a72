//! Dispatch plans: which row goes where, as pure functions of plain numbers.
//!
//! A *slot* is one (token, choice) pair. Slots are ordered by expert, so those for one rank are neighbours, and
//! within an expert by token. A rank owns `experts / ranks` consecutive experts.

use std::ops::Range;

/// How a rank's own tokens are laid out for sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendPlan {
    /// The token of each slot, `[T * K]`.
    pub token_of_slot: Vec<i64>,
    /// The slot of each (token, choice), token-major, `[T * K]`.
    pub slot_of_choice: Vec<i64>,
    /// Slots for each expert, `[E]`.
    pub counts: Vec<i64>,
}

/// Sorts the choices `experts` `[T * K]`, token-major, by expert.
pub fn plan_send(experts: &[i64], top_k: usize, num_experts: usize) -> SendPlan {
    let mut counts = vec![0i64; num_experts];
    for &expert in experts {
        counts[expert as usize] += 1;
    }
    let mut next = exclusive_sum(&counts);
    let mut token_of_slot = vec![0i64; experts.len()];
    let mut slot_of_choice = vec![0i64; experts.len()];
    for (choice, &expert) in experts.iter().enumerate() {
        let slot = next[expert as usize];
        next[expert as usize] += 1;
        token_of_slot[slot as usize] = (choice / top_k) as i64;
        slot_of_choice[choice] = slot;
    }
    SendPlan { token_of_slot, slot_of_choice, counts }
}

/// How received rows, which come rank by rank, are laid out expert by expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivePlan {
    /// Rows from each rank.
    pub rows_from: Vec<i64>,
    /// For each place in expert order, the received row that belongs there.
    pub order: Vec<i64>,
    /// For each received row, its place in expert order.
    pub place: Vec<i64>,
    /// Rows for each local expert.
    pub counts: Vec<i64>,
}

/// From `counts`, rank-major `[ranks * local experts]`: how many rows each rank sends for each local expert.
pub fn plan_receive(counts: &[i64], num_ranks: usize) -> ReceivePlan {
    let local = counts.len() / num_ranks;
    let rows_from: Vec<i64> = counts.chunks(local).map(|rank| rank.iter().sum()).collect();
    let starts = exclusive_sum(counts);
    let total: i64 = counts.iter().sum();
    let mut order = Vec::with_capacity(total as usize);
    let mut place = vec![0i64; total as usize];
    for expert in 0..local {
        for rank in 0..num_ranks {
            let cell = rank * local + expert;
            for row in starts[cell]..starts[cell] + counts[cell] {
                place[row as usize] = order.len() as i64;
                order.push(row);
            }
        }
    }
    let counts = (0..local).map(|expert| counts.iter().skip(expert).step_by(local).sum()).collect();
    ReceivePlan { rows_from, order, place, counts }
}

/// Where experts are split, each choice becomes `slices` choices, one for every rank with a slice of the expert: the
/// numbers that `choices` of `num_experts` experts on `owners` groups of `slices` ranks then have.
pub fn spread(choices: &[i64], num_experts: usize, owners: usize, slices: usize) -> Vec<i64> {
    let local = (num_experts / owners) as i64;
    let slices = slices as i64;
    let of_slice = |expert: i64, slice: i64| (expert / local * slices + slice) * local + expert % local;
    choices.iter().flat_map(|&expert| (0..slices).map(move |slice| of_slice(expert, slice))).collect()
}

/// Which of a rank's rows belong to each of `groups` groups of `per_group` rows, where its `rows` rows begin at `start`.
pub fn segments(start: usize, rows: usize, per_group: usize, groups: usize) -> Vec<Range<usize>> {
    let inside = |row: usize| row.clamp(start, start + rows) - start;
    (0..groups).map(|group| inside(group * per_group)..inside((group + 1) * per_group)).collect()
}

/// Choices of each expert among the tokens of each group, group-major `[G * E]`.
pub fn count_choices(experts: &[i64], top_k: usize, groups: &[Range<usize>], num_experts: usize) -> Vec<f32> {
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
    use proptest::prelude::*;

    /// Choices of `top_k` distinct experts for each token.
    fn choices() -> impl Strategy<Value = (Vec<i64>, usize, usize)> {
        (1usize..12, 0usize..40).prop_flat_map(|(num_experts, tokens)| {
            (1..=num_experts).prop_flat_map(move |top_k| {
                let row = Just((0..num_experts as i64).collect::<Vec<_>>()).prop_shuffle();
                prop::collection::vec(row, tokens).prop_map(move |rows| {
                    (rows.into_iter().flat_map(|row| row.into_iter().take(top_k)).collect(), top_k, num_experts)
                })
            })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn sending_sorts_every_choice_by_expert_and_token((experts, top_k, num_experts) in choices()) {
            let plan = plan_send(&experts, top_k, num_experts);
            prop_assert_eq!(plan.counts.iter().sum::<i64>() as usize, experts.len());
            let starts = exclusive_sum(&plan.counts);
            let mut seen = vec![false; experts.len()];
            for (choice, &expert) in experts.iter().enumerate() {
                let slot = plan.slot_of_choice[choice] as usize;
                prop_assert!(!std::mem::replace(&mut seen[slot], true));
                prop_assert_eq!(plan.token_of_slot[slot] as usize, choice / top_k);
                let start = starts[expert as usize];
                prop_assert!((start..start + plan.counts[expert as usize]).contains(&(slot as i64)));
            }
            for (start, count) in starts.iter().zip(&plan.counts) {
                let range = *start as usize..(start + count) as usize;
                prop_assert!(plan.token_of_slot[range].is_sorted());
            }
        }

        #[test]
        fn receiving_sorts_by_expert_and_then_rank(
            (num_ranks, counts) in (1usize..5, 1usize..5).prop_flat_map(|(ranks, local)| {
                (Just(ranks), prop::collection::vec(0i64..6, ranks * local))
            }),
        ) {
            let plan = plan_receive(&counts, num_ranks);
            let local = counts.len() / num_ranks;
            // What each received row is, in the order it comes.
            let rows: Vec<_> = (0..num_ranks)
                .flat_map(|rank| (0..local).flat_map(move |expert| (0..6).map(move |i| (expert, rank, i))))
                .filter(|&(expert, rank, i)| i < counts[rank * local + expert])
                .collect();
            let sorted: Vec<_> = plan.order.iter().map(|&row| rows[row as usize]).collect();
            prop_assert!(sorted.is_sorted());
            for (row, &place) in plan.place.iter().enumerate() {
                prop_assert_eq!(plan.order[place as usize], row as i64);
            }
            prop_assert_eq!(plan.rows_from.iter().sum::<i64>(), counts.iter().sum::<i64>());
            prop_assert_eq!(plan.counts.iter().sum::<i64>(), counts.iter().sum::<i64>());
        }

        #[test]
        fn choices_are_counted_by_group_however_ranks_split_the_tokens(
            (experts, top_k, num_experts) in choices(), per_group in 1usize..9, ranks in 1usize..5,
        ) {
            let tokens = experts.len() / top_k / (per_group * ranks) * (per_group * ranks);
            let groups = tokens / per_group;
            let all = &experts[..tokens * top_k];
            let whole = count_choices(all, top_k, &segments(0, tokens, per_group, groups), num_experts);
            prop_assert_eq!(whole.iter().sum::<f32>() as usize, all.len());
            let mut summed = vec![0f32; whole.len()];
            for rank in 0..ranks {
                let (start, len) = (rank * tokens / ranks, tokens / ranks);
                let own = &all[start * top_k..(start + len) * top_k];
                let counts = count_choices(own, top_k, &segments(start, len, per_group, groups), num_experts);
                summed.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
            prop_assert_eq!(whole, summed);
        }

        #[test]
        fn a_split_expert_is_chosen_on_every_rank_with_a_slice(
            owners in 1usize..5, local in 1usize..4, slices in 1usize..4, choices in prop::collection::vec(0i64..1000, 0..30),
        ) {
            let num_experts = owners * local;
            let choices: Vec<i64> = choices.into_iter().map(|choice| choice % num_experts as i64).collect();
            let spread = spread(&choices, num_experts, owners, slices);
            for (&expert, places) in choices.iter().zip(spread.chunks(slices)) {
                for (slice, &place) in places.iter().enumerate() {
                    let (rank, on_rank) = (place as usize / local, place as usize % local);
                    prop_assert_eq!((rank / slices, rank % slices), (expert as usize / local, slice));
                    prop_assert_eq!(on_rank, expert as usize % local);
                }
            }
        }
    }
}
