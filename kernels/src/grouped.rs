//! Grouped GEMMs by libtorch's `_grouped_mm`, one kernel for all groups.
//!
//! libtorch has it for bf16 on NVIDIA GPUs of compute capability 9 and 10 (Hopper and Blackwell of
//! data centers); not yet run there. On the CPU libtorch loops over the groups, which the tests
//! use.

use crate::row_groups::RowGroups;
use tch::{Device, Kind, Tensor};

/// Required alignment of addresses and strides, in bytes.
const ALIGNMENT: usize = 16;

/// True if `_grouped_mm` accepts these tensors, of any number of dimensions.
pub(crate) fn supports_grouped_mm(tensors: &[&Tensor]) -> bool {
    let Device::Cuda(index) = tensors[0].device() else {
        return false;
    };
    tensors.iter().all(|tensor| fits(tensor))
        && torch_ext::compute_capability(index).is_ok_and(|(major, _)| has_kernel(major))
}

/// True if libtorch has the kernel for GPUs of this major compute capability. On others it loops
/// over the groups and waits for the offsets.
fn has_kernel(major: i32) -> bool {
    matches!(major, 9 | 10)
}

fn fits(tensor: &Tensor) -> bool {
    let size = tensor.kind().elt_size_in_bytes();
    let aligned = |bytes: usize| bytes.is_multiple_of(ALIGNMENT);
    let stride_fits = |&stride: &i64| stride == 1 || aligned(stride as usize * size);
    let strides = tensor.stride();
    tensor.kind() == Kind::BFloat16
        && aligned(tensor.data_ptr() as usize)
        && strides.iter().all(stride_fits)
        && strides.iter().rev().take(2).any(|&stride| stride == 1)
}

fn offsets(groups: &RowGroups, device: Device) -> Tensor {
    let offsets = groups.ends(device);
    offsets.unwrap_or_else(|error| panic!("offsets of groups: {error}"))
}

/// Does what [`crate::grouped_gemm`] does.
pub(crate) fn grouped_gemm(rows: &Tensor, matrices: &[Tensor], groups: &RowGroups) -> Tensor {
    if let [matrices] = matrices
        && groups.num_groups() as i64 == matrices.size()[0]
    {
        let offsets = Some(offsets(groups, rows.device()));
        let products = rows.internal_grouped_mm(matrices, offsets, None, None);
        // libtorch pads rows whose length is not a multiple of 16 bytes.
        return products.contiguous();
    }
    let shape = [rows.size()[0], matrices[0].size()[2]];
    let out = Tensor::empty(shape, (rows.kind(), rows.device()));
    let mut groups = groups.clone();
    let mut start = 0;
    for matrices in matrices {
        let [here, later] = groups.split_at(matrices.size()[0] as usize);
        let len = here.num_rows();
        if len > 0 {
            let offsets = Some(offsets(&here, rows.device()));
            let rows = rows.narrow(0, start, len);
            let products = rows.internal_grouped_mm(matrices, offsets, None, None);
            out.narrow(0, start, len).copy_(&products);
        }
        groups = later;
        start += len;
    }
    out
}

/// Does what [`crate::grouped_gemm_accumulate`] does, or [`crate::grouped_gemm_overwrite`] if not
/// `accumulate`.
pub(crate) fn grouped_gemm_to_sums(
    sums: &Tensor,
    left: &Tensor,
    right: &Tensor,
    groups: &RowGroups,
    accumulate: bool,
) {
    let offsets = Some(offsets(groups, left.device()));
    let products = left.tr().internal_grouped_mm(right, offsets, None, None);
    // The result for groups without rows is unspecified.
    for (group, &count) in groups.counts().iter().enumerate() {
        if count == 0 {
            let _ = products.get(group as i64).zero_();
        }
    }
    let mut sums = sums.shallow_clone();
    if accumulate {
        drop(sums.g_add_(&products))
    } else {
        sums.copy_(&products)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::{test_gpu, with_cases},
        matmul::{grouped_gemm, grouped_gemm_accumulate, grouped_gemm_overwrite},
        tensors::tests::{TestTensor, randn},
    };
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(with_cases(100))]
        #[test]
        fn it_matches_one_gemm_per_group(
            own in prop::collection::vec(0i64..20, 1..5),
            lent in prop::collection::vec(0i64..20, 0..4),
            transposed: bool,
            accumulate: bool,
            inner in 1i64..5,
            outer in 1i64..5,
        ) {
            let inner = 8 * inner;
            let outer = 8 * outer;
            let device = test_gpu().1;
            let random = |shape: &[i64]| randn(shape, Kind::BFloat16);
            let there = |x: &Tensor| x.to_device(device);
            let here = |x: &Tensor| x.to_device(Device::Cpu);
            let stack = |groups: usize| {
                if transposed {
                    random(&[groups as i64, outer, inner]).transpose(1, 2)
                } else {
                    random(&[groups as i64, inner, outer])
                }
            };
            let mut matrices = vec![stack(own.len())];
            if !lent.is_empty() {
                matrices.push(stack(lent.len()));
            }
            let has_lent = !lent.is_empty();
            let groups = RowGroups::new([own, lent].concat());
            let total = groups.num_rows();
            let rows = random(&[total, inner]);
            let grad = random(&[total, outer]);
            prop_assert!(fits(&rows) && matrices.iter().all(fits) && fits(&grad.tr()));
            let close = |ours: &Tensor, plain: &Tensor| {
                let off = (ours.to_f64() - plain.to_f64()).norm();
                off.double_value(&[])
                    <= 1e-2
                        * plain
                            .to_f64()
                            .norm()
                            .double_value(&[])
            };
            let there_matrices: Vec<_> = matrices.iter().map(there).collect();
            let ends = groups.ends(device).unwrap();
            let there_groups = RowGroups::from_device(ends, total).unwrap();
            let out = super::grouped_gemm(&there(&rows), &there_matrices, &there_groups);
            // The host need not know the groups of one stack.
            prop_assert_eq!(there_groups.is_on_host(), has_lent);
            prop_assert!(out.is_contiguous());
            prop_assert!(close(&here(&out), &grouped_gemm(&rows, &matrices, &groups)));
            let sums = randn(&[groups.num_groups() as i64, outer, inner], Kind::Float);
            let ours = there(&sums).copy();
            grouped_gemm_to_sums(
                &ours,
                &there(&grad),
                &there(&rows),
                &there_groups,
                accumulate,
            );
            if accumulate {
                grouped_gemm_accumulate(&sums, &grad, &rows, &groups);
            } else {
                grouped_gemm_overwrite(&sums, &grad, &rows, &groups);
            }
            prop_assert!(close(&here(&ours), &sums));
        }
    }

    #[test]
    fn the_kernel_exists_for_two_generations() {
        assert!([9, 10].into_iter().all(has_kernel));
        assert!(![8, 11, 12].into_iter().any(has_kernel));
    }

    #[test]
    fn unaligned_tensors_are_refused() {
        let x = Tensor::zeros([6, 16], (Kind::BFloat16, Device::Cpu));
        assert!(fits(&x) && fits(&x.tr()) && !supports_grouped_mm(&[&x]));
        assert!(!fits(&x.narrow(1, 1, 8)));
        assert!(!fits(&x.to_kind(Kind::Float)));
        let unaligned_rows = Tensor::zeros([6, 12], (Kind::BFloat16, Device::Cpu));
        assert!(!fits(&unaligned_rows));
    }
}
