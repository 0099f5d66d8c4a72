//! Sums of rows by their target, such as the gradient of an embedding.
// Shapes: T rows to add, V sums, D width.

use crate::{
    cuda,
    profile::{Cost, span},
};
use tch::{Kind, Tensor};

/// Adds each of `rows` `[T, D]` to its target among `sums` `[V, D]` fp32.
///
/// `targets` `[T]` int64 holds a row of `sums`, or -1 if the row is left out. Processors and our
/// kernel for NVIDIA GPUs add in the order of the rows, so that equal inputs give equal bits.
/// Libtorch's operation, elsewhere, has a fixed order only if
/// [`set_deterministic`](torch_ext::set_deterministic) has requested it.
///
/// # Panics
/// If a target is out of range.
pub fn add_rows(sums: &Tensor, targets: &Tensor, rows: &Tensor) {
    let cost = || Cost::passes(3.0, rows);
    span("embedding", "backward", cost, || {
        if let Some(gpu) = cuda::gpu(&[rows]).filter(|_| fits_gpu(sums, targets, rows)) {
            let (sorted, order) = targets.sort_stable(true, 0, false);
            return cuda::add_rows(gpu, sums, &sorted, &order, rows);
        }
        let inside = targets.ge(0).to_kind(Kind::Float).unsqueeze(1);
        let wide = rows.to_kind(Kind::Float) * inside;
        let _ = sums
            .shallow_clone()
            .index_add_(0, &targets.clamp_min(0), &wide);
    })
}

fn fits_gpu(sums: &Tensor, targets: &Tensor, rows: &Tensor) -> bool {
    cuda::same_device_contiguous(rows, sums, Kind::Float)
        && cuda::same_device_contiguous(rows, targets, Kind::Int64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_a_target_are_left_out() {
        let sums = Tensor::from_slice(&[1f32, 1., 2., 2.]).view([2, 2]);
        let rows = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).view([3, 2]);
        add_rows(&sums, &Tensor::from_slice(&[1i64, -1, 1]), &rows);
        let expected = Tensor::from_slice(&[1f32, 1., 8., 10.]).view([2, 2]);
        assert_eq!(sums, expected);
    }

    #[test]
    fn a_requested_order_is_that_of_processors() {
        let random = |rows: i64| Tensor::randn([rows, 24], (Kind::Float, tch::Device::Cpu));
        let before = random(9);
        let rows = random(200);
        let targets = Tensor::randint_low(-1, 9, [200], (Kind::Int64, tch::Device::Cpu));
        let [plain, requested] = [false, true].map(|deterministic| {
            torch_ext::set_deterministic(deterministic).unwrap();
            let sums = before.copy();
            add_rows(&sums, &targets, &rows);
            sums
        });
        torch_ext::set_deterministic(false).unwrap();
        assert!(plain.equal(&requested));
        assert!(!plain.equal(&before));
    }
}
