//! RMSNorm (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps) * weight` over the last dim.

use crate::cuda;
use crate::number::Number;
use crate::profile::{Cost, part};
use crate::rows::{Numbers, for_kind, for_rows, host_kind, parts};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Numbers that are added up side by side.
const LANES: usize = 16;

/// Of `x` `[.., D]` with `weight` `[D]`: the result, of the dtype of `x`, and the factor of each row `[.., 1]` fp32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let cost = || Cost::passes(2.0, x);
    part("norm", "forward", cost, || {
        if let Some(gpu) = cuda::gpu(&[x, weight]) {
            return cuda::rms_norm(gpu, x, weight, eps);
        }
        let Some(kind) = host_kind(&[x, weight]) else {
            let wide = x.to_kind(Kind::Float);
            let scale = (wide
                .square()
                .mean_dim([-1i64].as_slice(), true, Kind::Float)
                + eps)
                .rsqrt();
            return ((&wide * &scale).to_kind(x.kind()) * weight, scale);
        };
        let mut shape = x.size();
        let width = shape.pop().unwrap_or(1) as usize;
        shape.push(1);
        let out = x.empty_like();
        let scale = Tensor::empty(shape.as_slice(), (Kind::Float, x.device()));
        for_kind!(
            kind,
            forward_on_threads(x, weight, &out, &scale, (width, eps as f32))
        );
        (out, scale)
    })
}

/// The gradients of `x`, of its dtype, and of `weight`, fp32, given that of the result; `scale` as [`rms_norm`] gave it.
pub fn rms_norm_backward(
    grad: &Tensor,
    x: &Tensor,
    scale: &Tensor,
    weight: &Tensor,
) -> (Tensor, Tensor) {
    let cost = || Cost::passes(3.0, x);
    part("norm", "backward", cost, || {
        if let Some(gpu) =
            cuda::gpu(&[grad, x, weight]).filter(|_| weight.numel() <= cuda::MAX_NORM_WIDTH)
        {
            return cuda::rms_norm_backward(gpu, grad, x, scale, weight);
        }
        let Some(kind) = host_kind(&[grad, x, weight]) else {
            let wide = grad.to_kind(Kind::Float);
            let normed = x.to_kind(Kind::Float) * scale;
            let rows: Vec<i64> = (0..grad.dim() as i64 - 1).collect();
            let grad_weight =
                (&wide * &normed).sum_dim_intlist(rows.as_slice(), false, Kind::Float);
            let grad_normed = wide * weight.to_kind(Kind::Float);
            let along = (&grad_normed * &normed).mean_dim([-1i64].as_slice(), true, Kind::Float);
            return (
                ((grad_normed - normed * along) * scale).to_kind(x.kind()),
                grad_weight,
            );
        };
        let width = weight.numel();
        let out = x.empty_like();
        // Parts add up for themselves, and their sums are added in order.
        let parts = parts(scale.numel(), width);
        let sums = Tensor::zeros([parts as i64, width as i64], (Kind::Float, x.device()));
        for_kind!(
            kind,
            backward_on_threads([grad, x, scale, weight], &out, &sums, width)
        );
        (
            out,
            sums.sum_dim_intlist([0i64].as_slice(), false, Kind::Float),
        )
    })
}

fn forward_on_threads<T: Number>(
    x: &Tensor,
    weight: &Tensor,
    out: &Tensor,
    scale: &Tensor,
    (width, eps): (usize, f32),
) {
    let count = scale.numel();
    // SAFETY: all were checked, or made, to be in host memory without gaps, of the type that is named.
    let (x, weight, out, scale) = unsafe {
        (
            Numbers::<T>::of(x),
            Numbers::<T>::of(weight),
            Numbers::<T>::of(out),
            Numbers::<f32>::of(scale),
        )
    };
    for_rows(count, width, |_, rows| {
        // SAFETY: parts of threads do not overlap.
        let (out, scale) = unsafe { (out.part_mut(&rows, width), scale.part_mut(&rows, 1)) };
        forward(
            x.part(&rows, width),
            weight.part(&(0..1), width),
            out,
            scale,
            eps,
        );
    });
}

fn backward_on_threads<T: Number>(
    [grad, x, scale, weight]: [&Tensor; 4],
    out: &Tensor,
    sums: &Tensor,
    width: usize,
) {
    let count = scale.numel();
    // SAFETY: as in forward; `scale` is what forward made.
    let (grad, x, weight, out) = unsafe {
        (
            Numbers::<T>::of(grad),
            Numbers::<T>::of(x),
            Numbers::<T>::of(weight),
            Numbers::<T>::of(out),
        )
    };
    // SAFETY: likewise.
    let (scale, sums) = unsafe { (Numbers::<f32>::of(scale), Numbers::<f32>::of(sums)) };
    for_rows(count, width, |part, rows| {
        // SAFETY: parts of threads do not overlap.
        let (out, sum) = unsafe {
            (
                out.part_mut(&rows, width),
                sums.part_mut(&(part..part + 1), width),
            )
        };
        let grad = grad.part(&rows, width);
        let x = x.part(&rows, width);
        backward(
            grad,
            x,
            scale.part(&rows, 1),
            weight.part(&(0..1), width),
            out,
            sum,
        );
    });
}

/// Adds up `of(i)` for all `i` below `width`, in an order that suits vectors.
#[inline(always)]
fn sum(width: usize, of: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = width / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += of(start + lane);
        }
    }
    let rest: f32 = (whole..width).map(of).sum();
    lanes.iter().sum::<f32>() + rest
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn forward<T: Number>(x: &[T], weight: &[T], out: &mut [T], scale: &mut [f32], eps: f32) {
    let width = weight.len();
    for ((x, out), scale) in x
        .chunks_exact(width)
        .zip(out.chunks_exact_mut(width))
        .zip(scale)
    {
        let squares = sum(width, |i| x[i].wide() * x[i].wide());
        *scale = 1.0 / (squares / width as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = T::narrow(T::narrow(x.wide() * *scale).wide() * weight.wide());
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn backward<T: Number>(
    grad: &[T],
    x: &[T],
    scale: &[f32],
    weight: &[T],
    out: &mut [T],
    grad_weight: &mut [f32],
) {
    let width = weight.len();
    let rows = grad
        .chunks_exact(width)
        .zip(x.chunks_exact(width))
        .zip(out.chunks_exact_mut(width))
        .zip(scale);
    for (((grad, x), out), &scale) in rows {
        let along =
            sum(width, |i| grad[i].wide() * weight[i].wide() * x[i].wide()) * scale / width as f32;
        let columns = grad
            .iter()
            .zip(x)
            .zip(weight)
            .zip(out.iter_mut().zip(grad_weight.iter_mut()));
        for (((grad, x), weight), (out, grad_weight)) in columns {
            let grad = grad.wide();
            let normed = x.wide() * scale;
            *grad_weight += grad * normed;
            *out = T::narrow((grad * weight.wide() - normed * along) * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn it_is_the_norm_with_its_gradients() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            for shape in [
                &[0i64, 8] as &[i64],
                &[1, 1],
                &[5, 33],
                &[3, 4, 96],
                &[300, 64],
            ] {
                let random =
                    |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                let width = shape[shape.len() - 1];
                let x = random(shape);
                let weight = random(&[width]);
                let grad = random(shape);
                let wide = |x: &Tensor| x.to_kind(Kind::Double).set_requires_grad(true);
                let wide_x = wide(&x);
                let wide_weight = wide(&weight);
                let scale = (wide_x
                    .square()
                    .mean_dim([-1i64].as_slice(), true, Kind::Double)
                    + 1e-5)
                    .rsqrt();
                let plain = &wide_x * &scale * &wide_weight;
                (&plain * grad.to_kind(Kind::Double))
                    .sum(Kind::Double)
                    .backward();
                let (out, scale) = rms_norm(&x, &weight, 1e-5);
                let (grad_x, grad_weight) = rms_norm_backward(&grad, &x, &scale, &weight);
                for (ours, plain) in [
                    (&out, &plain.detach()),
                    (&grad_x, &wide_x.grad()),
                    (&grad_weight, &wide_weight.grad()),
                ] {
                    let ours = ours.to_kind(Kind::Double);
                    assert!(
                        ours.allclose(plain, tolerance, tolerance * 4.0, false),
                        "{kind:?} {shape:?}"
                    );
                }
            }
        }
    }
}
