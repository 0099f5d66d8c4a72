//! Launches of the rotary embedding kernel in `source/rotary.cu`.

use super::launch::{Gpu, KernelLaunch, Variant, arguments};
use crate::positions::RowPositions;
use tch::Tensor;

/// Rotates the rows of `x` `[.., d]` by `cos` and `sin` `[positions, d / 2]`.
pub(crate) fn apply_rotary(
    gpu: &dyn Gpu,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    order: RowPositions,
) -> Tensor {
    let half = x.size()[x.dim() - 1] as usize / 2;
    let rows = x.numel().checked_div(2 * half).unwrap_or(0);
    let out = x.empty_like();
    let variant = Variant::of(&[x, cos, sin, &out], half);
    let RowPositions {
        rows_per_position,
        positions,
    } = order;
    let arguments = arguments![x, cos, sin, &out, rows, half, rows_per_position, positions];
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
            input: TestInput,
        ) {
            let (gpu, _) = test_gpu();
            let x = input.random(&[batch, positions, heads, 2 * half]);
            let [cos, sin] = [(); 2].map(|()| input.random(&[positions, half]));
            let order = RowPositions {
                rows_per_position: heads as usize,
                positions: positions as usize,
            };
            let ours = apply_rotary(gpu, &x, &cos, &sin, order);
            let halves = x.to_f64().chunk(2, -1);
            let [cos, sin] = [cos, sin].map(|table| table.to_f64().unsqueeze(1));
            let plain = [
                &halves[0] * &cos - &halves[1] * &sin,
                &halves[1] * &cos + &halves[0] * &sin,
            ];
            let tolerance = if input.bf16 { 2e-2 } else { 1e-6 };
            close(&ours, &Tensor::cat(&plain, -1), tolerance)?;
        }
    }
}
