//! The kernel for processors with AVX-512 and its bf16 instructions.
//!
//! A tile is 6 x 64: its rows are four vectors wide, so that a multiplication needs less than half
//! a load.

mod pack;
mod tile;

use super::kernel::{CacheLine, Kernel, Layout, Operand, ROWS, TileOutput};
use pack::{VECTORS, per_unit, size};
use std::ops::Range;

/// The AVX-512 kernel for bf16 or fp32.
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
            // 192 contiguous bytes, which are three cache lines.
            Layout::Units => 192 / size(BF16) / ROWS,
            _ => 1,
        }
    }

    unsafe fn pack_right(
        from: &Operand,
        units: Range<usize>,
        columns: Range<usize>,
        to: *mut CacheLine,
    ) {
        // SAFETY: the caller makes the same promises.
        unsafe { pack::pack_right::<BF16>(from, units, columns, to) }
    }

    unsafe fn pack_left(
        from: &Operand,
        units: Range<usize>,
        first: usize,
        rows: usize,
        to: *mut u32,
    ) {
        // SAFETY: the caller makes the same promises.
        unsafe { pack::pack_left::<BF16>(from, units, first, rows, to) }
    }

    unsafe fn tile(
        lines: usize,
        units: usize,
        left: &[*const u8; ROWS],
        step: usize,
        right: *const CacheLine,
        out: &TileOutput,
    ) {
        // SAFETY: the caller makes the same promises.
        unsafe { tile::dispatch_tile::<BF16>(lines, units, left, step, right, out) }
    }

    unsafe fn round(
        from: *const f32,
        from_stride: usize,
        width: usize,
        out: *mut u8,
        out_stride: usize,
        rows: usize,
    ) {
        // SAFETY: the caller makes the same promises.
        unsafe { tile::round(from, from_stride, width, out, out_stride, rows) }
    }
}
