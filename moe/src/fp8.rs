//! Grouped GEMMs in 8-bit floating point (E4M3) with a scale per row and column, summed in fp32.
//!
//! The scaling is the row-wise one of "FP8-LM" (arXiv 2310.18313) and of torch's
//! `_scaled_grouped_mm`, which needs a Hopper GPU. Other devices compute the same numbers in fp32
//! from the same rounded operands, so the effect of the rounding on the loss can be measured
//! anywhere. The kernel itself has not yet been run on hardware.
// Shapes: R rows, E experts, I in, O out.

use tch::{Device, Kind, Tensor};
use torch_ext::Error;

const E4M3_MAX: f64 = 448.0;

/// Rounds `[.., I]` to 8 bits. Also returns the scale of each row, `[.., 1]` fp32.
fn quantize(x: &Tensor) -> (Tensor, Tensor) {
    let x = x.to_kind(Kind::Float);
    let largest = x.abs().amax([-1i64].as_slice(), true);
    // Avoids a division by zero for rows of zeros.
    let scale = (largest / E4M3_MAX).clamp_min(1e-12);
    let small = (x / &scale)
        .clamp(-E4M3_MAX, E4M3_MAX)
        .to_kind(Kind::Float8e4m3fn);
    (small, scale)
}

/// Multiplies each group of rows `[R, I]` by its own matrix of `[E, O, I]`: `[R, O]`.
///
/// # Errors
/// On a GPU, if the kernel fails. It needs a bf16 model, widths that are multiples of 16, and
/// Hopper or newer.
pub(crate) fn grouped_matmul(
    rows: &Tensor,
    matrices: &Tensor,
    counts: &[i64],
) -> Result<Tensor, Error> {
    let (small, scales) = quantize(rows);
    if let Device::Cuda(_) = rows.device() {
        return grouped_matmul_cuda(&small, &scales, matrices, counts);
    }
    let small = small.to_kind(Kind::Float);
    let mut products = Vec::new();
    let mut start = 0;
    for (expert, &len) in counts.iter().enumerate() {
        let (matrix, matrix_scale) = quantize(&matrices.get(expert as i64));
        let group = small.narrow(0, start, len);
        let product = group.matmul(&matrix.to_kind(Kind::Float).tr());
        products.push(product * scales.narrow(0, start, len) * matrix_scale.tr());
        start += len;
    }
    Ok(Tensor::cat(&products, 0).to_kind(rows.kind()))
}

fn grouped_matmul_cuda(
    rows: &Tensor,
    scales: &Tensor,
    matrices: &Tensor,
    counts: &[i64],
) -> Result<Tensor, Error> {
    let (matrices, matrix_scales) = quantize(matrices);
    let ends = counts.iter().scan(0i32, |end, &count| {
        *end += count as i32;
        Some(*end)
    });
    let ends = Tensor::from_slice(&ends.collect::<Vec<_>>()).to_device(rows.device());
    let bias = None::<Tensor>;
    let result_scale = None::<Tensor>;
    rows.f_internal_scaled_grouped_mm(
        &matrices.transpose(-2, -1),
        &scales.squeeze_dim(-1),
        &matrix_scales.squeeze_dim(-1),
        Some(ends),
        bias,
        result_scale,
        Kind::BFloat16,
        true,
    )
    .map_err(|e| Error::new(format!("experts in fp8: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu};

    #[test]
    fn numbers_that_fit_are_multiplied_exactly() {
        // A row with the largest number 448 has scale 1. E4M3 has the whole numbers up to 16.
        let rows = Tensor::from_slice(&[448f32, 3.0, -2.0, 16.0, 448.0, 0.0, 448.0, 7.0, 1.0])
            .view([3, 3]);
        let matrices = [
            [448f32, 1.0, 2.0, -448.0, 5.0, 0.0],
            [0.0, 448.0, -9.0, 448.0, 448.0, 448.0],
        ];
        let matrices = Tensor::from_slice(&matrices.concat()).view([2, 2, 3]);
        let ours = grouped_matmul(&rows, &matrices, &[2, 1]).unwrap();
        let matrix = |expert: i64| matrices.get(expert).tr();
        let plain = [
            rows.narrow(0, 0, 2).matmul(&matrix(0)),
            rows.narrow(0, 2, 1).matmul(&matrix(1)),
        ];
        assert_eq!(ours, Tensor::cat(&plain, 0));
    }

    #[test]
    fn rounding_costs_a_few_percent_whatever_the_scale() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let rows = random(&[32, 64]) * (random(&[32, 1]) * 20.0).exp();
        let matrix = random(&[48, 64]);
        let ours = grouped_matmul(&rows, &matrix.unsqueeze(0), &[32]).unwrap();
        let plain = rows.matmul(&matrix.tr());
        let norm = |x: &Tensor| {
            x.square()
                .sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
                .sqrt()
        };
        let off = (norm(&(ours - &plain)) / norm(&plain))
            .max()
            .double_value(&[]);
        assert!(off > 1e-3 && off < 0.06, "{off}");
    }

    #[test]
    fn groups_without_rows_and_rows_of_zeros_are_fine() {
        let zeros = Tensor::zeros([2, 16], (Kind::BFloat16, Device::Cpu));
        let matrices = Tensor::stack(&[&zeros, &zeros, &zeros], 0);
        let out = grouped_matmul(&zeros, &matrices, &[0, 2, 0]).unwrap();
        assert_eq!((out.size(), out.kind()), (vec![2, 2], Kind::BFloat16));
        assert_eq!(out.abs().sum(Kind::Float).double_value(&[]), 0.0);
    }
}
