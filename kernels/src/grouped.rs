//! One kernel for the gemms of all groups, where libtorch has it: `_grouped_mm`, in bf16 on NVIDIA's GPUs from Hopper on. Not yet run
//! there; on the CPU libtorch does the same in a loop, which the tests compare.

use tch::{Device, Kind, Tensor};

/// Compute capability of the first GPUs that have it.
const HOPPER: (i32, i32) = (9, 0);
/// Bytes of which addresses and rows are multiples.
const ALIGNED: usize = 16;

/// Whether the kernel takes these, of any number of dims.
pub(crate) fn takes(tensors: &[&Tensor]) -> bool {
    let Device::Cuda(index) = tensors[0].device() else {
        return false;
    };
    tensors.iter().all(|tensor| fits(tensor))
        && torch_ext::capability(index).is_ok_and(|of| of >= HOPPER)
}

fn fits(tensor: &Tensor) -> bool {
    let aligned = |bytes: usize| bytes.is_multiple_of(ALIGNED);
    let apart =
        |&stride: &i64| stride == 1 || aligned(stride as usize * tensor.kind().elt_size_in_bytes());
    let strides = tensor.stride();
    tensor.kind() == Kind::BFloat16
        && aligned(tensor.data_ptr() as usize)
        && strides.iter().all(apart)
        && strides.iter().rev().take(2).any(|&stride| stride == 1)
}

/// Where each group's rows end: int32 `[groups]`.
fn offsets(counts: &[i64], device: Device) -> Tensor {
    let mut end = 0;
    let offsets: Vec<i32> = counts
        .iter()
        .map(|&count| (end += count as i32, end).1)
        .collect();
    Tensor::from_slice(&offsets).to_device(device)
}

/// As [`crate::grouped_gemm`], to `out`.
pub(crate) fn gemm(out: &Tensor, rows: &Tensor, matrices: &[Tensor], counts: &[i64]) {
    let mut counts = counts;
    let mut start = 0;
    for some in matrices {
        let (here, later) = counts.split_at(some.size()[0] as usize);
        let len = here.iter().sum();
        if len > 0 {
            let offsets = offsets(here, rows.device());
            let product =
                rows.narrow(0, start, len)
                    .internal_grouped_mm(some, Some(offsets), None, None);
            out.narrow(0, start, len).copy_(&product);
        }
        (counts, start) = (later, start + len);
    }
}

/// As [`crate::grouped_gemm_accumulate`], or with `accumulate` false [`crate::grouped_gemm_overwrite`].
pub(crate) fn grouped_gemm_to_sums(
    sums: &Tensor,
    left: &Tensor,
    right: &Tensor,
    counts: &[i64],
    accumulate: bool,
) {
    let offsets = offsets(counts, left.device());
    let gemms = left
        .tr()
        .internal_grouped_mm(right, Some(offsets), None, None);
    // What it makes of groups without rows, nobody says.
    for (group, _) in counts.iter().enumerate().filter(|(_, count)| **count == 0) {
        let _ = gemms.get(group as i64).zero_();
    }
    let mut sums = sums.shallow_clone();
    if accumulate {
        drop(sums.g_add_(&gemms))
    } else {
        sums.copy_(&gemms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::test_gpu;
    use crate::matmul::{grouped_gemm, grouped_gemm_accumulate, grouped_gemm_overwrite};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn it_is_the_products_one_by_one(
            own in prop::collection::vec(0i64..20, 1..5), borrowed in prop::collection::vec(0i64..20, 0..4), swapped: bool, accumulate: bool,
            (inner, outer) in (1i64..5, 1i64..5),
        ) {
            let (inner, outer) = (8 * inner, 8 * outer);
            let device = test_gpu().1;
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
            let (there, here) = (|x: &Tensor| x.to_device(device), |x: &Tensor| x.to_device(Device::Cpu));
            let stack = |groups: usize| match swapped {
                true => random(&[groups as i64, outer, inner]).transpose(1, 2),
                false => random(&[groups as i64, inner, outer]),
            };
            let mut matrices = vec![stack(own.len())];
            if !borrowed.is_empty() {
                matrices.push(stack(borrowed.len()));
            }
            let counts = [own, borrowed].concat();
            let total = counts.iter().sum::<i64>();
            let (rows, grad) = (random(&[total, inner]), random(&[total, outer]));
            prop_assert!(fits(&rows) && matrices.iter().all(fits) && fits(&grad.tr()));
            let wide = |x: &Tensor| x.to_kind(Kind::Double);
            let close = |ours: &Tensor, plain: &Tensor| {
                let off = (wide(ours) - wide(plain)).norm().double_value(&[]);
                off <= 1e-2 * wide(plain).norm().double_value(&[])
            };
            let out = there(&grad).empty_like();
            gemm(&out, &there(&rows), &matrices.iter().map(there).collect::<Vec<_>>(), &counts);
            prop_assert!(close(&here(&out), &grouped_gemm(&rows, &matrices, &counts)));
            let sums = Tensor::randn([counts.len() as i64, outer, inner], (Kind::Float, Device::Cpu));
            let ours = there(&sums).copy();
            grouped_gemm_to_sums(&ours, &there(&grad), &there(&rows), &counts, accumulate);
            if accumulate { grouped_gemm_accumulate(&sums, &grad, &rows, &counts) } else { grouped_gemm_overwrite(&sums, &grad, &rows, &counts) }
            prop_assert!(close(&here(&ours), &sums));
        }
    }

    #[test]
    fn what_is_not_aligned_is_not_taken() {
        let x = Tensor::zeros([6, 16], (Kind::BFloat16, Device::Cpu));
        assert!(fits(&x) && fits(&x.tr()) && !takes(&[&x]));
        assert!(!fits(&x.narrow(1, 1, 8)) && !fits(&x.to_kind(Kind::Float)));
        assert!(!fits(&Tensor::zeros(
            [6, 12],
            (Kind::BFloat16, Device::Cpu)
        )));
    }
}
