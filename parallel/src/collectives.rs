//! Differentiable collectives. Each function's gradient is the function named beside it, so a model composes them
//! like any other operation:
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
//! Every rank of the group calls forward and backward, in the same order.

use crate::{CommError, Communicator, ReduceOp, Work};
use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

type SharedComm = Arc<dyn Communicator>;

/// Where an operation under way leaves its result: one node of the graph starts it in backward, an earlier one waits.
pub(crate) type PendingGradient = Arc<Mutex<Option<(Work, Tensor)>>>;

pub(crate) fn fill(slot: &PendingGradient, work: Work, tensor: Tensor) {
    *slot.lock() = Some((work, tensor));
}

pub(crate) fn take(slot: &PendingGradient) -> Result<Tensor, Error> {
    let filled = slot.lock().take();
    let (work, tensor) = filled.ok_or_else(|| Error::new("a part that nobody sent"))?;
    work.wait()?;
    Ok(tensor)
}

/// A function of one tensor and its gradient, both made of collectives.
fn differentiable<F, B>(input: &Tensor, forward: F, backward: B) -> Result<Tensor, Error>
where
    F: FnOnce(&Tensor) -> Result<Tensor, CommError>,
    B: Fn(&Tensor) -> Result<Tensor, CommError> + Send + 'static,
{
    let output = tch::no_grad(|| forward(&input.detach().contiguous()))?;
    let shape = output.size();
    let options = (output.kind(), output.device());
    let mut outputs = attach_backward(&[input], vec![output], move |grads| {
        // A rank whose output nobody used still takes part in the collective, with zeros.
        let grad = match &grads[0] {
            Some(grad) => grad.contiguous(),
            None => Tensor::zeros(shape.as_slice(), options),
        };
        Ok(vec![Some(backward(&grad)?)])
    })?;
    Ok(outputs.remove(0))
}

fn reduced(tensor: &Tensor, group: &SharedComm) -> Result<Tensor, CommError> {
    let sum = tensor.copy();
    group.all_reduce(&sum, ReduceOp::Sum)?.wait()?;
    Ok(sum)
}

fn gathered(tensor: &Tensor, group: &SharedComm) -> Result<Tensor, CommError> {
    let mut shape = tensor.size();
    shape[0] *= group.size() as i64;
    let output = Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()));
    group.all_gather(&output, tensor)?.wait()?;
    Ok(output)
}

fn scattered(tensor: &Tensor, group: &SharedComm) -> Result<Tensor, CommError> {
    let mut shape = tensor.size();
    shape[0] /= group.size() as i64;
    let output = Tensor::empty(shape.as_slice(), (tensor.kind(), tensor.device()));
    group
        .reduce_scatter(&output, tensor, ReduceOp::Sum)?
        .wait()?;
    Ok(output)
}

/// Identity; the gradients of all ranks are summed.
///
/// # Errors
/// When a collective fails.
pub fn copy_to_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    let group = group.clone();
    differentiable(
        input,
        |x| Ok(x.shallow_clone()),
        move |grad| reduced(grad, &group),
    )
}

/// The sum of all ranks' inputs; the gradient passes as it is.
///
/// # Errors
/// When a collective fails.
pub fn reduce_from_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    differentiable(
        input,
        |x| reduced(x, group),
        |grad| Ok(grad.shallow_clone()),
    )
}

/// The ranks' inputs `[n, ...]` one after another: `[size * n, ...]`.
///
/// # Errors
/// When a collective fails.
pub fn gather_from_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    let back = group.clone();
    differentiable(
        input,
        |x| gathered(x, group),
        move |grad| scattered(grad, &back),
    )
}

/// This rank's part `[n, ...]` of the sum of all ranks' inputs `[size * n, ...]`.
///
/// # Errors
/// When a collective fails.
pub fn scatter_to_group(input: &Tensor, group: &SharedComm) -> Result<Tensor, Error> {
    let back = group.clone();
    differentiable(
        input,
        |x| scattered(x, group),
        move |grad| gathered(grad, &back),
    )
}

/// Sends `send[r]` rows to rank `r`, and returns the `receive[r]` rows that come from it, in rank order.
///
/// # Errors
/// When the splits do not fit the input, or the collective fails.
pub fn all_to_all(
    input: &Tensor,
    group: &SharedComm,
    receive: &[i64],
    send: &[i64],
) -> Result<Tensor, Error> {
    start_all_to_all(input, group, receive, send)?.wait()
}

/// Rows on their way.
#[must_use = "rows that nobody waits for may not have arrived"]
pub struct PendingAllToAll {
    work: Work,
    output: Tensor,
    /// Makes the node of the start come after that of the arrival in backward.
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
    let output = Tensor::empty(shape.as_slice(), (input.kind(), input.device()));
    let work = group.all_to_all(&output, input, receive, send)?;
    Ok((work, output))
}

/// As [`all_to_all`], for a caller that computes something else before [`PendingAllToAll::wait`]. In backward, what it computed
/// is what the gradients travel beside.
///
/// # Errors
/// As [`all_to_all`].
pub fn start_all_to_all(
    input: &Tensor,
    group: &SharedComm,
    receive: &[i64],
    send: &[i64],
) -> Result<PendingAllToAll, Error> {
    let (work, output) =
        tch::no_grad(|| exchange(&input.detach().contiguous(), group, receive, send))?;
    let slot = PendingGradient::default();
    let arrived = slot.clone();
    let link = Tensor::zeros([0], (Kind::Float, input.device()));
    let mut link = attach_backward(&[input], vec![link], move |_| {
        Ok(vec![Some(take(&arrived)?)])
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
    /// Waits for the rows.
    ///
    /// # Errors
    /// When the collective failed.
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
        let options = (output.kind(), output.device());
        let mut out = attach_backward(&[&link], vec![output], move |grads| {
            // A rank whose rows nobody used still takes part, with zeros.
            let grad = match &grads[0] {
                Some(grad) => grad.contiguous(),
                None => Tensor::zeros(shape.as_slice(), options),
            };
            let (work, back) = exchange(&grad, &group, &send, &receive)?;
            fill(&slot, work, back);
            // It goes on through the slot.
            Ok(vec![None])
        })?;
        Ok(out.remove(0))
    }
}
