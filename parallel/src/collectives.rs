//! Differentiable collectives. Each function's gradient is the function named beside it, so a model composes them
//! like any other operation:
//!
//! | forward | backward |
//! |---|---|
//! | [`copy_to_group`] (identity) | all-reduce |
//! | [`reduce_from_group`] (all-reduce) | identity |
//! | [`gather_from_group`] (all-gather, dim 0) | reduce-scatter |
//! | [`scatter_to_group`] (reduce-scatter, dim 0) | all-gather |
//! | [`all_to_all`] | all-to-all with the splits exchanged |
//!
//! # Collective
//! Every rank of the group calls forward and backward, in the same order.

use crate::{CommError, Communicator, ReduceOp};
use std::sync::Arc;
use tch::Tensor;
use torch_ext::{Error, attach_backward};

type Shared = Arc<dyn Communicator>;

fn edge(error: CommError) -> Error {
    Error::new(error.to_string())
}

/// A function of one tensor and its gradient, both made of collectives.
fn one_to_one<F, B>(input: &Tensor, forward: F, backward: B) -> Result<Tensor, Error>
where
    F: FnOnce(&Tensor) -> Result<Tensor, CommError>,
    B: Fn(&Tensor) -> Result<Tensor, CommError> + Send + 'static,
{
    let output = tch::no_grad(|| forward(&input.detach().contiguous())).map_err(edge)?;
    let shape = output.size();
    let options = (output.kind(), output.device());
    let mut outputs = attach_backward(&[input], vec![output], move |grads| {
        // A rank whose output nobody used still takes part in the collective, with zeros.
        let grad = match &grads[0] {
            Some(grad) => grad.contiguous(),
            None => Tensor::zeros(shape.as_slice(), options),
        };
        Ok(vec![Some(backward(&grad).map_err(edge)?)])
    })?;
    Ok(outputs.remove(0))
}

fn reduced(tensor: &Tensor, group: &Shared) -> Result<Tensor, CommError> {
    let sum = tensor.copy();
    group.all_reduce(&sum, ReduceOp::Sum)?.wait()?;
    Ok(sum)
}

fn gathered(tensor: &Tensor, group: &Shared) -> Result<Tensor, CommError> {
    let mut shape = tensor.size();
    shape[0] *= group.size() as i64;
    let output = Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()));
    group.all_gather(&output, tensor)?.wait()?;
    Ok(output)
}

fn scattered(tensor: &Tensor, group: &Shared) -> Result<Tensor, CommError> {
    let mut shape = tensor.size();
    shape[0] /= group.size() as i64;
    let output = Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()));
    group.reduce_scatter(&output, tensor, ReduceOp::Sum)?.wait()?;
    Ok(output)
}

fn exchanged(tensor: &Tensor, group: &Shared, receive: &[i64], send: &[i64]) -> Result<Tensor, CommError> {
    let mut shape = tensor.size();
    shape[0] = receive.iter().sum();
    let output = Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()));
    group.all_to_all(&output, tensor, receive, send)?.wait()?;
    Ok(output)
}

/// Identity; the gradients of all ranks are summed.
///
/// # Errors
/// When a collective fails.
pub fn copy_to_group(input: &Tensor, group: &Shared) -> Result<Tensor, Error> {
    let group = group.clone();
    one_to_one(input, |x| Ok(x.shallow_clone()), move |grad| reduced(grad, &group))
}

/// The sum of all ranks' inputs; the gradient passes as it is.
///
/// # Errors
/// When a collective fails.
pub fn reduce_from_group(input: &Tensor, group: &Shared) -> Result<Tensor, Error> {
    one_to_one(input, |x| reduced(x, group), |grad| Ok(grad.shallow_clone()))
}

/// The ranks' inputs `[n, ...]` one after another: `[size * n, ...]`.
///
/// # Errors
/// When a collective fails.
pub fn gather_from_group(input: &Tensor, group: &Shared) -> Result<Tensor, Error> {
    let back = group.clone();
    one_to_one(input, |x| gathered(x, group), move |grad| scattered(grad, &back))
}

/// This rank's part `[n, ...]` of the sum of all ranks' inputs `[size * n, ...]`.
///
/// # Errors
/// When a collective fails.
pub fn scatter_to_group(input: &Tensor, group: &Shared) -> Result<Tensor, Error> {
    let back = group.clone();
    one_to_one(input, |x| scattered(x, group), move |grad| gathered(grad, &back))
}

/// Sends `send[r]` rows to rank `r`, and returns the `receive[r]` rows that come from it, in rank order.
///
/// # Errors
/// When the splits do not fit the input, or the collective fails.
pub fn all_to_all(input: &Tensor, group: &Shared, receive: &[i64], send: &[i64]) -> Result<Tensor, Error> {
    let (back, receive_back, send_back) = (group.clone(), send.to_vec(), receive.to_vec());
    one_to_one(
        input,
        |x| exchanged(x, group, receive, send),
        move |grad| exchanged(grad, &back, &receive_back, &send_back),
    )
}
