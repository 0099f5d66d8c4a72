//! 1F1B.

use crate::pipeline::{Order, Pass, PassKind, Placement};

pub(super) fn order(ranks: usize, microbatches: usize) -> Order {
    let rank_passes = |rank: usize| {
        let warm_up = (ranks - 1 - rank).min(microbatches);
        let mut list: Vec<Pass> = (0..warm_up)
            .map(|k| Pass::new(PassKind::Forward, 0, k))
            .collect();
        for k in 0..microbatches {
            if warm_up + k < microbatches {
                list.push(Pass::new(PassKind::Forward, 0, warm_up + k));
            }
            list.push(Pass::new(PassKind::Backward, 0, k));
        }
        list
    };
    let ranks = (0..ranks).map(rank_passes).collect();
    Order {
        microbatches,
        chunks: 1,
        placement: Placement::Loop,
        vocabulary: None,
        ranks,
    }
}
