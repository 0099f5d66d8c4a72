//! 1F1B (PipeDream, arXiv 1806.03377): after a warm-up, one forward and one backward in turn.

use crate::pipeline::{Order, Pass, PassKind, Placement};

pub(super) fn order(ranks: usize, microbatches: usize) -> Order {
    let rank_passes = |rank: usize| {
        let warm_up = (ranks - 1 - rank).min(microbatches);
        let mut list: Vec<Pass> = (0..warm_up)
            .map(|microbatch| Pass::new(PassKind::Forward, 0, microbatch))
            .collect();
        for microbatch in 0..microbatches {
            let ahead = microbatch + warm_up;
            if ahead < microbatches {
                list.push(Pass::new(PassKind::Forward, 0, ahead));
            }
            list.push(Pass::new(PassKind::Backward, 0, microbatch));
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
