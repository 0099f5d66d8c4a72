//! Weights as layers use them: a value to compute with, and a place where their gradient is added up.
//!
//! Layers that have weights are autograd nodes of their own. They compute the gradient of their input at once and hand
//! the one of their weight to [`Weight::add_gradient`], which adds it up in fp32, now or, in a pipeline that splits B
//! from W, later.

use crate::gradients::BucketState;
use crate::recompute::Activation;
use crate::sum::GradientSum;
use kernels::{gemm, gemm_accumulate};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// A weight. Clones are handles to the same one.
pub struct Weight {
    shared: Arc<WeightState>,
    /// The part along dim 0 that this handle is about.
    rows: Option<(i64, i64)>,
}

struct WeightState {
    shape: Vec<i64>,
    kind: Kind,
    device: Device,
    /// An empty tensor that requires grad.
    tracker: Mutex<Tensor>,
    /// None while other ranks keep it.
    value: Mutex<Option<Tensor>>,
    uses: AtomicUsize,
    sink: Mutex<Option<Sink>>,
}

struct Sink {
    index: usize,
    state: Arc<Mutex<BucketState>>,
}

impl Clone for Weight {
    fn clone(&self) -> Weight {
        Weight {
            shared: self.shared.clone(),
            rows: self.rows,
        }
    }
}

impl Weight {
    /// A weight that one layer uses.
    pub fn new(value: Tensor) -> Weight {
        let weight = Weight::without_value(&value.size(), value.kind(), value.device());
        weight.set_value(Some(value));
        weight
    }

    /// A weight whose value is not here yet.
    pub fn without_value(shape: &[i64], kind: Kind, device: Device) -> Weight {
        let tracker = Tensor::zeros([0], (Kind::Float, device)).set_requires_grad(true);
        let shared = WeightState {
            shape: shape.to_vec(),
            kind,
            device,
            tracker: Mutex::new(tracker),
            value: Mutex::new(None),
            uses: AtomicUsize::new(1),
            sink: Mutex::new(None),
        };
        Weight {
            shared: Arc::new(shared),
            rows: None,
        }
    }

    /// The same weight for another layer: its gradient then has one more contribution.
    pub fn tied(&self) -> Weight {
        self.scale_uses(2)
    }

    /// The same weight, of which one forward makes `times` as many uses as before.
    pub fn scale_uses(&self, times: usize) -> Weight {
        let uses = self.shared.uses.load(Ordering::Relaxed);
        self.shared.uses.store(uses * times, Ordering::Relaxed);
        self.clone()
    }

    /// `len` rows from `start` on, for a layer that uses no others.
    pub fn narrow_rows(&self, start: i64, len: i64) -> Weight {
        Weight {
            rows: Some((start, len)),
            ..self.clone()
        }
    }

    /// Layers that use it.
    pub(crate) fn uses(&self) -> usize {
        self.shared.uses.load(Ordering::Relaxed)
    }

    /// What layers compute with.
    ///
    /// # Panics
    /// When other ranks keep it and nobody gathered it: a layer's mistake.
    pub fn value(&self) -> Tensor {
        let value = locked(&self.shared.value);
        let value = value
            .as_ref()
            .expect("a layer's weights are gathered before it works");
        self.part(value)
    }

    /// Gives the value, or takes it away.
    pub(crate) fn set_value(&self, value: Option<Tensor>) {
        *locked(&self.shared.value) = value;
    }

    /// What a layer's node names as an input, so that it becomes part of the graph; it gets no gradient.
    pub fn tracker(&self) -> Tensor {
        locked(&self.shared.tracker).shallow_clone()
    }

    /// The whole weight's shape.
    pub fn shape(&self) -> &[i64] {
        &self.shared.shape
    }

    /// Its dtype.
    pub fn kind(&self) -> Kind {
        self.shared.kind
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.shared.device
    }

    fn part(&self, whole: &Tensor) -> Tensor {
        self.rows.map_or_else(
            || whole.shallow_clone(),
            |(start, len)| whole.narrow(0, start, len),
        )
    }

    /// Adds one layer's contribution of one backward to the gradient.
    ///
    /// # Errors
    /// Those of `add`, and when nothing collects the gradient.
    pub fn add_gradient<F>(&self, add: F) -> Result<(), Error>
    where
        F: FnOnce(&GradientSum) -> Result<(), Error> + Send + 'static,
    {
        add_gradients(&[self], |sums| add(sums[0]))
    }

    fn state(&self) -> Result<Arc<Mutex<BucketState>>, Error> {
        let sink = locked(&self.shared.sink);
        sink.as_ref()
            .map(|sink| sink.state.clone())
            .ok_or_else(|| Error::new("a weight without a place for its gradient"))
    }

    /// One layer's contribution of one backward, for a layer that adds it up piece by piece and at once.
    ///
    /// # Errors
    /// When nothing collects the gradient.
    pub fn contribution(&self) -> Result<Contribution, Error> {
        let state = self.state()?;
        let index = locked(&self.shared.sink)
            .as_ref()
            .map_or(0, |sink| sink.index);
        let (whole, unwritten) = locked(&state).sum(index);
        let whole = GradientSum::new(whole.view(self.shape()), unwritten);
        let sum = match self.rows {
            None => whole,
            // Others' rows would stay as they are.
            Some(_) => GradientSum::new(self.part(whole.tensor()), false),
        };
        Ok(Contribution { sum, index, state })
    }

    /// Makes parameter `index` of `state` the place of the gradient.
    pub(crate) fn attach_sink(
        &self,
        index: usize,
        state: Arc<Mutex<BucketState>>,
    ) -> Result<(), Error> {
        match locked(&self.shared.sink).replace(Sink { index, state }) {
            None => Ok(()),
            Some(_) => Err(Error::new("a weight's gradient already has a place")),
        }
    }
}

/// As [`Weight::add_gradient`], for weights whose contributions are computed together; `add` gets their sums.
///
/// # Errors
/// Those of `add`, and when nothing collects the gradients.
pub fn add_gradients<F>(weights: &[&Weight], add: F) -> Result<(), Error>
where
    F: FnOnce(&[&GradientSum]) -> Result<(), Error> + Send + 'static,
{
    let Some(first) = weights.first() else {
        return Ok(());
    };
    let state = first.state()?;
    let weights: Vec<Weight> = weights.iter().map(|&weight| weight.clone()).collect();
    let now = locked(&state).defer(Box::new(move || {
        let contributions = weights
            .iter()
            .map(Weight::contribution)
            .collect::<Result<Vec<_>, _>>()?;
        let sums: Vec<_> = contributions.iter().map(Contribution::sum).collect();
        tch::no_grad(|| add(&sums))?;
        contributions.into_iter().try_for_each(Contribution::finish)
    }));
    now.map_or(Ok(()), |contribution| contribution())
}

/// A contribution under way.
#[must_use = "the gradient is not complete before every contribution is finished"]
pub struct Contribution {
    sum: GradientSum,
    index: usize,
    state: Arc<Mutex<BucketState>>,
}

impl Contribution {
    /// The sum to add to.
    pub fn sum(&self) -> &GradientSum {
        &self.sum
    }

    /// Says that all of it has been added.
    ///
    /// # Errors
    /// When the gradient is complete by this and its reduction cannot be started.
    pub fn finish(self) -> Result<(), Error> {
        // Who had nothing to add has added nothing.
        self.sum.tensor();
        drop(self.sum);
        locked(&self.state)
            .ready(self.index)
            .map_err(|e| Error::new(e.to_string()))
    }
}

fn locked<T>(state: &Mutex<T>) -> parking_lot::MutexGuard<'_, T> {
    state.lock()
}

/// `x` `[N, in]` times the transpose of `weight` `[out, in]`: `[N, out]`.
///
/// # Errors
/// libtorch's message.
pub fn linear(x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
    Ok(linears(&Activation::kept(x), &[weight])?.remove(0))
}

/// `x` `[N, in]` times the transpose of each of `weights` `[out, in]`.
///
/// # Errors
/// libtorch's message, and that of making the input again.
pub fn linears(x: &Activation, weights: &[&Weight]) -> Result<Vec<Tensor>, Error> {
    let value = &x.value;
    let outputs = tch::no_grad(|| {
        weights
            .iter()
            .map(|weight| gemm(value, &weight.value().tr()))
            .collect()
    });
    let used: Vec<Weight> = weights.iter().map(|&weight| weight.clone()).collect();
    let trackers: Vec<Tensor> = weights.iter().map(|weight| weight.tracker()).collect();
    let inputs: Vec<&Tensor> = std::iter::once(value).chain(&trackers).collect();
    let saved = x.saved();
    let needs_grad = value.requires_grad();
    attach_backward(&inputs, outputs, move |grads| {
        let x = saved.get()?;
        let mut grad_x: Option<Tensor> = None;
        for (weight, grad) in used.iter().zip(grads) {
            let Some(grad) = grad else { continue };
            if needs_grad {
                match &mut grad_x {
                    Some(sum) => gemm_accumulate(sum, grad, &weight.value()),
                    None => grad_x = Some(gemm(grad, &weight.value())),
                }
            }
            let grad = grad.shallow_clone();
            let x = x.shallow_clone();
            weight.add_gradient(move |sum| {
                sum.gemm_accumulate(&grad.tr(), &x);
                Ok(())
            })?;
        }
        Ok(std::iter::once(grad_x)
            .chain(used.iter().map(|_| None))
            .collect())
    })
}
