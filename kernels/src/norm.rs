//! RMSNorm (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps) * gain` over the last dimension.
//!
//! Without an offset in the gain, rows are rounded to their dtype before the product with it, too.

use crate::{
    cuda,
    gain::{Gain, rounds_before},
    number::Number,
    profile::{Cost, span},
    rows::{HostData, for_kind, for_rows, host_kind, parts},
    tensors::{FIRST_DIM, LAST_DIM},
};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Elements that are summed in parallel.
const LANES: usize = 16;

/// Returns the normalized `x` `[.., D]`, in its dtype, and the factor of each row, `[.., 1]` fp32.
pub fn rms_norm<'a>(x: &Tensor, gain: impl Into<Gain<'a>>, eps: f64) -> (Tensor, Tensor) {
    let gain = gain.into();
    let weight = gain.weight;
    let cost = || Cost::passes(2.0, x);
    span("norm", "forward", cost, || {
        if let Some(gpu) = cuda::gpu(&[x, weight]) {
            return cuda::rms_norm(gpu, x, gain, eps);
        }
        let Some(kind) = host_kind(&[x, weight]) else {
            let wide = x.to_kind(Kind::Float);
            let squares = wide.square();
            let mean = squares.mean_dim(LAST_DIM, true, Kind::Float);
            let scale = (mean + eps).rsqrt();
            let normed = &wide * &scale;
            let out = if rounds_before(gain.offset) {
                normed.to_kind(x.kind()) * weight
            } else {
                (normed * gain.wide()).to_kind(x.kind())
            };
            return (out, scale);
        };
        let mut shape = x.size();
        let width = shape.pop().unwrap_or(1) as usize;
        shape.push(1);
        let normed = x.empty_like();
        let scale = Tensor::empty(shape.as_slice(), (Kind::Float, x.device()));
        let eps = eps as f32;
        for_kind!(
            kind,
            forward_on_threads(x, gain, &normed, &scale, width, eps)
        );
        (normed, scale)
    })
}

/// Returns the gradients of `x`, in its dtype, and of the weight, in fp32.
///
/// `grad` is the gradient of the result of [`rms_norm`], and `scale` holds its row factors.
pub fn rms_norm_backward<'a>(
    grad: &Tensor,
    x: &Tensor,
    scale: &Tensor,
    gain: impl Into<Gain<'a>>,
) -> (Tensor, Tensor) {
    let gain = gain.into();
    let weight = gain.weight;
    let cost = || Cost::passes(3.0, x);
    span("norm", "backward", cost, || {
        let fits_gpu = weight.numel() <= cuda::MAX_NORM_WIDTH;
        if let Some(gpu) = cuda::gpu(&[grad, x, weight]).filter(|_| fits_gpu) {
            return cuda::rms_norm_backward(gpu, grad, x, scale, gain);
        }
        let Some(kind) = host_kind(&[grad, x, weight]) else {
            return backward_by_libtorch(grad, x, scale, gain);
        };
        let width = weight.numel();
        let grad_x = x.empty_like();
        // Each range of rows has its own sums, which are added in order.
        let parts = parts(scale.numel(), width);
        let shape = [parts as i64, width as i64];
        let sums = Tensor::zeros(shape, (Kind::Float, x.device()));
        for_kind!(
            kind,
            backward_on_threads(grad, x, scale, gain, &grad_x, &sums)
        );
        let grad_weight = sums.sum_dim_intlist(FIRST_DIM, false, Kind::Float);
        (grad_x, grad_weight)
    })
}

fn backward_by_libtorch(grad: &Tensor, x: &Tensor, scale: &Tensor, gain: Gain) -> (Tensor, Tensor) {
    let wide = grad.to_kind(Kind::Float);
    let normed = x.to_kind(Kind::Float) * scale;
    let rows: Vec<i64> = (0..grad.dim() as i64 - 1).collect();
    let grad_weight = (&wide * &normed).sum_dim_intlist(rows.as_slice(), false, Kind::Float);
    let grad_normed = wide * gain.wide();
    let products = &grad_normed * &normed;
    let along = products.mean_dim(LAST_DIM, true, Kind::Float);
    let grad_x = (grad_normed - normed * along) * scale;
    (grad_x.to_kind(x.kind()), grad_weight)
}

fn forward_on_threads<T>(
    x: &Tensor,
    gain: Gain,
    out: &Tensor,
    scale: &Tensor,
    width: usize,
    eps: f32,
) where
    T: Number,
{
    let count = scale.numel();
    let Gain { weight, offset } = gain;
    // SAFETY: `host_kind` has checked the inputs, and the caller creates the outputs.
    let [x, weight, out] = unsafe { HostData::<T>::of_all([x, weight, out]) };
    // SAFETY: as above.
    let scale = unsafe { HostData::<f32>::of(scale) };
    for_rows(count, width, |_, rows| {
        let x = x.rows(&rows, width);
        // SAFETY: each row belongs to one thread.
        let out = unsafe { out.rows_mut(&rows, width) };
        // SAFETY: as above.
        let scale = unsafe { scale.rows_mut(&rows, 1) };
        let weight = weight.rows(&(0..1), width);
        forward(x, Columns { weight, offset }, out, scale, eps);
    });
}

fn backward_on_threads<T>(
    grad: &Tensor,
    x: &Tensor,
    scale: &Tensor,
    gain: Gain,
    out: &Tensor,
    sums: &Tensor,
) where
    T: Number,
{
    let count = scale.numel();
    let Gain { weight, offset } = gain;
    let width = weight.numel();
    // SAFETY: `host_kind` has checked the inputs, and the caller creates the outputs.
    let [grad, x, weight, out] = unsafe { HostData::<T>::of_all([grad, x, weight, out]) };
    // SAFETY: as above; `scale` is a result of `rms_norm`.
    let [scale, sums] = unsafe { HostData::<f32>::of_all([scale, sums]) };
    for_rows(count, width, |part, rows| {
        let grad = grad.rows(&rows, width);
        let x = x.rows(&rows, width);
        let scale = scale.rows(&rows, 1);
        let weight = weight.rows(&(0..1), width);
        // SAFETY: each row belongs to one thread.
        let out = unsafe { out.rows_mut(&rows, width) };
        // SAFETY: each part belongs to one thread.
        let sum = unsafe { sums.rows_mut(&(part..part + 1), width) };
        backward(grad, x, scale, Columns { weight, offset }, out, sum);
    });
}

/// A [`Gain`] in host memory.
#[derive(Clone, Copy)]
struct Columns<'a, T> {
    weight: &'a [T],
    offset: f32,
}

/// Sums `term(i)` for all `i` below `width`, in an order that suits vectors.
#[inline(always)]
fn sum(width: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = width / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    let rest: f32 = (whole..width).map(term).sum();
    lanes.iter().sum::<f32>() + rest
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn forward<T>(
    input: &[T],
    gain: Columns<T>,
    normed_rows: &mut [T],
    scales: &mut [f32],
    epsilon: f32,
) where
    T: Number,
{
    let Columns { weight, offset } = gain;
    let width = weight.len();
    let rows = input
        .chunks_exact(width)
        .zip(normed_rows.chunks_exact_mut(width));
    for ((input, normed_rows), scales) in rows.zip(scales) {
        let squares = sum(width, |i| input[i].wide() * input[i].wide());
        *scales = 1.0 / (squares / width as f32 + epsilon).sqrt();
        let elements = normed_rows.iter_mut().zip(input).zip(weight);
        if rounds_before(offset) {
            for ((out, input), weight) in elements {
                let normed = T::narrow(input.wide() * *scales);
                *out = T::narrow(normed.wide() * weight.wide());
            }
        } else {
            for ((out, input), weight) in elements {
                *out = T::narrow(input.wide() * *scales * (weight.wide() + offset));
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn backward<T>(
    grad: &[T],
    x: &[T],
    scale: &[f32],
    gain: Columns<T>,
    out: &mut [T],
    grad_weight: &mut [f32],
) where
    T: Number,
{
    let Columns { weight, offset } = gain;
    let width = weight.len();
    let rows = grad
        .chunks_exact(width)
        .zip(x.chunks_exact(width))
        .zip(out.chunks_exact_mut(width))
        .zip(scale);
    for (((grad, x), out), &scale) in rows {
        let product = |i: usize| grad[i].wide() * (weight[i].wide() + offset) * x[i].wide();
        let along = sum(width, product) * scale / width as f32;
        let inputs = grad.iter().zip(x).zip(weight);
        let outputs = out.iter_mut().zip(grad_weight.iter_mut());
        for (((grad, x), weight), (out, grad_weight)) in inputs.zip(outputs) {
            let grad = grad.wide();
            let normed = x.wide() * scale;
            *grad_weight += grad * normed;
            *out = T::narrow((grad * (weight.wide() + offset) - normed * along) * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn, tolerances};

    #[test]
    fn rows_with_an_offset_in_the_gain_are_rounded_once() {
        let x = randn(&[40, 64], Kind::BFloat16);
        let weight = randn(&[64], Kind::BFloat16) * 0.1;
        let gain = Gain {
            weight: &weight,
            offset: 1.0,
        };
        let (out, scale) = rms_norm(&x, gain, 1e-6);
        let wide = x.to_kind(Kind::Float) * scale * gain.wide();
        let once = wide.to_kind(Kind::BFloat16);
        assert_eq!(out, once);
        let normed = x.to_kind(Kind::Float) * &rms_norm(&x, &weight, 1e-6).1;
        let twice = normed.to_kind(Kind::BFloat16) * gain.wide();
        assert_ne!(twice.to_kind(Kind::BFloat16), once);
    }

    #[test]
    fn it_matches_the_formula() {
        for (kind, tolerance) in tolerances(1e-5, 2e-2) {
            for (shape, offset) in [
                (&[0i64, 8] as &[i64], 0.0),
                (&[1, 1], 0.0),
                (&[5, 33], 1.0),
                (&[3, 4, 96], 0.0),
                (&[300, 64], 1.0),
            ] {
                let random = |shape: &[i64]| randn(shape, kind);
                let width = shape[shape.len() - 1];
                let x = random(shape);
                let weight = random(&[width]);
                let grad = random(shape);
                let wide = |x: &Tensor| x.to_f64().set_requires_grad(true);
                let wide_x = wide(&x);
                let wide_weight = wide(&weight);
                let squares = wide_x.square();
                let mean = squares.mean_dim(LAST_DIM, true, Kind::Double);
                let scale = (mean + 1e-5).rsqrt();
                let plain = &wide_x * &scale * (&wide_weight + f64::from(offset));
                (&plain * grad.to_f64()).sum(Kind::Double).backward();
                let gain = Gain {
                    weight: &weight,
                    offset,
                };
                let (out, scale) = rms_norm(&x, gain, 1e-5);
                let (grad_x, grad_weight) = rms_norm_backward(&grad, &x, &scale, gain);
                let by_libtorch = backward_by_libtorch(&grad, &x, &scale, gain);
                for (ours, plain) in [
                    (&out, &plain.detach()),
                    (&grad_x, &wide_x.grad()),
                    (&by_libtorch.0, &wide_x.grad()),
                    (&grad_weight, &wide_weight.grad()),
                ] {
                    let ours = ours.to_f64();
                    assert!(
                        ours.allclose(plain, tolerance, tolerance * 4.0, false),
                        "{kind:?} {shape:?}"
                    );
                }
            }
        }
    }
}
