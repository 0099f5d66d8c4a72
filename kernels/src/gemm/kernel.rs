//! The interface of a processor's kernel: operands, packing units and tiles.

use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
use std::ops::Range;

/// Number of rows of a tile.
pub(crate) const ROWS: usize = 6;
/// Number of 4-byte units of a [`CacheLine`].
pub(crate) const LANES: usize = 16;

/// Most panels of a left matrix, each of [`ROWS`] rows, that are packed at once.
pub(crate) const MAX_PACKED_PANELS: usize = 16;

/// An aligned 64-byte line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct CacheLine([u32; LANES]);

/// A matrix in memory, seen as the inner dimension, which is summed over, and the outer one.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) data: *const u8,
    /// Stride of the inner dimension in bytes.
    pub(crate) inner: usize,
    /// Stride of the outer dimension in bytes.
    pub(crate) outer: usize,
    /// Length of the inner dimension in elements.
    pub(crate) len: usize,
}

/// The order in which a tile reads the left matrix.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Unpacked, in the memory of the tensor.
    InPlace,
    /// Packed row by row: the units of a row are adjacent.
    Rows,
    /// Packed unit by unit: the rows of a unit are adjacent.
    Units,
}

/// The destination of a tile.
#[derive(Clone, Copy)]
pub(crate) struct TileOutput {
    pub(crate) data: *mut u8,
    /// Bytes from one row to the next.
    pub(crate) row_stride: usize,
    /// Number of valid rows, at most [`ROWS`].
    pub(crate) rows: usize,
    /// One bit per valid column of the last vector.
    pub(crate) mask: u16,
    pub(crate) store: Store,
}

impl TileOutput {
    /// Prefetches the output tile, N vectors wide, for writing.
    ///
    /// A write to memory outside the cache takes as long as a read, so the prefetch overlaps the
    /// computation of the tile.
    #[inline(always)]
    pub(crate) fn fetch<const N: usize>(&self) {
        let lines = if self.store == Store::Round {
            N.div_ceil(2)
        } else {
            N
        };
        let mut row = self.data;
        for i in 1..=ROWS {
            for line in (0..N).take_while(|&line| line < lines) {
                let line = row.wrapping_add(line * size_of::<CacheLine>());
                // SAFETY: a prefetch may use any address.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.cast()) }
            }
            // Repeats the last row if rows are missing.
            row = row.wrapping_add(if i < self.rows { self.row_stride } else { 0 });
        }
    }

    /// True if all rows and columns are valid.
    #[inline(always)]
    pub(crate) fn is_full(&self) -> bool {
        self.rows == ROWS && self.mask == u16::MAX
    }
}

/// The way in which a tile is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// Overwrites fp32 elements with sums.
    Set,
    /// Adds sums to fp32 elements.
    Add,
    /// Overwrites bf16 elements with rounded sums.
    Round,
}

/// A processor's GEMM kernel for elements of one dtype.
///
/// Packed matrices consist of 4-byte units. One lane multiplies a unit per step: one fp32 element
/// or a pair of bf16 elements that are consecutive along the inner dimension.
pub(crate) trait Kernel {
    /// Bytes of an element in memory.
    const SIZE: usize;
    /// Number of elements of a unit.
    const PER_UNIT: usize;
    /// Number of cache lines of a tile's row.
    const LINES: usize;
    /// Units of the inner dimension per pass, so that the packed right matrix fits the L2 cache.
    const DEPTH: usize;
    /// True if a tile's columns of the right matrix stay in the L1 cache while panels change; false
    /// if a panel stays there while columns change.
    const RIGHT_STATIONARY: bool;

    /// Returns the order in which a tile reads this left matrix.
    fn layout(left: &Operand) -> Layout;

    /// Returns how many panels of a left matrix are packed at once, at most [`MAX_PACKED_PANELS`].
    fn panels(layout: Layout) -> usize;

    /// Packs units of columns of a right matrix into panels as wide as a tile, unit by unit.
    ///
    /// The last panel has the remaining columns.
    ///
    /// # Safety
    /// The processor has the features, the matrix has these columns and units, and `to` has room.
    unsafe fn pack_right(
        from: &Operand,
        units: Range<usize>,
        columns: Range<usize>,
        to: *mut CacheLine,
    );

    /// Packs units of `rows` rows of a left matrix, from row `first`, into panels of [`ROWS`] rows.
    ///
    /// A matrix with [`Layout::InPlace`] needs no packing.
    ///
    /// # Safety
    /// As for [`Kernel::pack_right`]; `to` has room for `panels * units * ROWS` units and a line.
    unsafe fn pack_left(
        from: &Operand,
        units: Range<usize>,
        first: usize,
        rows: usize,
        to: *mut u32,
    );

    /// Computes a tile of [`ROWS`] rows and `lines` lines of columns in `units` steps.
    ///
    /// The units of row `i` start at `left[i]` and are `step` bytes apart. A step of `right` is
    /// `lines` lines.
    ///
    /// # Safety
    /// The processor has the features, all of `left` and `right` is readable, and the elements that
    /// `out` describes are writable.
    unsafe fn tile(
        lines: usize,
        units: usize,
        left: &[*const u8; ROWS],
        step: usize,
        right: *const CacheLine,
        out: &TileOutput,
    );

    /// Rounds `rows` rows of `width` fp32 elements, `from_stride` elements apart, to bf16 in `out`,
    /// `out_stride` bytes apart.
    ///
    /// # Safety
    /// As for [`Kernel::tile`].
    unsafe fn round(
        from: *const f32,
        from_stride: usize,
        width: usize,
        out: *mut u8,
        out_stride: usize,
        rows: usize,
    );
}

/// Grows the buffer to hold at least `units` units and a line, and returns its address.
pub(crate) fn reserve_units(buffer: &mut Vec<CacheLine>, units: usize) -> *mut CacheLine {
    let lines = units.div_ceil(LANES) + 1;
    if buffer.len() < lines {
        buffer.resize(lines, CacheLine([0; LANES]));
    }
    buffer.as_mut_ptr()
}

/// Prefetches bytes for reading.
///
/// Rows may be pages apart, and hardware prefetchers do not cross pages.
#[inline(always)]
pub(crate) fn fetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(size_of::<CacheLine>()) {
        // SAFETY: a prefetch may use any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) }
    }
}

/// Returns a mask with a bit for each of the first `count` lanes.
pub(crate) fn mask(count: usize) -> u16 {
    if count >= LANES {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}
