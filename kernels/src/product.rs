//! Matrix products. libtorch multiplies on some processors with half of what they can do (docs/performance.md): there loops of our
//! own do it ([`multiply`](crate::multiply)), elsewhere libtorch does.

#[cfg(target_arch = "x86_64")]
use crate::multiply::{instructions, multiply};
use crate::profile::{Cost, part};
use tch::{Kind, Tensor};

/// A product of no more rows than this is libtorch's.
#[cfg(target_arch = "x86_64")]
const SMALL: i64 = 4;
/// Rows that one product of a group in 16 bits has a multiple of, in libtorch.
const BLOCK: i64 = 64;

/// `left right`, of matrices.
pub fn product(left: &Tensor, right: &Tensor) -> Tensor {
    let out = Tensor::empty([left.size()[0], right.size()[1]], (left.kind(), left.device()));
    product_into(&out, left, right);
    out
}

/// `out = left right`, of matrices of one dtype.
pub fn product_into(out: &Tensor, left: &Tensor, right: &Tensor) {
    part(
        "product",
        "of activations",
        || cost(&[(out, left, right)]),
        || {
            if !ours(&[(out, left, right)], false) {
                tch::no_grad(|| drop(left.mm_out(out, right)));
            }
        },
    );
}

/// `sum += left right`, of matrices; `sum` is fp32, or of the dtype of the others, and rounded once.
pub fn add_product(sum: &Tensor, left: &Tensor, right: &Tensor) {
    part(
        "product",
        "for gradients",
        || cost(&[(sum, left, right)]),
        || {
            if !ours(&[(sum, left, right)], true) {
                add_by_libtorch(sum, left, right);
            }
        },
    );
}

/// The first `counts[0]` rows of `rows` `[R, I]` times `matrix(0)`, the next `counts[1]` times `matrix(1)`, and so on: `[R, O]`.
/// Matrices are `[I, O]`, however they lie in memory.
pub fn grouped_product(rows: &Tensor, matrix: impl Fn(i64) -> Tensor, counts: &[i64]) -> Tensor {
    let total = rows.size()[0];
    let out = Tensor::empty([total, matrix(0).size()[1]], (rows.kind(), rows.device()));
    let groups = groups(counts);
    let of =
        |&(group, start, len): &(i64, i64, i64)| (out.narrow(0, start, len), rows.narrow(0, start, len), matrix(group));
    let products: Vec<_> = groups.iter().map(of).collect();
    let borrowed: Vec<_> = products.iter().map(|(out, rows, matrix)| (out, rows, matrix)).collect();
    part(
        "product",
        "of experts",
        || cost(&borrowed),
        || {
            if !ours(&borrowed, false) {
                by_libtorch(&out, rows, &groups, &products);
            }
        },
    );
    out
}

/// The place of a group's product, its rows and its matrix.
type Grouped = (Tensor, Tensor, Tensor);

fn by_libtorch(out: &Tensor, rows: &Tensor, groups: &[(i64, i64, i64)], products: &[Grouped]) {
    let total = rows.size()[0];
    // oneDNN makes a kernel for each number of rows that it has not met, which takes longer than the product. So groups are rounded
    // up: what a product writes beyond its own group is the next group's place, which that one's product writes after it.
    let rounds = rows.device() == tch::Device::Cpu && rows.kind() == Kind::BFloat16;
    for ((_, start, len), (_, _, matrix)) in groups.iter().copied().zip(products) {
        let rounded = (len + BLOCK - 1) / BLOCK * BLOCK;
        let len = if rounds && start + rounded <= total { rounded } else { len };
        tch::no_grad(|| drop(rows.narrow(0, start, len).mm_out(&out.narrow(0, start, len), matrix)));
    }
}

/// Adds the product of each group's rows, `left^T right`, to its own matrix: `sum(g)` `[O, I]`, fp32, for groups of `counts[g]` rows
/// of `left` `[R, O]` and `right` `[R, I]`.
pub fn add_grouped_product(sum: impl Fn(i64) -> Tensor, left: &Tensor, right: &Tensor, counts: &[i64]) {
    let of = |(group, start, len)| (sum(group), left.narrow(0, start, len).tr(), right.narrow(0, start, len));
    let products: Vec<_> = groups(counts).into_iter().map(of).collect();
    let borrowed: Vec<_> = products.iter().map(|(sum, left, right)| (sum, left, right)).collect();
    part(
        "product",
        "for experts' gradients",
        || cost(&borrowed),
        || {
            if !ours(&borrowed, true) {
                borrowed.iter().for_each(|(sum, left, right)| add_by_libtorch(sum, left, right));
            }
        },
    );
}

/// What products have to do.
fn cost(products: &[(&Tensor, &Tensor, &Tensor)]) -> Cost {
    let bytes = |x: &Tensor| Cost::passes(1.0, x).bytes;
    let of = |(out, left, right): &(&Tensor, &Tensor, &Tensor)| {
        let flops = (2 * out.numel()) as f64 * left.size()[1] as f64;
        Cost { flops, bytes: bytes(out) + bytes(left) + bytes(right) }
    };
    products.iter().map(of).fold(Cost::default(), Cost::and)
}

/// Number, first row and length of each group that has rows.
fn groups(counts: &[i64]) -> Vec<(i64, i64, i64)> {
    let mut start = 0;
    let place = |(group, &len): (usize, &i64)| {
        start += len;
        (group as i64, start - len, len)
    };
    counts.iter().enumerate().map(place).filter(|(_, _, len)| *len > 0).collect()
}

fn add_by_libtorch(sum: &Tensor, left: &Tensor, right: &Tensor) {
    let mut sum = sum.shallow_clone();
    tch::no_grad(|| match left.kind() == sum.kind() {
        true => drop(sum.addmm_(left, right)),
        false => drop(sum.g_add_(&left.matmul(right).to_kind(Kind::Float))),
    });
}

/// Computes products here, if they are such as are computed here.
#[cfg(target_arch = "x86_64")]
fn ours(products: &[(&Tensor, &Tensor, &Tensor)], adds: bool) -> bool {
    let fit = |&(out, left, right): &(&Tensor, &Tensor, &Tensor)| fits(out, left, right, adds);
    // Few rows do not pay for packing what they meet.
    let enough = adds || products.iter().any(|(out, _, _)| out.size()[0] > SMALL);
    let Some(by) = products.first().and_then(|(_, left, _)| instructions(left.kind())) else {
        return false;
    };
    if !enough || !products.iter().all(fit) {
        return false;
    }
    multiply(products, adds, by);
    true
}

#[cfg(not(target_arch = "x86_64"))]
fn ours(_: &[(&Tensor, &Tensor, &Tensor)], _: bool) -> bool {
    false
}

/// Whether a product is one for [`multiply`].
#[cfg(target_arch = "x86_64")]
fn fits(out: &Tensor, left: &Tensor, right: &Tensor, adds: bool) -> bool {
    let kind = left.kind();
    let known = matches!(kind, Kind::Float | Kind::BFloat16)
        && right.kind() == kind
        && (out.kind() == kind || (adds && out.kind() == Kind::Float))
        && [out, left, right].iter().all(|x| x.device() == tch::Device::Cpu && x.dim() == 2);
    let step = |x: &Tensor, dim: i64| if x.size()[dim as usize] == 1 { 1 } else { x.stride()[dim as usize] };
    // Two numbers of 16 bits at a time along the inner dimension, if that is the contiguous one.
    let whole = kind == Kind::Float || (known && left.size()[1] % 2 == 0);
    let lies = |x: &Tensor, inner: i64| step(x, 1 - inner) == 1 || (step(x, inner) == 1 && whole);
    known && step(out, 1) == 1 && lies(left, 1) && lies(right, 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use tch::Device;

    pub(crate) fn random(rows: i64, columns: i64, transposed: bool, kind: Kind) -> Tensor {
        let (outer, inner) = if transposed { (columns, rows) } else { (rows, columns) };
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
            (m, k, n) in (0i64..150, 0i64..90, 0i64..300), lie in 0u8..8, threads in 1i32..4, adds: bool, bf16: bool,
            deep in 0u8..8,
        ) {
            tch::set_num_threads(threads);
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            // Now and then more than one block, and odd or even.
            let k = if deep == 0 { k + 1100 } else { k };
            let (left, right) = (random(m, k, lie & 1 > 0, kind), random(k, n, lie & 2 > 0, kind));
            let out = random(m, n, lie & 4 > 0, if adds { Kind::Float } else { kind });
            let before = if adds { wide(&out) } else { wide(&out).zeros_like() };
            let plain = before + wide(&left).matmul(&wide(&right));
            match adds {
                true => add_product(&out, &left, &right),
                false => product_into(&out, &left, &right),
            }
            prop_assert!(close(&out, &plain, kind));
        }

        #[test]
        fn each_group_meets_its_own_matrix(
            counts in proptest::collection::vec(0i64..150, 1..9), bf16: bool, threads in 1i32..4,
        ) {
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let (total, groups) = (counts.iter().sum::<i64>(), counts.len() as i64);
            let random = |shape: &[i64], kind| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (rows, others) = (random(&[total, 24], kind), random(&[total, 40], kind));
            let (matrices, sums) = (random(&[groups, 24, 40], kind), random(&[groups, 40, 24], Kind::Float));
            tch::set_num_threads(threads);
            let ours = grouped_product(&rows, |group| matrices.get(group), &counts);
            let (mut parts, mut plain) = (vec![Tensor::empty([0, 40], (Kind::Double, Device::Cpu))], Vec::new());
            let mut start = 0;
            for (group, &len) in counts.iter().enumerate() {
                let (rows, others) = (wide(&rows.narrow(0, start, len)), wide(&others.narrow(0, start, len)));
                parts.push(rows.matmul(&wide(&matrices.get(group as i64))));
                plain.push(wide(&sums.get(group as i64)) + others.tr().matmul(&rows));
                start += len;
            }
            prop_assert!(close(&ours, &Tensor::cat(&parts, 0), kind));
            add_grouped_product(|group| sums.get(group), &others, &rows, &counts);
            prop_assert!(close(&sums, &Tensor::stack(&plain, 0), kind));
        }
    }

    #[test]
    fn what_others_multiply_goes_to_them() {
        let [left, right] = [(4, 5), (5, 6)].map(|(rows, columns)| random(rows, columns, false, Kind::Double));
        let plain = left.matmul(&right);
        assert_eq!(product(&left, &right), plain);
        let sum = Tensor::ones([4, 6], (Kind::Double, Device::Cpu));
        add_product(&sum, &left, &right);
        assert!(sum.allclose(&(plain + 1.0), 1e-12, 1e-12, false));
        // Nor does a gradient that somebody wants of an operand stop them.
        let [left, right] = [left, right].map(|x| x.set_requires_grad(true));
        assert!(!product(&left, &right).requires_grad());
        add_product(&sum, &left, &right);
        let _ = grouped_product(&left, |_| right.shallow_clone(), &[4]);
    }
}
