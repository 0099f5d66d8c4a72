//! Launches of the kernel in `source/quantize.cu`.

use super::launch::{
    BLOCKS_PER_MULTIPROCESSOR, BlockShape, Gpu, KernelLaunch, THREADS, Variant, arguments,
};
use crate::tensors::empty_f32;
use tch::{Kind, Tensor};

/// Runs [`crate::quantize_rows`] on a contiguous tensor.
pub(crate) fn quantize_rows(gpu: &dyn Gpu, x: &Tensor) -> (Tensor, Tensor) {
    let shape = x.size();
    let width = shape.last().map_or(1, |&width| width as usize);
    let rows = x.numel().checked_div(width).unwrap_or(0);
    let out = Tensor::empty(shape.as_slice(), (Kind::Float8e4m3fn, x.device()));
    let scales = empty_f32(x, [rows]);
    let variant = Variant::of(&[x], width);
    let block = BlockShape {
        threads_per_row: 32,
        rows: THREADS / 32,
    };
    let arguments = arguments![x, &out, &scales, rows, width];
    let launch = KernelLaunch {
        name: "quantize",
        variant,
        blocks: rows
            .div_ceil(block.rows)
            .min(BLOCKS_PER_MULTIPROCESSOR * gpu.multiprocessors()),
        block,
        shared: 0,
        arguments: &arguments,
    };
    gpu.run(&launch, x);
    let mut of_rows = shape;
    if let Some(last) = of_rows.last_mut() {
        *last = 1;
    }
    (out, scales.view(of_rows.as_slice()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::{TestInput, test_gpu, with_cases},
        quantize::quantize_by_libtorch,
    };
    use proptest::prelude::*;
    use tch::Device;

    /// True if the rows of `x` have the bits that libtorch gives them on the host.
    fn has_libtorchs_bits(gpu: &dyn Gpu, x: &Tensor) -> bool {
        let (small, scales) = quantize_rows(gpu, x);
        let (plain_small, plain_scales) = quantize_by_libtorch(&x.to_device(Device::Cpu));
        let bytes = |x: &Tensor| x.to_device(Device::Cpu).view_dtype(Kind::Uint8);
        bytes(&small).equal(&bytes(&plain_small)) && bytes(&scales).equal(&bytes(&plain_scales))
    }

    proptest! {
        #![proptest_config(with_cases(60))]
        #[test]
        fn it_has_libtorchs_bits(
            rows in 0i64..30,
            width in prop_oneof![1i64..50, (1i64..40).prop_map(|n| n * 8), Just(2048)],
            spread in 0f64..20.0,
            zero_row: bool,
            input: TestInput,
        ) {
            let (gpu, device) = test_gpu();
            // From subnormal numbers of E4M3 to its largest.
            let exponents = Tensor::rand([rows, width], (Kind::Float, device)) * -spread;
            let mut x = input.random(&[rows, width]);
            x *= exponents.exp().to_kind(x.kind());
            if zero_row && rows > 0 {
                let _ = x.get(0).zero_();
            }
            prop_assert!(has_libtorchs_bits(gpu, &x));
        }
    }

    #[test]
    fn each_rounding_of_e4m3_is_libtorchs() {
        let (gpu, device) = test_gpu();
        // All bf16 numbers up to 448, in rows whose scale is 1.
        let numbers: Vec<f32> = (0..0x43e1u32)
            .map(|bits| f32::from_bits(bits << 16))
            .collect();
        let positive = Tensor::from_slice(&numbers).to_device(device);
        let x = Tensor::stack(&[&positive, &-&positive], 0);
        for kind in [Kind::BFloat16, Kind::Float] {
            let x = x.to_kind(kind);
            assert!(has_libtorchs_bits(gpu, &x));
        }
    }

    #[test]
    fn rows_with_nan_are_nan_and_others_are_not() {
        let (gpu, device) = test_gpu();
        let x = Tensor::from_slice(&[1f32, f32::NAN, 2., 3.])
            .view([2, 2])
            .to_device(device);
        let (small, scales) = quantize_rows(gpu, &x);
        let isnan = small.to_kind(Kind::Float).isnan().flatten(0, -1);
        assert_eq!(
            Vec::<bool>::try_from(isnan).unwrap(),
            [true, true, false, false]
        );
        assert!(scales.double_value(&[0, 0]).is_nan());
        assert_eq!(scales.double_value(&[1, 0]), f64::from(3f32 / 448.0));
    }
}
