//! RMSNorm (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps) * weight`, over the last dim, computed in fp32.
//! Only the input and one number a row are kept for backward.

use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// `x` `[..., D]` and `weight` `[D]`: `[..., D]` of the dtype of `x`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, Error> {
    let kind = x.kind();
    let last = [-1i64];
    let (out, scale) = tch::no_grad(|| {
        let wide = x.detach().to_kind(Kind::Float);
        let scale = (wide.square().mean_dim(last.as_slice(), true, Kind::Float) + eps).rsqrt();
        (((&wide * &scale).to_kind(kind)) * weight, scale)
    });
    let (saved_x, saved_weight) = (x.detach(), weight.detach());
    let mut out = attach_backward(&[x, weight], vec![out], move |grads| {
        let Some(grad) = &grads[0] else { return Ok(vec![None, None]) };
        let grad = grad.to_kind(Kind::Float);
        let normed = saved_x.to_kind(Kind::Float) * &scale;
        let rows: Vec<i64> = (0..grad.dim() as i64 - 1).collect();
        let grad_weight = (&grad * &normed).sum_dim_intlist(rows.as_slice(), false, Kind::Float);
        let grad_normed = grad * saved_weight.to_kind(Kind::Float);
        let along = (&grad_normed * &normed).mean_dim(last.as_slice(), true, Kind::Float);
        let grad_x = (grad_normed - normed * along) * &scale;
        Ok(vec![Some(grad_x.to_kind(kind)), Some(grad_weight.to_kind(saved_weight.kind()))])
    })?;
    Ok(out.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu};

    #[test]
    fn the_gradients_are_those_of_the_formula() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0).set_requires_grad(true);
        let (x, weight, probe) = (random(&[2, 3, 8]), random(&[8]), random(&[2, 3, 8]).detach());
        let ours = rms_norm(&x, &weight, 1e-5).unwrap();
        (&ours * &probe).sum(Kind::Float).backward();
        let grads = (x.grad().copy(), weight.grad().copy());
        let (mut x, mut weight) = (x, weight);
        x.zero_grad();
        weight.zero_grad();
        let scale = (x.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + 1e-5).rsqrt();
        let plain = &x * scale * &weight;
        (&plain * &probe).sum(Kind::Float).backward();
        assert!(ours.allclose(&plain, 1e-6, 1e-6, false));
        assert!(grads.0.allclose(&x.grad(), 1e-5, 1e-6, false));
        assert!(grads.1.allclose(&weight.grad(), 1e-5, 1e-6, false));
    }
}
