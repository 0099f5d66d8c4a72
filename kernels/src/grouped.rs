//! Products of groups of rows, each with a matrix of its own.

use crate::product::product_into;
use tch::{Device, Kind, Tensor};

/// Rows that one product of a group in 16 bits has a multiple of.
const BLOCK: i64 = 64;

/// The first `counts[0]` rows of `rows` `[R, I]` times `matrix(0)`, the next `counts[1]` times `matrix(1)`, and so on: `[R, O]`.
/// Matrices are `[I, O]`, however they lie in memory.
pub fn grouped_product(rows: &Tensor, matrix: impl Fn(i64) -> Tensor, counts: &[i64]) -> Tensor {
    let total = rows.size()[0];
    let out = Tensor::empty([total, matrix(0).size()[1]], (rows.kind(), rows.device()));
    // oneDNN makes a kernel for each number of rows that it has not met, which takes longer than the product. So groups are rounded
    // up: what a product writes beyond its own group is the next group's place, which that one's product writes after it.
    let rounds = rows.device() == Device::Cpu && rows.kind() == Kind::BFloat16;
    let mut start = 0;
    for (group, &len) in counts.iter().enumerate().filter(|(_, len)| **len > 0) {
        let rounded = (len + BLOCK - 1) / BLOCK * BLOCK;
        let len_here = if rounds && start + rounded <= total { rounded } else { len };
        let (part, into) = (rows.narrow(0, start, len_here), out.narrow(0, start, len_here));
        product_into(&into, &part, &matrix(group as i64));
        start += len;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn each_group_meets_its_own_matrix(counts in proptest::collection::vec(0i64..150, 1..9), bf16: bool) {
            let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
            let total: i64 = counts.iter().sum();
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (rows, matrices) = (random(&[total, 24]), random(&[counts.len() as i64, 24, 40]));
            let ours = grouped_product(&rows, |group| matrices.get(group), &counts);
            let (mut start, mut parts) = (0, vec![Tensor::empty([0, 40], (Kind::Double, Device::Cpu))]);
            for (group, &len) in counts.iter().enumerate() {
                let wide = |x: Tensor| x.to_kind(Kind::Double);
                parts.push(wide(rows.narrow(0, start, len)).matmul(&wide(matrices.get(group as i64))));
                start += len;
            }
            let tolerance = if bf16 { 3e-2 } else { 1e-5 };
            prop_assert!(ours.to_kind(Kind::Double).allclose(&Tensor::cat(&parts, 0), tolerance, tolerance * 4.0, false));
        }
    }
}
