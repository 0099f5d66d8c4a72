//! Some panels of some columns of a product, by one thread.

use super::kernel::{
    CacheLine, Kernel, LANES, Layout, MAX_PACKED_PANELS, Operand, ROWS, Store, TileOutput, mask,
    room,
};
use super::partition::Size;
use crate::number::{Bf16, Number};
use std::cell::RefCell;
use std::ops::Range;

/// Panels whose sums are kept in fp32 until they can be rounded.
const ROUNDED_PANELS: usize = 64;

/// One of several products.
pub(super) struct GemmTask {
    pub(super) out: *mut u8,
    pub(super) out_row: usize,
    pub(super) rounds: bool,
    pub(super) accumulate: bool,
    pub(super) left: Operand,
    pub(super) right: Operand,
    pub(super) size: Size,
}

// SAFETY: threads read operands, and write parts of `out` that do not overlap.
unsafe impl Sync for GemmTask {}

impl GemmTask {
    /// Units of the inner dimension.
    pub(super) fn units<K: Kernel>(&self) -> usize {
        self.size.1.div_ceil(K::PER_UNIT)
    }

    /// Whether sums are kept in fp32 until all units are gone along, and rounded then.
    pub(super) fn keeps_f32_sums<K: Kernel>(&self) -> bool {
        self.rounds && (self.accumulate || self.units::<K>() > K::DEPTH)
    }
}

thread_local! {
    /// A right matrix, packed for this thread or for all.
    pub(super) static PACKED: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
    /// Some panels of a left one.
    static LEFT: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
    /// Sums that are not rounded yet.
    static SUMS: RefCell<Vec<CacheLine>> = const { RefCell::new(Vec::new()) };
}

/// Some panels of some columns of a product, of whose right matrix `right` is what was packed: `units` of the inner dimension, depth
/// after depth. (All of them, where sums are kept until they are rounded.) `between` is called before each tile.
///
/// # Safety
/// The processor has the features, the task's tensors live, and nobody else works on these.
pub(super) unsafe fn macrokernel<K: Kernel>(
    task: &GemmTask,
    columns: &Range<usize>,
    units: Range<usize>,
    right: *const CacheLine,
    panels: Range<usize>,
    mut between: impl FnMut(),
) {
    let m = task.size.0;
    let width = columns.len();
    let rows_of = |panel: usize| (m - panel * ROWS).min(ROWS);
    let kept = task.keeps_f32_sums::<K>();
    let padded = width.next_multiple_of(LANES);
    // Nobody else on this thread asks for the buffers while this runs.
    let sums_room = if kept {
        ROUNDED_PANELS * ROWS * padded
    } else {
        0
    };
    let sums = SUMS
        .with_borrow_mut(|buffer| room(buffer, sums_room))
        .cast::<f32>();
    let some = if kept {
        ROUNDED_PANELS
    } else {
        panels.len().max(1)
    };
    let layout = K::layout(&task.left);
    let at_once = K::panels(layout);
    let left_room = if layout == Layout::InPlace {
        0
    } else {
        at_once * ROWS * K::DEPTH.min(units.len())
    };
    let packed_left = LEFT
        .with_borrow_mut(|buffer| room(buffer, left_room))
        .cast::<u32>();
    for start in panels.clone().step_by(some) {
        let panels = start..(start + some).min(panels.end);
        if kept && task.accumulate {
            // SAFETY: rows of this part of `out`, and as many of the buffer.
            unsafe { widen(task, columns, &panels, sums, padded) };
        }
        for unit in units.clone().step_by(K::DEPTH) {
            let block = unit..(unit + K::DEPTH).min(units.end);
            let right = right.wrapping_add((unit - units.start) * padded / LANES);
            for group in panels.clone().step_by(at_once) {
                let group = group..(group + at_once).min(panels.end);
                if layout != Layout::InPlace {
                    let rows = (group.end * ROWS).min(m) - group.start * ROWS;
                    // SAFETY: the left matrix has these, and the buffer room.
                    unsafe {
                        K::left(
                            &task.left,
                            block.clone(),
                            group.start * ROWS,
                            rows,
                            packed_left,
                        )
                    };
                }
                // Where rows of the panels begin, of the left matrix and of the result: the same for all columns. From here on sums are
                // not checked, as that would take as long as some steps of a tile; sizes were compared where the task was made.
                let mut lefts = [[std::ptr::null(); ROWS]; MAX_PACKED_PANELS];
                for (panel, left) in group.clone().zip(&mut lefts) {
                    let rows = rows_of(panel);
                    let first = packed_left
                        .wrapping_add((panel - group.start) * block.len() * ROWS)
                        .cast_const();
                    *left = std::array::from_fn(|i| match layout {
                        Layout::InPlace => {
                            let at = (panel * ROWS + i.min(rows - 1)) * task.left.outer
                                + block.start * 4;
                            task.left.data.wrapping_add(at)
                        }
                        Layout::Rows => first.wrapping_add(i.min(rows - 1) * block.len()).cast(),
                        Layout::Units => first.wrapping_add(i).cast(),
                    });
                }
                let step = if layout == Layout::Units { 4 * ROWS } else { 4 };
                let (data, row) = if kept {
                    (
                        sums.wrapping_add((group.start - panels.start) * ROWS * padded)
                            .cast::<u8>(),
                        padded * 4,
                    )
                } else {
                    let column = columns.start * if task.rounds { 2 } else { 4 };
                    (
                        task.out
                            .wrapping_add(group.start * ROWS * task.out_row + column),
                        task.out_row,
                    )
                };
                let store = match task.rounds && !kept {
                    true => Store::Round,
                    false if task.accumulate || unit > 0 => Store::Add,
                    false => Store::Set,
                };
                let bytes = if store == Store::Round { 2 } else { 4 };
                let last = rows_of(group.end - 1);
                let mut tile = |index: usize, column: usize| {
                    between();
                    let here = width.wrapping_sub(column).min(K::LINES * LANES);
                    let lines = here.div_ceil(LANES);
                    let data = data.wrapping_add(index.wrapping_mul(row).wrapping_mul(ROWS));
                    let out = TileOutput {
                        data: data.wrapping_add(column.wrapping_mul(bytes)),
                        row,
                        rows: if index.wrapping_add(1) == group.len() {
                            last
                        } else {
                            ROWS
                        },
                        mask: mask(here.wrapping_sub(lines.wrapping_sub(1).wrapping_mul(LANES))),
                        store,
                    };
                    // SAFETY: what was packed, rows that the left matrix has, and a place in `out` that is this piece's; columns before
                    // this one fill whole tiles.
                    unsafe {
                        let right = right.add(block.len().wrapping_mul(column / LANES));
                        K::tile(lines, block.len(), &lefts[index], step, right, &out);
                    }
                };
                let all_columns = || (0..width).step_by(K::LINES * LANES);
                if K::RIGHT_STATIONARY {
                    all_columns()
                        .for_each(|column| (0..group.len()).for_each(|index| tile(index, column)))
                } else {
                    (0..group.len())
                        .for_each(|index| all_columns().for_each(|column| tile(index, column)))
                }
            }
        }
        if kept {
            let rows = (panels.end * ROWS).min(m) - panels.start * ROWS;
            let place = panels.start * ROWS * task.out_row + columns.start * 2;
            // SAFETY: as above.
            unsafe { K::round(sums, padded, width, task.out.add(place), task.out_row, rows) };
        }
    }
}

/// What `out` has of some rows and columns, in bf16, to `sums`, fp32 with rows `padded` apart.
///
/// # Safety
/// It can be read, and `sums` written.
unsafe fn widen(
    task: &GemmTask,
    columns: &Range<usize>,
    panels: &Range<usize>,
    sums: *mut f32,
    padded: usize,
) {
    for row in panels.start * ROWS..(panels.end * ROWS).min(task.size.0) {
        // SAFETY: as the caller promises.
        let (from, to) = unsafe {
            let from = task
                .out
                .add(row * task.out_row)
                .cast::<Bf16>()
                .add(columns.start);
            let to = sums.add((row - panels.start * ROWS) * padded);
            (
                std::slice::from_raw_parts(from, columns.len()),
                std::slice::from_raw_parts_mut(to, columns.len()),
            )
        };
        to.iter_mut().zip(from).for_each(|(to, x)| *to = x.wide());
    }
}
