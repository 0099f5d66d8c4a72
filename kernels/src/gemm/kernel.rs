//! What kernels of different processors have in common: operands, units, tiles and where those go.

use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
use std::ops::Range;

/// Rows of a tile.
pub(crate) const ROWS: usize = 6;
/// Numbers of a [`CacheLine`].
pub(crate) const LANES: usize = 16;

/// The most panels of a left matrix, each of [`ROWS`] rows, that are packed at once.
pub(crate) const MAX_PACKED_PANELS: usize = 16;

/// 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct CacheLine([u32; LANES]);

/// A matrix in memory, of which one side is "inner": the dimension that is summed over.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) data: *const u8,
    /// Bytes to the next along the inner dimension.
    pub(crate) inner: usize,
    /// Bytes to the next along the other one.
    pub(crate) outer: usize,
    /// Numbers along the inner dimension.
    pub(crate) len: usize,
}

/// How a tile reads rows of the left matrix.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Where they lie.
    InPlace,
    /// Packed, each row's units after each other.
    Rows,
    /// Packed, each unit's rows after each other.
    Units,
}

/// Where a tile goes.
#[derive(Clone, Copy)]
pub(crate) struct TileOutput {
    pub(crate) data: *mut u8,
    /// Bytes from one row to the next.
    pub(crate) row: usize,
    /// Rows that there are, at most [`ROWS`].
    pub(crate) rows: usize,
    /// Columns of the last vector that there are, a bit each.
    pub(crate) mask: u16,
    pub(crate) store: Store,
}

impl TileOutput {
    /// Has the place, of N vectors of columns, fetched while the product is made: to write to memory that is far away takes as long as to
    /// read it.
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
                // SAFETY: fetching asks for nothing.
                unsafe {
                    _mm_prefetch::<_MM_HINT_ET0>(
                        row.wrapping_add(line * size_of::<CacheLine>()).cast(),
                    )
                }
            }
            // Where rows are missing, the last one again.
            row = row.wrapping_add(if i < self.rows { self.row } else { 0 });
        }
    }

    /// Whether no row is missing, nor a column.
    #[inline(always)]
    pub(crate) fn is_full(&self) -> bool {
        self.rows == ROWS && self.mask == u16::MAX
    }
}

/// What becomes of the numbers that are there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// fp32 takes their place.
    Set,
    /// They are fp32 and are added to.
    Add,
    /// bf16 takes their place.
    Round,
}

/// How a processor multiplies numbers of a dtype. Matrices are gone along in units, of four bytes each once they are packed: what one
/// lane multiplies in a step.
pub(crate) trait Kernel {
    /// Bytes of a number in memory.
    const SIZE: usize;
    /// Numbers of a unit.
    const PER_UNIT: usize;
    /// Lines of a tile's row.
    const LINES: usize;
    /// Units of the inner dimension that are gone along at once: what is packed of the right matrix stays in the second cache.
    const DEPTH: usize;
    /// Whether a tile's columns of the right matrix stay in the first cache while many panels meet them, or a panel while many
    /// columns do.
    const RIGHT_STATIONARY: bool;

    /// How rows of a left matrix are read.
    fn layout(left: &Operand) -> Layout;

    /// How many panels of a left matrix are packed at once, at most [`MAX_PACKED_PANELS`].
    fn panels(layout: Layout) -> usize;

    /// Packs the units `units` of the columns `columns` of a right matrix: panels of as many as a tile has, or the rest, each unit
    /// after unit.
    ///
    /// # Safety
    /// The processor has the features, the matrix has these columns and units, and `to` has room.
    unsafe fn right(from: &Operand, units: Range<usize>, columns: Range<usize>, to: *mut CacheLine);

    /// Packs the units `units` of `rows` rows of a left matrix from `first` on, unless its layout is [`Layout::InPlace`]: panels of
    /// [`ROWS`] rows.
    ///
    /// # Safety
    /// As above: room for `panels * units * ROWS` units and a line.
    unsafe fn left(from: &Operand, units: Range<usize>, first: usize, rows: usize, to: *mut u32);

    /// `units` steps of a tile of [`ROWS`] rows and `lines` lines of columns. Row `i`'s units begin at `left[i]`, `step` bytes apart; a
    /// step of `right` is `lines` lines.
    ///
    /// # Safety
    /// The processor has the features. All of `left` and `right` can be read, and what `out` tells be written.
    unsafe fn tile(
        lines: usize,
        units: usize,
        left: &[*const u8; ROWS],
        step: usize,
        right: *const CacheLine,
        out: &TileOutput,
    );

    /// Rounds rows of `width` fp32 numbers at `from`, `from_row` numbers apart, to bf16 in `out`.
    ///
    /// # Safety
    /// As for a tile.
    unsafe fn round(
        from: *const f32,
        from_row: usize,
        width: usize,
        out: *mut u8,
        out_row: usize,
        rows: usize,
    );
}

/// Room for `units` units.
pub(crate) fn room(buffer: &mut Vec<CacheLine>, units: usize) -> *mut CacheLine {
    let lines = units.div_ceil(LANES) + 1;
    if buffer.len() < lines {
        buffer.resize(lines, CacheLine([0; LANES]));
    }
    buffer.as_mut_ptr()
}

/// Has bytes fetched that will be read. Rows may be pages apart, which a processor does not follow by itself.
#[inline(always)]
pub(crate) fn fetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(size_of::<CacheLine>()) {
        // SAFETY: fetching asks for nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) }
    }
}

/// A bit for each number of a line that is there.
pub(crate) fn mask(there: usize) -> u16 {
    if there >= LANES {
        u16::MAX
    } else {
        (1 << there) - 1
    }
}
