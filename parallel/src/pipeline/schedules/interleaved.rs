//! Interleaved 1F1B: microbatches go in groups through chunk after chunk.

use crate::pipeline::{Order, Pass, PassKind, Placement};

pub(super) fn order(ranks: usize, microbatches: usize, chunks: usize) -> Result<Order, String> {
    // Groups of equal size of at least `ranks`, so that a group fills the pipeline before the next chunk begins.
    let groups = (microbatches / ranks).max(1);
    if !microbatches.is_multiple_of(groups) {
        let below = microbatches - microbatches % groups;
        return Err(format!(
            "interleaved on {ranks} ranks takes microbatches in {groups} groups, and {microbatches} do not divide by \
             {groups}: use {below} or {}",
            below + groups
        ));
    }
    let size = microbatches / groups;
    // The n-th forward of every rank; backwards take the chunks in reverse.
    let forward = |n: usize| {
        let group = n / (size * chunks);
        let within = n % (size * chunks);
        (within / size, group * size + within % size)
    };
    let total = microbatches * chunks;
    let rank_passes = |rank: usize| {
        let warm_up = (2 * (ranks - 1 - rank) + (chunks - 1) * size).min(total);
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
            list.push(Pass::new(
                PassKind::Backward,
                chunks - 1 - chunk,
                microbatch,
            ));
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
