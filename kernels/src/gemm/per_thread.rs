//! GEMMs of which each thread computes whole blocks.
//!
//! A thread packs the right matrix of a block for itself, one depth at a time. The packed depth is
//! still in the L2 cache when it is used, and the next depth is prefetched meanwhile.

use super::{
    kernel::{CacheLine, Kernel, LANES, reserve_units},
    macrokernel::{GemmTask, PACKED, macrokernel},
    partition::Block,
    prefetch::Prefetcher,
};
use crate::rows::on_threads;
use std::ops::Range;

/// Computes all blocks; each thread takes the next block when it is free.
pub(super) fn gemm_batch<K>(tasks: &[GemmTask], blocks: &[Block])
where
    K: Kernel,
{
    let threads = torch_ext::max_parallel_ranges();
    on_threads(blocks.len(), |index| {
        // A guess at this thread's next block: the one after each thread has taken another.
        let next = blocks.get(index + threads);
        PACKED.with_borrow_mut(|buffer| compute_block::<K>(tasks, &blocks[index], next, buffer));
    });
}

fn compute_block<K>(
    tasks: &[GemmTask],
    block: &Block,
    next: Option<&Block>,
    buffer: &mut Vec<CacheLine>,
) where
    K: Kernel,
{
    let task = &tasks[block.task];
    let panels = task.size.panels();
    let padded = block.padded();
    let mut units = first::<K>(task);
    while !units.is_empty() {
        let packed = reserve_units(buffer, units.len() * padded);
        for start in units.clone().step_by(K::DEPTH) {
            let deep = start..(start + K::DEPTH).min(units.end);
            let to = packed.wrapping_add((start - units.start) * padded / LANES);
            // SAFETY: the matrix and the buffer have these sizes.
            unsafe { K::pack_right(&task.right, deep, block.columns.clone(), to) }
        }
        let rest = units.end..(units.end + K::DEPTH).min(task.units::<K>());
        let next = if rest.is_empty() {
            next.map(|next| (next, first::<K>(&tasks[next.task])))
        } else {
            Some((block, rest.clone()))
        };
        let tiles_across = block.columns.len().div_ceil(K::LINES * LANES);
        let tiles = panels * tiles_across * units.len().div_ceil(K::DEPTH);
        let mut prefetch = next.map(|(block, units)| {
            let right = &tasks[block.task].right;
            let end = (units.end * K::PER_UNIT).min(right.len);
            let inner = units.start * K::PER_UNIT..end;
            Prefetcher::of(right, K::SIZE, inner, block.columns.clone(), tiles)
        });
        let fetch = || {
            if let Some(prefetch) = &mut prefetch {
                prefetch.fetch();
            }
        };
        // SAFETY: the processor has the features, `task` in mod.rs has compared the sizes, the
        // block belongs to this thread, and these units are packed.
        unsafe { macrokernel::<K>(task, &block.columns, units, packed, 0..panels, fetch) }
        units = rest;
    }
}

/// Returns the units that are packed first: all of them if sums are rounded at the end.
fn first<K>(task: &GemmTask) -> Range<usize>
where
    K: Kernel,
{
    let units = task.units::<K>();
    if task.keeps_f32_sums::<K>() {
        0..units
    } else {
        0..units.min(K::DEPTH)
    }
}
