//! Grouped GEMMs in 8-bit floating point (E4M3) with a scale per row and column, summed in fp32.
//!
//! The scaling is the row-wise one of "FP8-LM" (arXiv 2310.18313) and of torch's
//! `_scaled_grouped_mm`, whose kernel is compiled for Hopper only. Processors and NPUs compute the
//! same numbers in fp32 from the same rounded operands, so the effect of the rounding on the
//! loss can be measured there. The kernel itself has not yet been run on hardware.
// Shapes: R rows, E experts, I in, O out.

use kernels::{RowGroups, quantize_rows};
use parking_lot::Mutex;
use std::{collections::HashMap, sync::Arc};
use tch::{Device, Kind, Tensor};
use torch_ext::Error;

/// Sums in Hopper's tensor cores would keep some 14 bits (DeepSeek-V3, arXiv 2412.19437, section
/// 3.3.2), and the emulation's sums are fp32.
const FAST_ACCUMULATION: bool = false;

/// True if libtorch 2.11.0 has the kernel for NVIDIA GPUs of this major compute capability. On
/// newer ones it accepts the operands, and its kernel stops the program.
pub fn has_fp8_kernel(major: i32) -> bool {
    major == 9
}

/// Matrices `[E, O, I]` in 8 bits, with the scale of each row.
pub(crate) struct Fp8Matrices {
    /// `[E, O, I]` E4M3.
    small: Tensor,
    /// `[E, O, 1]` fp32.
    scales: Tensor,
}

impl Fp8Matrices {
    /// Rounds a stack of matrices `[E, O, I]`.
    pub(crate) fn of(matrices: &Tensor) -> Fp8Matrices {
        let (small, scales) = quantize_rows(&matrices.contiguous());
        Fp8Matrices { small, scales }
    }

    /// Returns the matrices of all stacks.
    pub(crate) fn join(stacks: Vec<Fp8Matrices>) -> Fp8Matrices {
        let join = |part: fn(&Fp8Matrices) -> Tensor| {
            Tensor::cat(&stacks.iter().map(part).collect::<Vec<_>>(), 0)
        };
        // libtorch may not concatenate E4M3, so bytes are.
        let small = join(|stack| stack.small.view_dtype(Kind::Uint8));
        Fp8Matrices {
            small: small.view_dtype(Kind::Float8e4m3fn),
            scales: join(|stack| stack.scales.shallow_clone()),
        }
    }

    fn shallow_clone(&self) -> Fp8Matrices {
        Fp8Matrices {
            small: self.small.shallow_clone(),
            scales: self.scales.shallow_clone(),
        }
    }
}

/// A layer's matrices, as a GEMM uses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ExpertMatrix {
    GateUp,
    GateUpTransposed,
    Down,
    DownTransposed,
}

/// The weights of a layer's experts in 8 bits, rounded at their first use after each update.
#[derive(Clone, Default)]
pub struct Fp8Weights(Arc<Mutex<HashMap<ExpertMatrix, Fp8Matrices>>>);

impl Fp8Weights {
    /// Returns `matrices`, which are `matrix` of the layer, in 8 bits.
    pub(crate) fn get(&self, matrix: ExpertMatrix, matrices: &Tensor) -> Fp8Matrices {
        let mut known = self.0.lock();
        let rounded = known
            .entry(matrix)
            .or_insert_with(|| Fp8Matrices::of(matrices));
        rounded.shallow_clone()
    }

    /// Frees the rounded weights, which an update has made stale.
    pub(crate) fn forget(&self) {
        self.0.lock().clear();
    }
}

impl std::fmt::Debug for Fp8Weights {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.debug_struct("Fp8Weights").finish_non_exhaustive()
    }
}

/// Multiplies each group of rows `[R, I]` by its own matrix: `[R, O]`.
///
/// # Errors
/// On a GPU, if the kernel fails. It needs a bf16 model, widths that are multiples of 16, and
/// compute capability 9 (Hopper).
pub(crate) fn grouped_matmul(
    rows: &Tensor,
    matrices: &Fp8Matrices,
    groups: &RowGroups,
) -> Result<Tensor, Error> {
    let (small, scales) = quantize_rows(&rows.contiguous());
    if let Device::Cuda(index) = rows.device() {
        let (major, minor) = torch_ext::compute_capability(index)?;
        check_gpu(index, major, minor)?;
        return grouped_matmul_cuda(&small, &scales, matrices, groups);
    }
    let small = small.to_kind(Kind::Float);
    let mut products = Vec::new();
    let mut start = 0;
    for (expert, &len) in groups.counts().iter().enumerate() {
        let matrix = matrices.small.get(expert as i64);
        let matrix_scale = matrices.scales.get(expert as i64);
        let group = small.narrow(0, start, len);
        let product = group.matmul(&matrix.to_kind(Kind::Float).tr());
        products.push(product * scales.narrow(0, start, len) * matrix_scale.tr());
        start += len;
    }
    Ok(Tensor::cat(&products, 0).to_kind(rows.kind()))
}

/// Fails unless GPUs of this compute capability have the kernel.
fn check_gpu(index: usize, major: i32, minor: i32) -> Result<(), Error> {
    if has_fp8_kernel(major) {
        return Ok(());
    }
    Err(Error::new(format!(
        "train.fp8_experts: GPU {index} has compute capability {major}.{minor}, and libtorch's \
         kernel needs 9.0 (Hopper); hint: leave fp8_experts out"
    )))
}

fn grouped_matmul_cuda(
    rows: &Tensor,
    scales: &Tensor,
    matrices: &Fp8Matrices,
    groups: &RowGroups,
) -> Result<Tensor, Error> {
    let ends = groups.ends(rows.device())?;
    let bias = None::<Tensor>;
    let result_scale = None::<Tensor>;
    rows.f_internal_scaled_grouped_mm(
        &matrices.small.transpose(-2, -1),
        &scales.squeeze_dim(-1),
        &matrices.scales.squeeze_dim(-1),
        Some(ends),
        bias,
        result_scale,
        Kind::BFloat16,
        FAST_ACCUMULATION,
    )
    .map_err(|e| Error::new(format!("experts in fp8: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu};

    #[test]
    fn only_hopper_has_the_kernel() {
        for major in [8, 9, 10, 12] {
            assert_eq!(check_gpu(0, major, 0).is_ok(), major == 9, "{major}");
        }
        let error = check_gpu(3, 8, 0).unwrap_err().to_string();
        assert!(
            error.contains("train.fp8_experts") && error.contains("GPU 3") && error.contains("8.0"),
            "{error}"
        );
    }

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
        let ours = grouped_matmul(
            &rows,
            &Fp8Matrices::of(&matrices),
            &RowGroups::new(vec![2, 1]),
        )
        .unwrap();
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
        let groups = RowGroups::new(vec![32]);
        let ours = grouped_matmul(&rows, &Fp8Matrices::of(&matrix.unsqueeze(0)), &groups).unwrap();
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
    fn weights_are_rounded_once_until_they_are_forgotten() {
        let weights = Fp8Weights::default();
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let mut matrices = random(&[2, 3, 16]);
        let first = weights.get(ExpertMatrix::Down, &matrices);
        let of_other = weights.get(ExpertMatrix::GateUp, &random(&[2, 3, 16]));
        assert_ne!(of_other.scales, first.scales);
        let _ = matrices.g_mul_scalar_(2.0);
        let again = weights.get(ExpertMatrix::Down, &matrices);
        assert_eq!(again.small.data_ptr(), first.small.data_ptr());
        weights.forget();
        assert_eq!(
            weights.get(ExpertMatrix::Down, &matrices).scales,
            first.scales * 2.0
        );
    }

    #[test]
    fn joined_stacks_are_one_stack() {
        let random = |experts| {
            Cpu.empty(&[experts, 3, 16], Kind::Float)
                .uniform_(-1.0, 1.0)
        };
        let [own, lent] = [random(2), random(1)];
        let joined = Fp8Matrices::join(vec![Fp8Matrices::of(&own), Fp8Matrices::of(&lent)]);
        let whole = Fp8Matrices::of(&Tensor::cat(&[own, lent], 0));
        let rows = random(1).get(0);
        let groups = RowGroups::new(vec![1; 3]);
        let multiply = |matrices| grouped_matmul(&rows, matrices, &groups).unwrap();
        assert_eq!(multiply(&joined), multiply(&whole));
    }

    #[test]
    fn groups_without_rows_and_rows_of_zeros_are_fine() {
        let zeros = Tensor::zeros([2, 16], (Kind::BFloat16, Device::Cpu));
        let matrices = Tensor::stack(&[&zeros, &zeros, &zeros], 0);
        let groups = RowGroups::new(vec![0, 2, 0]);
        let out = grouped_matmul(&zeros, &Fp8Matrices::of(&matrices), &groups).unwrap();
        assert_eq!((out.size(), out.kind()), (vec![2, 2], Kind::BFloat16));
        assert_eq!(out.abs().sum(Kind::Float).double_value(&[]), 0.0);
    }
}
