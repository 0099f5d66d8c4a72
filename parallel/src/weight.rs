//! Weights as layers use them: a value to compute with, and a place where their gradient is added up.
//!
//! Layers that have weights are autograd nodes of their own. They compute the gradient of their input at once and hand
//! the one of their weight to [`Weight::add_gradient`], which adds it up in fp32, now or, in a pipeline that splits B
//! from W, later.

use crate::gradients::State;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// A weight. Clones are handles to the same one.
pub struct Weight {
    value: Tensor,
    uses: Arc<AtomicUsize>,
    sink: Arc<Mutex<Option<Sink>>>,
}

struct Sink {
    /// fp32, of the weight's shape.
    sum: Tensor,
    bucket: usize,
    state: Arc<Mutex<State>>,
}

impl Clone for Weight {
    fn clone(&self) -> Weight {
        Weight { value: self.value.shallow_clone(), uses: self.uses.clone(), sink: self.sink.clone() }
    }
}

impl Weight {
    /// A weight that one layer uses.
    pub fn new(value: Tensor) -> Weight {
        let value = value.set_requires_grad(true);
        Weight { value, uses: Arc::new(AtomicUsize::new(1)), sink: Arc::new(Mutex::new(None)) }
    }

    /// The same weight for another layer: its gradient then has one more contribution.
    pub fn shared(&self) -> Weight {
        self.uses.fetch_add(1, Ordering::Relaxed);
        self.clone()
    }

    /// Layers that use it.
    pub(crate) fn uses(&self) -> usize {
        self.uses.load(Ordering::Relaxed)
    }

    /// What layers compute with; it requires grad, so that their nodes become part of the graph.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Adds one layer's contribution of one backward to the gradient: `add` gets the fp32 sum, of the weight's shape.
    ///
    /// # Errors
    /// Those of `add`, and when nothing collects the gradient.
    pub fn add_gradient<F>(&self, add: F) -> Result<(), Error>
    where
        F: FnOnce(&Tensor) -> Result<(), Error> + Send + 'static,
    {
        let contribution = self.contribution()?;
        let state = contribution.state.clone();
        let now = locked(&state).defer(Box::new(move || {
            tch::no_grad(|| add(contribution.sum()))?;
            contribution.finish()
        }));
        now.map_or(Ok(()), |contribution| contribution())
    }

    /// One layer's contribution of one backward, for a layer that adds it up piece by piece and at once.
    ///
    /// # Errors
    /// When nothing collects the gradient.
    pub fn contribution(&self) -> Result<Contribution, Error> {
        match &*locked(&self.sink) {
            Some(Sink { sum, bucket, state }) => {
                Ok(Contribution { sum: sum.shallow_clone(), bucket: *bucket, state: state.clone() })
            }
            None => Err(Error::new("a weight without a place for its gradient")),
        }
    }

    /// Makes `sum` the place of the gradient.
    pub(crate) fn collect_in(&self, sum: Tensor, bucket: usize, state: Arc<Mutex<State>>) -> Result<(), Error> {
        match locked(&self.sink).replace(Sink { sum, bucket, state }) {
            None => Ok(()),
            Some(_) => Err(Error::new("a weight's gradient already has a place")),
        }
    }
}

/// A contribution under way.
#[must_use = "the gradient is not complete before every contribution is finished"]
pub struct Contribution {
    sum: Tensor,
    bucket: usize,
    state: Arc<Mutex<State>>,
}

impl Contribution {
    /// The fp32 sum to add to, of the weight's shape.
    pub fn sum(&self) -> &Tensor {
        &self.sum
    }

    /// Says that all of it has been added.
    ///
    /// # Errors
    /// When the gradient is complete by this and its all-reduce cannot be started.
    pub fn finish(self) -> Result<(), Error> {
        locked(&self.state).ready(self.bucket).map_err(|e| Error::new(e.to_string()))
    }
}

fn locked<T>(state: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    state.lock().expect("no thread panics while it holds the gradients")
}

/// `x` `[N, in]` times the transpose of `weight` `[out, in]`: `[N, out]`.
///
/// # Errors
/// libtorch's message.
pub fn linear(x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
    let out = tch::no_grad(|| x.matmul(&weight.value().tr()));
    let (saved, used, needs_grad) = (x.detach(), weight.clone(), x.requires_grad());
    let mut out = attach_backward(&[x, weight.value()], vec![out], move |grads| {
        let Some(grad) = &grads[0] else { return Ok(vec![None, None]) };
        let grad_x = needs_grad.then(|| grad.matmul(used.value()));
        let (grad, x) = (grad.shallow_clone(), saved.shallow_clone());
        used.add_gradient(move |sum| {
            add_product(sum, &grad.tr(), &x);
            Ok(())
        })?;
        Ok(vec![grad_x, None])
    })?;
    Ok(out.remove(0))
}

/// `sum += left right`, for matrices; `sum` is fp32 whatever the dtype of the others.
pub fn add_product(sum: &Tensor, left: &Tensor, right: &Tensor) {
    let mut sum = sum.shallow_clone();
    if left.kind() == sum.kind() {
        let _ = sum.addmm_(left, right);
    } else {
        let _ = sum.g_add_(&left.matmul(right).to_kind(Kind::Float));
    }
}
