//! The loops of one thread over depths, panels and tiles.

use super::{
    kernel::{
        CacheLine, Kernel, LANES, Layout, MAX_PACKED_PANELS, Operand, ROWS, Store, TileOutput,
        mask, reserve_units,
    },
    partition::GemmSize,
};
use crate::number::{Bf16, Number};
use std::{cell::RefCell, ops::Range};

/// Number of panels whose sums stay in fp32 until they are complete.
const ROUNDED_PANELS: usize = 64;

/// One GEMM of a batch.
pub(super) struct GemmTask {
    pub(super) out: *mut u8,
    /// Bytes from one row of `out` to the next.
    pub(super) out_row_stride: usize,
    /// True if `out` is bf16.
    pub(super) rounds: bool,
    pub(super) accumulate: bool,
    pub(super) left: Operand,
    pub(super) right: Operand,
    pub(super) size: GemmSize,
}

// SAFETY: threads only read the operands, and they write disjoint parts of `out`.
unsafe impl Sync for GemmTask {}

impl GemmTask {
    /// Returns the length of the inner dimension in units.
    pub(super) fn units<K>(&self) -> usize
    where
        K: Kernel,
    {
        self.size.k.div_ceil(K::PER_UNIT)
    }

    /// True if sums stay in fp32 until they are complete, and are rounded then.
    pub(super) fn keeps_f32_sums<K>(&self) -> bool
    where
        K: Kernel,
    {
        self.rounds && (self.accumulate || self.units::<K>() > K::DEPTH)
    }
}

thread_local! {
    /// A packed right matrix, for this thread or for all threads.
    pub(super) static PACKED: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
    /// Packed panels of a left matrix.
    static LEFT: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
    /// The fp32 sums of bf16 outputs.
    static SUMS: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
}

/// Computes panels of some columns of a task.
///
/// `right` is the packed right matrix for `units` of the inner dimension, one [`Kernel::DEPTH`]
/// after another. If sums stay in fp32, these are all units. `between` is called before each tile.
///
/// # Safety
/// The processor has the features, the tensors of the task are alive, and no other thread works on
/// these panels and columns.
pub(super) unsafe fn macrokernel<K>(
    task: &GemmTask,
    columns: &Range<usize>,
    units: Range<usize>,
    right: *const CacheLine,
    panels: Range<usize>,
    mut between: impl FnMut(),
) where
    K: Kernel,
{
    let m = task.size.m;
    let width = columns.len();
    let rows_of = |panel: usize| (m - panel * ROWS).min(ROWS);
    let kept = task.keeps_f32_sums::<K>();
    let padded = width.next_multiple_of(LANES);
    // The addresses stay valid: nothing else on this thread uses the buffers during the call.
    let sums_units = if kept {
        ROUNDED_PANELS * ROWS * padded
    } else {
        0
    };
    let sums = SUMS
        .with_borrow_mut(|buffer| reserve_units(buffer, sums_units))
        .cast::<f32>();
    let panels_per_pass = if kept {
        ROUNDED_PANELS
    } else {
        panels.len().max(1)
    };
    let layout = K::layout(&task.left);
    let at_once = K::panels(layout);
    let left_units = if layout == Layout::InPlace {
        0
    } else {
        at_once * ROWS * K::DEPTH.min(units.len())
    };
    let packed_left = LEFT
        .with_borrow_mut(|buffer| reserve_units(buffer, left_units))
        .cast::<u32>();
    for start in panels.clone().step_by(panels_per_pass) {
        let panels = start..(start + panels_per_pass).min(panels.end);
        if kept && task.accumulate {
            // SAFETY: the rows belong to this call, and the buffer has as many.
            unsafe { widen(task, columns, &panels, sums, padded) };
        }
        for unit in units.clone().step_by(K::DEPTH) {
            let block = unit..(unit + K::DEPTH).min(units.end);
            let right = right.wrapping_add((unit - units.start) * padded / LANES);
            for group in panels.clone().step_by(at_once) {
                let group = group..(group + at_once).min(panels.end);
                if layout != Layout::InPlace {
                    let first = group.start * ROWS;
                    let rows = (group.end * ROWS).min(m) - first;
                    // SAFETY: the left matrix has these rows, and the buffer has room.
                    unsafe { K::pack_left(&task.left, block.clone(), first, rows, packed_left) };
                }
                // The starts of the panels' rows in the left matrix and in the output are the same
                // for all columns. From here on, arithmetic is unchecked: checks would take as long
                // as several steps of a tile. `task` in mod.rs has compared the sizes.
                let mut lefts = [[std::ptr::null(); ROWS]; MAX_PACKED_PANELS];
                for (panel, left) in group.clone().zip(&mut lefts) {
                    let rows = rows_of(panel);
                    let packed = (panel - group.start) * block.len() * ROWS;
                    let first = packed_left.wrapping_add(packed).cast_const();
                    *left = std::array::from_fn(|i| match layout {
                        Layout::InPlace => {
                            let row = panel * ROWS + i.min(rows - 1);
                            let offset = row * task.left.outer + block.start * 4;
                            task.left.data.wrapping_add(offset)
                        }
                        Layout::Rows => first.wrapping_add(i.min(rows - 1) * block.len()).cast(),
                        Layout::Units => first.wrapping_add(i).cast(),
                    });
                }
                let step = if layout == Layout::Units { 4 * ROWS } else { 4 };
                let row_stride = if kept {
                    padded * 4
                } else {
                    task.out_row_stride
                };
                let data = if kept {
                    let first_row = (group.start - panels.start) * ROWS;
                    sums.wrapping_add(first_row * padded).cast::<u8>()
                } else {
                    let column = columns.start * if task.rounds { 2 } else { 4 };
                    let first_row = group.start * ROWS;
                    task.out.wrapping_add(first_row * row_stride + column)
                };
                let store = if task.rounds && !kept {
                    Store::Round
                } else if task.accumulate || unit > 0 {
                    Store::Add
                } else {
                    Store::Set
                };
                let bytes = if store == Store::Round { 2 } else { 4 };
                let last = rows_of(group.end - 1);
                let mut tile = |index: usize, column: usize| {
                    between();
                    let here = width.wrapping_sub(column).min(K::LINES * LANES);
                    let lines = here.div_ceil(LANES);
                    let panel = index.wrapping_mul(row_stride).wrapping_mul(ROWS);
                    let data = data.wrapping_add(panel);
                    let full_lines = lines.wrapping_sub(1).wrapping_mul(LANES);
                    let out = TileOutput {
                        data: data.wrapping_add(column.wrapping_mul(bytes)),
                        row_stride,
                        rows: if index.wrapping_add(1) == group.len() {
                            last
                        } else {
                            ROWS
                        },
                        mask: mask(here.wrapping_sub(full_lines)),
                        store,
                    };
                    // SAFETY: `right` is packed, the left matrix has these rows, and the tile of
                    // `out` belongs to this call. Earlier columns fill whole tiles.
                    unsafe {
                        let right = right.add(block.len().wrapping_mul(column / LANES));
                        K::tile(lines, block.len(), &lefts[index], step, right, &out);
                    }
                };
                let all_columns = || (0..width).step_by(K::LINES * LANES);
                if K::RIGHT_STATIONARY {
                    for column in all_columns() {
                        for index in 0..group.len() {
                            tile(index, column);
                        }
                    }
                } else {
                    for index in 0..group.len() {
                        for column in all_columns() {
                            tile(index, column);
                        }
                    }
                }
            }
        }
        if kept {
            let rows = (panels.end * ROWS).min(m) - panels.start * ROWS;
            let stride = task.out_row_stride;
            let offset = panels.start * ROWS * stride + columns.start * 2;
            // SAFETY: as above.
            unsafe { K::round(sums, padded, width, task.out.add(offset), stride, rows) };
        }
    }
}

/// Converts panels of `out` from bf16 to fp32 sums with rows `padded` elements apart.
///
/// # Safety
/// The panels are readable and `sums` is writable.
unsafe fn widen(
    task: &GemmTask,
    columns: &Range<usize>,
    panels: &Range<usize>,
    sums: *mut f32,
    padded: usize,
) {
    let first = panels.start * ROWS;
    for row in first..(panels.end * ROWS).min(task.size.m) {
        // SAFETY: as the caller promises.
        let from = unsafe {
            let row = task.out.add(row * task.out_row_stride).cast::<Bf16>();
            std::slice::from_raw_parts(row.add(columns.start), columns.len())
        };
        // SAFETY: as the caller promises.
        let to = unsafe {
            let row = sums.add((row - first) * padded);
            std::slice::from_raw_parts_mut(row, columns.len())
        };
        for (to, x) in to.iter_mut().zip(from) {
            *to = x.wide();
        }
    }
}
