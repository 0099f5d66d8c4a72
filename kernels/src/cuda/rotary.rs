//! Rotary positions, `source/rotary.cu`.

use super::{Gpu, KernelLaunch, Variant, arguments};
use tch::Tensor;

/// Turns the rows of `x` `[.., d]` by `cos` and `sin` `[positions, d / 2]`: a row's position is its number over `between`, modulo
/// `positions`.
pub(crate) fn apply_rotary(
    gpu: &dyn Gpu,
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    between: usize,
    positions: usize,
) -> Tensor {
    let half = x.size()[x.dim() - 1] as usize / 2;
    let rows = x.numel().checked_div(2 * half).unwrap_or(0);
    let out = x.empty_like();
    let variant = Variant::of(&[x, cos, sin, &out], half);
    let arguments = arguments![x, cos, sin, &out, rows, half, between, positions];
    gpu.run(
        &KernelLaunch::over_rows("apply_rotary", gpu, variant, (rows, half), &arguments),
        x,
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{Numbers, close, test_gpu};
    use proptest::prelude::*;
    use tch::Kind;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn pairs_turn_by_the_angles_of_their_position(
            (batch, positions, heads) in (0i64..3, 1i64..9, 1i64..5), half in prop_oneof![1i64..20, Just(32), Just(64)], numbers: Numbers,
        ) {
            let (gpu, _) = test_gpu();
            let x = numbers.random(&[batch, positions, heads, 2 * half]);
            let tables = [(); 2].map(|()| numbers.random(&[positions, half]));
            let ours = apply_rotary(gpu, &x, tables.each_ref(), heads as usize, positions as usize);
            let halves = x.to_kind(Kind::Double).chunk(2, -1);
            let [cos, sin] = tables.map(|table| table.to_kind(Kind::Double).unsqueeze(1));
            let plain = [&halves[0] * &cos - &halves[1] * &sin, &halves[1] * &cos + &halves[0] * &sin];
            close(&ours, &Tensor::cat(&plain, -1), if numbers.bf16 { 2e-2 } else { 1e-6 })?;
        }
    }
}
