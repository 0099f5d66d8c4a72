//! Products of which each thread makes whole blocks, whose right matrices it packs for itself, a depth at a time: what it packed is
//! still in its second cache when it uses it, and what it packs next is fetched meanwhile.

use super::kernel::{CacheLine, Kernel, LANES, ROWS, room};
use super::macrokernel::{GemmTask, PACKED, macrokernel};
use super::partition::Block;
use super::prefetch::Prefetcher;
use crate::rows::on_threads;
use std::ops::Range;

/// All blocks, each by whichever thread is free.
pub(super) fn gemm_batch<K: Kernel>(tasks: &[GemmTask], blocks: &[Block]) {
    let threads = torch_ext::max_parallel_ranges();
    on_threads(blocks.len(), |index| {
        // Which one is this thread's next is not known before; most likely the one after each thread has had one.
        let next = blocks.get(index + threads);
        PACKED.with_borrow_mut(|buffer| make::<K>(tasks, &blocks[index], next, buffer));
    });
}

fn make<K: Kernel>(
    tasks: &[GemmTask],
    block: &Block,
    next: Option<&Block>,
    buffer: &mut Vec<CacheLine>,
) {
    let task = &tasks[block.task];
    let panels = task.size.0.div_ceil(ROWS);
    let padded = block.padded();
    let mut units = first::<K>(task);
    while !units.is_empty() {
        let packed = room(buffer, units.len() * padded);
        for start in units.clone().step_by(K::DEPTH) {
            let deep = start..(start + K::DEPTH).min(units.end);
            let to = packed.wrapping_add((start - units.start) * padded / LANES);
            // SAFETY: inside the matrix and the buffer, by their sizes.
            unsafe { K::right(&task.right, deep, block.columns.clone(), to) }
        }
        let rest = units.end..(units.end + K::DEPTH).min(task.units::<K>());
        let next = if rest.is_empty() {
            next.map(|next| (next, first::<K>(&tasks[next.task])))
        } else {
            Some((block, rest.clone()))
        };
        let tiles = panels
            * block.columns.len().div_ceil(K::LINES * LANES)
            * units.len().div_ceil(K::DEPTH);
        let mut prefetch = next.map(|(block, units)| {
            let right = &tasks[block.task].right;
            let inner = units.start * K::PER_UNIT..(units.end * K::PER_UNIT).min(right.len);
            Prefetcher::of(right, K::SIZE, inner, block.columns.clone(), tiles)
        });
        let fetch = || prefetch.iter_mut().for_each(Prefetcher::fetch);
        // SAFETY: the processor was asked, sizes were compared where the task was made, the block is this thread's alone, and these units
        // of the right matrix were packed above.
        unsafe { macrokernel::<K>(task, &block.columns, units, packed, 0..panels, fetch) }
        units = rest;
    }
}

/// The units that are packed first: all, where sums are rounded when all are summed up.
fn first<K: Kernel>(task: &GemmTask) -> Range<usize> {
    let units = task.units::<K>();
    0..if task.keeps_f32_sums::<K>() {
        units
    } else {
        units.min(K::DEPTH)
    }
}
