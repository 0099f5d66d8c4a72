//! RMSNorm (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in
//! fp32.
//!
//! Backward needs only the input and one number per row.

use super::spec::{Dim, ParamSpec, Role, Split, Stack};
use parallel::{Communicator, ReduceOp, Weight};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Returns the weight of a norm over `dim`, of which `split` gives the division.
pub(crate) fn norm_spec(block: &str, part: &'static str, dim: Dim, split: Split) -> ParamSpec {
    ParamSpec {
        block: block.to_string(),
        part,
        dims: vec![dim],
        stack: Stack::Single,
        split,
        role: Role::Norm,
        writes_residual: false,
    }
}

/// Normalizes `x` `[..., D]` with `weight` `[D]`, in the dtype of `x`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Weight, eps: f64) -> Result<Tensor, Error> {
    let (out, scale) = tch::no_grad(|| kernels::rms_norm(&x.detach(), &weight.value(), eps));
    let saved = x.detach();
    let used = weight.clone();
    let mut out = attach_backward(&[x, &weight.tracker()], vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let (grad_x, grad_weight) =
            kernels::rms_norm_backward(&grad.contiguous(), &saved, &scale, &used.value());
        add_gradient(&used, grad_weight)?;
        Ok(vec![Some(grad_x), None])
    })?;
    Ok(out.remove(0))
}

fn add_gradient(weight: &Weight, gradient: Tensor) -> Result<(), Error> {
    weight.add_gradient(move |sum| {
        let _ = sum.tensor().shallow_clone().g_add_(&gradient);
        Ok(())
    })
}

/// As [`rms_norm`], for rows of which each rank of `group` has an equal part.
///
/// # Collective
/// All ranks of the group, forward and backward.
pub(crate) fn split_rms_norm(
    x: &Tensor,
    weight: &Weight,
    eps: f64,
    group: &Arc<dyn Communicator>,
) -> Result<Tensor, Error> {
    if group.size() == 1 {
        return rms_norm(x, weight, eps);
    }
    let kind = x.kind();
    let (out, scale) = tch::no_grad(|| {
        let wide = x.detach().to_kind(Kind::Float);
        let scale = (mean(&wide.square(), group)? + eps).rsqrt();
        let normed = (&wide * &scale).to_kind(kind);
        Ok::<_, Error>((normed * weight.value(), scale))
    })?;
    let saved = x.detach();
    let used = weight.clone();
    let group = group.clone();
    let mut out = attach_backward(&[x, &weight.tracker()], vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let grad = grad.to_kind(Kind::Float);
        let normed = saved.to_kind(Kind::Float) * &scale;
        let rows: Vec<i64> = (0..grad.dim() as i64 - 1).collect();
        let by_element = &grad * &normed;
        let grad_weight = by_element.sum_dim_intlist(rows.as_slice(), false, Kind::Float);
        add_gradient(&used, grad_weight)?;
        let grad_normed = grad * used.value().to_kind(Kind::Float);
        let along = mean(&(&grad_normed * &normed), &group)?;
        let grad_x = (grad_normed - normed * along) * &scale;
        Ok(vec![Some(grad_x.to_kind(kind)), None])
    })?;
    Ok(out.remove(0))
}

/// Returns the mean over the last dimension, of all ranks.
fn mean(x: &Tensor, group: &Arc<dyn Communicator>) -> Result<Tensor, Error> {
    let mut mean = x.mean_dim([-1i64].as_slice(), true, Kind::Float);
    group
        .all_reduce(&mean, ReduceOp::Sum)
        .and_then(parallel::Work::wait)?;
    mean /= group.size() as f64;
    Ok(mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu, GradientBuckets, Replication};

    #[test]
    fn the_gradients_are_those_of_the_formula() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let mut x = random(&[2, 3, 8]).set_requires_grad(true);
        let value = random(&[8]);
        let probe = random(&[2, 3, 8]);
        let weight = Weight::new(value.copy());
        let alone = [Replication::alone()];
        let gradients =
            GradientBuckets::new(&[(weight.clone(), 0)], &alone, 1 << 20, true, &Cpu).unwrap();
        gradients.begin(1);
        let ours = rms_norm(&x, &weight, 1e-5).unwrap();
        (&ours * &probe).sum(Kind::Float).backward();
        let grad_x = x.grad().copy();
        x.zero_grad();
        let weight = value.set_requires_grad(true);
        let scale = (x.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + 1e-5).rsqrt();
        let plain = &x * scale * &weight;
        (&plain * &probe).sum(Kind::Float).backward();
        assert!(ours.allclose(&plain, 1e-6, 1e-6, false));
        assert!(grad_x.allclose(&x.grad(), 1e-5, 1e-6, false));
        assert!(
            gradients
                .gradient(0)
                .flatten(0, -1)
                .allclose(&weight.grad(), 1e-5, 1e-6, false)
        );
    }
}
