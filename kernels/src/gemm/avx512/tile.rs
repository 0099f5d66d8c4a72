//! The innermost loop: a tile of a product, which stays in registers while one goes along the inner dimension.

use crate::gemm::kernel::{CacheLine, LANES, ROWS, Store, TileOutput, mask};
use std::arch::x86_64::*;

/// `units` steps of a tile of [`ROWS`] rows and N vectors of columns. Row `i`'s units begin at `left[i]`, `step` bytes apart; a step
/// of `right` is N lines.
///
/// # Safety
/// The processor has the features. All of `left` and `right` can be read, and what `out` tells be written.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn tile<const BF16: bool, const N: usize>(
    units: usize,
    left: &[*const u8; ROWS],
    step: usize,
    mut right: *const CacheLine,
    out: &TileOutput,
) {
    // SAFETY: as the caller promises.
    unsafe {
        out.fetch::<N>();
        let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
        let mut at = 0usize;
        for _ in 0..units {
            let line: [__m512; N] = std::array::from_fn(|j| _mm512_load_ps(right.add(j).cast()));
            for i in 0..ROWS {
                let left = _mm512_castsi512_ps(_mm512_set1_epi32(
                    left[i].add(at).cast::<i32>().read_unaligned(),
                ));
                for j in 0..N {
                    sums[i][j] = if BF16 {
                        _mm512_dpbf16_ps(sums[i][j], pairs(left), pairs(line[j]))
                    } else {
                        _mm512_fmadd_ps(left, line[j], sums[i][j])
                    };
                }
            }
            (at, right) = (at.wrapping_add(step), right.add(N));
        }
        if !out.is_full() {
            // By a copy: what is passed on lies in memory, and the sums are to stay in registers.
            let sums = sums;
            return store_partial_tile(&sums, out);
        }
        let mut row = out.data;
        for sums in sums {
            let place = row.cast::<f32>();
            for (j, sum) in sums.into_iter().enumerate() {
                match out.store {
                    Store::Set => _mm512_storeu_ps(place.add(j * LANES), sum),
                    Store::Add => {
                        let place = place.add(j * LANES);
                        _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), sum));
                    }
                    Store::Round => {
                        _mm256_storeu_si256(row.cast::<i16>().add(j * LANES).cast(), rounded(sum))
                    }
                }
            }
            row = row.wrapping_add(out.row);
        }
    }
}

/// The numbers of a tile that are there.
///
/// # Safety
/// As for [`tile`].
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn store_partial_tile<const N: usize>(sums: &[[__m512; N]; ROWS], out: &TileOutput) {
    for (i, sums) in sums.iter().enumerate().take(out.rows) {
        for (j, &sum) in sums.iter().enumerate() {
            let mask = if j + 1 == N { out.mask } else { u16::MAX };
            // SAFETY: as the caller promises.
            unsafe {
                let row = out.data.add(i * out.row);
                let place = row.cast::<f32>().add(j * LANES);
                match out.store {
                    Store::Set => _mm512_mask_storeu_ps(place, mask, sum),
                    Store::Add => {
                        _mm512_mask_storeu_ps(
                            place,
                            mask,
                            _mm512_add_ps(_mm512_maskz_loadu_ps(mask, place), sum),
                        );
                    }
                    Store::Round => {
                        _mm256_mask_storeu_epi16(
                            row.cast::<i16>().add(j * LANES),
                            mask,
                            rounded(sum),
                        );
                    }
                }
            }
        }
    }
}

/// [`tile`] of `lines` vectors of columns, from 1 to 4.
///
/// # Safety
/// As for [`tile`].
pub(super) unsafe fn dispatch_tile<const BF16: bool>(
    lines: usize,
    units: usize,
    left: &[*const u8; ROWS],
    step: usize,
    right: *const CacheLine,
    out: &TileOutput,
) {
    // SAFETY: as the caller promises.
    unsafe {
        match lines {
            1 => tile::<BF16, 1>(units, left, step, right, out),
            2 => tile::<BF16, 2>(units, left, step, right, out),
            3 => tile::<BF16, 3>(units, left, step, right, out),
            _ => tile::<BF16, 4>(units, left, step, right, out),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(x: __m512) -> __m512bh {
    // SAFETY: the same 512 bits.
    unsafe { std::mem::transmute(x) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(x: __m512) -> __m256i {
    // SAFETY: 16 numbers of 16 bits.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(x)) }
}

/// Rounds rows of `width` fp32 numbers at `from`, `from_row` numbers apart, to bf16 in `out`.
///
/// # Safety
/// As for [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn round(
    from: *const f32,
    from_row: usize,
    width: usize,
    out: *mut u8,
    out_row: usize,
    rows: usize,
) {
    // SAFETY: as the caller promises.
    unsafe {
        for i in 0..rows {
            for column in (0..width).step_by(LANES) {
                let mask = mask(width - column);
                let sum = _mm512_maskz_loadu_ps(mask, from.add(i * from_row + column));
                _mm256_mask_storeu_epi16(
                    out.add(i * out_row).cast::<i16>().add(column),
                    mask,
                    rounded(sum),
                );
            }
        }
    }
}
