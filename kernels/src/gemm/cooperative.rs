//! Products whose right matrices are packed once, by all threads, before any of them uses them.

use super::kernel::{CacheLine, Kernel, LANES, room};
use super::macrokernel::{GemmTask, PACKED, macrokernel};
use super::partition::Wave;
use crate::rows::on_threads;
use std::ops::Range;

/// Columns that a thread packs at once: of whole panels.
const CHUNK: usize = 64;

/// Right matrices of a wave's blocks, packed: each block's lines from its start on, depth after depth.
struct PackedBlocks {
    data: *mut CacheLine,
    starts: Vec<usize>,
}

// SAFETY: threads write parts that do not overlap, and read when all are written.
unsafe impl Sync for PackedBlocks {}

impl PackedBlocks {
    fn of(&self, block: usize) -> *mut CacheLine {
        self.data.wrapping_add(self.starts[block])
    }
}

/// Some columns of a block, some units deep.
struct Chunk {
    block: usize,
    units: Range<usize>,
    columns: Range<usize>,
}

/// All waves' products, one after another.
pub(super) fn gemm_batch<K: Kernel>(tasks: &[GemmTask], waves: &[Wave]) {
    PACKED.with_borrow_mut(|buffer| {
        for wave in waves {
            let packed = pack::<K>(tasks, wave, buffer);
            on_threads(wave.parts.len(), |part| {
                for piece in &wave.parts[part] {
                    let block = &wave.blocks[piece.block];
                    let task = &tasks[block.task];
                    let right = packed.of(piece.block);
                    let units = 0..task.units::<K>();
                    // SAFETY: the processor was asked, sizes were compared where the task was made, what is needed of the right matrix
                    // is packed, and a piece is this thread's alone.
                    unsafe {
                        macrokernel::<K>(
                            task,
                            &block.columns,
                            units,
                            right,
                            piece.panels.clone(),
                            || {},
                        )
                    }
                }
            });
        }
    });
}

fn pack<K: Kernel>(tasks: &[GemmTask], wave: &Wave, buffer: &mut Vec<CacheLine>) -> PackedBlocks {
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
        data: room(buffer, lines * LANES),
        starts,
    };
    on_threads(chunks.len(), |chunk| {
        let Chunk {
            block: index,
            units,
            columns,
        } = &chunks[chunk];
        let block = &wave.blocks[*index];
        let before =
            units.start * block.padded() + units.len() * (columns.start - block.columns.start);
        // SAFETY: inside the matrix and the buffer, by their sizes: chunks begin with whole lines.
        unsafe {
            let to = packed.of(*index).add(before / LANES);
            K::right(&tasks[block.task].right, units.clone(), columns.clone(), to);
        }
    });
    packed
}
