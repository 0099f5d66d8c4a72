//! Differentiable collectives, which a model composes like any other operation:
//!
//! | forward | backward |
//! |---|---|
//! | [`copy_to_group`] (identity) | all-reduce |
//! | [`reduce_from_group`] (all-reduce) | identity |
//! | [`gather_from_group`] (all-gather, dim 0) | reduce-scatter |
//! | [`scatter_to_group`] (reduce-scatter, dim 0) | all-gather |
//! | [`all_to_all`], in two halves [`start_all_to_all`] | all-to-all with the splits exchanged |
//!
//! # Collective
//! Every rank of the group calls the same functions in the same order, and then backward.

use crate::{CommError, Communicator, ReduceOp, Work};
use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

type SharedComm = Arc<dyn Communicator>;

/// A gradient in transit: one autograd node starts the operation in backward, and another, which
/// backward reaches later, waits for its result.
pub(crate) type PendingGradient = Arc<Mutex<Option<(Work, Tensor)>>>;

pub(crate) fn fill(slot: &PendingGradient, work: Work, tensor: Tensor) {
    *slot.lock() = Some((work, tensor));
}

pub(crate) fn take(slot: &PendingGradient) -> Result<Tensor, Error> {
    let filled = slot.lock().take();
    let (work, tensor) = filled.ok_or_else(|| Error::new("backward: a gradient was never sent"))?;
    work.wait()?;
    Ok(tensor)
}

/// Applies `forward` to `input` and registers `backward` as its gradient function.
fn differentiable<F, B>(input: &Tensor, forward: F, backward: B) -> Result<Tensor, Error>
where
    F: FnOnce(&Tensor) -> Result<Tensor, CommError>,
    B: Fn(&Tensor) -> Result<Tensor, CommError> + Send + 'static,
{
    let output = tch::no_grad(|| forward(&input.detach().contiguous()))?;
    let shape = output.size();
    let kind = output.kind();
    let device = output.device();
    let mut outputs = attach_backward(&[input], vec![output], move |grads| {
        let grad = grad_or_zeros(&grads[0], &shape, kind, device);
        Ok(vec![Some(backward(&grad)?)])
    })?;
    Ok(outputs.remove(0))
}

/// Returns the gradient, or zeros if the output was unused: the rank must still join the
/// collective.
fn grad_or_zeros(grad: &Option<Tensor>, shape: &[i64], kind: Kind, device: Device) -> Tensor {
    match grad {
        Some(grad) => grad.contiguous(),
        None => Tensor::zeros(shape, (kind, device)),
    }
}

fn all_reduce(tensor: &Tensor, group: &SharedComm) -> Result<Tensor, CommError> {
    let sum = tensor.copy();
    group.all_reduce(&sum, ReduceOp::Sum)?.wait()?;
    Ok(sum)
}

fn all_gather(tensor: &Tensor, group: &SharedComm) -> Result<Tensor, CommError> {
    let mut shape = tensor.size();
    shape[0] *= group.size() as i64;
    let output = Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()));
    group.all_gather(&output, tensor)?.wait()?;
    Ok(output)
}

fn reduce_scatter(tensor: &Tensor, group: &SharedComm) -> Result<Tensor, CommError> {
    let mut shape = tensor.size();
    shape[0] /= group.size() as i64;
    let output = Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()));
    group
        .reduce_scatter(&output, tensor, ReduceOp::Sum)?
        .wait()?;
    Ok(output)
}

/// Returns the input; backward sums the gradients of all ranks.
///
/// # Errors
/// If a collective fails.
pub fn copy_to_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    let group = group.clone();
    differentiable(
        input,
        |x| Ok(x.shallow_clone()),
        move |grad| all_reduce(grad, &group),
    )
}

/// Returns the sum of all ranks' inputs; backward is the identity.
///
/// # Errors
/// If a collective fails.
pub fn reduce_from_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    differentiable(
        input,
        |x| all_reduce(x, group),
        |grad| Ok(grad.shallow_clone()),
    )
}

/// Concatenates the ranks' inputs `[n, ...]` to `[size * n, ...]`.
///
/// # Errors
/// If a collective fails.
pub fn gather_from_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    let back = group.clone();
    differentiable(
        input,
        |x| all_gather(x, group),
        move |grad| reduce_scatter(grad, &back),
    )
}

/// Returns this rank's part `[n, ...]` of the sum of all ranks' inputs `[size * n, ...]`.
///
/// # Errors
/// If a collective fails.
pub fn scatter_to_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    let back = group.clone();
    differentiable(
        input,
        |x| reduce_scatter(x, group),
        move |grad| all_gather(grad, &back),
    )
}

/// Sends `send[r]` rows to each rank `r` and returns the `receive[r]` rows from each, in rank
/// order.
///
/// # Errors
/// If the splits do not match the input, or the collective fails.
pub fn all_to_all(
    input: &Tensor,
    group: &SharedComm,
    receive: &[i64],
    send: &[i64],
) -> Result<Tensor, Error> {
    start_all_to_all(input, group, receive, send)?.wait()
}

/// An all-to-all in progress.
#[must_use = "the rows have arrived only after `wait`"]
pub struct PendingAllToAll {
    work: Work,
    output: Tensor,
    /// An empty tensor through which backward reaches the start after the end.
    link: Tensor,
    slot: PendingGradient,
    group: SharedComm,
    receive: Vec<i64>,
    send: Vec<i64>,
}

fn exchange(
    input: &Tensor,
    group: &SharedComm,
    receive: &[i64],
    send: &[i64],
) -> Result<(Work, Tensor), Error> {
    let mut shape = input.size();
    shape[0] = receive.iter().sum();
    let options = (input.kind(), input.device());
    let output = Tensor::empty(shape.as_slice(), options);
    let work = group.all_to_all(&output, input, receive, send)?;
    Ok((work, output))
}

/// Starts an [`all_to_all`].
///
/// The transfer overlaps with what the caller computes until [`PendingAllToAll::wait`], and that of
/// the gradients with the backward of the same computation.
///
/// # Errors
/// As for [`all_to_all`].
pub fn start_all_to_all(
    input: &Tensor,
    group: &SharedComm,
    receive: &[i64],
    send: &[i64],
) -> Result<PendingAllToAll, Error> {
    let (work, output) =
        tch::no_grad(|| exchange(&input.detach().contiguous(), group, receive, send))?;
    let slot = PendingGradient::default();
    let gradient = slot.clone();
    let link = Tensor::zeros([0], (Kind::Float, input.device()));
    let mut link = attach_backward(&[input], vec![link], move |_| {
        Ok(vec![Some(take(&gradient)?)])
    })?;
    let receive = receive.to_vec();
    let send = send.to_vec();
    Ok(PendingAllToAll {
        work,
        output,
        link: link.remove(0),
        slot,
        group: group.clone(),
        receive,
        send,
    })
}

impl PendingAllToAll {
    /// Waits for the rows and returns them.
    ///
    /// # Errors
    /// If the collective failed.
    pub fn wait(self) -> Result<Tensor, Error> {
        let PendingAllToAll {
            work,
            output,
            link,
            slot,
            group,
            receive,
            send,
        } = self;
        work.wait()?;
        let shape = output.size();
        let kind = output.kind();
        let device = output.device();
        let mut out = attach_backward(&[&link], vec![output], move |grads| {
            let grad = grad_or_zeros(&grads[0], &shape, kind, device);
            let (work, back) = exchange(&grad, &group, &send, &receive)?;
            fill(&slot, work, back);
            // The gradient reaches `link`'s node through the slot.
            Ok(vec![None])
        })?;
        Ok(out.remove(0))
    }
}
