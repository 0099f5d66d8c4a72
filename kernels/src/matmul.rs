//! Matrix gemms. libtorch multiplies on some processors with half of what they can do (docs/performance.md): there loops of our
//! own do it ([`gemm`](crate::gemm)), elsewhere libtorch does; on some GPUs all groups at once ([`grouped`]).

#[cfg(target_arch = "x86_64")]
use crate::gemm::{gemm_batch, instructions};
use crate::grouped;
use crate::matrix::Matrix;
use crate::profile::{Cost, part};
use tch::{Device, Kind, Tensor};

/// A gemm of no more rows than this is libtorch's.
#[cfg(target_arch = "x86_64")]
const SMALL: usize = 4;
/// Rows that one gemm of a group in 16 bits has a multiple of, in libtorch.
const BLOCK: i64 = 64;

/// One of several gemms.
pub(crate) struct GemmOperands<'a> {
    pub(crate) out: Matrix<'a>,
    pub(crate) left: Matrix<'a>,
    pub(crate) right: Matrix<'a>,
}

impl GemmOperands<'_> {
    pub(crate) fn of<'a>(out: &'a Tensor, left: &'a Tensor, right: &'a Tensor) -> GemmOperands<'a> {
        GemmOperands {
            out: Matrix::of(out),
            left: Matrix::of(left),
            right: Matrix::of(right),
        }
    }
}

/// `left right`, of matrices.
pub fn gemm(left: &Tensor, right: &Tensor) -> Tensor {
    let out = Tensor::empty(
        [left.size()[0], right.size()[1]],
        (left.kind(), left.device()),
    );
    gemm_into(&out, left, right);
    out
}

/// `out = left right`, of matrices of one dtype.
pub fn gemm_into(out: &Tensor, left: &Tensor, right: &Tensor) {
    part(
        "gemm",
        "of activations",
        || cost(out, left, right),
        || {
            if !try_own_gemm([out, left, right], false, || {
                vec![GemmOperands::of(out, left, right)]
            }) {
                tch::no_grad(|| drop(left.mm_out(out, right)));
            }
        },
    );
}

/// `sum += left right`, of matrices; `sum` is fp32, or of the dtype of the others, and rounded once.
pub fn gemm_accumulate(sum: &Tensor, left: &Tensor, right: &Tensor) {
    gemm_to_sum(sum, left, right, true);
}

/// As [`gemm_accumulate`], of a sum in which nothing is yet, whatever its memory holds.
pub fn gemm_overwrite(sum: &Tensor, left: &Tensor, right: &Tensor) {
    gemm_to_sum(sum, left, right, false);
}

fn gemm_to_sum(sum: &Tensor, left: &Tensor, right: &Tensor, accumulate: bool) {
    part(
        "gemm",
        "for gradients",
        || cost(sum, left, right),
        || {
            if !try_own_gemm([sum, left, right], accumulate, || {
                vec![GemmOperands::of(sum, left, right)]
            }) {
                by_libtorch(sum, left, right, accumulate);
            }
        },
    );
}

/// The first `counts[0]` rows of `rows` `[R, I]` times the first matrix, the next `counts[1]` times the next one, and so on: `[R, O]`.
/// Matrices are those of the first of `matrices`, `[G, I, O]`, then those of the next; none more than there are counts, and they may lie
/// in memory as they like.
pub fn grouped_gemm(rows: &Tensor, matrices: &[Tensor], counts: &[i64]) -> Tensor {
    let out = Tensor::empty(
        [rows.size()[0], matrices[0].size()[2]],
        (rows.kind(), rows.device()),
    );
    let groups = groups(counts);
    let cost = || grouped_cost(&groups, &matrices[0], rows.kind());
    let all = || {
        let out = Matrix::of(&out);
        let rows = Matrix::of(rows);
        let matrices: Vec<_> = matrices.iter().flat_map(Matrix::each_of).collect();
        let of = |&GemmGroup { index, start, len }: &GemmGroup| GemmOperands {
            out: out.slice_rows(start, len),
            left: rows.slice_rows(start, len),
            right: matrices[index],
        };
        groups.iter().map(of).collect()
    };
    part("gemm", "of experts", cost, || {
        let operands: Vec<_> = matrices.iter().chain([rows]).collect();
        if groups.len() > 1 && grouped::takes(&operands) {
            grouped::gemm(&out, rows, matrices, counts);
        } else if !try_own_gemm([&out, rows, &matrices[0]], false, all) {
            grouped_by_libtorch(&out, rows, matrices, &groups);
        }
    });
    out
}

fn grouped_by_libtorch(out: &Tensor, rows: &Tensor, matrices: &[Tensor], groups: &[GemmGroup]) {
    let total = rows.size()[0];
    let matrices: Vec<_> = matrices.iter().flat_map(|some| some.unbind(0)).collect();
    // oneDNN makes a kernel for each number of rows that it has not met, which takes longer than the gemm. So groups are rounded
    // up: what a gemm writes beyond its own group is the next group's place, which that one's gemm writes after it.
    let rounds = rows.device() == Device::Cpu && rows.kind() == Kind::BFloat16;
    for &GemmGroup { index, start, len } in groups {
        let start = start as i64;
        let len = len as i64;
        let rounded = (len + BLOCK - 1) / BLOCK * BLOCK;
        let len = if rounds && start + rounded <= total {
            rounded
        } else {
            len
        };
        tch::no_grad(|| {
            drop(
                rows.narrow(0, start, len)
                    .mm_out(&out.narrow(0, start, len), &matrices[index]),
            )
        });
    }
}

/// Adds the gemm of each group's rows, `left^T right`, to its own matrix of `sums` `[G, O, I]`, fp32, for groups of `counts[g]`
/// rows of `left` `[R, O]` and `right` `[R, I]`.
pub fn grouped_gemm_accumulate(sums: &Tensor, left: &Tensor, right: &Tensor, counts: &[i64]) {
    grouped_gemm_to_sums(sums, left, right, counts, true);
}

/// As [`grouped_gemm_accumulate`], of sums in which nothing is yet, whatever their memory holds: those of groups without rows become zero.
///
/// # Panics
/// When there are not as many counts as sums.
pub fn grouped_gemm_overwrite(sums: &Tensor, left: &Tensor, right: &Tensor, counts: &[i64]) {
    assert_eq!(counts.len() as i64, sums.size()[0], "each sum is set");
    grouped_gemm_to_sums(sums, left, right, counts, false);
}

fn grouped_gemm_to_sums(
    sums: &Tensor,
    left: &Tensor,
    right: &Tensor,
    counts: &[i64],
    accumulate: bool,
) {
    let groups = all_groups(counts)
        .filter(|group| group.len > 0 || !accumulate)
        .collect::<Vec<_>>();
    let cost = || grouped_cost(&groups, sums, left.kind());
    let all = || {
        let left = Matrix::of(left);
        let right = Matrix::of(right);
        let sums: Vec<_> = Matrix::each_of(sums).collect();
        let of = |&GemmGroup { index, start, len }: &GemmGroup| GemmOperands {
            out: sums[index],
            left: left.slice_rows(start, len).transposed(),
            right: right.slice_rows(start, len),
        };
        groups.iter().map(of).collect()
    };
    part("gemm", "for experts' gradients", cost, || {
        if groups.len() > 1 && grouped::takes(&[left, right]) {
            grouped::grouped_gemm_to_sums(sums, left, right, counts, accumulate);
        } else if !try_own_gemm([sums, left, right], accumulate, all) {
            for &GemmGroup { index, start, len } in &groups {
                let some = |rows: &Tensor| rows.narrow(0, start as i64, len as i64);
                by_libtorch(
                    &sums.get(index as i64),
                    &some(left).tr(),
                    &some(right),
                    accumulate,
                );
            }
        }
    });
}

/// What a gemm has to do.
fn cost(out: &Tensor, left: &Tensor, right: &Tensor) -> Cost {
    let flops = (2 * out.numel()) as f64 * left.size()[1] as f64;
    [out, left, right]
        .map(|x| Cost::passes(1.0, x))
        .into_iter()
        .fold(Cost { flops, bytes: 0.0 }, Cost::and)
}

/// What groups have to do whose matrices are like those of `matrices` `[G, A, B]`, with rows of A and of B numbers of `kind`.
fn grouped_cost(groups: &[GemmGroup], matrices: &Tensor, kind: Kind) -> Cost {
    let [a, b] = [1, 2].map(|dim| matrices.size()[dim] as usize);
    let rows: usize = groups.iter().map(|group| group.len).sum();
    let sides = rows * (a + b) * kind.elt_size_in_bytes();
    let bytes = sides + groups.len() * a * b * matrices.kind().elt_size_in_bytes();
    Cost {
        flops: 2.0 * (rows * a * b) as f64,
        bytes: bytes as f64,
    }
}

/// Rows that meet a matrix of their own.
struct GemmGroup {
    index: usize,
    start: usize,
    len: usize,
}

/// The groups that have rows.
fn groups(counts: &[i64]) -> Vec<GemmGroup> {
    all_groups(counts).filter(|group| group.len > 0).collect()
}

fn all_groups(counts: &[i64]) -> impl Iterator<Item = GemmGroup> {
    let mut start = 0;
    let place = move |(index, &len): (usize, &i64)| {
        let len = len as usize;
        start += len;
        GemmGroup {
            index,
            start: start - len,
            len,
        }
    };
    counts.iter().enumerate().map(place)
}

fn by_libtorch(sum: &Tensor, left: &Tensor, right: &Tensor, accumulate: bool) {
    let mut sum = sum.shallow_clone();
    tch::no_grad(|| match (left.kind() == sum.kind(), accumulate) {
        (true, true) => drop(sum.addmm_(left, right)),
        (true, false) => drop(left.mm_out(&sum, right)),
        (false, true) => drop(sum.g_add_(&left.matmul(right).to_kind(Kind::Float))),
        (false, false) => sum.copy_(&left.matmul(right)),
    });
}

/// Computes gemms here, if they are such as are computed here: of tensors like these (place, left, right).
#[cfg(target_arch = "x86_64")]
fn try_own_gemm<'a>(
    tensors: [&Tensor; 3],
    accumulate: bool,
    gemms: impl FnOnce() -> Vec<GemmOperands<'a>>,
) -> bool {
    let Some(by) = instructions(tensors[1].kind()) else {
        return false;
    };
    if tensors.iter().any(|tensor| tensor.device() != Device::Cpu) {
        return false;
    }
    let gemms = gemms();
    // Few rows do not pay for packing what they meet.
    let enough = accumulate || gemms.iter().any(|gemm| gemm.out.rows > SMALL);
    if gemms.is_empty() || !enough || !gemms.iter().all(fits) {
        return false;
    }
    gemm_batch(&gemms, accumulate, by);
    true
}

#[cfg(not(target_arch = "x86_64"))]
fn try_own_gemm<'a>(_: [&Tensor; 3], _: bool, _: impl FnOnce() -> Vec<GemmOperands<'a>>) -> bool {
    false
}

/// Whether a gemm is one for [`gemm`].
#[cfg(target_arch = "x86_64")]
fn fits(GemmOperands { out, left, right }: &GemmOperands) -> bool {
    let kind = left.kind;
    let known = matches!(kind, Kind::Float | Kind::BFloat16)
        && right.kind == kind
        && (out.kind == kind || out.kind == Kind::Float);
    // Two numbers of 16 bits at a time along the inner dimension, if that is the contiguous one.
    let whole = kind == Kind::Float || left.columns.is_multiple_of(2);
    known
        && out.has_contiguous_rows()
        && (left.has_contiguous_columns() || (left.has_contiguous_rows() && whole))
        && (right.has_contiguous_rows() || (right.has_contiguous_columns() && whole))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn random(rows: i64, columns: i64, transposed: bool, kind: Kind) -> Tensor {
        let (outer, inner) = if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        // A part of a larger matrix.
        let all = Tensor::randn([outer + 3, inner + 3], (Kind::Float, Device::Cpu)).to_kind(kind);
        let part = all.narrow(0, 1, outer).narrow(1, 2, inner);
        if transposed { part.tr() } else { part }
    }

    fn wide(x: &Tensor) -> Tensor {
        x.to_kind(Kind::Double)
    }

    /// Off by no more than rounding, on the whole: a single number may be the small difference of large ones.
    fn close(try_own_gemm: &Tensor, plain: &Tensor, kind: Kind) -> bool {
        let tolerance = if kind == Kind::BFloat16 { 5e-3 } else { 1e-6 };
        let off = (wide(try_own_gemm) - plain).norm().double_value(&[]);
        off <= tolerance * plain.norm().double_value(&[])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn it_is_the_product_however_matrices_lie(
            (m, k, n) in (0i64..150, 0i64..90, 0i64..300), lie in 0u8..8, threads in 1i32..4, accumulate: bool, sets: bool, bf16: bool,
            deep in 0u8..8,
        ) {
            tch::set_num_threads(threads);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            // Now and then more than one block, and odd or even.
            let k = if deep == 0 { k + 1100 } else { k };
            let (left, right) = (random(m, k, lie & 1 > 0, kind), random(k, n, lie & 2 > 0, kind));
            let out = random(m, n, lie & 4 > 0, if accumulate || sets { Kind::Float } else { kind });
            let before = if accumulate { wide(&out) } else { wide(&out).zeros_like() };
            let plain = before + wide(&left).matmul(&wide(&right));
            match (accumulate, sets) {
                (true, _) => gemm_accumulate(&out, &left, &right),
                (_, true) => gemm_overwrite(&out, &left, &right),
                _ => gemm_into(&out, &left, &right),
            }
            prop_assert!(close(&out, &plain, kind));
        }

        #[test]
        fn each_group_meets_its_own_matrix(
            counts in proptest::collection::vec(prop_oneof![Just(0i64), 0i64..150], 1..9), accumulate: bool, bf16: bool,
            threads in 1i32..4,
        ) {
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let (total, groups) = (counts.iter().sum::<i64>(), counts.len() as i64);
            let random = |shape: &[i64], kind| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (rows, others) = (random(&[total, 24], kind), random(&[total, 40], kind));
            let (matrices, sums) = (random(&[groups, 24, 40], kind), random(&[groups, 40, 24], Kind::Float));
            tch::set_num_threads(threads);
            let try_own_gemm = grouped_gemm(&rows, &[matrices.shallow_clone()], &counts);
            let (mut parts, mut plain) = (vec![Tensor::empty([0, 40], (Kind::Double, Device::Cpu))], Vec::new());
            let mut start = 0;
            for (group, &len) in counts.iter().enumerate() {
                let (rows, others) = (wide(&rows.narrow(0, start, len)), wide(&others.narrow(0, start, len)));
                parts.push(rows.matmul(&wide(&matrices.get(group as i64))));
                let before = wide(&sums.get(group as i64)) * i64::from(accumulate);
                plain.push(before + others.tr().matmul(&rows));
                start += len;
            }
            prop_assert!(close(&try_own_gemm, &Tensor::cat(&parts, 0), kind));
            let grouped_gemm_to_sums = if accumulate { grouped_gemm_accumulate } else { grouped_gemm_overwrite };
            grouped_gemm_to_sums(&sums, &others, &rows, &counts);
            prop_assert!(close(&sums, &Tensor::stack(&plain, 0), kind));
        }
    }

    #[test]
    fn groups_cost_what_their_rows_do() {
        let matrices = Tensor::zeros([3, 5, 7], (Kind::Float, Device::Cpu));
        let cost = grouped_cost(&groups(&[4, 0, 2]), &matrices, Kind::BFloat16);
        assert_eq!(
            cost,
            Cost {
                flops: 2.0 * 6.0 * 35.0,
                bytes: 6.0 * 12.0 * 2.0 + 2.0 * 35.0 * 4.0
            }
        );
        assert_eq!(
            grouped_cost(&[], &matrices.narrow(0, 0, 0), Kind::Float),
            Cost::default()
        );
    }

    #[test]
    fn what_others_multiply_goes_to_them() {
        let [left, right] =
            [(4, 5), (5, 6)].map(|(rows, columns)| random(rows, columns, false, Kind::Double));
        let plain = left.matmul(&right);
        assert_eq!(gemm(&left, &right), plain);
        let sum = Tensor::ones([4, 6], (Kind::Double, Device::Cpu));
        gemm_accumulate(&sum, &left, &right);
        assert!(sum.allclose(&(&plain + 1.0), 1e-12, 1e-12, false));
        gemm_overwrite(&sum, &left, &right);
        assert_eq!(sum, plain);
        // Nor does a gradient that somebody wants of an operand stop them.
        let [left, right] = [left, right].map(|x| x.set_requires_grad(true));
        assert!(!gemm(&left, &right).requires_grad());
        gemm_accumulate(&sum, &left, &right);
        let _ = grouped_gemm(&left, &[right.unsqueeze(0)], &[4]);
    }
}
