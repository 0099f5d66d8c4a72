//! The kernel for processors with AVX2 and FMA.
//!
//! A tile is 6 x 16: its rows are two vectors wide, and its sums fill 12 of 16 registers. There are
//! no bf16 instructions, so bf16 becomes fp32 when it is packed, and rows of a bf16 left matrix are
//! packed too.

use super::kernel::{
    CacheLine, Kernel, LANES, Layout, MAX_PACKED_PANELS, Operand, ROWS, Store, TileOutput, fetch,
};
use crate::number::{Bf16, Number};
use std::{arch::x86_64::*, marker::PhantomData, ops::Range};

/// Number of fp32 lanes of a vector.
const WIDTH: usize = 8;
/// Columns that are packed together, row by row.
const COLUMNS: usize = 4 * LANES;
const PAGE_BYTES: usize = 4096;
/// Prefetch distance in steps.
const AHEAD: usize = 8;

/// The AVX2 kernel for elements of type `T`.
pub(crate) struct Avx2<T>(PhantomData<T>);

impl<T> Kernel for Avx2<T>
where
    T: Number,
{
    const SIZE: usize = size_of::<T>();
    const PER_UNIT: usize = 1;
    const LINES: usize = 1;
    const DEPTH: usize = 256;
    const RIGHT_STATIONARY: bool = true;

    fn layout(left: &Operand) -> Layout {
        if left.inner != Self::SIZE {
            return Layout::Units;
        }
        // Rows that are whole pages apart would map to few cache sets.
        let conflicts = left.outer.is_multiple_of(PAGE_BYTES);
        if Self::SIZE == 4 && !conflicts {
            Layout::InPlace
        } else {
            Layout::Rows
        }
    }

    fn panels(_: Layout) -> usize {
        MAX_PACKED_PANELS
    }

    unsafe fn pack_right(
        from: &Operand,
        units: Range<usize>,
        columns: Range<usize>,
        to: *mut CacheLine,
    ) {
        // SAFETY: the caller makes the same promises.
        unsafe {
            if from.outer == Self::SIZE {
                pack_right_rows::<T>(from, units, columns, to)
            } else {
                pack_right_columns::<T>(from, units, columns, to)
            }
        }
    }

    unsafe fn pack_left(
        from: &Operand,
        units: Range<usize>,
        first: usize,
        rows: usize,
        to: *mut u32,
    ) {
        // SAFETY: the caller makes the same promises.
        unsafe {
            match Self::layout(from) {
                Layout::Units => pack_left_columns::<T>(from, units, first, rows, to.cast()),
                _ => pack_left_rows::<T>(from, units, first, rows, to.cast()),
            }
        }
    }

    unsafe fn tile(
        _: usize,
        units: usize,
        left: &[*const u8; ROWS],
        step: usize,
        right: *const CacheLine,
        out: &TileOutput,
    ) {
        // SAFETY: the caller makes the same promises; a step has as many lines as a tile.
        unsafe { tile(units, left, step, right.cast(), out) }
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
        unsafe { round(from, from_stride, width, out, out_stride, rows) }
    }
}

/// Converts `count` elements to fp32.
///
/// # Safety
/// The elements are readable and writable, and the caller has the features.
#[inline(always)]
unsafe fn widen<T>(from: *const T, to: *mut f32, count: usize)
where
    T: Number,
{
    // SAFETY: as the caller promises.
    unsafe {
        let from = std::slice::from_raw_parts(from, count);
        let to = std::slice::from_raw_parts_mut(to, count);
        for (to, x) in to.iter_mut().zip(from) {
            *to = x.wide();
        }
    }
}

/// Packs units of a right matrix with contiguous rows.
///
/// # Safety
/// As for [`Kernel::pack_right`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_right_rows<T>(
    from: &Operand,
    units: Range<usize>,
    columns: Range<usize>,
    to: *mut CacheLine,
) where
    T: Number,
{
    let count = units.len();
    // The destinations of more panels at once would map to few cache sets.
    for first in columns.clone().step_by(COLUMNS) {
        let end = columns.end.min(first + COLUMNS);
        for (index, unit) in units.clone().enumerate() {
            let row = from
                .data
                .wrapping_add(unit * from.inner + first * from.outer);
            let bytes = (end - first) * size_of::<T>();
            fetch(row.wrapping_add(AHEAD * from.inner), bytes);
            for column in (first..end).step_by(LANES) {
                let here = (end - column).min(LANES);
                let panel = (column - columns.start) / LANES;
                // SAFETY: as the caller promises.
                unsafe {
                    let at = from
                        .data
                        .add(unit * from.inner + column * from.outer)
                        .cast::<T>();
                    let to = to.add(panel * count + index).cast::<f32>();
                    let (first, second) = if here == LANES {
                        (load8(at), load8(at.add(WIDTH)))
                    } else {
                        let low = here.min(WIDTH);
                        let high = here.saturating_sub(WIDTH);
                        (load_partial(at, low), load_partial(at.add(low), high))
                    };
                    _mm256_store_ps(to, first);
                    _mm256_store_ps(to.add(WIDTH), second);
                }
            }
        }
    }
}

/// Packs units of a right matrix with contiguous columns.
///
/// # Safety
/// As for [`Kernel::pack_right`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_right_columns<T>(
    from: &Operand,
    units: Range<usize>,
    columns: Range<usize>,
    to: *mut CacheLine,
) where
    T: Number,
{
    let count = units.len();
    for (panel, first) in columns.clone().step_by(LANES).enumerate() {
        let there = (columns.end - first).min(LANES);
        for (index, unit) in units.clone().enumerate().step_by(WIDTH) {
            let here = (units.end - unit).min(WIDTH);
            for half in [0, WIDTH] {
                // SAFETY: as the caller promises.
                unsafe {
                    let mut rows = [_mm256_setzero_ps(); WIDTH];
                    let valid = there.saturating_sub(half);
                    for (column, row) in rows.iter_mut().enumerate().take(valid) {
                        let column = first + half + column;
                        let at = from
                            .data
                            .add(unit * from.inner + column * from.outer)
                            .cast::<T>();
                        fetch(at.wrapping_add(AHEAD * WIDTH).cast(), 1);
                        *row = match here {
                            WIDTH => load8(at),
                            _ => load_partial(at, here),
                        };
                    }
                    for (step, values) in transposed(rows).into_iter().enumerate().take(here) {
                        let line = to.add(panel * count + index + step);
                        _mm256_store_ps(line.cast::<f32>().add(half), values);
                    }
                }
            }
        }
    }
}

/// Packs units of a left matrix with contiguous rows.
///
/// # Safety
/// As for [`Kernel::pack_left`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_left_rows<T>(
    from: &Operand,
    units: Range<usize>,
    first: usize,
    rows: usize,
    to: *mut f32,
) where
    T: Number,
{
    let whole = units.len() / WIDTH * WIDTH;
    for row in 0..rows {
        // SAFETY: as the caller promises.
        unsafe {
            let at = from
                .data
                .add(units.start * from.inner + (first + row) * from.outer)
                .cast::<T>();
            let to = to.add(row * units.len());
            for unit in (0..whole).step_by(WIDTH) {
                _mm256_storeu_ps(to.add(unit), load8(at.add(unit)));
            }
            widen(at.add(whole), to.add(whole), units.len() - whole);
        }
    }
}

/// Packs units of a left matrix with contiguous columns.
///
/// # Safety
/// As for [`Kernel::pack_left`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_left_columns<T>(
    from: &Operand,
    units: Range<usize>,
    first: usize,
    rows: usize,
    to: *mut f32,
) where
    T: Number,
{
    let count = units.len();
    for (index, unit) in units.enumerate() {
        let at = from
            .data
            .wrapping_add(unit * from.inner + first * from.outer);
        fetch(at.wrapping_add(AHEAD * from.inner), rows * size_of::<T>());
        for (panel, row) in (0..rows).step_by(ROWS).enumerate() {
            // SAFETY: as the caller promises. The next unit overwrites what is written beyond six
            // elements.
            unsafe {
                let at = at.cast::<T>().add(row);
                let to = to.add((panel * count + index) * ROWS);
                match rows - row {
                    WIDTH.. if index + 1 < count => _mm256_storeu_ps(to, load8(at)),
                    ROWS.. => copy6(at, to),
                    rest => widen(at, to, rest),
                }
            }
        }
    }
}

/// # Safety
/// Eight elements are readable.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn load8<T>(at: *const T) -> __m256
where
    T: Number,
{
    // SAFETY: as the caller promises.
    unsafe {
        match size_of::<T>() {
            4 => _mm256_loadu_ps(at.cast()),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}

/// # Safety
/// Six elements are readable and writable.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn copy6<T>(at: *const T, to: *mut f32)
where
    T: Number,
{
    // SAFETY: as the caller promises.
    unsafe {
        if size_of::<T>() == 4 {
            let elements = at.cast::<[f32; ROWS]>().read_unaligned();
            to.cast::<[f32; ROWS]>().write_unaligned(elements);
            return;
        }
        let wide = |x| _mm_slli_epi32::<16>(_mm_cvtepu16_epi32(x));
        let first = _mm_loadl_epi64(at.cast());
        let last = at.add(4).cast::<i32>().read_unaligned();
        _mm_storeu_si128(to.cast(), wide(first));
        _mm_storel_epi64(to.add(4).cast(), wide(_mm_cvtsi32_si128(last)));
    }
}

/// # Safety
/// `count` elements, at most eight, are readable.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn load_partial<T>(at: *const T, count: usize) -> __m256
where
    T: Number,
{
    let mut numbers = [0f32; WIDTH];
    // SAFETY: as the caller promises.
    unsafe {
        widen(at, numbers.as_mut_ptr(), count);
        _mm256_loadu_ps(numbers.as_ptr())
    }
}

/// Transposes 8 x 8 elements.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed(a: [__m256; WIDTH]) -> [__m256; WIDTH] {
    let mut b = a;
    for i in (0..WIDTH).step_by(2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    let mut c = b;
    for i in (0..WIDTH).step_by(4) {
        c[i] = _mm256_shuffle_ps::<0x44>(b[i], b[i + 2]);
        c[i + 1] = _mm256_shuffle_ps::<0xee>(b[i], b[i + 2]);
        c[i + 2] = _mm256_shuffle_ps::<0x44>(b[i + 1], b[i + 3]);
        c[i + 3] = _mm256_shuffle_ps::<0xee>(b[i + 1], b[i + 3]);
    }
    // Half h of c[4 q + i] is column i + 4 h of rows 4 q to 4 q + 3.
    let low: [__m256; 4] = std::array::from_fn(|i| _mm256_permute2f128_ps::<0x20>(c[i], c[4 + i]));
    let high: [__m256; 4] = std::array::from_fn(|i| _mm256_permute2f128_ps::<0x31>(c[i], c[4 + i]));
    std::array::from_fn(|i| if i < 4 { low[i] } else { high[i - 4] })
}

/// # Safety
/// As for [`Kernel::tile`].
#[target_feature(enable = "avx2,fma")]
unsafe fn tile(
    units: usize,
    left: &[*const u8; ROWS],
    step: usize,
    mut right: *const f32,
    out: &TileOutput,
) {
    // SAFETY: as the caller promises.
    unsafe {
        out.fetch::<1>();
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        let mut at = 0usize;
        for _ in 0..units {
            let line = [_mm256_load_ps(right), _mm256_load_ps(right.add(WIDTH))];
            for i in 0..ROWS {
                let left = _mm256_broadcast_ss(&*left[i].add(at).cast());
                for j in 0..2 {
                    sums[i][j] = _mm256_fmadd_ps(left, line[j], sums[i][j]);
                }
            }
            at = at.wrapping_add(step);
            right = right.add(LANES);
        }
        if !out.is_full() || out.store == Store::Round {
            // A copy: what is passed by reference is in memory, and `sums` must stay in registers.
            let sums = sums;
            return store_partial_tile(&sums, out);
        }
        let mut row = out.data.cast::<f32>();
        for [mut first, mut second] in sums {
            if out.store == Store::Add {
                first = _mm256_add_ps(_mm256_loadu_ps(row), first);
                second = _mm256_add_ps(_mm256_loadu_ps(row.add(WIDTH)), second);
            }
            _mm256_storeu_ps(row, first);
            _mm256_storeu_ps(row.add(WIDTH), second);
            row = row.wrapping_byte_add(out.row_stride);
        }
    }
}

/// Stores the valid elements of a tile, rounded if `out` says so.
///
/// # Safety
/// As for [`Kernel::tile`].
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
unsafe fn store_partial_tile(sums: &[[__m256; 2]; ROWS], out: &TileOutput) {
    let columns = out.mask.count_ones() as usize;
    for (i, &[first, second]) in sums.iter().enumerate().take(out.rows) {
        // SAFETY: as the caller promises.
        unsafe {
            let row = out.data.add(i * out.row_stride);
            let mut sums = [0f32; LANES];
            _mm256_storeu_ps(sums.as_mut_ptr(), first);
            _mm256_storeu_ps(sums.as_mut_ptr().add(WIDTH), second);
            if out.store == Store::Round {
                let row = std::slice::from_raw_parts_mut(row.cast::<Bf16>(), columns);
                for (x, sum) in row.iter_mut().zip(sums) {
                    *x = Bf16::narrow(sum);
                }
                continue;
            }
            let row = std::slice::from_raw_parts_mut(row.cast::<f32>(), columns);
            for (x, sum) in row.iter_mut().zip(sums) {
                *x = if out.store == Store::Add {
                    *x + sum
                } else {
                    sum
                };
            }
        }
    }
}

/// # Safety
/// As for [`Kernel::round`].
#[target_feature(enable = "avx2,fma")]
unsafe fn round(
    from: *const f32,
    from_stride: usize,
    width: usize,
    out: *mut u8,
    out_stride: usize,
    rows: usize,
) {
    for row in 0..rows {
        // SAFETY: as the caller promises.
        let from = unsafe { std::slice::from_raw_parts(from.add(row * from_stride), width) };
        // SAFETY: as the caller promises.
        let to = unsafe {
            let row = out.add(row * out_stride).cast::<Bf16>();
            std::slice::from_raw_parts_mut(row, width)
        };
        for (to, x) in to.iter_mut().zip(from) {
            *to = Bf16::narrow(*x);
        }
    }
}
