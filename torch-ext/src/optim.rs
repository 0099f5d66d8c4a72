//! Fused AdamW, which updates weights and both moments in one pass over memory.

use crate::{Error, ffi};
use tch::Tensor;
use torch_sys::C_tensor;

/// The scalars of one AdamW step (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate of the step.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay, which is multiplied by `lr`.
    pub weight_decay: f64,
    /// Constant that is added to the denominator.
    pub eps: f64,
}

/// Updates parameters and their moments in place, in lists of equal length.
///
/// `steps` are fp32 scalars that include this step, so the first is 1. Gradients are divided by the
/// fp32 scalar `grad_scale` if there is one.
///
/// # Errors
/// libtorch's message if shapes, dtypes or devices differ.
///
/// # Panics
/// If the lists differ in length.
pub fn fused_adamw(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    steps: &[Tensor],
    config: AdamW,
    grad_scale: Option<&Tensor>,
) -> Result<(), Error> {
    let lists = [params, grads, exp_avgs, exp_avg_sqs, steps];
    assert!(
        lists.iter().all(|list| list.len() == params.len()),
        "AdamW: lists differ in length"
    );
    if params.is_empty() {
        return Ok(());
    }
    let pointers = lists.map(|list| {
        list.iter()
            .map(|t| t.as_ptr() as *mut C_tensor)
            .collect::<Vec<_>>()
    });
    let scale = grad_scale.map_or(std::ptr::null_mut(), |t| t.as_ptr() as *mut C_tensor);
    // SAFETY: the five arrays hold live tensors and have the same length; the scale is a live
    // tensor or null.
    ffi::check(unsafe {
        ffi::mtx_fused_adamw(
            pointers[0].as_ptr(),
            pointers[1].as_ptr(),
            pointers[2].as_ptr(),
            pointers[3].as_ptr(),
            pointers[4].as_ptr(),
            params.len(),
            config.lr,
            config.beta1,
            config.beta2,
            config.weight_decay,
            config.eps,
            scale,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn one_step_matches_a_hand_calculation() {
        let new = |v: f32| Tensor::from_slice(&[v]);
        let param = new(1.0);
        let grad = new(1.0);
        let m = new(0.0);
        let v = new(0.0);
        let step = new(1.0);
        let config = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            weight_decay: 0.5,
            eps: 0.0,
        };
        let scale = Tensor::full([1], 2.0, (Kind::Float, Device::Cpu));
        let list = |t: &Tensor| vec![t.shallow_clone()];
        fused_adamw(
            &list(&param),
            &list(&grad),
            &list(&m),
            &list(&v),
            &list(&step),
            config,
            Some(&scale),
        )
        .unwrap();
        // The scaled gradient is 0.5, and the first update is lr * sign(grad) after the decay.
        let expected = 1.0 - 0.1 * 0.5 - 0.1;
        assert!((param.double_value(&[0]) - expected).abs() < 1e-6);
        assert!((m.double_value(&[0]) - 0.05).abs() < 1e-7);
        assert!((v.double_value(&[0]) - 0.0125).abs() < 1e-7);
    }
}
