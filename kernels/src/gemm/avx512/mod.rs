//! For processors with AVX-512 and its bf16 instructions: a tile is 6 x 64, whose row of four vectors meets six broadcast numbers, so
//! that a product needs less than half a load.

mod pack;
mod tile;

use super::kernel::{CacheLine, Kernel, Layout, Operand, ROWS, TileOutput};
use std::ops::Range;

/// Vectors of a tile's row.
const VECTORS: usize = 4;

/// Bytes of a number.
const fn size(bf16: bool) -> usize {
    if bf16 { 2 } else { 4 }
}

/// Numbers of a unit.
const fn per_unit(bf16: bool) -> usize {
    4 / size(bf16)
}

/// Products of bf16 or of fp32.
pub(crate) struct Avx512<const BF16: bool>;

impl<const BF16: bool> Kernel for Avx512<BF16> {
    const SIZE: usize = size(BF16);
    const PER_UNIT: usize = per_unit(BF16);
    const LINES: usize = VECTORS;
    const DEPTH: usize = 512;
    const RIGHT_STATIONARY: bool = false;

    fn layout(left: &Operand) -> Layout {
        if left.inner == size(BF16) && left.len.is_multiple_of(per_unit(BF16)) {
            Layout::InPlace
        } else {
            Layout::Units
        }
    }

    fn panels(layout: Layout) -> usize {
        match layout {
            // 192 bytes of a row of the transpose.
            Layout::Units => 192 / size(BF16) / ROWS,
            _ => 1,
        }
    }

    unsafe fn right(
        from: &Operand,
        units: Range<usize>,
        columns: Range<usize>,
        to: *mut CacheLine,
    ) {
        // SAFETY: the same promises.
        unsafe { pack::right::<BF16>(from, units, columns, to) }
    }

    unsafe fn left(from: &Operand, units: Range<usize>, first: usize, rows: usize, to: *mut u32) {
        // SAFETY: the same promises.
        unsafe { pack::left::<BF16>(from, units, first, rows, to) }
    }

    unsafe fn tile(
        lines: usize,
        units: usize,
        left: &[*const u8; ROWS],
        step: usize,
        right: *const CacheLine,
        out: &TileOutput,
    ) {
        // SAFETY: the same promises.
        unsafe { tile::dispatch_tile::<BF16>(lines, units, left, step, right, out) }
    }

    unsafe fn round(
        from: *const f32,
        from_row: usize,
        width: usize,
        out: *mut u8,
        out_row: usize,
        rows: usize,
    ) {
        // SAFETY: the same promises.
        unsafe { tile::round(from, from_row, width, out, out_row, rows) }
    }
}
