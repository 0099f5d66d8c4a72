//! The clamped GLU of gpt-oss (arXiv 2508.10925): `(up + 1) * gate * sigmoid(alpha * gate)`.

use crate::{
    cuda,
    exponential::exp,
    number::Number,
    profile::{Cost, span},
    rows::{HostData, for_kind, for_rows, host_kind},
    tensors::{empty_as, sizes},
};
use multiversion::multiversion;
use tch::{Kind, Tensor};

/// Constants of the clamped GLU. The gate is at most `limit`, and up is between `-limit` and
/// `limit`. A clamped value has no gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClampedGlu {
    /// Factor on the gate inside the sigmoid.
    pub alpha: f32,
    pub limit: f32,
}

impl ClampedGlu {
    /// Returns the GLU `[R, F]` of `hidden` `[R, 2F]`, whose rows are the gate followed by up.
    pub(crate) fn forward(self, hidden: &Tensor) -> Tensor {
        let cost = || Cost::passes(1.5, hidden);
        span("clamped_glu", "forward", cost, || {
            if let Some(gpu) = cuda::gpu(&[hidden]) {
                return cuda::clamped_glu(gpu, hidden, self.alpha, self.limit);
            }
            let Some(kind) = host_kind(&[hidden]) else {
                return self.with_libtorch(hidden);
            };
            let [rows, width] = sizes(hidden);
            let out = empty_as(hidden, [rows, width / 2]);
            for_kind!(kind, forward_on_threads(self, hidden, &out));
            out
        })
    }

    /// Returns the gradient of `hidden` `[R, 2F]`, given that of the result `[R, F]`, and the
    /// result.
    pub(crate) fn backward(self, grad: &Tensor, hidden: &Tensor) -> (Tensor, Tensor) {
        let cost = || Cost::passes(3.0, hidden);
        span("clamped_glu", "backward", cost, || {
            if let Some(gpu) = cuda::gpu(&[grad, hidden]) {
                let ClampedGlu { alpha, limit } = self;
                return cuda::clamped_glu_backward(gpu, grad, hidden, alpha, limit);
            }
            let Some(kind) = host_kind(&[grad, hidden]) else {
                return self.backward_with_libtorch(grad, hidden);
            };
            let out = hidden.empty_like();
            let result = grad.empty_like();
            for_kind!(kind, backward_on_threads(self, grad, hidden, &out, &result));
            (out, result)
        })
    }

    /// Computes [`ClampedGlu::forward`] in fp32 by libtorch's operations.
    pub(crate) fn with_libtorch(self, hidden: &Tensor) -> Tensor {
        let [gate, up] = self.clamped_halves(hidden);
        let gated = &gate * (&gate * f64::from(self.alpha)).sigmoid();
        (gated * (up + 1.0)).to_kind(hidden.kind())
    }

    /// Computes [`ClampedGlu::backward`] in fp32 by libtorch's operations.
    pub(crate) fn backward_with_libtorch(self, grad: &Tensor, hidden: &Tensor) -> (Tensor, Tensor) {
        let limit = f64::from(self.limit);
        let alpha = f64::from(self.alpha);
        let kind = hidden.kind();
        let wide = hidden.to_kind(Kind::Float);
        let grad = grad.to_kind(Kind::Float);
        let [gate, up] = self.clamped_halves(hidden);
        let sigmoid = (&gate * alpha).sigmoid();
        let shifted = up + 1.0;
        let rest: Tensor = (1.0 - &sigmoid) * &gate;
        let slope: Tensor = &sigmoid * (rest * alpha + 1.0);
        let grad_gate: Tensor = slope * &grad * &shifted;
        let gated = gate * sigmoid;
        let grad_up = grad * &gated;
        let grads = Tensor::cat(&[grad_gate, grad_up], -1);
        let halves = wide.chunk(2, -1);
        let are_cut = [halves[0].gt(limit), halves[1].abs().gt(limit)];
        let grads = grads.masked_fill(&Tensor::cat(&are_cut, -1), 0.0);
        let out = gated * shifted;
        (grads.to_kind(kind), out.to_kind(kind))
    }

    /// Returns the gate and up in fp32, clamped.
    fn clamped_halves(self, hidden: &Tensor) -> [Tensor; 2] {
        let limit = f64::from(self.limit);
        let wide = hidden.to_kind(Kind::Float).chunk(2, -1);
        [wide[0].clamp_max(limit), wide[1].clamp(-limit, limit)]
    }

    #[inline(always)]
    fn element(self, gate: f32, up: f32) -> Element {
        let clamped = if up < -self.limit {
            -self.limit
        } else {
            self.at_most_limit(up)
        };
        let gate = self.at_most_limit(gate);
        let denominator = 1.0 + exp(-self.alpha * gate);
        Element {
            gate,
            shifted_up: clamped + 1.0,
            sigmoid: 1.0 / denominator,
            gated: gate / denominator,
        }
    }

    #[inline(always)]
    fn at_most_limit(self, x: f32) -> f32 {
        // `f32::min` would turn a NaN into the limit.
        if x > self.limit { self.limit } else { x }
    }
}

/// Values of one element that its result and its gradients share, so that their bits agree.
struct Element {
    /// The gate, at most the limit.
    gate: f32,
    /// The clamped up, plus one.
    shifted_up: f32,
    sigmoid: f32,
    /// The clamped gate times the sigmoid.
    gated: f32,
}

fn forward_on_threads<T: Number>(glu: ClampedGlu, hidden: &Tensor, out: &Tensor) {
    let [count, ffn] = sizes(out);
    // SAFETY: `host_kind` has checked `hidden`, and the caller creates `out`.
    let [hidden, out] = unsafe { HostData::<T>::of_all([hidden, out]) };
    for_rows(count, 2 * ffn, |_, rows| {
        // SAFETY: each row belongs to one thread.
        let out = unsafe { out.rows_mut(&rows, ffn) };
        forward(glu, hidden.rows(&rows, 2 * ffn), out, ffn);
    });
}

fn backward_on_threads<T: Number>(
    glu: ClampedGlu,
    grad: &Tensor,
    hidden: &Tensor,
    grad_hidden: &Tensor,
    activation: &Tensor,
) {
    let [count, ffn] = sizes(grad);
    // SAFETY: `host_kind` has checked the inputs, and the caller creates the outputs like them.
    let [grad, hidden, grad_hidden, activation] =
        unsafe { HostData::<T>::of_all([grad, hidden, grad_hidden, activation]) };
    for_rows(count, 2 * ffn, |_, rows| {
        let inputs = [grad.rows(&rows, ffn), hidden.rows(&rows, 2 * ffn)];
        // SAFETY: each row belongs to one thread.
        let grad_hidden = unsafe { grad_hidden.rows_mut(&rows, 2 * ffn) };
        // SAFETY: as above.
        let activation = unsafe { activation.rows_mut(&rows, ffn) };
        backward(glu, inputs, grad_hidden, activation, ffn);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn forward<T: Number>(glu: ClampedGlu, hidden: &[T], out: &mut [T], ffn: usize) {
    let outputs = out.chunks_exact_mut(ffn);
    for (hidden, out) in hidden.chunks_exact(2 * ffn).zip(outputs) {
        let (gate, up) = hidden.split_at(ffn);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let Element {
                gated, shifted_up, ..
            } = glu.element(gate.wide(), up.wide());
            *out = T::narrow(gated * shifted_up);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn backward<T: Number>(
    glu: ClampedGlu,
    inputs: [&[T]; 2],
    grad_hidden: &mut [T],
    activation: &mut [T],
    ffn: usize,
) {
    let [grad, hidden] = inputs;
    let inputs = grad.chunks_exact(ffn).zip(hidden.chunks_exact(2 * ffn));
    let grads = grad_hidden.chunks_exact_mut(2 * ffn);
    let outputs = grads.zip(activation.chunks_exact_mut(ffn));
    for ((grad, hidden), (grad_hidden, activation)) in inputs.zip(outputs) {
        let (gate, up) = hidden.split_at(ffn);
        let (grad_gate, grad_up) = grad_hidden.split_at_mut(ffn);
        let inputs = grad.iter().zip(gate).zip(up);
        let outputs = grad_gate.iter_mut().zip(grad_up).zip(activation);
        for (((grad, gate), up), ((grad_gate, grad_up), activation)) in inputs.zip(outputs) {
            let grad = grad.wide();
            let raw_gate = gate.wide();
            let raw_up = up.wide();
            let Element {
                gate,
                shifted_up,
                sigmoid,
                gated,
            } = glu.element(raw_gate, raw_up);
            *activation = T::narrow(gated * shifted_up);
            let slope = sigmoid * (1.0 + glu.alpha * gate * (1.0 - sigmoid));
            let of_gate = grad * shifted_up * slope;
            let is_cut = raw_gate > glu.limit;
            *grad_gate = T::narrow(if is_cut { 0.0 } else { of_gate });
            let of_up = grad * gated;
            let is_cut = raw_up.abs() > glu.limit;
            *grad_up = T::narrow(if is_cut { 0.0 } else { of_up });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn, tolerances};

    const GLU: ClampedGlu = ClampedGlu {
        alpha: 1.702,
        limit: 2.0,
    };

    /// Returns the result, and the gradient of `hidden`, by autograd in fp64.
    fn plain(grad: &Tensor, hidden: &Tensor) -> [Tensor; 2] {
        let wide = hidden.to_f64().set_requires_grad(true);
        let halves = wide.chunk(2, -1);
        let gate = halves[0].clamp_max(f64::from(GLU.limit));
        let up = halves[1].clamp(f64::from(-GLU.limit), f64::from(GLU.limit));
        let out = (&gate * f64::from(GLU.alpha)).sigmoid() * gate * (up + 1.0);
        (&out * grad.to_f64()).sum(Kind::Double).backward();
        [out.detach(), wide.grad()]
    }

    #[test]
    fn loops_and_libtorch_match_autograd() {
        for (kind, tolerance) in tolerances(4e-6, 1e-2) {
            for (rows, ffn) in [(0, 4), (1, 1), (3, 7), (67, 96)] {
                // Many values are beyond the limits.
                let hidden = randn(&[rows, 2 * ffn], kind) * 3.0;
                let grad = randn(&[rows, ffn], kind) * 3.0;
                let [out, grad_hidden] = plain(&grad, &hidden);
                let close = |ours: &Tensor, plain: &Tensor| {
                    assert_eq!(ours.kind(), kind);
                    let ours = ours.to_f64();
                    let is_close = ours.allclose(plain, tolerance, tolerance, false);
                    assert!(is_close, "{kind:?} {rows}: {ours} {plain}");
                };
                let (ours, again) = GLU.backward(&grad, &hidden);
                close(&ours, &grad_hidden);
                close(&again, &out);
                assert!(again.equal(&GLU.forward(&hidden)));
                let (ours, again) = GLU.backward_with_libtorch(&grad, &hidden);
                close(&ours, &grad_hidden);
                close(&again, &out);
                close(&GLU.with_libtorch(&hidden), &out);
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        for place in [0, 2] {
            let mut values = [1f32; 4];
            values[place] = f32::NAN;
            let hidden = Tensor::from_slice(&values).view([1, 4]);
            assert!(GLU.forward(&hidden).double_value(&[0, 0]).is_nan());
            assert!(!GLU.forward(&hidden).double_value(&[0, 1]).is_nan());
        }
    }
}
