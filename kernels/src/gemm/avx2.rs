//! For processors with AVX2 and FMA, which have no instructions for bf16: bf16 becomes fp32 where it is packed, so that rows of a left
//! matrix are packed, too. A tile is 6 x 16, whose row of two vectors meets six broadcast numbers: 12 of 16 registers.

use super::kernel::{
    CacheLine, Kernel, LANES, Layout, MAX_PACKED_PANELS, Operand, ROWS, Store, TileOutput, fetch,
};
use crate::number::{Bf16, Number};
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Numbers of a vector.
const WIDTH: usize = 8;
/// Columns of which a row is read at once.
const COLUMNS: usize = 4 * LANES;
/// Bytes of a page.
const PAGE: usize = 4096;
/// Steps from what is read to what is fetched meanwhile.
const AHEAD: usize = 8;

/// Products of numbers of this type.
pub(crate) struct Avx2<T>(PhantomData<T>);

impl<T: Number> Kernel for Avx2<T> {
    const SIZE: usize = size_of::<T>();
    const PER_UNIT: usize = 1;
    const LINES: usize = 1;
    const DEPTH: usize = 256;
    const RIGHT_STATIONARY: bool = true;

    fn layout(left: &Operand) -> Layout {
        match left.inner == Self::SIZE {
            // bf16 has to be made fp32, and rows that are whole pages apart would share few places of the cache.
            true if Self::SIZE == 4 && !left.outer.is_multiple_of(PAGE) => Layout::InPlace,
            true => Layout::Rows,
            false => Layout::Units,
        }
    }

    fn panels(_: Layout) -> usize {
        MAX_PACKED_PANELS
    }

    unsafe fn right(
        from: &Operand,
        units: Range<usize>,
        columns: Range<usize>,
        to: *mut CacheLine,
    ) {
        // SAFETY: the same promises.
        unsafe {
            if from.outer == Self::SIZE {
                pack_right_rows::<T>(from, units, columns, to)
            } else {
                pack_right_columns::<T>(from, units, columns, to)
            }
        }
    }

    unsafe fn left(from: &Operand, units: Range<usize>, first: usize, rows: usize, to: *mut u32) {
        // SAFETY: the same promises.
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
        // SAFETY: the same promises; a step has as many lines as a tile.
        unsafe { tile(units, left, step, right.cast(), out) }
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
        unsafe { round(from, from_row, width, out, out_row, rows) }
    }
}

/// `count` numbers, made fp32.
///
/// # Safety
/// They can be read, and written; the caller has the features.
#[inline(always)]
unsafe fn widen<T: Number>(from: *const T, to: *mut f32, count: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        let from = std::slice::from_raw_parts(from, count);
        let to = std::slice::from_raw_parts_mut(to, count);
        to.iter_mut().zip(from).for_each(|(to, x)| *to = x.wide());
    }
}

/// A right matrix whose rows lie in memory, `units` of which are wanted.
///
/// # Safety
/// As for [`Kernel::right`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_right_rows<T: Number>(
    from: &Operand,
    units: Range<usize>,
    columns: Range<usize>,
    to: *mut CacheLine,
) {
    let count = units.len();
    // Many panels at once would be written to few places of the cache.
    for first in columns.clone().step_by(COLUMNS) {
        let end = columns.end.min(first + COLUMNS);
        for (index, unit) in units.clone().enumerate() {
            let row = from
                .data
                .wrapping_add(unit * from.inner + first * from.outer);
            fetch(
                row.wrapping_add(AHEAD * from.inner),
                (end - first) * size_of::<T>(),
            );
            for column in (first..end).step_by(LANES) {
                let here = (end - column).min(LANES);
                // SAFETY: as the caller promises.
                unsafe {
                    let at = from
                        .data
                        .add(unit * from.inner + column * from.outer)
                        .cast::<T>();
                    let to = to
                        .add((column - columns.start) / LANES * count + index)
                        .cast::<f32>();
                    let (first, second) = match here {
                        LANES => (eight(at), eight(at.add(WIDTH))),
                        _ => (
                            some(at, here.min(WIDTH)),
                            some(at.add(here.min(WIDTH)), here.saturating_sub(WIDTH)),
                        ),
                    };
                    _mm256_store_ps(to, first);
                    _mm256_store_ps(to.add(WIDTH), second);
                }
            }
        }
    }
}

/// A right matrix whose columns lie in memory.
///
/// # Safety
/// As for [`Kernel::right`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_right_columns<T: Number>(
    from: &Operand,
    units: Range<usize>,
    columns: Range<usize>,
    to: *mut CacheLine,
) {
    let count = units.len();
    for (panel, first) in columns.clone().step_by(LANES).enumerate() {
        let there = (columns.end - first).min(LANES);
        for (index, unit) in units.clone().enumerate().step_by(WIDTH) {
            let here = (units.end - unit).min(WIDTH);
            for half in [0, WIDTH] {
                // SAFETY: as the caller promises.
                unsafe {
                    let mut rows = [_mm256_setzero_ps(); WIDTH];
                    for (column, row) in
                        rows.iter_mut().enumerate().take(there.saturating_sub(half))
                    {
                        let at = from
                            .data
                            .add(unit * from.inner + (first + half + column) * from.outer)
                            .cast::<T>();
                        fetch(at.wrapping_add(AHEAD * WIDTH).cast(), 1);
                        *row = match here {
                            WIDTH => eight(at),
                            _ => some(at, here),
                        };
                    }
                    for (step, values) in transposed(rows).into_iter().enumerate().take(here) {
                        _mm256_store_ps(
                            to.add(panel * count + index + step).cast::<f32>().add(half),
                            values,
                        );
                    }
                }
            }
        }
    }
}

/// Rows of a left matrix that lie in memory.
///
/// # Safety
/// As for [`Kernel::left`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_left_rows<T: Number>(
    from: &Operand,
    units: Range<usize>,
    first: usize,
    rows: usize,
    to: *mut f32,
) {
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
                _mm256_storeu_ps(to.add(unit), eight(at.add(unit)));
            }
            widen(at.add(whole), to.add(whole), units.len() - whole);
        }
    }
}

/// Rows of a left matrix whose columns lie in memory.
///
/// # Safety
/// As for [`Kernel::left`].
#[target_feature(enable = "avx2,fma")]
unsafe fn pack_left_columns<T: Number>(
    from: &Operand,
    units: Range<usize>,
    first: usize,
    rows: usize,
    to: *mut f32,
) {
    let count = units.len();
    for (index, unit) in units.enumerate() {
        let at = from
            .data
            .wrapping_add(unit * from.inner + first * from.outer);
        fetch(at.wrapping_add(AHEAD * from.inner), rows * size_of::<T>());
        for (panel, row) in (0..rows).step_by(ROWS).enumerate() {
            // SAFETY: as the caller promises. What is written beyond six numbers, the next unit's are written over.
            unsafe {
                let at = at.cast::<T>().add(row);
                let to = to.add((panel * count + index) * ROWS);
                match rows - row {
                    WIDTH.. if index + 1 < count => _mm256_storeu_ps(to, eight(at)),
                    ROWS.. => six(at, to),
                    rest => widen(at, to, rest),
                }
            }
        }
    }
}

/// # Safety
/// Eight numbers can be read.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn eight<T: Number>(at: *const T) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe {
        match size_of::<T>() {
            4 => _mm256_loadu_ps(at.cast()),
            _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(at.cast()),
            ))),
        }
    }
}

/// # Safety
/// Six numbers can be read, and written.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn six<T: Number>(at: *const T, to: *mut f32) {
    // SAFETY: as the caller promises.
    unsafe {
        if size_of::<T>() == 4 {
            to.cast::<[f32; ROWS]>()
                .write_unaligned(at.cast::<[f32; ROWS]>().read_unaligned());
            return;
        }
        let wide = |x| _mm_slli_epi32::<16>(_mm_cvtepu16_epi32(x));
        _mm_storeu_si128(to.cast(), wide(_mm_loadl_epi64(at.cast())));
        _mm_storel_epi64(
            to.add(4).cast(),
            wide(_mm_cvtsi32_si128(at.add(4).cast::<i32>().read_unaligned())),
        );
    }
}

/// # Safety
/// `count` numbers, at most eight, can be read.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn some<T: Number>(at: *const T, count: usize) -> __m256 {
    let mut numbers = [0f32; WIDTH];
    // SAFETY: as the caller promises.
    unsafe {
        widen(at, numbers.as_mut_ptr(), count);
        _mm256_loadu_ps(numbers.as_ptr())
    }
}

/// 8 x 8 numbers, rows for columns.
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
    // Each half of c[4 q + i] is column i + 4 * half of rows 4 q to 4 q + 3.
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
            (at, right) = (at.wrapping_add(step), right.add(LANES));
        }
        if !out.is_full() || out.store == Store::Round {
            // By a copy: what is passed on lies in memory, and the sums are to stay in registers.
            let sums = sums;
            return store_partial_tile(&sums, out);
        }
        let mut place = out.data.cast::<f32>();
        for [mut first, mut second] in sums {
            if out.store == Store::Add {
                first = _mm256_add_ps(_mm256_loadu_ps(place), first);
                second = _mm256_add_ps(_mm256_loadu_ps(place.add(WIDTH)), second);
            }
            _mm256_storeu_ps(place, first);
            _mm256_storeu_ps(place.add(WIDTH), second);
            place = place.wrapping_byte_add(out.row);
        }
    }
}

/// The numbers of a tile that are there, or all, rounded.
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
            let row = out.data.add(i * out.row);
            let mut sums = [0f32; LANES];
            _mm256_storeu_ps(sums.as_mut_ptr(), first);
            _mm256_storeu_ps(sums.as_mut_ptr().add(WIDTH), second);
            if out.store == Store::Round {
                let place = std::slice::from_raw_parts_mut(row.cast::<Bf16>(), columns);
                place
                    .iter_mut()
                    .zip(sums)
                    .for_each(|(place, sum)| *place = Bf16::narrow(sum));
                continue;
            }
            for (place, sum) in std::slice::from_raw_parts_mut(row.cast::<f32>(), columns)
                .iter_mut()
                .zip(sums)
            {
                *place = if out.store == Store::Add {
                    *place + sum
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
    from_row: usize,
    width: usize,
    out: *mut u8,
    out_row: usize,
    rows: usize,
) {
    for row in 0..rows {
        // SAFETY: as the caller promises.
        let (from, to) = unsafe {
            let to = out.add(row * out_row).cast::<Bf16>();
            (
                std::slice::from_raw_parts(from.add(row * from_row), width),
                std::slice::from_raw_parts_mut(to, width),
            )
        };
        to.iter_mut()
            .zip(from)
            .for_each(|(to, x)| *to = Bf16::narrow(*x));
    }
}
