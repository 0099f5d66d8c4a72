//! Batched fp32 and bf16 GEMMs with fp32 sums, for processors on which libtorch's are slower.
//!
//! One loop over threads computes several GEMMs, in buffers that stay allocated, so that the kernel
//! need not clear new pages. The algorithm is that of Goto and van de Geijn (Anatomy of
//! High-Performance Matrix Multiplication, 2008), except that rows of the left matrix are read in
//! place if a tile can read their layout. A processor's [`Kernel`] defines the tile.
//!
//! If there are enough blocks of columns, each thread computes whole blocks ([`per_thread`]).
//! Otherwise threads share blocks ([`cooperative`]).
//!
//! Only the length of the inner dimension determines the order in which an element is summed:
//! neither the number of threads nor the other GEMMs change a bit of it.

mod avx2;
mod avx512;
mod cooperative;
pub(crate) mod kernel;
mod macrokernel;
mod partition;
mod per_thread;
mod prefetch;

use crate::{
    matrix::{GemmOperands, Matrix},
    number::Bf16,
};
pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;
use kernel::{Kernel, Operand};
use macrokernel::GemmTask;
use partition::{GemmSize, Partition, partition};
use std::sync::OnceLock;
use tch::Kind;

/// Most elements of the inner dimension for which right matrices are packed at once when
/// accumulating. Gradients sum over all tokens, and the packing buffer is never freed.
const SLAB: usize = 1 << 14;

/// An instruction set with kernels of our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InstructionSet {
    Avx512,
    Avx2,
}

/// The properties of this processor that decide between our GEMM and libtorch's.
#[derive(Clone, Copy)]
struct Processor {
    best: Option<InstructionSet>,
    intel: bool,
}

impl Processor {
    fn detect() -> Processor {
        let id = std::arch::x86_64::__cpuid(0);
        let vendor: Vec<u8> = [id.ebx, id.edx, id.ecx]
            .iter()
            .flat_map(|register| register.to_le_bytes())
            .collect();
        Processor {
            best: InstructionSet::available().first().copied(),
            intel: vendor == b"GenuineIntel",
        }
    }
}

/// Returns the instruction set with which our GEMM and attention are faster than libtorch's on this
/// processor, for elements of `kind`.
pub(crate) fn instructions(kind: Kind) -> Option<InstructionSet> {
    static PROCESSOR: OnceLock<Processor> = OnceLock::new();
    let Processor { best, intel } = *PROCESSOR.get_or_init(Processor::detect);
    match (best?, kind) {
        // For Intel, MKL has kernels of all widths, and oneDNN uses the tile unit (AMX).
        (InstructionSet::Avx512, Kind::Float | Kind::BFloat16) if !intel => best,
        (InstructionSet::Avx2, Kind::Float) if !intel => best,
        // Without AVX-512, oneDNN has no bf16 kernel for any vendor.
        (InstructionSet::Avx2, Kind::BFloat16) if !std::is_x86_feature_detected!("avx512bw") => {
            best
        }
        _ => None,
    }
}

impl InstructionSet {
    /// Returns the instruction sets of this processor, the fastest first.
    fn available() -> Vec<InstructionSet> {
        let avx512 = std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512vl")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512bf16");
        let avx2 = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
        let all = [
            (InstructionSet::Avx512, avx512),
            (InstructionSet::Avx2, avx2),
        ];
        all.into_iter()
            .filter_map(|(instructions, detected)| detected.then_some(instructions))
            .collect()
    }
}

/// Computes `out = left right`, or `out += left right`, for all operands.
///
/// The processor has the instructions. `left` and `right` are fp32 or bf16 and contiguous in one
/// dimension. `out` has contiguous rows and is fp32 or has their dtype. The caller checks this.
pub(crate) fn gemm_batch(
    operands: &[GemmOperands],
    accumulate: bool,
    instructions: InstructionSet,
) {
    let deepest = operands
        .iter()
        .map(|gemm| gemm.left.columns)
        .max()
        .unwrap_or(0);
    let all_fp32 = operands.iter().all(|gemm| gemm.out.kind == Kind::Float);
    if !accumulate || deepest <= SLAB || !all_fp32 {
        return run_batch(operands, accumulate, instructions);
    }
    for start in (0..deepest).step_by(SLAB) {
        let slab = |&GemmOperands { out, left, right }| {
            let len = left.columns.saturating_sub(start).min(SLAB);
            (len > 0).then(|| GemmOperands {
                out,
                left: left.slice_columns(start, len),
                right: right.slice_rows(start, len),
            })
        };
        let slabs = operands
            .iter()
            .filter_map(slab)
            .collect::<Vec<GemmOperands>>();
        run_batch(&slabs, accumulate, instructions);
    }
}

fn run_batch(gemms: &[GemmOperands], accumulate: bool, instructions: InstructionSet) {
    let Some(first) = gemms.first() else {
        return;
    };
    match (instructions, first.left.kind == Kind::BFloat16) {
        (InstructionSet::Avx512, true) => gemm_batch_with::<Avx512<true>>(gemms, accumulate),
        (InstructionSet::Avx512, false) => gemm_batch_with::<Avx512<false>>(gemms, accumulate),
        (InstructionSet::Avx2, true) => gemm_batch_with::<Avx2<Bf16>>(gemms, accumulate),
        (InstructionSet::Avx2, false) => gemm_batch_with::<Avx2<f32>>(gemms, accumulate),
    }
}

fn gemm_batch_with<K>(gemms: &[GemmOperands], accumulate: bool)
where
    K: Kernel,
{
    let tasks: Vec<GemmTask> = gemms
        .iter()
        .map(|operands| task(operands, accumulate))
        .collect();
    let sizes = tasks
        .iter()
        .map(|task| task.size)
        .collect::<Vec<GemmSize>>();
    match partition(&sizes, torch_ext::max_parallel_ranges()) {
        Partition::PerThread(blocks) => per_thread::gemm_batch::<K>(&tasks, &blocks),
        Partition::Cooperative(waves) => cooperative::gemm_batch::<K>(&tasks, &waves),
    }
}

fn task(GemmOperands { out, left, right }: &GemmOperands, accumulate: bool) -> GemmTask {
    let m = left.rows;
    let k = left.columns;
    let n = right.columns;
    assert!(
        [out.rows, out.columns, right.rows] == [m, n, k],
        "GEMM shapes differ: {m} x {k} times {} x {n} into {} x {}",
        right.rows,
        out.rows,
        out.columns
    );
    let operand = |matrix: Matrix| Operand {
        data: matrix.data,
        inner: matrix.column_stride,
        outer: matrix.row_stride,
        len: k,
    };
    if k == 0 && !accumulate {
        for row in 0..m {
            // SAFETY: this is a row of the output, whose elements are adjacent.
            unsafe {
                let row = out.data.add(row * out.row_stride);
                row.write_bytes(0, n * out.element_size());
            }
        }
    }
    GemmTask {
        out: out.data,
        out_row_stride: out.row_stride,
        rounds: out.kind == Kind::BFloat16,
        accumulate,
        left: operand(*left),
        right: operand(right.transposed()),
        size: GemmSize { m, k, n },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{matrix::tests::random, tensors::tests::TestTensor};
    use proptest::prelude::*;
    use tch::{Tensor, kind::FLOAT_CPU};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn all_instruction_sets_match_libtorch(
            m in 0i64..150,
            k in 0i64..90,
            n in 0i64..300,
            transposed: [bool; 2],
            threads in 1i32..4,
            accumulate: bool,
            bf16: bool,
            narrow_sum: bool,
            deep in 0u8..8,
        ) {
            tch::set_num_threads(threads);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            // Sometimes more than one block. Always even, so that either dimension may be the
            // contiguous one.
            let k = (if deep == 0 { k + 1100 } else { k }) / 2 * 2;
            let left = random(m, k, transposed[0], kind);
            let right = random(k, n, transposed[1], kind);
            let out_kind = if accumulate && !narrow_sum {
                Kind::Float
            } else {
                kind
            };
            let before = random(m, n, false, out_kind);
            let plain = left
                .to_f64()
                .matmul(&right.to_f64());
            let plain = if accumulate {
                plain + before.to_f64()
            } else {
                plain
            };
            for instructions in InstructionSet::available() {
                let compute = || {
                    let out = random(m, n, false, out_kind);
                    out.shallow_clone().copy_(&before);
                    let operands = GemmOperands::of_tensors(&out, &left, &right);
                    gemm_batch(&[operands], accumulate, instructions);
                    out
                };
                let out = compute();
                let off = (out.to_f64() - &plain)
                    .norm()
                    .double_value(&[]);
                let tolerance = if bf16 { 5e-3 } else { 1e-6 };
                let close = off <= tolerance * plain.norm().double_value(&[]);
                prop_assert!(close, "{instructions:?}: {off}");
                // The number of threads changes no bit.
                tch::set_num_threads(1);
                let by_one_thread = compute();
                tch::set_num_threads(threads);
                prop_assert!(by_one_thread.equal(&out));
            }
        }
    }

    #[test]
    fn gradients_sum_over_many_tokens() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let left = random(9, 40_000, true, kind);
            let right = random(40_000, 20, false, kind);
            let plain = left.to_f64().matmul(&right.to_f64()) + 1.0;
            for instructions in InstructionSet::available() {
                let sum = Tensor::ones([9, 20], FLOAT_CPU);
                let operands = GemmOperands::of_tensors(&sum, &left, &right);
                gemm_batch(&[operands], true, instructions);
                let off = (sum.to_f64() - &plain).norm().double_value(&[]);
                assert!(
                    off < 1e-5 * plain.norm().double_value(&[]),
                    "{instructions:?} {kind:?}: {off}"
                );
            }
        }
    }
}
