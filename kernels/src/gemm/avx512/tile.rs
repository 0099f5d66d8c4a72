//! The innermost loop: the sums of a tile, which stay in registers along the inner dimension.

use crate::gemm::kernel::{CacheLine, LANES, ROWS, Store, TileOutput, mask};
use std::arch::x86_64::*;

/// Computes a tile of N vectors of columns, as
/// [`Kernel::tile`](crate::gemm::kernel::Kernel::tile) describes.
///
/// # Safety
/// The processor has the features, all of `left` and `right` is readable, and the elements that
/// `out` describes are writable.
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
                let unit = left[i].add(at).cast::<i32>().read_unaligned();
                let left = _mm512_castsi512_ps(_mm512_set1_epi32(unit));
                for j in 0..N {
                    sums[i][j] = if BF16 {
                        _mm512_dpbf16_ps(sums[i][j], pairs(left), pairs(line[j]))
                    } else {
                        _mm512_fmadd_ps(left, line[j], sums[i][j])
                    };
                }
            }
            at = at.wrapping_add(step);
            right = right.add(N);
        }
        if !out.is_full() {
            // A copy: what is passed by reference is in memory, and `sums` must stay in registers.
            let sums = sums;
            return store_partial_tile(&sums, out);
        }
        let mut row = out.data;
        for sums in sums {
            for (j, sum) in sums.into_iter().enumerate() {
                let wide = row.cast::<f32>().wrapping_add(j * LANES);
                match out.store {
                    Store::Set => _mm512_storeu_ps(wide, sum),
                    Store::Add => {
                        let sum = _mm512_add_ps(_mm512_loadu_ps(wide), sum);
                        _mm512_storeu_ps(wide, sum);
                    }
                    Store::Round => {
                        let narrow = row.cast::<i16>().add(j * LANES);
                        _mm256_storeu_si256(narrow.cast(), rounded(sum));
                    }
                }
            }
            row = row.wrapping_add(out.row_stride);
        }
    }
}

/// Stores the valid elements of a tile.
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
                let row = out.data.add(i * out.row_stride);
                let wide = row.cast::<f32>().wrapping_add(j * LANES);
                match out.store {
                    Store::Set => _mm512_mask_storeu_ps(wide, mask, sum),
                    Store::Add => {
                        let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, wide), sum);
                        _mm512_mask_storeu_ps(wide, mask, sum);
                    }
                    Store::Round => {
                        let narrow = row.cast::<i16>().add(j * LANES);
                        _mm256_mask_storeu_epi16(narrow, mask, rounded(sum));
                    }
                }
            }
        }
    }
}

/// Calls [`tile`] for `lines` vectors of columns, from 1 to 4.
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
    // SAFETY: both types are 512 plain bits.
    unsafe { std::mem::transmute(x) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(x: __m512) -> __m256i {
    // SAFETY: both types are 256 plain bits.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(x)) }
}

/// Does what [`Kernel::round`](crate::gemm::kernel::Kernel::round) describes.
///
/// # Safety
/// As for [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn round(
    from: *const f32,
    from_stride: usize,
    width: usize,
    out: *mut u8,
    out_stride: usize,
    rows: usize,
) {
    // SAFETY: as the caller promises.
    unsafe {
        for i in 0..rows {
            for column in (0..width).step_by(LANES) {
                let mask = mask(width - column);
                let sum = _mm512_maskz_loadu_ps(mask, from.add(i * from_stride + column));
                let to = out.add(i * out_stride).cast::<i16>().add(column);
                _mm256_mask_storeu_epi16(to, mask, rounded(sum));
            }
        }
    }
}
