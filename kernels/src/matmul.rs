//! GEMMs and grouped GEMMs, each on the fastest path for its operands.
//!
//! On some processors libtorch reaches half of the peak (docs/performance.md). There our own loops
//! run (module `gemm`), elsewhere libtorch's. On some GPUs one kernel computes all groups
//! ([`grouped`]).

#[cfg(target_arch = "x86_64")]
use crate::tensors::{empty_as, empty_f32, sizes, slice_rows};
use crate::{
    gemm::{gemm_batch, instructions},
    grouped,
    matrix::{GemmOperands, Matrix},
    profile::{Cost, span},
    row_groups::RowGroups,
};
use tch::{Device, Kind, Tensor};

/// libtorch computes GEMMs of up to this many rows: packing their right matrix would not pay.
#[cfg(target_arch = "x86_64")]
const FEW_ROWS: usize = 4;
/// Multiple to which the rows of a group's bf16 GEMM are rounded up for libtorch.
const ROW_MULTIPLE: i64 = 64;

/// Returns the matrix product `left right`.
pub fn gemm(left: &Tensor, right: &Tensor) -> Tensor {
    let [rows] = sizes(left);
    let [_, columns] = sizes(right);
    let out = empty_as(left, [rows, columns]);
    gemm_into(&out, left, right);
    out
}

/// Writes the matrix product `left right` to `out`; all three have the same dtype.
pub fn gemm_into(out: &Tensor, left: &Tensor, right: &Tensor) {
    let cost = || cost(out, left, right);
    let operands = || vec![GemmOperands::of_tensors(out, left, right)];
    span("gemm", "of activations", cost, || {
        if !try_own_gemm([out, left, right], false, operands) {
            tch::no_grad(|| drop(left.mm_out(out, right)));
        }
    });
}

/// Returns the matrix product `left right` in fp32, of operands of one dtype. Products of bf16
/// numbers are exact in fp32, so that only their sum is rounded.
pub fn gemm_f32(left: &Tensor, right: &Tensor) -> Tensor {
    let [rows] = sizes(left);
    let [_, columns] = sizes(right);
    let out = empty_f32(left, [rows, columns]);
    let cost = || cost(&out, left, right);
    let operands = || vec![GemmOperands::of_tensors(&out, left, right)];
    span("gemm", "in fp32", cost, || {
        if !try_own_gemm([&out, left, right], false, operands) {
            tch::no_grad(|| match SumPath::of(&out, left) {
                SumPath::Wide => drop(left.mm_dtype_out(&out, right, Kind::Float)),
                SumPath::SameKind | SumPath::Rounded => {
                    let wide = [left, right].map(|x| x.to_kind(Kind::Float));
                    drop(wide[0].mm_out(&out, &wide[1]));
                }
            });
        }
    });
    out
}

/// Adds the matrix product `left right` to `sum`, which is fp32 or has their dtype; rounds once.
pub fn gemm_accumulate(sum: &Tensor, left: &Tensor, right: &Tensor) {
    gemm_to_sum(sum, left, right, true);
}

/// Does what [`gemm_accumulate`] does, with the previous contents of `sum` taken as zero.
pub fn gemm_overwrite(sum: &Tensor, left: &Tensor, right: &Tensor) {
    gemm_to_sum(sum, left, right, false);
}

fn gemm_to_sum(sum: &Tensor, left: &Tensor, right: &Tensor, accumulate: bool) {
    let cost = || cost(sum, left, right);
    span("gemm", "for gradients", cost, || {
        add_product(sum, left, right, accumulate)
    });
}

/// Adds the matrix product `left right` to `sum`, or writes it there, as part of another span.
pub(crate) fn add_product(sum: &Tensor, left: &Tensor, right: &Tensor, accumulate: bool) {
    let operands = || vec![GemmOperands::of_tensors(sum, left, right)];
    if !try_own_gemm([sum, left, right], accumulate, operands) {
        by_libtorch(sum, left, right, accumulate);
    }
}

/// Multiplies each group of `rows` `[R, I]` by its own matrix and returns the products `[R, O]`.
///
/// `matrices` are tensors `[G, I, O]`, whose matrices belong to the groups in order. There are no
/// more matrices than groups, and the tensors may have any strides.
pub fn grouped_gemm(rows: &Tensor, matrices: &[Tensor], groups: &RowGroups) -> Tensor {
    let cost = || grouped_cost(&filled_groups(groups), &matrices[0], rows.kind());
    span("gemm", "of experts", cost, || {
        let inputs: Vec<_> = matrices.iter().chain([rows]).collect();
        if pays_in_one_kernel(groups) && grouped::supports_grouped_mm(&inputs) {
            grouped::grouped_gemm(rows, matrices, groups)
        } else {
            grouped_gemm_one_by_one(rows, matrices, &filled_groups(groups))
        }
    })
}

/// True if one kernel for all groups has something to join.
fn pays_in_one_kernel(groups: &RowGroups) -> bool {
    groups.num_groups() > 1 && groups.num_rows() > 0
}

/// Multiplies each group's rows by a GEMM of its own.
fn grouped_gemm_one_by_one(rows: &Tensor, matrices: &[Tensor], groups: &[GemmGroup]) -> Tensor {
    let [total] = sizes(rows);
    let [_, _, columns] = sizes(&matrices[0]);
    let out = empty_as(rows, [total, columns]);
    let operands = || {
        let out = Matrix::of(&out);
        let rows = Matrix::of(rows);
        let matrices = matrices
            .iter()
            .flat_map(Matrix::each_of)
            .collect::<Vec<_>>();
        let of_group = |&GemmGroup { index, start, len }: &GemmGroup| GemmOperands {
            out: out.slice_rows(start, len),
            left: rows.slice_rows(start, len),
            right: matrices[index],
        };
        groups.iter().map(of_group).collect()
    };
    if !try_own_gemm([&out, rows, &matrices[0]], false, operands) {
        grouped_gemm_by_libtorch(&out, rows, matrices, groups);
    }
    out
}

fn grouped_gemm_by_libtorch(
    out: &Tensor,
    rows: &Tensor,
    matrices: &[Tensor],
    groups: &[GemmGroup],
) {
    let total = rows.size()[0];
    let matrices = matrices
        .iter()
        .flat_map(|all| all.unbind(0))
        .collect::<Vec<_>>();
    // oneDNN compiles a kernel for each new number of rows, which takes longer than the GEMM. So
    // the rows of a group are rounded up. The surplus rows are overwritten by the next group's
    // GEMM.
    let rounds = rows.device() == Device::Cpu && rows.kind() == Kind::BFloat16;
    for &GemmGroup { index, start, len } in groups {
        let start = start as i64;
        let len = len as i64;
        let rounded = (len + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE;
        let len = if rounds && start + rounded <= total {
            rounded
        } else {
            len
        };
        let left = rows.narrow(0, start, len);
        let out = out.narrow(0, start, len);
        tch::no_grad(|| drop(left.mm_out(&out, &matrices[index])));
    }
}

/// Adds the product `left^T right` of each group's rows to its own matrix of `sums` `[G, O, I]`
/// fp32.
///
/// `groups` divide the rows of `left` `[R, O]` and `right` `[R, I]`.
pub fn grouped_gemm_accumulate(sums: &Tensor, left: &Tensor, right: &Tensor, groups: &RowGroups) {
    grouped_gemm_to_sums(sums, left, right, groups, true);
}

/// Does what [`grouped_gemm_accumulate`] does, with the previous contents of `sums` taken as zero.
///
/// # Panics
/// If there is not one group for each sum.
pub fn grouped_gemm_overwrite(sums: &Tensor, left: &Tensor, right: &Tensor, groups: &RowGroups) {
    let num_groups = groups.num_groups() as i64;
    assert_eq!(num_groups, sums.size()[0], "one group per sum");
    grouped_gemm_to_sums(sums, left, right, groups, false);
}

fn grouped_gemm_to_sums(
    sums: &Tensor,
    left: &Tensor,
    right: &Tensor,
    groups: &RowGroups,
    accumulate: bool,
) {
    let written_groups = || {
        all_groups(groups.counts())
            .filter(|group| group.len > 0 || !accumulate)
            .collect::<Vec<_>>()
    };
    let cost = || grouped_cost(&written_groups(), sums, left.kind());
    let operands = || {
        let left = Matrix::of(left);
        let right = Matrix::of(right);
        let sums: Vec<_> = Matrix::each_of(sums).collect();
        let of_group = |&GemmGroup { index, start, len }: &GemmGroup| GemmOperands {
            out: sums[index],
            left: left.slice_rows(start, len).transposed(),
            right: right.slice_rows(start, len),
        };
        written_groups().iter().map(of_group).collect()
    };
    span("gemm", "for experts' gradients", cost, || {
        if pays_in_one_kernel(groups) && grouped::supports_grouped_mm(&[left, right]) {
            grouped::grouped_gemm_to_sums(sums, left, right, groups, accumulate);
        } else if !try_own_gemm([sums, left, right], accumulate, operands) {
            for GemmGroup { index, start, len } in written_groups() {
                let sum = sums.get(index as i64);
                let range = start..start + len;
                let rows = |x: &Tensor| slice_rows(x, &range);
                by_libtorch(&sum, &rows(left).tr(), &rows(right), accumulate);
            }
        }
    });
}

fn cost(out: &Tensor, left: &Tensor, right: &Tensor) -> Cost {
    let [_, inner] = sizes(left);
    let flops = (2 * out.numel()) as f64 * inner as f64;
    let passes = [out, left, right].map(|x| Cost::passes(1.0, x));
    passes
        .into_iter()
        .fold(Cost { flops, bytes: 0.0 }, Cost::plus)
}

/// Returns the cost of groups with matrices `[G, A, B]`, and rows of A and of B elements of `kind`.
fn grouped_cost(groups: &[GemmGroup], matrices: &Tensor, kind: Kind) -> Cost {
    let [_, a, b] = sizes(matrices);
    let rows: usize = groups.iter().map(|group| group.len).sum();
    let row_bytes = rows * (a + b) * kind.elt_size_in_bytes();
    let matrix_bytes = groups.len() * a * b * matrices.kind().elt_size_in_bytes();
    Cost {
        flops: 2.0 * (rows * a * b) as f64,
        bytes: (row_bytes + matrix_bytes) as f64,
    }
}

/// Consecutive rows with a matrix of their own.
struct GemmGroup {
    index: usize,
    start: usize,
    len: usize,
}

/// Returns the groups that have rows.
fn filled_groups(groups: &RowGroups) -> Vec<GemmGroup> {
    all_groups(groups.counts())
        .filter(|group| group.len > 0)
        .collect()
}

fn all_groups(counts: &[i64]) -> impl Iterator<Item = GemmGroup> {
    let mut start = 0;
    counts.iter().enumerate().map(move |(index, &len)| {
        let len = len as usize;
        start += len;
        GemmGroup {
            index,
            start: start - len,
            len,
        }
    })
}

/// libtorch's operation that adds a product to a sum.
#[derive(Debug, PartialEq, Eq)]
enum SumPath {
    /// The dtype of the operands is that of the sum.
    SameKind,
    /// One cuBLAS call adds the bf16 product to the fp32 sum.
    Wide,
    /// The product is rounded to bf16, and then added.
    Rounded,
}

impl SumPath {
    fn of(sum: &Tensor, operand: &Tensor) -> SumPath {
        SumPath::choose(sum.kind(), operand.kind(), sum.device())
    }

    fn choose(sum: Kind, operand: Kind, device: Device) -> SumPath {
        match device {
            _ if sum == operand => SumPath::SameKind,
            // Of libtorch's backends only CUDA's has the operation.
            Device::Cuda(_) if (sum, operand) == (Kind::Float, Kind::BFloat16) => SumPath::Wide,
            _ => SumPath::Rounded,
        }
    }
}

fn by_libtorch(sum: &Tensor, left: &Tensor, right: &Tensor, accumulate: bool) {
    let mut out = sum.shallow_clone();
    tch::no_grad(|| match (SumPath::of(sum, left), accumulate) {
        (SumPath::SameKind, true) => drop(out.addmm_(left, right)),
        (SumPath::SameKind, false) => drop(left.mm_out(&out, right)),
        (SumPath::Wide, true) => drop(sum.addmm_dtype_out(sum, left, right, Kind::Float)),
        (SumPath::Wide, false) => drop(left.mm_dtype_out(sum, right, Kind::Float)),
        (SumPath::Rounded, true) => drop(out.g_add_(&left.matmul(right).to_kind(Kind::Float))),
        (SumPath::Rounded, false) => out.copy_(&left.matmul(right)),
    });
}

/// Runs our GEMM if it supports the operands, and returns whether it did.
///
/// `tensors` are the tensors of the output, left and right operands.
#[cfg(target_arch = "x86_64")]
fn try_own_gemm<'a>(
    tensors: [&Tensor; 3],
    accumulate: bool,
    operands: impl FnOnce() -> Vec<GemmOperands<'a>>,
) -> bool {
    let Some(instructions) = instructions(tensors[1].kind()) else {
        return false;
    };
    if tensors.iter().any(|tensor| tensor.device() != Device::Cpu) {
        return false;
    }
    let gemms = operands();
    let has_rows = |gemm: &GemmOperands| gemm.out.rows > FEW_ROWS;
    let enough_rows = accumulate || gemms.iter().any(has_rows);
    if gemms.is_empty() || !enough_rows || !gemms.iter().all(fits) {
        return false;
    }
    gemm_batch(&gemms, accumulate, instructions);
    true
}

#[cfg(not(target_arch = "x86_64"))]
fn try_own_gemm<'a>(
    _tensors: [&Tensor; 3],
    _accumulate: bool,
    _operands: impl FnOnce() -> Vec<GemmOperands<'a>>,
) -> bool {
    false
}

/// True if our GEMM supports the dtypes and strides.
#[cfg(target_arch = "x86_64")]
fn fits(GemmOperands { out, left, right }: &GemmOperands) -> bool {
    let kind = left.kind;
    let supported = matches!(kind, Kind::Float | Kind::BFloat16)
        && right.kind == kind
        && (out.kind == kind || out.kind == Kind::Float);
    // Pairs of bf16 are read along the inner dimension if that is the contiguous one.
    let whole_pairs = kind == Kind::Float || left.columns.is_multiple_of(2);
    supported
        && out.has_contiguous_rows()
        && (left.has_contiguous_columns() || (left.has_contiguous_rows() && whole_pairs))
        && (right.has_contiguous_rows() || (right.has_contiguous_columns() && whole_pairs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::test_gpu,
        matrix::tests::random,
        tensors::tests::{TestTensor, randn},
    };
    use proptest::prelude::*;
    use tch::kind::{DOUBLE_CPU, FLOAT_CPU};

    /// True if the norm of the error is within rounding: a single element may be the small
    /// difference of large ones.
    fn close(ours: &Tensor, plain: &Tensor, kind: Kind) -> bool {
        is_within(ours, plain, kind, 0.0)
    }

    /// As [`close`], for sums of terms whose sizes add up to a matrix with the norm `terms`: all
    /// elements of a small product may be small differences.
    fn is_within(ours: &Tensor, plain: &Tensor, kind: Kind, terms: f64) -> bool {
        let tolerance = if kind == Kind::BFloat16 { 5e-3 } else { 1e-6 };
        let off = (ours.to_f64() - plain).norm();
        let size = plain.norm().double_value(&[]);
        off.double_value(&[]) <= tolerance * size + f64::from(f32::EPSILON) * terms
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn products_of_any_layout_match_libtorch(
            m in 0i64..150,
            k in 0i64..90,
            n in 0i64..300,
            transposed: [bool; 3],
            threads in 1i32..4,
            accumulate: bool,
            overwrite: bool,
            bf16: bool,
            deep in 0u8..8,
        ) {
            tch::set_num_threads(threads);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            // Sometimes more than one block along the inner dimension, odd or even.
            let k = if deep == 0 { k + 1100 } else { k };
            let left = random(m, k, transposed[0], kind);
            let right = random(k, n, transposed[1], kind);
            let out_kind = if accumulate || overwrite {
                Kind::Float
            } else {
                kind
            };
            let out = random(m, n, transposed[2], out_kind);
            let before = out.to_f64() * i64::from(accumulate);
            let plain = before
                + left
                    .to_f64()
                    .matmul(&right.to_f64());
            match (accumulate, overwrite) {
                (true, _) => gemm_accumulate(&out, &left, &right),
                (_, true) => gemm_overwrite(&out, &left, &right),
                _ => gemm_into(&out, &left, &right),
            }
            let terms = left.to_f64().abs().matmul(&right.to_f64().abs());
            let terms = terms.norm().double_value(&[]);
            prop_assert!(is_within(&out, &plain, kind, terms));
        }

        #[test]
        fn each_group_has_its_own_matrix(
            counts in proptest::collection::vec(prop_oneof![Just(0i64), 0i64..150], 1..9),
            accumulate: bool,
            bf16: bool,
            threads in 1i32..4,
        ) {
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let groups = RowGroups::from(&counts[..]);
            let total = groups.num_rows();
            let num_groups = counts.len() as i64;
            let rows = randn(&[total, 24], kind);
            let others = randn(&[total, 40], kind);
            let matrices = randn(&[num_groups, 24, 40], kind);
            let sums = randn(&[num_groups, 40, 24], Kind::Float);
            tch::set_num_threads(threads);
            let ours = grouped_gemm(&rows, &[matrices.shallow_clone()], &groups);
            let mut products = vec![Tensor::empty([0, 40], DOUBLE_CPU)];
            let mut plain = Vec::new();
            let mut start = 0;
            for (group, &len) in counts.iter().enumerate() {
                let rows = rows.narrow(0, start, len).to_f64();
                let others = others
                    .narrow(0, start, len)
                    .to_f64();
                let matrix = matrices.get(group as i64).to_f64();
                products.push(rows.matmul(&matrix));
                let sum = sums.get(group as i64).to_f64();
                let before = sum * i64::from(accumulate);
                plain.push(before + others.tr().matmul(&rows));
                start += len;
            }
            prop_assert!(close(&ours, &Tensor::cat(&products, 0), kind));
            if accumulate {
                grouped_gemm_accumulate(&sums, &others, &rows, &groups);
            } else {
                grouped_gemm_overwrite(&sums, &others, &rows, &groups);
            }
            prop_assert!(close(&sums, &Tensor::stack(&plain, 0), kind));
        }
    }

    #[test]
    fn gpus_add_bf16_products_in_fp32() {
        let gpu = Device::Cuda(0);
        let path = SumPath::choose;
        assert_eq!(path(Kind::Float, Kind::BFloat16, gpu), SumPath::Wide);
        assert_eq!(
            path(Kind::Float, Kind::BFloat16, Device::Mps),
            SumPath::Rounded
        );
        assert_eq!(
            path(Kind::Float, Kind::BFloat16, Device::Cpu),
            SumPath::Rounded
        );
        for device in [gpu, Device::Cpu] {
            assert_eq!(
                path(Kind::BFloat16, Kind::BFloat16, device),
                SumPath::SameKind
            );
            assert_eq!(path(Kind::Float, Kind::Float, device), SumPath::SameKind);
        }
    }

    #[test]
    fn many_small_products_lose_no_bits() {
        // Each product is far below the last bit of a bf16 sum.
        let device = test_gpu().1;
        let there = |x: &Tensor| x.to_device(device);
        let left = randn(&[24, 40], Kind::BFloat16);
        let right = randn(&[40, 32], Kind::BFloat16);
        let sum = there(&(randn(&[24, 32], Kind::Float) * 100.0));
        let mut plain = sum.to_f64().to_device(Device::Cpu);
        for _ in 0..50 {
            gemm_accumulate(&sum, &there(&left), &there(&right));
            plain += left.to_f64().matmul(&right.to_f64());
        }
        assert!(close(&sum.to_device(Device::Cpu), &plain, Kind::Float));
        gemm_overwrite(&sum, &there(&left), &there(&right));
        let plain = left.to_f64().matmul(&right.to_f64());
        assert!(close(&sum.to_device(Device::Cpu), &plain, Kind::Float));
        let product = gemm_f32(&there(&left), &there(&right));
        assert!(close(&product.to_device(Device::Cpu), &plain, Kind::Float));
    }

    #[test]
    fn groups_cost_as_much_as_their_rows() {
        let matrices = Tensor::zeros([3, 5, 7], FLOAT_CPU);
        let groups = RowGroups::new(vec![4, 0, 2]);
        let cost = grouped_cost(&filled_groups(&groups), &matrices, Kind::BFloat16);
        let expected = Cost {
            flops: 2.0 * 6.0 * 35.0,
            bytes: 6.0 * 12.0 * 2.0 + 2.0 * 35.0 * 4.0,
        };
        assert_eq!(cost, expected);
        let nothing = grouped_cost(&[], &matrices.narrow(0, 0, 0), Kind::Float);
        assert_eq!(nothing, Cost::default());
    }

    #[test]
    fn libtorch_computes_other_dtypes() {
        let [left, right] =
            [(4, 5), (5, 6)].map(|(rows, columns)| random(rows, columns, false, Kind::Double));
        let plain = left.matmul(&right);
        assert_eq!(gemm(&left, &right), plain);
        let sum = Tensor::ones([4, 6], DOUBLE_CPU);
        gemm_accumulate(&sum, &left, &right);
        assert!(sum.allclose(&(&plain + 1.0), 1e-12, 1e-12, false));
        gemm_overwrite(&sum, &left, &right);
        assert_eq!(sum, plain);
        // Operands that require gradients are allowed, and nothing is recorded.
        let [left, right] = [left, right].map(|x| x.set_requires_grad(true));
        assert!(!gemm(&left, &right).requires_grad());
        gemm_accumulate(&sum, &left, &right);
        let _ = grouped_gemm(&left, &[right.unsqueeze(0)], &RowGroups::new(vec![4]));
    }
}
