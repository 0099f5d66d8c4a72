//! Products of which each thread makes whole blocks, whose right matrices it packs for itself, a depth at a time: what it packed is
//! still in its second cache when it uses it, and what it packs next is fetched meanwhile.

use super::ahead::Ahead;
use super::kernel::{Kernel, LANES, Line, ROWS, room};
use super::share::Block;
use super::work::{Job, PACKED, work};
use crate::rows::on_threads;
use std::ops::Range;

/// All blocks, each by whichever thread is free.
pub(super) fn multiply<K: Kernel>(jobs: &[Job], blocks: &[Block]) {
    let threads = torch_ext::parallel_parts();
    on_threads(blocks.len(), |index| {
        // Which one is this thread's next is not known before; most likely the one after each thread has had one.
        let next = blocks.get(index + threads);
        PACKED.with_borrow_mut(|buffer| make::<K>(jobs, &blocks[index], next, buffer));
    });
}

fn make<K: Kernel>(jobs: &[Job], block: &Block, next: Option<&Block>, buffer: &mut Vec<Line>) {
    let job = &jobs[block.product];
    let panels = job.size.0.div_ceil(ROWS);
    let padded = block.padded();
    let mut units = first::<K>(job);
    while !units.is_empty() {
        let packed = room(buffer, units.len() * padded);
        for start in units.clone().step_by(K::DEPTH) {
            let deep = start..(start + K::DEPTH).min(units.end);
            let to = packed.wrapping_add((start - units.start) * padded / LANES);
            // SAFETY: inside the matrix and the buffer, by their sizes.
            unsafe { K::right(&job.right, deep, block.columns.clone(), to) }
        }
        let rest = units.end..(units.end + K::DEPTH).min(job.units::<K>());
        let next = if rest.is_empty() {
            next.map(|next| (next, first::<K>(&jobs[next.product])))
        } else {
            Some((block, rest.clone()))
        };
        let tiles = panels
            * block.columns.len().div_ceil(K::LINES * LANES)
            * units.len().div_ceil(K::DEPTH);
        let mut ahead = next.map(|(block, units)| {
            let right = &jobs[block.product].right;
            let inner = units.start * K::PER_UNIT..(units.end * K::PER_UNIT).min(right.len);
            Ahead::of(right, K::SIZE, inner, block.columns.clone(), tiles)
        });
        let fetch = || ahead.iter_mut().for_each(Ahead::fetch);
        // SAFETY: the processor was asked, sizes were compared where the job was made, the block is this thread's alone, and these units
        // of the right matrix were packed above.
        unsafe { work::<K>(job, &block.columns, units, packed, 0..panels, fetch) }
        units = rest;
    }
}

/// The units that are packed first: all, where sums are rounded when all are summed up.
fn first<K: Kernel>(job: &Job) -> Range<usize> {
    let units = job.units::<K>();
    0..if job.keeps::<K>() {
        units
    } else {
        units.min(K::DEPTH)
    }
}
