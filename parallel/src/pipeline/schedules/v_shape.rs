//! V-Half and V-Min (Controllable Memory, arXiv 2405.15362, section 4).
//!
//! A building block of four offsets repeats every six time slots. Weight gradients take the free
//! slots. Only the order of the passes is kept.

use crate::pipeline::{Order, Pass, PassKind, Placement};
use std::collections::VecDeque;

/// The time slots of microbatch 0 on each rank: F and B of chunks 0 and 1.
pub(super) struct BuildingBlock {
    f0: Vec<usize>,
    f1: Vec<usize>,
    b1: Vec<usize>,
    b0: Vec<usize>,
}

/// Time slots from one microbatch to the next: F, B and W of two chunks.
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
        let mut timed: Vec<(usize, Pass)> = Vec::new();
        for (kind, chunk, start) in starts {
            for microbatch in 0..microbatches {
                let slot = start + PERIOD * microbatch;
                timed.push((slot, Pass::new(kind, chunk, microbatch)));
            }
        }
        timed.sort();
        let mut list = Vec::new();
        let mut waiting = VecDeque::new();
        let mut slot = 0;
        for (start, pass) in timed {
            // The slots before this pass are free.
            while slot < start {
                list.extend(waiting.pop_front());
                slot += 1;
            }
            list.push(pass);
            slot = start + 1;
            if pass.kind == B {
                let kind = PassKind::BackwardWeight;
                waiting.push_back(Pass { kind, ..pass });
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
