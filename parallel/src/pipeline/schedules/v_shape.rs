//! V-Half and V-Min: a building block of four offsets, repeated every six slots of time; weight gradients take the free
//! slots (arXiv 2405.15362, section 4). Only the order of the passes is kept.

use crate::pipeline::{Order, Pass, PassKind, Placement};
use std::collections::VecDeque;

/// Times of microbatch 0 on each rank, in slots: F and B of chunk 0 and 1.
pub(super) struct BuildingBlock {
    f0: Vec<usize>,
    f1: Vec<usize>,
    b1: Vec<usize>,
    b0: Vec<usize>,
}

/// Slots from a microbatch to the next: F, B and W of two chunks.
const PERIOD: usize = 6;

pub(super) fn half(p: usize) -> BuildingBlock {
    let extra = if p.is_multiple_of(2) { 3 } else { 0 };
    BuildingBlock {
        f0: (0..p).map(|i| 2 * i).collect(),
        f1: (0..p).map(|i| 3 * p - i - 2).collect(),
        b1: (0..p).map(|i| 3 * p + extra + 2 * i - 1).collect(),
        b0: (0..p).map(|i| 6 * p + extra - i - 2).collect(),
    }
}

pub(super) fn min(p: usize) -> BuildingBlock {
    let extra = if p.is_multiple_of(3) { 2 } else { 0 };
    BuildingBlock {
        f0: (0..p).collect(),
        f1: (0..p).map(|i| 2 * p - i - 1).collect(),
        b1: (0..p).map(|i| 2 * p + extra + i).collect(),
        b0: (0..p).map(|i| 4 * p + extra - i - 1).collect(),
    }
}

pub(super) fn order(block: BuildingBlock, ranks: usize, microbatches: usize) -> Order {
    let rank_passes = |rank: usize| {
        use PassKind::{BackwardInput as B, Forward as F};
        let starts = [
            (F, 0, block.f0[rank]),
            (F, 1, block.f1[rank]),
            (B, 1, block.b1[rank]),
            (B, 0, block.b0[rank]),
        ];
        let mut timed: Vec<(usize, Pass)> = starts
            .iter()
            .flat_map(|&(kind, chunk, start)| {
                (0..microbatches).map(move |k| (start + PERIOD * k, Pass::new(kind, chunk, k)))
            })
            .collect();
        timed.sort();
        let mut list = Vec::new();
        let mut waiting = VecDeque::new();
        let mut slot = 0;
        for (start, pass) in timed {
            // Slots before this pass are free.
            while slot < start {
                list.extend(waiting.pop_front());
                slot += 1;
            }
            list.push(pass);
            slot = start + 1;
            if pass.kind == B {
                waiting.push_back(Pass {
                    kind: PassKind::BackwardWeight,
                    ..pass
                });
            }
        }
        list.extend(waiting);
        list
    };
    let ranks = (0..ranks).map(rank_passes).collect();
    Order {
        microbatches,
        chunks: 2,
        placement: Placement::V,
        vocabulary: None,
        ranks,
    }
}
