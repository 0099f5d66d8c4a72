//! Interleaved 1F1B (Megatron-LM, arXiv 2104.04473): groups of microbatches pass chunk after chunk.

use crate::pipeline::{Order, Pass, PassKind, Placement};

pub(super) fn order(ranks: usize, microbatches: usize, chunks: usize) -> Result<Order, String> {
    // Groups have equal sizes of at least `ranks`, so that each fills the pipeline before the next
    // chunk begins.
    let groups = (microbatches / ranks).max(1);
    if !microbatches.is_multiple_of(groups) {
        let below = microbatches - microbatches % groups;
        let above = below + groups;
        return Err(format!(
            "interleaved on {ranks} ranks splits microbatches into {groups} groups, and {groups} \
             does not divide {microbatches}: use {below} or {above}"
        ));
    }
    let size = microbatches / groups;
    // The chunk and the microbatch of a rank's n-th forward. Backwards take the chunks in reverse.
    let forward = |n: usize| {
        let group = n / (size * chunks);
        let within = n % (size * chunks);
        let chunk = within / size;
        let microbatch = group * size + within % size;
        (chunk, microbatch)
    };
    let total = microbatches * chunks;
    let rank_passes = |rank: usize| {
        let warm_up = 2 * (ranks - 1 - rank) + (chunks - 1) * size;
        let warm_up = warm_up.min(total);
        let forward_pass = |n| {
            let (chunk, microbatch) = forward(n);
            Pass::new(PassKind::Forward, chunk, microbatch)
        };
        let mut list: Vec<Pass> = (0..warm_up).map(forward_pass).collect();
        for n in 0..total {
            if warm_up + n < total {
                list.push(forward_pass(warm_up + n));
            }
            let (chunk, microbatch) = forward(n);
            let chunk = chunks - 1 - chunk;
            list.push(Pass::new(PassKind::Backward, chunk, microbatch));
        }
        list
    };
    let ranks = (0..ranks).map(rank_passes).collect();
    Ok(Order {
        microbatches,
        chunks,
        placement: Placement::Loop,
        vocabulary: None,
        ranks,
    })
}
