//! Uneven loads of experts.
//!
//! Some send a share of the tokens to a few experts, as in the LLEP paper's layer test. The others
//! are the eight workloads proposed for Megatron Core (its issue 7488).

use crate::hint::hinted;
use anyhow::{Result, anyhow};

/// The tokens of one rank in one round.
#[derive(Clone, Copy)]
pub(super) struct RankBatch {
    pub(super) tokens: usize,
    pub(super) experts: usize,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    pub(super) round: usize,
}

/// A distribution of tokens over experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Workload {
    Balanced,
    /// A share of the tokens chooses among the first experts, which rank 0 holds; the others choose
    /// among the rest.
    Share {
        share: f64,
        hot: usize,
    },
    /// W1: half of the tokens choose one of two experts.
    HotExperts,
    /// W2: four of five tokens choose experts of rank 0.
    HotRank,
    /// W3: half of the tokens choose among one expert of each rank.
    SpreadHeat,
    /// W4: ranks have different numbers of tokens, and half of them choose one of two experts.
    RaggedSources,
    /// W5: no token chooses the last rank's experts, nor every second one of the others.
    Unused,
    /// W6: the hot expert changes each round.
    Rotating,
    /// W7: one expert is hot in every fourth round; in the others the load is even.
    Burst,
}

pub(super) const NAMED_WORKLOADS: [(&str, Workload); 9] = [
    ("balanced", Workload::Balanced),
    ("w0", Workload::Balanced),
    ("w1", Workload::HotExperts),
    ("w2", Workload::HotRank),
    ("w3", Workload::SpreadHeat),
    ("w4", Workload::RaggedSources),
    ("w5", Workload::Unused),
    ("w6", Workload::Rotating),
    ("w7", Workload::Burst),
];

/// Parses `balanced`, `w0` to `w7`, or `PERCENT:EXPERTS`.
pub(super) fn parse(case: &str) -> Result<Workload> {
    if let Some((_, workload)) = NAMED_WORKLOADS.iter().find(|(name, _)| *name == case) {
        return Ok(*workload);
    }
    if let Some((share, hot)) = case.split_once(':')
        && let (Ok(share), Ok(hot)) = (share.parse::<f64>(), hot.parse::<usize>())
        && (0.0..=100.0).contains(&share)
        && hot > 0
    {
        return Ok(Workload::Share {
            share: share / 100.0,
            hot,
        });
    }
    Err(hinted(
        anyhow!("--case {case}: no such workload"),
        "use balanced, w0 to w7, or PERCENT:EXPERTS such as 95:1",
    ))
}

impl Workload {
    /// Returns the default number of experts on `ranks` ranks.
    pub(super) fn experts(self, ranks: usize) -> usize {
        let multiple = ranks.max(8).next_multiple_of(ranks);
        match self {
            Workload::Share { hot, .. } => multiple * hot,
            _ => 2 * multiple,
        }
    }

    pub(super) fn top_k(self) -> usize {
        match self {
            Workload::Share { hot: 1, .. } => 1,
            _ => 2,
        }
    }

    /// Returns the number of rounds after which the load repeats, if rounds differ.
    pub(super) fn cycle(self) -> usize {
        match self {
            Workload::Burst => 4,
            _ => 1,
        }
    }

    /// Returns the probability of each expert to be a token's first choice in this round.
    ///
    /// The probabilities are not normalised.
    pub(super) fn weights(self, experts: usize, ranks: usize, round: usize) -> Vec<f64> {
        let local = experts / ranks;
        let even = 1.0 / experts as f64;
        let hot = |is_hot: &dyn Fn(usize) -> bool, share: f64| {
            let count = (0..experts).filter(|&expert| is_hot(expert)).count();
            let weight = |expert| {
                if is_hot(expert) {
                    share / count as f64
                } else {
                    (1.0 - share) / (experts - count).max(1) as f64
                }
            };
            (0..experts).map(weight).collect::<Vec<f64>>()
        };
        match self {
            Workload::Balanced => vec![even; experts],
            Workload::Share { share, hot: count } => hot(&|expert| expert < count, share),
            Workload::HotExperts => hot(&|expert| expert == 1 || expert == 2, 0.5),
            Workload::HotRank => hot(&|expert| expert < local, 0.8),
            Workload::SpreadHeat => hot(&|expert| expert % local == 0, 0.5),
            Workload::RaggedSources => hot(&|expert| expert < 2, 0.5),
            Workload::Unused => hot(&|expert| expert < experts - local && expert % 2 == 0, 1.0),
            Workload::Rotating => hot(&|expert| expert == round * 5 % experts, 0.5),
            Workload::Burst if round.is_multiple_of(4) => hot(&|expert| expert == 0, 0.95),
            Workload::Burst => vec![even; experts],
        }
    }

    /// Returns the tokens of rank `rank`; over all ranks their mean is `tokens`.
    pub(super) fn tokens(self, tokens: usize, rank: usize, ranks: usize) -> usize {
        match self {
            Workload::RaggedSources => 2 * tokens * (rank + 1) / (ranks + 1),
            _ => tokens,
        }
    }

    /// Draws the expert ids of a batch, `[T * K]`. Those of one token are distinct.
    ///
    /// With a share, all experts of a token are among the hot ones, or none is, while there are
    /// enough.
    pub(super) fn expert_ids(self, batch: RankBatch) -> Vec<i64> {
        let RankBatch {
            tokens,
            experts,
            rank,
            ranks,
            round,
        } = batch;
        let top_k = self.top_k();
        let weights = self.weights(experts, ranks, round);
        let mut state = ((rank + ranks * round) as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut random = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut draw = |weights: &[f64]| {
            let mut left = random() * weights.iter().sum::<f64>();
            let chosen = weights.iter().position(|weight| {
                left -= weight;
                left < 0.0
            });
            chosen.unwrap_or_else(|| {
                weights
                    .iter()
                    .rposition(|&weight| weight > 0.0)
                    .unwrap_or(0)
            })
        };
        let mut chosen = Vec::with_capacity(tokens * top_k);
        for _ in 0..tokens {
            let first = draw(&weights);
            chosen.push(first as i64);
            let mut rest = weights.clone();
            if let Workload::Share { hot, .. } = self {
                let same = |expert: usize| (expert < hot) == (first < hot);
                for expert in (0..experts).filter(|&expert| !same(expert)) {
                    rest[expert] = 0.0;
                }
            }
            rest[first] = 0.0;
            for _ in 1..top_k {
                let next = draw(&rest);
                rest[next] = 0.0;
                chosen.push(next as i64);
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_as_requested_and_choices_distinct() {
        for (case, hot, expected) in [("95:1", 1, 0.95), ("30:4", 4, 0.3), ("80:16", 16, 0.8)] {
            let workload = parse(case).unwrap();
            let experts = workload.experts(2);
            let chosen = workload.expert_ids(RankBatch {
                tokens: 4000,
                experts,
                rank: 1,
                ranks: 2,
                round: 0,
            });
            let share = chosen.iter().filter(|&&e| e < hot).count() as f64 / chosen.len() as f64;
            assert!((share - expected).abs() < 0.03, "{case}: {share}");
            for token in chosen.chunks(workload.top_k()) {
                let mut choices = token.iter().enumerate();
                assert!(choices.all(|(index, expert)| !token[..index].contains(expert)));
            }
        }
        assert_eq!(parse("w5").unwrap(), Workload::Unused);
        for wrong in ["w8", "95", "101:1", "5:0", "x:y"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn workloads_are_what_their_names_say() {
        let counts = |name: &str, rank: usize, round: usize| {
            let workload = parse(name).unwrap();
            let chosen = workload.expert_ids(RankBatch {
                tokens: workload.tokens(2000, rank, 4),
                experts: 16,
                rank,
                ranks: 4,
                round,
            });
            let mut counts = vec![0usize; 16];
            for expert in chosen {
                counts[expert as usize] += 1;
            }
            counts
        };
        let of_rank = |counts: &[usize], rank: usize| counts[rank * 4..][..4].iter().sum::<usize>();
        assert!(of_rank(&counts("w2", 0, 0), 0) > 2400);
        let spread = counts("w3", 0, 0);
        assert!(
            (0..4)
                .all(|rank| of_rank(&spread, rank).abs_diff(1000) < 120 && spread[rank * 4] > 350)
        );
        assert_eq!(
            counts("w4", 0, 0).iter().sum::<usize>() * 4,
            counts("w4", 3, 0).iter().sum::<usize>()
        );
        assert_eq!(of_rank(&counts("w5", 0, 0), 3), 0);
        assert_ne!(counts("w6", 0, 0), counts("w6", 0, 1));
        assert!(counts("w7", 0, 4)[0] > 1800 && counts("w7", 0, 5)[0] < 400);
    }
}
