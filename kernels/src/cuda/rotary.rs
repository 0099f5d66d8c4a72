//! Launches of the rotary embedding kernel in `source/rotary.cu`.

use super::launch::{Gpu, KernelLaunch, Variant, arguments};
use crate::positions::RowPositions;
use tch::Tensor;

/// Rotates the first `n` elements of the rows of `x` `[.., d]` by `cos` and `sin`
/// `[positions, n / 2]`.
pub(crate) fn apply_rotary(
    gpu: &dyn Gpu,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    order: RowPositions,
) -> Tensor {
    let [width, half] = [x, cos].map(|tensor| tensor.size()[tensor.dim() - 1] as usize);
    let rows = x.numel().checked_div(width).unwrap_or(0);
    let out = x.empty_like();
    let tensors = [x, cos, sin, &out];
    // Vectors divide each half and the rest of a row.
    let vectors = [half, width].map(|length| Variant::of(&tensors, length));
    let [variant, of_rows] = vectors;
    let variant = if of_rows.vector() < variant.vector() {
        of_rows
    } else {
        variant
    };
    let RowPositions {
        rows_per_position,
        positions,
    } = order;
    let arguments = arguments![
        x,
        cos,
        sin,
        &out,
        rows,
        half,
        width,
        rows_per_position,
        positions
    ];
    let launch = KernelLaunch::over_rows("apply_rotary", gpu, variant, rows, half, &arguments);
    gpu.run(&launch, x);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cuda::tests::{TestInput, close, test_gpu, with_cases},
        tensors::tests::TestTensor,
    };
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(with_cases(60))]
        #[test]
        fn pairs_rotate_by_the_angle_of_their_position(
            batch in 0i64..3,
            positions in 1i64..9,
            heads in 1i64..5,
            half in prop_oneof![1i64..20, Just(32), Just(64)],
            rest in prop_oneof![Just(0), 1i64..20, Just(64)],
            input: TestInput,
        ) {
            let (gpu, _) = test_gpu();
            let x = input.random(&[batch, positions, heads, 2 * half + rest]);
            let [cos, sin] = [(); 2].map(|()| input.random(&[positions, half]));
            let order = RowPositions {
                rows_per_position: heads as usize,
                positions: positions as usize,
            };
            let ours = apply_rotary(gpu, &x, &cos, &sin, order);
            let parts = x
                .to_f64()
                .split_with_sizes([half, half, rest], -1);
            let [cos, sin] = [cos, sin].map(|table| table.to_f64().unsqueeze(1));
            let plain = [
                &parts[0] * &cos - &parts[1] * &sin,
                &parts[1] * &cos + &parts[0] * &sin,
                parts[2].shallow_clone(),
            ];
            let tolerance = if input.bf16 { 2e-2 } else { 1e-6 };
            close(&ours, &Tensor::cat(&plain, -1), tolerance)?;
        }
    }
}
