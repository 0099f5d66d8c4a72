//! Matrix products. libtorch multiplies on some processors with half of what they can do (docs/performance.md): there loops of our
//! own do it ([`multiply`](crate::multiply)), elsewhere libtorch does; on some GPUs all groups at once ([`grouped`]).

use crate::grouped;
use crate::matrix::Matrix;
#[cfg(target_arch = "x86_64")]
use crate::multiply::{instructions, multiply};
use crate::profile::{Cost, part};
use tch::{Device, Kind, Tensor};

/// A product of no more rows than this is libtorch's.
#[cfg(target_arch = "x86_64")]
const SMALL: usize = 4;
/// Rows that one product of a group in 16 bits has a multiple of, in libtorch.
const BLOCK: i64 = 64;

/// One of several products.
pub(crate) struct Product<'a> {
    pub(crate) out: Matrix<'a>,
    pub(crate) left: Matrix<'a>,
    pub(crate) right: Matrix<'a>,
}

impl Product<'_> {
    pub(crate) fn of<'a>(out: &'a Tensor, left: &'a Tensor, right: &'a Tensor) -> Product<'a> {
        Product {
            out: Matrix::of(out),
            left: Matrix::of(left),
            right: Matrix::of(right),
        }
    }
}

/// `left right`, of matrices.
pub fn product(left: &Tensor, right: &Tensor) -> Tensor {
    let out = Tensor::empty(
        [left.size()[0], right.size()[1]],
        (left.kind(), left.device()),
    );
    product_into(&out, left, right);
    out
}

/// `out = left right`, of matrices of one dtype.
pub fn product_into(out: &Tensor, left: &Tensor, right: &Tensor) {
    part(
        "product",
        "of activations",
        || cost(out, left, right),
        || {
            if !ours([out, left, right], false, || {
                vec![Product::of(out, left, right)]
            }) {
                tch::no_grad(|| drop(left.mm_out(out, right)));
            }
        },
    );
}

/// `sum += left right`, of matrices; `sum` is fp32, or of the dtype of the others, and rounded once.
pub fn add_product(sum: &Tensor, left: &Tensor, right: &Tensor) {
    to_sum(sum, left, right, true);
}

/// As [`add_product`], of a sum in which nothing is yet, whatever its memory holds.
pub fn set_product(sum: &Tensor, left: &Tensor, right: &Tensor) {
    to_sum(sum, left, right, false);
}

fn to_sum(sum: &Tensor, left: &Tensor, right: &Tensor, adds: bool) {
    part(
        "product",
        "for gradients",
        || cost(sum, left, right),
        || {
            if !ours([sum, left, right], adds, || {
                vec![Product::of(sum, left, right)]
            }) {
                by_libtorch(sum, left, right, adds);
            }
        },
    );
}

/// The first `counts[0]` rows of `rows` `[R, I]` times the first matrix, the next `counts[1]` times the next one, and so on: `[R, O]`.
/// Matrices are those of the first of `matrices`, `[G, I, O]`, then those of the next; none more than there are counts, and they may lie
/// in memory as they like.
pub fn grouped_product(rows: &Tensor, matrices: &[Tensor], counts: &[i64]) -> Tensor {
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
        let of = |&Group { index, start, len }: &Group| Product {
            out: out.some_rows(start, len),
            left: rows.some_rows(start, len),
            right: matrices[index],
        };
        groups.iter().map(of).collect()
    };
    part("product", "of experts", cost, || {
        let operands: Vec<_> = matrices.iter().chain([rows]).collect();
        if groups.len() > 1 && grouped::takes(&operands) {
            grouped::product(&out, rows, matrices, counts);
        } else if !ours([&out, rows, &matrices[0]], false, all) {
            grouped_by_libtorch(&out, rows, matrices, &groups);
        }
    });
    out
}

fn grouped_by_libtorch(out: &Tensor, rows: &Tensor, matrices: &[Tensor], groups: &[Group]) {
    let total = rows.size()[0];
    let matrices: Vec<_> = matrices.iter().flat_map(|some| some.unbind(0)).collect();
    // oneDNN makes a kernel for each number of rows that it has not met, which takes longer than the product. So groups are rounded
    // up: what a product writes beyond its own group is the next group's place, which that one's product writes after it.
    let rounds = rows.device() == Device::Cpu && rows.kind() == Kind::BFloat16;
    for &Group { index, start, len } in groups {
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

/// Adds the product of each group's rows, `left^T right`, to its own matrix of `sums` `[G, O, I]`, fp32, for groups of `counts[g]`
/// rows of `left` `[R, O]` and `right` `[R, I]`.
pub fn add_grouped_product(sums: &Tensor, left: &Tensor, right: &Tensor, counts: &[i64]) {
    to_sums(sums, left, right, counts, true);
}

/// As [`add_grouped_product`], of sums in which nothing is yet, whatever their memory holds: those of groups without rows become zero.
///
/// # Panics
/// When there are not as many counts as sums.
pub fn set_grouped_product(sums: &Tensor, left: &Tensor, right: &Tensor, counts: &[i64]) {
    assert_eq!(counts.len() as i64, sums.size()[0], "each sum is set");
    to_sums(sums, left, right, counts, false);
}

fn to_sums(sums: &Tensor, left: &Tensor, right: &Tensor, counts: &[i64], adds: bool) {
    let groups = all_groups(counts)
        .filter(|group| group.len > 0 || !adds)
        .collect::<Vec<_>>();
    let cost = || grouped_cost(&groups, sums, left.kind());
    let all = || {
        let left = Matrix::of(left);
        let right = Matrix::of(right);
        let sums: Vec<_> = Matrix::each_of(sums).collect();
        let of = |&Group { index, start, len }: &Group| Product {
            out: sums[index],
            left: left.some_rows(start, len).transposed(),
            right: right.some_rows(start, len),
        };
        groups.iter().map(of).collect()
    };
    part("product", "for experts' gradients", cost, || {
        if groups.len() > 1 && grouped::takes(&[left, right]) {
            grouped::to_sums(sums, left, right, counts, adds);
        } else if !ours([sums, left, right], adds, all) {
            for &Group { index, start, len } in &groups {
                let some = |rows: &Tensor| rows.narrow(0, start as i64, len as i64);
                by_libtorch(
                    &sums.get(index as i64),
                    &some(left).tr(),
                    &some(right),
                    adds,
                );
            }
        }
    });
}

/// What a product has to do.
fn cost(out: &Tensor, left: &Tensor, right: &Tensor) -> Cost {
    let flops = (2 * out.numel()) as f64 * left.size()[1] as f64;
    [out, left, right]
        .map(|x| Cost::passes(1.0, x))
        .into_iter()
        .fold(Cost { flops, bytes: 0.0 }, Cost::and)
}

/// What groups have to do whose matrices are like those of `matrices` `[G, A, B]`, with rows of A and of B numbers of `kind`.
fn grouped_cost(groups: &[Group], matrices: &Tensor, kind: Kind) -> Cost {
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
struct Group {
    index: usize,
    start: usize,
    len: usize,
}

/// The groups that have rows.
fn groups(counts: &[i64]) -> Vec<Group> {
    all_groups(counts).filter(|group| group.len > 0).collect()
}

fn all_groups(counts: &[i64]) -> impl Iterator<Item = Group> {
    let mut start = 0;
    let place = move |(index, &len): (usize, &i64)| {
        let len = len as usize;
        start += len;
        Group {
            index,
            start: start - len,
            len,
        }
    };
    counts.iter().enumerate().map(place)
}

fn by_libtorch(sum: &Tensor, left: &Tensor, right: &Tensor, adds: bool) {
    let mut sum = sum.shallow_clone();
    tch::no_grad(|| match (left.kind() == sum.kind(), adds) {
        (true, true) => drop(sum.addmm_(left, right)),
        (true, false) => drop(left.mm_out(&sum, right)),
        (false, true) => drop(sum.g_add_(&left.matmul(right).to_kind(Kind::Float))),
        (false, false) => sum.copy_(&left.matmul(right)),
    });
}

/// Computes products here, if they are such as are computed here: of tensors like these (place, left, right).
#[cfg(target_arch = "x86_64")]
fn ours<'a>(
    tensors: [&Tensor; 3],
    adds: bool,
    products: impl FnOnce() -> Vec<Product<'a>>,
) -> bool {
    let Some(by) = instructions(tensors[1].kind()) else {
        return false;
    };
    if tensors.iter().any(|tensor| tensor.device() != Device::Cpu) {
        return false;
    }
    let products = products();
    // Few rows do not pay for packing what they meet.
    let enough = adds || products.iter().any(|product| product.out.rows > SMALL);
    if products.is_empty() || !enough || !products.iter().all(fits) {
        return false;
    }
    multiply(&products, adds, by);
    true
}

#[cfg(not(target_arch = "x86_64"))]
fn ours<'a>(_: [&Tensor; 3], _: bool, _: impl FnOnce() -> Vec<Product<'a>>) -> bool {
    false
}

/// Whether a product is one for [`multiply`].
#[cfg(target_arch = "x86_64")]
fn fits(Product { out, left, right }: &Product) -> bool {
    let kind = left.kind;
    let known = matches!(kind, Kind::Float | Kind::BFloat16)
        && right.kind == kind
        && (out.kind == kind || out.kind == Kind::Float);
    // Two numbers of 16 bits at a time along the inner dimension, if that is the contiguous one.
    let whole = kind == Kind::Float || left.columns.is_multiple_of(2);
    known
        && out.has_whole_rows()
        && (left.has_whole_columns() || (left.has_whole_rows() && whole))
        && (right.has_whole_rows() || (right.has_whole_columns() && whole))
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
    fn close(ours: &Tensor, plain: &Tensor, kind: Kind) -> bool {
        let tolerance = if kind == Kind::BFloat16 { 5e-3 } else { 1e-6 };
        let off = (wide(ours) - plain).norm().double_value(&[]);
        off <= tolerance * plain.norm().double_value(&[])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn it_is_the_product_however_matrices_lie(
            (m, k, n) in (0i64..150, 0i64..90, 0i64..300), lie in 0u8..8, threads in 1i32..4, adds: bool, sets: bool, bf16: bool,
            deep in 0u8..8,
        ) {
            tch::set_num_threads(threads);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            // Now and then more than one block, and odd or even.
            let k = if deep == 0 { k + 1100 } else { k };
            let (left, right) = (random(m, k, lie & 1 > 0, kind), random(k, n, lie & 2 > 0, kind));
            let out = random(m, n, lie & 4 > 0, if adds || sets { Kind::Float } else { kind });
            let before = if adds { wide(&out) } else { wide(&out).zeros_like() };
            let plain = before + wide(&left).matmul(&wide(&right));
            match (adds, sets) {
                (true, _) => add_product(&out, &left, &right),
                (_, true) => set_product(&out, &left, &right),
                _ => product_into(&out, &left, &right),
            }
            prop_assert!(close(&out, &plain, kind));
        }

        #[test]
        fn each_group_meets_its_own_matrix(
            counts in proptest::collection::vec(prop_oneof![Just(0i64), 0i64..150], 1..9), adds: bool, bf16: bool,
            threads in 1i32..4,
        ) {
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let (total, groups) = (counts.iter().sum::<i64>(), counts.len() as i64);
            let random = |shape: &[i64], kind| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (rows, others) = (random(&[total, 24], kind), random(&[total, 40], kind));
            let (matrices, sums) = (random(&[groups, 24, 40], kind), random(&[groups, 40, 24], Kind::Float));
            tch::set_num_threads(threads);
            let ours = grouped_product(&rows, &[matrices.shallow_clone()], &counts);
            let (mut parts, mut plain) = (vec![Tensor::empty([0, 40], (Kind::Double, Device::Cpu))], Vec::new());
            let mut start = 0;
            for (group, &len) in counts.iter().enumerate() {
                let (rows, others) = (wide(&rows.narrow(0, start, len)), wide(&others.narrow(0, start, len)));
                parts.push(rows.matmul(&wide(&matrices.get(group as i64))));
                let before = wide(&sums.get(group as i64)) * i64::from(adds);
                plain.push(before + others.tr().matmul(&rows));
                start += len;
            }
            prop_assert!(close(&ours, &Tensor::cat(&parts, 0), kind));
            let to_sums = if adds { add_grouped_product } else { set_grouped_product };
            to_sums(&sums, &others, &rows, &counts);
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
        assert_eq!(product(&left, &right), plain);
        let sum = Tensor::ones([4, 6], (Kind::Double, Device::Cpu));
        add_product(&sum, &left, &right);
        assert!(sum.allclose(&(&plain + 1.0), 1e-12, 1e-12, false));
        set_product(&sum, &left, &right);
        assert_eq!(sum, plain);
        // Nor does a gradient that somebody wants of an operand stop them.
        let [left, right] = [left, right].map(|x| x.set_requires_grad(true));
        assert!(!product(&left, &right).requires_grad());
        add_product(&sum, &left, &right);
        let _ = grouped_product(&left, &[right.unsqueeze(0)], &[4]);
    }
}
