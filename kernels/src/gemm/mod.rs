//! Products of matrices in fp32 and bf16, all accumulated in fp32, for processors on which libtorch's are slower: several gemms in
//! one loop over threads, without memory that the kernel has to clear first.
//!
//! The usual way (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008), except that of the left matrix rows
//! are read where they lie, if they lie as a tile reads them. What a tile is and how it is fed is a processor's [`Kernel`].
//!
//! Threads make whole blocks of columns where there are enough of them ([`per_thread`]), and parts of blocks otherwise ([`cooperative`]).
//!
//! A number of the result is summed up in an order that the inner dimension's length decides per_thread: neither threads nor the
//! other gemms change a bit of it.

mod avx2;
mod avx512;
mod cooperative;
pub(crate) mod kernel;
mod macrokernel;
mod partition;
mod per_thread;
mod prefetch;

use crate::matmul::GemmOperands;
use crate::matrix::Matrix;
use crate::number::Bf16;
pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;
use kernel::{Kernel, Operand};
use macrokernel::GemmTask;
use partition::{Partition, partition};
use std::sync::OnceLock;
use tch::Kind;

/// The inner dimension of which right matrices are packed at once, where sums are added to: gradients sum up over all tokens, and the
/// buffer is kept.
const SLAB: usize = 1 << 14;

/// The instructions that loops of our own are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InstructionSet {
    Avx512,
    Avx2,
}

/// Those of this processor that make gemms of numbers of `kind`, and attend to them, faster than libtorch, if any do.
pub(crate) fn instructions(kind: Kind) -> Option<InstructionSet> {
    static BEST: OnceLock<(Option<InstructionSet>, bool)> = OnceLock::new();
    let (best, intel) = *BEST.get_or_init(|| {
        let id = std::arch::x86_64::__cpuid(0);
        let vendor: Vec<u8> = [id.ebx, id.edx, id.ecx]
            .iter()
            .flat_map(|part| part.to_le_bytes())
            .collect();
        (
            InstructionSet::available().first().copied(),
            vendor == b"GenuineIntel",
        )
    });
    match (best?, kind) {
        // Intel's have kernels of all widths in MKL, and a unit for tiles that oneDNN uses.
        (InstructionSet::Avx512, Kind::Float | Kind::BFloat16) if !intel => best,
        (InstructionSet::Avx2, Kind::Float) if !intel => best,
        // Without AVX-512 oneDNN has nothing for bf16, on anybody's.
        (InstructionSet::Avx2, Kind::BFloat16) if !std::is_x86_feature_detected!("avx512bw") => {
            best
        }
        _ => None,
    }
}

impl InstructionSet {
    /// Those that this processor has, the best first.
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
            .filter_map(|(instructions, there)| there.then_some(instructions))
            .collect()
    }
}

/// Computes `out = left right` of all of them, or `out += left right`, by instructions that this processor has, of operands in
/// fp32 or bf16. They have a contiguous dimension; `out` has contiguous rows, in their dtype or fp32. (`fits` of the caller says so.)
pub(crate) fn gemm_batch(gemms: &[GemmOperands], accumulate: bool, instructions: InstructionSet) {
    let deepest = gemms
        .iter()
        .map(|product| product.left.columns)
        .max()
        .unwrap_or(0);
    let splits =
        accumulate && deepest > SLAB && gemms.iter().all(|product| product.out.kind == Kind::Float);
    if !splits {
        return whole(gemms, accumulate, instructions);
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
        let slabs: Vec<GemmOperands> = gemms.iter().filter_map(slab).collect();
        whole(&slabs, accumulate, instructions);
    }
}

fn whole(gemms: &[GemmOperands], accumulate: bool, instructions: InstructionSet) {
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

fn gemm_batch_with<K: Kernel>(gemms: &[GemmOperands], accumulate: bool) {
    let tasks: Vec<GemmTask> = gemms
        .iter()
        .map(|product| task(product, accumulate))
        .collect();
    let sizes: Vec<partition::Size> = tasks.iter().map(|task| task.size).collect();
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
        "{m} x {k} times {} x {n} is not {} x {}",
        right.rows,
        out.rows,
        out.columns
    );
    let operand = |Matrix {
                       data, row, column, ..
                   }: Matrix| Operand {
        data,
        inner: column,
        outer: row,
        len: k,
    };
    if k == 0 && !accumulate {
        for row in 0..m {
            // SAFETY: a row of the result, whose numbers lie beside each other.
            unsafe { out.data.add(row * out.row).write_bytes(0, n * out.size()) }
        }
    }
    GemmTask {
        out: out.data,
        out_row: out.row,
        rounds: out.kind == Kind::BFloat16,
        accumulate,
        left: operand(*left),
        right: operand(right.transposed()),
        size: (m, k, n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::tests::random;
    use proptest::prelude::*;
    use tch::{Device, Tensor};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn all_instructions_make_the_product(
            (m, k, n) in (0i64..150, 0i64..90, 0i64..300), lie in 0u8..4, threads in 1i32..4, accumulate: bool, bf16: bool,
            narrow_sum: bool, deep in 0u8..8,
        ) {
            tch::set_num_threads(threads);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            // Now and then more than one block, and even: either dimension may be the contiguous one.
            let k = (if deep == 0 { k + 1100 } else { k }) / 2 * 2;
            let (left, right) = (random(m, k, lie & 1 > 0, kind), random(k, n, lie & 2 > 0, kind));
            let before = random(m, n, false, if accumulate && !narrow_sum { Kind::Float } else { kind });
            let plain = left.to_kind(Kind::Double).matmul(&right.to_kind(Kind::Double));
            let plain = if accumulate { plain + before.to_kind(Kind::Double) } else { plain };
            for by in InstructionSet::available() {
                let out = random(m, n, false, before.kind());
                out.shallow_clone().copy_(&before);
                gemm_batch(&[GemmOperands::of(&out, &left, &right)], accumulate, by);
                let off = (out.to_kind(Kind::Double) - &plain).norm().double_value(&[]);
                let tolerance = if bf16 { 5e-3 } else { 1e-6 };
                prop_assert!(off <= tolerance * plain.norm().double_value(&[]), "{:?}: {}", by, off);
                // Threads change no bit.
                let per_thread = random(m, n, false, before.kind());
                per_thread.shallow_clone().copy_(&before);
                tch::set_num_threads(1);
                gemm_batch(&[GemmOperands::of(&per_thread, &left, &right)], accumulate, by);
                tch::set_num_threads(threads);
                prop_assert!(per_thread.equal(&out));
            }
        }
    }

    #[test]
    fn gradients_of_very_many_tokens() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let left = random(9, 40_000, true, kind);
            let right = random(40_000, 20, false, kind);
            let plain = left
                .to_kind(Kind::Double)
                .matmul(&right.to_kind(Kind::Double))
                + 1.0;
            for by in InstructionSet::available() {
                let sum = Tensor::ones([9, 20], (Kind::Float, Device::Cpu));
                gemm_batch(&[GemmOperands::of(&sum, &left, &right)], true, by);
                let off = (sum.to_kind(Kind::Double) - &plain)
                    .norm()
                    .double_value(&[]);
                assert!(
                    off < 1e-5 * plain.norm().double_value(&[]),
                    "{by:?} {kind:?}: {off}"
                );
            }
        }
    }
}
