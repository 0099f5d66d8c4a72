//! Rounding of rows to 8-bit floating point (E4M3) with a scale per row.

use crate::{
    cuda,
    profile::{Cost, span},
    tensors::LAST_DIM,
};
use tch::{Kind, Tensor};

/// The largest number of E4M3.
const E4M3_MAX: f64 = 448.0;

/// Rounds `x` `[.., I]` to E4M3. Also returns the scale of each row, `[.., 1]` fp32: its largest
/// magnitude over 448.
///
/// # Panics
/// If libtorch refuses the dtype.
pub fn quantize_rows(x: &Tensor) -> (Tensor, Tensor) {
    let cost = || Cost::passes(1.5, x);
    span("fp8", "quantize", cost, || match cuda::gpu(&[x]) {
        Some(gpu) => cuda::quantize_rows(gpu, x),
        None => quantize_by_libtorch(x),
    })
}

pub(crate) fn quantize_by_libtorch(x: &Tensor) -> (Tensor, Tensor) {
    let x = x.to_kind(Kind::Float);
    let largest = x.abs().amax(LAST_DIM, true);
    // Avoids a division by zero for rows of zeros.
    let scale = (largest / E4M3_MAX).clamp_min(1e-12);
    let small = (x / &scale)
        .clamp(-E4M3_MAX, E4M3_MAX)
        .to_kind(Kind::Float8e4m3fn);
    (small, scale)
}
