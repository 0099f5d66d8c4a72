//! The autograd node of attention whose log-sum-exps are known, and its sinks.

use crate::Weight;
use kernels::{add_sinks, sinks_gradient};
use tch::Tensor;
use torch_ext::{Error, attach_backward};

/// Attention of queries over keys, as backward needs it.
pub struct AttentionResult {
    /// `[B, H, S, dv]`.
    pub out: Tensor,
    /// Log-sum-exps of the scores `[B, H, S]` in fp32.
    pub lse: Tensor,
}

/// Adds sinks to attention of `inputs` (queries, keys and values) and makes it differentiable.
///
/// `result` is computed without autograd. `sinks` `[H]` has a logit per query head, see
/// [`add_sinks`]. `backward` maps the output's gradient and the result with sinks to the gradients
/// of `inputs`.
///
/// # Errors
/// libtorch's message, and in backward the errors of `backward`.
pub fn attention_node<B>(
    inputs: [&Tensor; 3],
    result: AttentionResult,
    sinks: Option<&Weight>,
    mut backward: B,
) -> Result<Tensor, Error>
where
    B: FnMut(&Tensor, &AttentionResult) -> Result<[Tensor; 3], Error> + Send + 'static,
{
    let AttentionResult { out, lse } = result;
    let (out, lse) = match sinks {
        Some(sinks) => tch::no_grad(|| add_sinks(out, &lse, &sinks.value())),
        None => (out, lse),
    };
    let saved = AttentionResult {
        out: out.detach(),
        lse,
    };
    let tracker = sinks.map(Weight::tracker);
    let sinks = sinks.cloned();
    let num_trackers = usize::from(tracker.is_some());
    let inputs: Vec<&Tensor> = inputs.into_iter().chain(&tracker).collect();
    let mut outputs = attach_backward(&inputs, vec![out], move |grads| {
        let Some(grad) = &grads[0] else {
            return Err(Error::new("attention: the output has no gradient"));
        };
        if let Some(sinks) = &sinks {
            let gradient = sinks_gradient(grad, &saved.out, &saved.lse, &sinks.value());
            sinks.add_gradient(move |sum| {
                let _ = sum.tensor().shallow_clone().g_add_(&gradient);
                Ok(())
            })?;
        }
        let of_inputs = backward(grad, &saved)?;
        let of_trackers = (0..num_trackers).map(|_| None);
        Ok(of_inputs.map(Some).into_iter().chain(of_trackers).collect())
    })?;
    Ok(outputs.remove(0))
}
