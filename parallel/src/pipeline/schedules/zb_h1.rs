//! ZB-H1 (Zero Bubble, arXiv 2401.10241): 1F1B with delayed weight gradients.
//!
//! On rank `i` up to `i` weight gradients wait, and fill the bubble at the end.

use super::one_f_one_b;
use crate::pipeline::{Order, Pass, PassKind};
use std::collections::VecDeque;

pub(super) fn order(ranks: usize, microbatches: usize) -> Order {
    let mut order = one_f_one_b::order(ranks, microbatches);
    for (rank, list) in order.ranks.iter_mut().enumerate() {
        let mut waiting = VecDeque::new();
        let mut split = Vec::new();
        for pass in list.iter() {
            if pass.kind != PassKind::Backward {
                split.push(*pass);
                continue;
            }
            split.push(Pass {
                kind: PassKind::BackwardInput,
                ..*pass
            });
            waiting.push_back(Pass {
                kind: PassKind::BackwardWeight,
                ..*pass
            });
            if waiting.len() > rank {
                split.extend(waiting.pop_front());
            }
        }
        split.extend(waiting);
        *list = split;
    }
    order
}
