//! Launches of the kernel in `source/add_rows.cu`.

use super::launch::{Gpu, KernelLaunch, Variant, arguments};
use crate::tensors::sizes;
use tch::Tensor;

/// Runs [`crate::add_rows`] for targets that were sorted, with the position that each came from.
///
/// A target out of range traps on the GPU.
pub(crate) fn add_rows(
    gpu: &dyn Gpu,
    sums: &Tensor,
    targets: &Tensor,
    order: &Tensor,
    rows: &Tensor,
) {
    let [count, width] = sizes(sums);
    let [added_rows] = sizes(targets);
    // A thread reads packs of four fp32 sums, and of four elements of `rows`.
    let of_sums = Variant::of(&[sums], width);
    let row_bytes = 4 * rows.kind().elt_size_in_bytes();
    let rows_aligned = (rows.data_ptr() as usize).is_multiple_of(row_bytes);
    let variant = Variant {
        kind: rows.kind(),
        vectors: of_sums.vectors && rows_aligned,
    };
    let packs = if variant.vectors { width / 4 } else { width };
    // The variant's packs may be longer than four elements.
    let threads_for = packs * variant.vector();
    let arguments = arguments![rows, targets, order, sums, added_rows, count, width];
    let launch = KernelLaunch::over_rows(
        "add_rows",
        gpu,
        variant,
        added_rows,
        threads_for,
        &arguments,
    );
    gpu.run(&launch, sums);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{TestInput, test_gpu, with_cases};
    use proptest::prelude::*;
    use tch::{Device, Kind};

    proptest! {
        #![proptest_config(with_cases(60))]
        #[test]
        fn it_has_the_bits_of_adding_row_by_row(
            targets in prop::collection::vec(-1i64..9, 0..60),
            width in prop_oneof![1i64..50, (1i64..40).prop_map(|n| n * 8), Just(2200)],
            input: TestInput,
        ) {
            let (gpu, device) = test_gpu();
            let rows = input.random(&[targets.len() as i64, width]);
            let sums = Tensor::randn([9, width], (Kind::Float, device));
            let targets_t = Tensor::from_slice(&targets);
            let here = |x: &Tensor| x.to_device(Device::Cpu).copy();
            let plain = here(&sums);
            crate::add_rows(&plain, &targets_t, &here(&rows));
            let (sorted, order) = targets_t
                .to_device(device)
                .sort_stable(true, 0, false);
            add_rows(gpu, &sums, &sorted, &order, &rows);
            prop_assert!(here(&sums).equal(&plain));
        }
    }

    #[test]
    #[should_panic(expected = "trapped")]
    fn a_target_out_of_range_traps() {
        // Always on the emulator: on a GPU the trap would end the context of every test.
        let gpu = crate::cuda::emulator::Host;
        let sums = Tensor::zeros([2, 4], tch::kind::FLOAT_CPU);
        let rows = Tensor::zeros([1, 4], tch::kind::FLOAT_CPU);
        let index = |x: i64| Tensor::from_slice(&[x]);
        add_rows(&gpu, &sums, &index(2), &index(0), &rows);
    }
}
