//! GPipe (arXiv 1811.06965): all forwards, then all backwards.

use crate::pipeline::{Order, Pass, PassKind, Placement};

pub(super) fn order(ranks: usize, microbatches: usize) -> Order {
    let all = |kind| (0..microbatches).map(move |microbatch| Pass::new(kind, 0, microbatch));
    let list: Vec<Pass> = all(PassKind::Forward)
        .chain(all(PassKind::Backward))
        .collect();
    Order {
        microbatches,
        chunks: 1,
        placement: Placement::Loop,
        vocabulary: None,
        ranks: vec![list; ranks],
    }
}
