//! Packing of matrices into units, in the order in which a tile reads them.

use crate::gemm::kernel::{CacheLine, LANES, Operand, ROWS, fetch, mask};
use std::arch::x86_64::*;
use std::ops::Range;

/// Number of vectors of a tile's row.
pub(super) const VECTORS: usize = 4;
/// Prefetch distance in units.
const AHEAD: usize = 8;
/// Prefetch distance along a row in cache lines.
const LINES_AHEAD: usize = 4;

/// Returns the bytes of an element.
pub(super) const fn size(bf16: bool) -> usize {
    if bf16 { 2 } else { 4 }
}

/// Returns the number of elements of a unit.
pub(super) const fn per_unit(bf16: bool) -> usize {
    4 / size(bf16)
}

impl Operand {
    /// Loads a unit of up to 16 rows or columns from `first`, which are adjacent in memory.
    ///
    /// # Safety
    /// The unit exists, and so do the rows or columns in `mask`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load_unit<const BF16: bool>(
        &self,
        unit: usize,
        first_lane: usize,
        mask: u16,
    ) -> __m512i {
        // SAFETY: as the caller promises; masked elements are not accessed.
        unsafe {
            let at = self
                .data
                .add(unit * per_unit(BF16) * self.inner + first_lane * self.outer);
            if !BF16 {
                return _mm512_maskz_loadu_epi32(mask, at.cast());
            }
            let low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
            // The last pair of an odd length has no second element.
            let mask = if 2 * unit + 1 < self.len { mask } else { 0 };
            let high = _mm256_maskz_loadu_epi16(mask, at.wrapping_add(self.inner).cast());
            _mm512_or_si512(low, _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)))
        }
    }
}

/// Does what [`Kernel::pack_right`](crate::gemm::kernel::Kernel::pack_right) describes.
///
/// # Safety
/// The processor has the features, the matrix has these columns and units, and `to` has room.
pub(super) unsafe fn pack_right<const BF16: bool>(
    from: &Operand,
    units: Range<usize>,
    columns: Range<usize>,
    mut to: *mut CacheLine,
) {
    for first in columns.clone().step_by(VECTORS * LANES) {
        let here = (columns.end - first).min(VECTORS * LANES);
        let lines = here.div_ceil(LANES);
        // SAFETY: as the caller promises.
        unsafe {
            panel::<BF16>(from, units.clone(), first, here, lines, to);
            to = to.add(units.len() * lines);
        }
    }
}

/// Packs units of `columns` columns from `first`, unit by unit. A unit has `lines` lines, of which
/// the last may be partial.
///
/// # Safety
/// The processor has the features, the matrix has these columns and units, and `to` has room.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn panel<const BF16: bool>(
    from: &Operand,
    units: Range<usize>,
    first: usize,
    columns: usize,
    lines: usize,
    to: *mut CacheLine,
) {
    // SAFETY: as the caller promises.
    unsafe {
        if from.outer == size(BF16) {
            for (index, unit) in units.enumerate() {
                let ahead = (unit + AHEAD) * per_unit(BF16) * from.inner + first * from.outer;
                for element in 0..per_unit(BF16) {
                    let at = from.data.wrapping_add(ahead + element * from.inner);
                    fetch(at, columns * size(BF16));
                }
                for line in 0..lines {
                    let mask = mask(columns - line * LANES);
                    let values = from.load_unit::<BF16>(unit, first + line * LANES, mask);
                    _mm512_store_si512(to.add(index * lines + line).cast(), values);
                }
            }
            return;
        }
        for (index, unit) in units.clone().enumerate().step_by(LANES) {
            let here = (units.end - unit).min(LANES);
            for line in 0..lines {
                let there = (columns - line * LANES).min(LANES);
                let column = first + line * LANES;
                let at = from.data.add(unit * 4 + column * from.outer);
                let rows: [__m512i; LANES] = std::array::from_fn(|column| {
                    if column < there {
                        let at = at.add(column * from.outer);
                        fetch(at.wrapping_add(LINES_AHEAD * size_of::<CacheLine>()), 1);
                        _mm512_maskz_loadu_epi32(mask(here), at.cast())
                    } else {
                        _mm512_setzero_si512()
                    }
                });
                for (step, values) in transposed(rows).into_iter().enumerate().take(here) {
                    _mm512_store_si512(to.add((index + step) * lines + line).cast(), values);
                }
            }
        }
    }
}

/// Does what [`Kernel::pack_left`](crate::gemm::kernel::Kernel::pack_left) describes, for a matrix
/// whose rows are adjacent in memory.
///
/// # Safety
/// The processor has the features, the matrix has these rows and units, and `to` has room for
/// `panels * units * ROWS` units and a line.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pack_left<const BF16: bool>(
    from: &Operand,
    units: Range<usize>,
    first: usize,
    rows: usize,
    to: *mut u32,
) {
    let count = units.len();
    // SAFETY: as the caller promises. A store writes beyond its six units, and the next one
    // overwrites that. The last store of a panel writes exactly six.
    unsafe {
        for (index, unit) in units.enumerate() {
            let at = from
                .data
                .add(unit * per_unit(BF16) * from.inner + first * from.outer);
            let ahead = at.wrapping_add(AHEAD * per_unit(BF16) * from.inner);
            for element in 0..per_unit(BF16) {
                fetch(ahead.wrapping_add(element * from.inner), rows * size(BF16));
            }
            // The last pair of an odd length has no second element.
            let has_second = 2 * unit + 1 < from.len;
            for (panel, row) in (0..rows).step_by(ROWS).enumerate() {
                let mask = mask((rows - row).min(ROWS)) as u8;
                let at = at.add(row * size(BF16));
                let values = if BF16 {
                    let low = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, at.cast()));
                    let mask = if has_second { mask } else { 0 };
                    let high = _mm_maskz_loadu_epi16(mask, at.wrapping_add(from.inner).cast());
                    _mm256_or_si256(low, _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high)))
                } else {
                    _mm256_maskz_loadu_epi32(mask, at.cast())
                };
                let to = to.add((panel * count + index) * ROWS).cast();
                if index + 1 < count {
                    _mm256_storeu_si256(to, values);
                } else {
                    _mm256_mask_storeu_epi32(to.cast(), (1 << ROWS) - 1, values);
                }
            }
        }
    }
}

/// Transposes 16 x 16 units.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut a = rows;
    let mut b = rows;
    for i in (0..LANES).step_by(2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for i in (0..LANES).step_by(4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // Quarter h of a[4 q + c] is column c + 4 h of rows 4 q to 4 q + 3.
    for c in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x44>(a[c], a[4 + c]);
        let high = _mm512_shuffle_i32x4::<0xee>(a[c], a[4 + c]);
        let low2 = _mm512_shuffle_i32x4::<0x44>(a[8 + c], a[12 + c]);
        let high2 = _mm512_shuffle_i32x4::<0xee>(a[8 + c], a[12 + c]);
        b[c] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        b[4 + c] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        b[8 + c] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        b[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
    b
}
