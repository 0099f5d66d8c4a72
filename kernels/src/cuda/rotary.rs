//! Launches of the rotary embedding kernel in `source/rotary.cu`.

use super::launch::{Gpu, KernelLaunch, Variant, arguments};
use crate::{positions::RowPositions, rotary_tables::RotaryTables};
use tch::Tensor;

/// Rotates the first `n` elements of the rows of `x` `[.., d]` by tables `[rows, n / 2]`.
///
/// Positions of tokens are not yet run on hardware.
pub(crate) fn apply_rotary(
    gpu: &dyn Gpu,
    x: &Tensor,
    tables: RotaryTables,
    order: RowPositions,
) -> Tensor {
    let RotaryTables {
        cos,
        sin,
        positions: of_tokens,
    } = tables;
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
        rows_per_sequence,
    } = order;
    let arguments = arguments![
        x,
        cos,
        sin,
        of_tokens,
        &out,
        rows,
        half,
        width,
        rows_per_position,
        positions,
        rows_per_sequence
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
    use tch::Kind;

    proptest! {
        #![proptest_config(with_cases(60))]
        #[test]
        fn pairs_rotate_by_the_angle_of_their_position(
            batch in 0i64..3,
            length in 1i64..9,
            heads in 1i64..5,
            heads_first: bool,
            half in prop_oneof![1i64..20, Just(32), Just(64)],
            rest in prop_oneof![Just(0), 1i64..20, Just(64)],
            table_rows in prop::option::of(1i64..12),
            input: TestInput,
        ) {
            let (gpu, device) = test_gpu();
            let width = 2 * half + rest;
            let shape = if heads_first {
                [batch, heads, length, width]
            } else {
                [batch, length, heads, width]
            };
            let x = input.random(&shape);
            let rows = table_rows.unwrap_or(length);
            let [cos, sin] = [(); 2].map(|()| input.random(&[rows, half]));
            let of_tokens = table_rows.map(|rows| {
                Tensor::randint(rows, [batch, length], (Kind::Int64, device))
            });
            let order = RowPositions {
                rows_per_position: if heads_first { 1 } else { heads as usize },
                positions: length as usize,
                rows_per_sequence: (heads * length) as usize,
            };
            let tables = RotaryTables {
                cos: &cos,
                sin: &sin,
                positions: of_tokens.as_ref(),
            };
            let ours = apply_rotary(gpu, &x, tables, order);
            let places = of_tokens.unwrap_or_else(|| {
                let in_order = Tensor::arange(length, (Kind::Int64, device));
                in_order.expand([batch, length], false)
            });
            let heads_dim = if heads_first { 1 } else { 2 };
            let [cos, sin] = [cos, sin].map(|table| {
                let of_places = table.to_f64().index_select(0, &places.flatten(0, -1));
                of_places.view([batch, length, half]).unsqueeze(heads_dim)
            });
            let parts = x.to_f64().split_with_sizes([half, half, rest], -1);
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
