//! ZB-V (Zero Bubble, arXiv 2401.10241): the fixed order without a bubble if F, B and W take equal
//! times.
//!
//! It is generated for enough microbatches to fill the pipeline; passes of those that do not exist
//! are left out.

use crate::pipeline::{Order, Pass, PassKind, Placement};
use std::collections::HashMap;

pub(super) fn order(ranks: usize, microbatches: usize) -> Order {
    let ranks = (0..ranks)
        .map(|rank| rank_passes(rank, ranks, microbatches))
        .collect();
    Order {
        microbatches,
        chunks: 2,
        placement: Placement::V,
        vocabulary: None,
        ranks,
    }
}

fn rank_passes(rank: usize, ranks: usize, microbatches: usize) -> Vec<Pass> {
    // Enough to fill the pipeline.
    let virtual_microbatches = microbatches.max(2 * ranks - 1);
    let mut next = HashMap::new();
    let mut list = Vec::new();
    // Appends a pass of the next microbatch of a kind and chunk, and returns their number so far.
    let mut push = |kind: PassKind, chunk: usize| -> usize {
        let microbatch = next.entry((kind, chunk)).or_insert(0);
        if *microbatch < microbatches {
            list.push(Pass::new(kind, chunk, *microbatch));
        }
        *microbatch += 1;
        *microbatch
    };
    use PassKind::{BackwardInput as B, BackwardWeight as W, Forward as F};
    let mut forwards0 = 0;
    let mut forwards1 = 0;
    for _ in 0..2 * (ranks - rank) - 1 {
        forwards0 = push(F, 0);
    }
    for _ in 0..rank {
        forwards1 = push(F, 1);
        forwards0 = push(F, 0);
    }
    for _ in 0..ranks - rank {
        forwards1 = push(F, 1);
        push(B, 1);
        push(W, 1);
    }
    while forwards1 < forwards0 || forwards0 < virtual_microbatches {
        if forwards0 < virtual_microbatches {
            forwards0 = push(F, 0);
        }
        push(B, 0);
        push(W, 0);
        forwards1 = push(F, 1);
        push(B, 1);
        push(W, 1);
    }
    for _ in 0..rank {
        push(B, 0);
        push(B, 1);
    }
    for _ in 0..ranks - rank {
        push(B, 0);
        push(W, 0);
    }
    while push(W, 1) < virtual_microbatches {}
    while push(W, 0) < virtual_microbatches {}
    list
}
