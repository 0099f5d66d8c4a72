//! DualPipeV: overlaps the forward of one microbatch with the backward of another.
//!
//! The communication of one hides behind the computation of the other. It is DualPipe
//! (DeepSeek-V3, arXiv 2412.19437), cut in half by Sea AI Lab. Weight gradients are split off only
//! while the pipeline fills and drains.

use crate::pipeline::{Order, Pass, PassKind, Placement};
use std::collections::VecDeque;

pub(super) fn order(ranks: usize, microbatches: usize) -> Result<Order, String> {
    if microbatches < 2 * ranks {
        let least = 2 * ranks;
        return Err(format!(
            "dualpipe-v on {ranks} ranks needs at least 2 x {ranks} = {least} microbatches, \
             not {microbatches}"
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
    /// Number of forwards so far, for each chunk.
    forwards: [usize; 2],
    /// Number of backwards so far, for each chunk.
    backwards: [usize; 2],
    /// Weight gradients that are split off and not computed yet.
    waiting: VecDeque<Pass>,
}

impl PassList {
    fn forward(&mut self, chunk: usize) {
        let microbatch = self.forwards[chunk];
        self.passes
            .push(Pass::new(PassKind::Forward, chunk, microbatch));
        self.forwards[chunk] += 1;
    }

    fn backward(&mut self, chunk: usize) {
        self.next_backward(PassKind::Backward, chunk);
    }

    /// Appends B; its W waits.
    fn split_backward(&mut self, chunk: usize) {
        let pass = self.next_backward(PassKind::BackwardInput, chunk);
        let kind = PassKind::BackwardWeight;
        self.waiting.push_back(Pass { kind, ..pass });
    }

    fn backward_split_if(&mut self, is_split: bool, chunk: usize) {
        if is_split {
            self.split_backward(chunk);
        } else {
            self.backward(chunk);
        }
    }

    fn next_backward(&mut self, kind: PassKind, chunk: usize) -> Pass {
        let pass = Pass::new(kind, chunk, self.backwards[chunk]);
        self.passes.push(pass);
        self.backwards[chunk] += 1;
        pass
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
        list.split_backward(1);
        list.weight();
        list.forward(1);
    }
    for _ in 0..microbatches + rank + 1 - 2 * ranks {
        list.forward(0);
        list.backward(1);
        list.forward(1);
        list.backward(0);
    }
    for _ in 0..after {
        list.backward(1);
        list.forward(1);
        list.backward(0);
    }
    // The second half of these is split, so that weight gradients can fill the drain.
    let middle = rank.div_ceil(2);
    for step in 0..=rank {
        let is_odd = rank % 2 == 1;
        list.backward_split_if(step > middle || (is_odd && step == middle), 1);
        list.backward_split_if(step >= middle, 0);
    }
    for _ in 0..after {
        list.weight();
        list.split_backward(0);
    }
    while !list.waiting.is_empty() {
        list.weight();
    }
    list.passes
}
