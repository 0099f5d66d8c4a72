//! SwiGLU (GLU Variants, arXiv 2002.05202): `silu(gate) * up`.

use crate::{
    cuda,
    exponential::exp,
    number::Number,
    profile::{Cost, span},
    rows::{HostData, for_kind, for_rows, host_kind},
    tensors::{empty_as, sizes},
};
use multiversion::multiversion;
use tch::Tensor;

/// Returns SwiGLU `[R, F]` of `hidden` `[R, 2F]`, whose rows are the gate followed by up.
pub(crate) fn swiglu(hidden: &Tensor) -> Tensor {
    let cost = || Cost::passes(1.5, hidden);
    span("swiglu", "forward", cost, || {
        if let Some(gpu) = cuda::gpu(&[hidden]) {
            return cuda::swiglu(gpu, hidden);
        }
        let Some(kind) = host_kind(&[hidden]) else {
            let halves = hidden.chunk(2, -1);
            return halves[0].silu().multiply_(&halves[1]);
        };
        let [rows, width] = sizes(hidden);
        let out = empty_as(hidden, [rows, width / 2]);
        for_kind!(kind, forward_on_threads(hidden, &out));
        out
    })
}

/// Returns the gradient of `hidden` `[R, 2F]`, given that of the result `[R, F]`, and the result.
///
/// The gradient of the next weight needs the result, so that it need not be saved.
pub(crate) fn swiglu_backward(grad: &Tensor, hidden: &Tensor) -> (Tensor, Tensor) {
    let cost = || Cost::passes(3.0, hidden);
    span("swiglu", "backward", cost, || {
        if let Some(gpu) = cuda::gpu(&[grad, hidden]) {
            return cuda::swiglu_backward(gpu, grad, hidden);
        }
        let grad_hidden = hidden.empty_like();
        let activation = grad.empty_like();
        match host_kind(&[grad, hidden, &grad_hidden, &activation]) {
            Some(kind) => for_kind!(
                kind,
                backward_on_threads(grad, hidden, &grad_hidden, &activation)
            ),
            None => {
                let halves = hidden.chunk(2, -1);
                let grads = grad_hidden.chunk(2, -1);
                let silu = halves[0].silu();
                let grad_gate = halves[0].silu_backward(&(grad * &halves[1]));
                grads[0].shallow_clone().copy_(&grad_gate);
                let _ = silu.multiply_out(&grads[1], grad);
                let _ = silu.multiply_out(&activation, &halves[1]);
            }
        }
        (grad_hidden, activation)
    })
}

fn forward_on_threads<T>(hidden: &Tensor, out: &Tensor)
where
    T: Number,
{
    let [count, ffn] = sizes(out);
    // SAFETY: `host_kind` has checked `hidden`, and the caller creates `out`.
    let [hidden, out] = unsafe { HostData::<T>::of_all([hidden, out]) };
    for_rows(count, 2 * ffn, |_, rows| {
        // SAFETY: each row belongs to one thread.
        let out = unsafe { out.rows_mut(&rows, ffn) };
        forward(hidden.rows(&rows, 2 * ffn), out, ffn);
    });
}

fn backward_on_threads<T>(grad: &Tensor, hidden: &Tensor, grad_hidden: &Tensor, activation: &Tensor)
where
    T: Number,
{
    let [count, ffn] = sizes(grad);
    // SAFETY: `host_kind` has checked all four.
    let [grad, hidden, grad_hidden, activation] =
        unsafe { HostData::<T>::of_all([grad, hidden, grad_hidden, activation]) };
    for_rows(count, 2 * ffn, |_, rows| {
        let grad = grad.rows(&rows, ffn);
        let hidden = hidden.rows(&rows, 2 * ffn);
        // SAFETY: each row belongs to one thread.
        let grad_hidden = unsafe { grad_hidden.rows_mut(&rows, 2 * ffn) };
        // SAFETY: as above.
        let activation = unsafe { activation.rows_mut(&rows, ffn) };
        backward(grad, hidden, grad_hidden, activation, ffn);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn forward<T>(hidden: &[T], out: &mut [T], ffn: usize)
where
    T: Number,
{
    let outputs = out.chunks_exact_mut(ffn);
    for (hidden, out) in hidden.chunks_exact(2 * ffn).zip(outputs) {
        let (gate, up) = hidden.split_at(ffn);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let x = gate.wide();
            *out = T::narrow(x / (1.0 + exp(-x)) * up.wide());
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn backward<T>(grad: &[T], hidden: &[T], grad_hidden: &mut [T], activation: &mut [T], ffn: usize)
where
    T: Number,
{
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
            let x = gate.wide();
            let up = up.wide();
            let denominator = 1.0 + exp(-x);
            // The same bits as in the forward pass.
            let silu = x / denominator;
            let sigmoid = 1.0 / denominator;
            *activation = T::narrow(silu * up);
            *grad_up = T::narrow(grad * silu);
            let factor = 1.0 + x * (1.0 - sigmoid);
            *grad_gate = T::narrow(grad * up * sigmoid * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensors::tests::{TestTensor, randn, tolerances};
    use tch::Kind;

    #[test]
    fn it_matches_libtorch() {
        for (kind, tolerance) in tolerances(2e-6, 8e-3) {
            for (rows, ffn) in [(0, 4), (1, 1), (3, 7), (67, 96)] {
                let hidden = randn(&[rows, 2 * ffn], kind) * 3.0;
                let grad = randn(&[rows, ffn], kind) * 3.0;
                let wide = hidden.to_f64().set_requires_grad(true);
                let halves = wide.chunk(2, -1);
                let plain = halves[0].silu() * &halves[1];
                (&plain * grad.to_f64()).sum(Kind::Double).backward();
                let close = |ours: Tensor, plain: &Tensor| {
                    assert_eq!(ours.kind(), kind);
                    let ours = ours.to_f64();
                    assert!(
                        ours.allclose(plain, tolerance, tolerance, false),
                        "{kind:?} {rows}"
                    );
                };
                let (grad_hidden, again) = swiglu_backward(&grad, &hidden);
                close(grad_hidden, &wide.grad());
                assert!(again.equal(&swiglu(&hidden)));
                close(again, &plain.detach());
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        let hidden = Tensor::from_slice(&[f32::NAN, 1.0, 1.0, 1.0]).view([1, 4]);
        assert!(swiglu(&hidden).double_value(&[0, 0]).is_nan());
    }
}
