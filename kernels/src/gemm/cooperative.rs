//! GEMMs whose right matrices all threads pack together before any thread uses them.

use super::{
    kernel::{CacheLine, Kernel, LANES, reserve_units},
    macrokernel::{GemmTask, PACKED, macrokernel},
    partition::{Block, Wave},
};
use crate::rows::on_threads;
use std::ops::Range;

/// Columns that a thread packs at once, a multiple of a panel.
const CHUNK: usize = 64;

/// The packed right matrices of a wave's blocks, each from its start, one depth after another.
struct PackedBlocks {
    data: *mut CacheLine,
    starts: Vec<usize>,
}

// SAFETY: threads write disjoint parts and read only after all parts are written.
unsafe impl Sync for PackedBlocks {}

impl PackedBlocks {
    fn of(&self, block: usize) -> *mut CacheLine {
        self.data.wrapping_add(self.starts[block])
    }
}

/// Columns of a block, for units of one depth.
struct Chunk {
    block: usize,
    units: Range<usize>,
    columns: Range<usize>,
}

/// Computes one wave after another.
pub(super) fn gemm_batch<K>(tasks: &[GemmTask], waves: &[Wave])
where
    K: Kernel,
{
    PACKED.with_borrow_mut(|buffer| {
        for wave in waves {
            let packed = pack_wave::<K>(tasks, wave, buffer);
            on_threads(wave.parts.len(), |part| {
                for piece in &wave.parts[part] {
                    let Block { task, columns } = &wave.blocks[piece.block];
                    let task = &tasks[*task];
                    let right = packed.of(piece.block);
                    let units = 0..task.units::<K>();
                    let panels = piece.panels.clone();
                    // SAFETY: the processor has the features, `task` in mod.rs has compared the
                    // sizes, the right matrix is packed, and the piece belongs to this thread.
                    unsafe { macrokernel::<K>(task, columns, units, right, panels, || {}) }
                }
            });
        }
    });
}

fn pack_wave<K>(tasks: &[GemmTask], wave: &Wave, buffer: &mut Vec<CacheLine>) -> PackedBlocks
where
    K: Kernel,
{
    let mut starts = Vec::new();
    let mut chunks = Vec::new();
    let mut lines = 0;
    for (index, block) in wave.blocks.iter().enumerate() {
        let units = tasks[block.task].units::<K>();
        starts.push(lines);
        lines += units * block.padded() / LANES;
        for unit in (0..units).step_by(K::DEPTH) {
            for column in block.columns.clone().step_by(CHUNK) {
                let columns = column..(column + CHUNK).min(block.columns.end);
                chunks.push(Chunk {
                    block: index,
                    units: unit..(unit + K::DEPTH).min(units),
                    columns,
                });
            }
        }
    }
    let packed = PackedBlocks {
        data: reserve_units(buffer, lines * LANES),
        starts,
    };
    on_threads(chunks.len(), |chunk| {
        let Chunk {
            block: index,
            units,
            columns,
        } = &chunks[chunk];
        let block = &wave.blocks[*index];
        let earlier_columns = columns.start - block.columns.start;
        let before = units.start * block.padded() + units.len() * earlier_columns;
        // SAFETY: the matrix and the buffer have these sizes, and chunks start at whole lines.
        unsafe {
            let to = packed.of(*index).add(before / LANES);
            K::pack_right(&tasks[block.task].right, units.clone(), columns.clone(), to);
        }
    });
    packed
}
