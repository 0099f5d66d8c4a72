//! DualPipeV: forward of one microbatch beside backward of another, so that one's communication hides under the other's
//! computation. Weight gradients are split off only while the pipeline fills and drains.

use crate::pipeline::{Order, Pass, PassKind, Placement};
use std::collections::VecDeque;

pub(super) fn order(ranks: usize, microbatches: usize) -> Result<Order, String> {
    if microbatches < 2 * ranks {
        return Err(format!(
            "dualpipe-v on {ranks} ranks needs at least 2 x {ranks} = {} microbatches, not {microbatches}",
            2 * ranks
        ));
    }
    let ranks = (0..ranks)
        .map(|rank| rank_passes(rank, ranks, microbatches))
        .collect();
    Ok(Order {
        microbatches,
        chunks: 2,
        placement: Placement::V,
        vocabulary: None,
        ranks,
    })
}

#[derive(Default)]
struct PassList {
    passes: Vec<Pass>,
    forwards: [usize; 2],
    backwards: [usize; 2],
    waiting: VecDeque<Pass>,
}

impl PassList {
    fn forward(&mut self, chunk: usize) {
        self.passes
            .push(Pass::new(PassKind::Forward, chunk, self.forwards[chunk]));
        self.forwards[chunk] += 1;
    }

    fn backward(&mut self, chunk: usize, split: bool) {
        let kind = if split {
            PassKind::BackwardInput
        } else {
            PassKind::Backward
        };
        let pass = Pass::new(kind, chunk, self.backwards[chunk]);
        self.passes.push(pass);
        self.backwards[chunk] += 1;
        if split {
            self.waiting.push_back(Pass {
                kind: PassKind::BackwardWeight,
                ..pass
            });
        }
    }

    fn weight(&mut self) {
        self.passes.extend(self.waiting.pop_front());
    }
}

fn rank_passes(rank: usize, ranks: usize, microbatches: usize) -> Vec<Pass> {
    let after = ranks - 1 - rank;
    let mut list = PassList::default();
    for _ in 0..2 * after {
        list.forward(0);
    }
    for _ in 0..=rank {
        list.forward(0);
        list.forward(1);
    }
    for _ in 0..after {
        list.backward(1, true);
        list.weight();
        list.forward(1);
    }
    for _ in 0..microbatches + rank + 1 - 2 * ranks {
        list.forward(0);
        list.backward(1, false);
        list.forward(1);
        list.backward(0, false);
    }
    for _ in 0..after {
        list.backward(1, false);
        list.forward(1);
        list.backward(0, false);
    }
    // The second half of these splits, so that the drain has weight gradients to fill in.
    let middle = rank.div_ceil(2);
    for step in 0..=rank {
        let (split1, split0) = if rank % 2 == 1 {
            (step >= middle, step >= middle)
        } else {
            (step > middle, step >= middle)
        };
        list.backward(1, split1);
        list.backward(0, split0);
    }
    for _ in 0..after {
        list.weight();
        list.backward(0, true);
    }
    while !list.waiting.is_empty() {
        list.weight();
    }
    list.passes
}
