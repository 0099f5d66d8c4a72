//! Weights as layers use them: a value to compute with, and a sink for gradients.
//!
//! Layers with weights are autograd nodes of their own. Their backward computes the gradient of
//! the input at once. It passes the gradient of the weight to [`Weight::add_gradient`], which adds
//! it up in fp32: now, or later in a pipeline that splits B from W.

use crate::{CommError, recompute::Activation, sum::GradientSum};
use kernels::{gemm, gemm_accumulate, gemm_f32};
use parking_lot::Mutex;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tch::{Device, Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// A contribution to a weight's gradient that is computed later.
pub type DeferredGradient = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// The buffers in which gradients are added up. Weights are known by their index.
pub(crate) trait GradientSink: Send {
    /// Keeps `contribution` for later, or returns it to be computed now.
    fn defer(&mut self, contribution: DeferredGradient) -> Option<DeferredGradient>;

    /// Returns the flat fp32 gradient of weight `index` so far. The caller must write to it.
    fn sum(&mut self, index: usize) -> GradientSum;

    /// Records that one contribution to weight `index` is complete.
    ///
    /// # Errors
    /// If this completes a bucket and its reduction cannot be started.
    fn ready(&mut self, index: usize) -> Result<(), CommError>;
}

pub(crate) type SharedSink = Arc<Mutex<dyn GradientSink>>;

/// A weight's gradient among those of a sink.
#[derive(Clone)]
struct SinkEntry {
    index: usize,
    sink: SharedSink,
}

/// A handle to a weight; clones share it.
pub struct Weight {
    state: Arc<WeightState>,
    /// The rows (start, length) that this handle is limited to.
    rows: Option<(i64, i64)>,
}

struct WeightState {
    shape: Vec<i64>,
    kind: Kind,
    device: Device,
    /// An empty tensor that requires grad.
    tracker: Mutex<Tensor>,
    /// None while the value is sharded and not gathered.
    value: Mutex<Option<Tensor>>,
    uses: AtomicUsize,
    sink: Mutex<Option<SinkEntry>>,
}

impl Clone for Weight {
    fn clone(&self) -> Weight {
        Weight {
            state: self.state.clone(),
            rows: self.rows,
        }
    }
}

impl Weight {
    /// Creates a weight that one layer uses.
    pub fn new(value: Tensor) -> Weight {
        let weight = Weight::without_value(&value.size(), value.kind(), value.device());
        weight.set_value(Some(value));
        weight
    }

    /// Creates a weight whose value is gathered later, see [`crate::sharding`].
    pub fn without_value(shape: &[i64], kind: Kind, device: Device) -> Weight {
        let tracker = Tensor::zeros([0], (Kind::Float, device)).set_requires_grad(true);
        let state = WeightState {
            shape: shape.to_vec(),
            kind,
            device,
            tracker: Mutex::new(tracker),
            value: Mutex::new(None),
            uses: AtomicUsize::new(1),
            sink: Mutex::new(None),
        };
        Weight {
            state: Arc::new(state),
            rows: None,
        }
    }

    /// Returns the same weight for another layer, which adds one contribution to its gradient.
    pub fn tied(&self) -> Weight {
        self.scale_uses(2)
    }

    /// Returns the same weight, of which one forward makes `times` as many uses as before.
    pub fn scale_uses(&self, times: usize) -> Weight {
        let uses = self.state.uses.load(Ordering::Relaxed);
        self.state.uses.store(uses * times, Ordering::Relaxed);
        self.clone()
    }

    /// Returns a handle to `len` rows from `start`, for a layer that uses no others.
    pub fn narrow_rows(&self, start: i64, len: i64) -> Weight {
        Weight {
            rows: Some((start, len)),
            ..self.clone()
        }
    }

    /// Returns the number of gradient contributions of one microbatch.
    pub(crate) fn uses(&self) -> usize {
        self.state.uses.load(Ordering::Relaxed)
    }

    /// Returns the value, or the rows that this handle is limited to.
    ///
    /// # Panics
    /// If the value is sharded and has not been gathered.
    pub fn value(&self) -> Tensor {
        let value = self.state.value.lock();
        let value = value
            .as_ref()
            .expect("weights are gathered before their layer runs");
        self.narrow(value)
    }

    pub(crate) fn set_value(&self, value: Option<Tensor>) {
        *self.state.value.lock() = value;
    }

    /// Returns a tensor without elements that stands for the weight in the autograd graph.
    ///
    /// A layer's node takes it as an input, so that the node is in the graph even if no other input
    /// requires grad. It gets no gradient.
    pub fn tracker(&self) -> Tensor {
        self.state.tracker.lock().shallow_clone()
    }

    /// Returns the shape of the whole weight, also for a handle to some of its rows.
    pub fn shape(&self) -> &[i64] {
        &self.state.shape
    }

    /// Returns the dtype of the value.
    pub fn kind(&self) -> Kind {
        self.state.kind
    }

    /// Returns the device of the value.
    pub fn device(&self) -> Device {
        self.state.device
    }

    /// Returns this handle's rows of `whole`.
    fn narrow(&self, whole: &Tensor) -> Tensor {
        match self.rows {
            Some((start, len)) => whole.narrow(0, start, len),
            None => whole.shallow_clone(),
        }
    }

    /// Adds one contribution to the gradient: `add` receives the sum, now or later.
    ///
    /// A layer calls it once in each backward.
    ///
    /// # Errors
    /// The errors of `add`, and if no sink is attached.
    pub fn add_gradient<F>(&self, add: F) -> Result<(), Error>
    where
        F: FnOnce(&GradientSum) -> Result<(), Error> + Send + 'static,
    {
        add_gradients(&[self], |sums| add(sums[0]))
    }

    fn sink(&self) -> Result<SinkEntry, Error> {
        let entry = self.state.sink.lock();
        entry
            .clone()
            .ok_or_else(|| Error::new("weight: no gradient buffer is attached"))
    }

    /// Begins a contribution to the gradient that is added piece by piece and at once.
    ///
    /// # Errors
    /// If no sink is attached.
    pub fn contribution(&self) -> Result<Contribution, Error> {
        let entry = self.sink()?;
        let whole = entry.sink.lock().sum(entry.index).view(self.shape());
        let sum = match self.rows {
            None => whole,
            // Clear all rows first: this contribution writes only some of them.
            Some(_) => GradientSum::new(self.narrow(whole.tensor()), false),
        };
        Ok(Contribution { sum, entry })
    }

    /// Makes gradient `index` of `sink` this weight's.
    pub(crate) fn attach_sink(&self, index: usize, sink: SharedSink) -> Result<(), Error> {
        match self.state.sink.lock().replace(SinkEntry { index, sink }) {
            None => Ok(()),
            Some(_) => Err(Error::new("weight: a gradient buffer is already attached")),
        }
    }
}

/// Adds one contribution to each weight's gradient; `add` computes them together.
///
/// # Errors
/// The errors of `add`, and if a weight has no sink.
pub fn add_gradients<F>(weights: &[&Weight], add: F) -> Result<(), Error>
where
    F: FnOnce(&[&GradientSum]) -> Result<(), Error> + Send + 'static,
{
    let Some(first) = weights.first() else {
        return Ok(());
    };
    let sink = first.sink()?.sink;
    let weights = clones(weights);
    let contribution = Box::new(move || {
        let contributions = weights
            .iter()
            .map(Weight::contribution)
            .collect::<Result<Vec<_>, _>>()?;
        let sums = contributions
            .iter()
            .map(Contribution::sum)
            .collect::<Vec<_>>();
        tch::no_grad(|| add(&sums))?;
        contributions.into_iter().try_for_each(Contribution::finish)
    });
    let now = sink.lock().defer(contribution);
    now.map_or(Ok(()), |contribution| contribution())
}

fn clones(weights: &[&Weight]) -> Vec<Weight> {
    weights.iter().map(|&weight| weight.clone()).collect()
}

/// A contribution to a weight's gradient that is being added.
#[must_use = "the gradient is not complete before every contribution is finished"]
pub struct Contribution {
    sum: GradientSum,
    entry: SinkEntry,
}

impl Contribution {
    /// Returns the sum to add to.
    pub fn sum(&self) -> &GradientSum {
        &self.sum
    }

    /// Ends the contribution, which may complete the gradient.
    ///
    /// # Errors
    /// If this completes the gradient and its reduction cannot be started.
    pub fn finish(self) -> Result<(), Error> {
        // Zeroes the buffer if nothing was written.
        self.sum.tensor();
        drop(self.sum);
        let SinkEntry { index, sink } = self.entry;
        Ok(sink.lock().ready(index)?)
    }
}

/// Returns `x` `[N, in]` times the transpose of `weight` `[out, in]`: `[N, out]`.
///
/// # Errors
/// libtorch's message.
pub fn linear(x: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
    Ok(linears(&Activation::kept(x), &[weight])?.remove(0))
}

/// Returns `x` `[N, in]` times the transpose of each of `weights` `[out, in]`.
///
/// # Errors
/// libtorch's message, and in backward the error of recomputing the input.
pub fn linears(x: &Activation, weights: &[&Weight]) -> Result<Vec<Tensor>, Error> {
    let value = &x.value;
    let forward = |weight: &&Weight| gemm(value, &weight.value().tr());
    let outputs = tch::no_grad(|| weights.iter().map(forward).collect());
    let trackers = weights
        .iter()
        .map(|weight| weight.tracker())
        .collect::<Vec<Tensor>>();
    let weights = clones(weights);
    let inputs = std::iter::once(value)
        .chain(&trackers)
        .collect::<Vec<&Tensor>>();
    let saved = x.saved();
    let needs_grad = value.requires_grad();
    attach_backward(&inputs, outputs, move |grads| {
        let x = saved.get()?;
        let mut grad_x: Option<Tensor> = None;
        for (weight, grad) in weights.iter().zip(grads) {
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
        let of_trackers = weights.iter().map(|_| None);
        Ok(std::iter::once(grad_x).chain(of_trackers).collect())
    })
}

/// Returns the same as [`linear`] in fp32. In a bf16 model neither the product nor its gradient is
/// rounded to bf16; only the gradient of `x` is, at the end.
///
/// # Errors
/// libtorch's message, and in backward the error of recomputing the input.
pub fn linear_f32(x: &Activation, weight: &Weight) -> Result<Tensor, Error> {
    let value = &x.value;
    let kind = value.kind();
    if kind == Kind::Float {
        return Ok(linears(x, &[weight])?.remove(0));
    }
    let output = tch::no_grad(|| gemm_f32(value, &weight.value().tr()));
    let tracker = weight.tracker();
    let weight = weight.clone();
    let saved = x.saved();
    let needs_grad = value.requires_grad();
    let mut outputs = attach_backward(&[value, &tracker], vec![output], move |grads| {
        let Some(grad) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let matrix = weight.value().to_kind(Kind::Float);
        let grad_x = needs_grad.then(|| gemm(grad, &matrix).to_kind(kind));
        let grad = grad.shallow_clone();
        let x = saved.get()?.shallow_clone();
        weight.add_gradient(move |sum| {
            sum.gemm_accumulate(&grad.tr(), &x.to_kind(Kind::Float));
            Ok(())
        })?;
        Ok(vec![grad_x, None])
    })?;
    Ok(outputs.remove(0))
}

/// Returns `x` `[N, F]` plus `bias` `[F]` in each row.
///
/// # Errors
/// libtorch's message.
pub fn add_bias(x: &Tensor, bias: &Weight) -> Result<Tensor, Error> {
    let output = tch::no_grad(|| x.detach() + bias.value());
    let weight = bias.clone();
    let mut outputs = attach_backward(&[x, &bias.tracker()], vec![output], move |grads| {
        let Some(grad) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let rows = grad.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        weight.add_gradient(move |sum| {
            let _ = sum.tensor().view_as(&rows).g_add_(&rows);
            Ok(())
        })?;
        Ok(vec![Some(grad.shallow_clone()), None])
    })?;
    Ok(outputs.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, GradientBuckets, Replication};
    use tch::kind::FLOAT_CPU;

    /// Returns the norm of the difference over the norm of `exact`.
    fn error(ours: &Tensor, exact: &Tensor) -> f64 {
        let difference = ours.to_kind(Kind::Double) - exact;
        difference.norm().double_value(&[]) / exact.norm().double_value(&[])
    }

    #[test]
    fn the_gradient_of_a_bias_is_the_sum_over_rows() {
        let weight = Weight::new(Tensor::from_slice(&[1f32, 2.0, 3.0]));
        let alone = [Replication::alone()];
        let weights = [(weight.clone(), 0)];
        let gradients = GradientBuckets::new(&weights, &alone, 1 << 20, true, &Cpu).unwrap();
        gradients.begin(1);
        let x = Tensor::zeros([2, 3], FLOAT_CPU).set_requires_grad(true);
        let out = add_bias(&x, &weight).unwrap();
        let expected = Tensor::from_slice(&[1f32, 2.0, 3.0]).repeat([2, 1]);
        assert_eq!(out.detach(), expected);
        let probe = Tensor::from_slice(&[1f32, 10.0, 100.0, 2.0, 20.0, 200.0]).view([2, 3]);
        (&out * &probe).sum(Kind::Float).backward();
        gradients.finish().unwrap();
        assert_eq!(x.grad(), probe);
        let sums = Tensor::from_slice(&[3f32, 30.0, 300.0]);
        assert_eq!(gradients.gradient(0).view([3]), sums);
    }

    #[test]
    fn a_linear_layer_in_fp32_rounds_no_bf16_product() {
        // Few rows and odd widths take other paths.
        for [tokens, width, outputs] in [[40, 64, 8], [3, 64, 8], [33, 31, 5]] {
            let random = |rows, columns| Tensor::randn([rows, columns], FLOAT_CPU);
            let x = random(tokens, width).to_kind(Kind::BFloat16);
            let matrix = random(outputs, width).to_kind(Kind::BFloat16);
            let grad = random(tokens, outputs);
            let [exact_x, exact_matrix, exact_grad] =
                [&x, &matrix, &grad].map(|tensor| tensor.to_kind(Kind::Double));

            let x = x.set_requires_grad(true);
            let weight = Weight::new(matrix);
            let alone = [Replication::alone()];
            let gradients =
                GradientBuckets::new(&[(weight.clone(), 0)], &alone, 1 << 20, true, &Cpu).unwrap();
            gradients.begin(1);
            let out = linear_f32(&Activation::kept(&x), &weight).unwrap();
            assert_eq!(out.kind(), Kind::Float);
            (&out * &grad).sum(Kind::Float).backward();
            let out_error = error(&out.detach(), &exact_x.matmul(&exact_matrix.tr()));
            assert!(out_error < 1e-6, "{out_error}");
            assert_eq!(x.grad().kind(), Kind::BFloat16);
            let x_error = error(&x.grad(), &exact_grad.matmul(&exact_matrix));
            assert!(x_error < 3e-3, "{x_error}");
            let weight_error = error(&gradients.gradient(0), &exact_grad.tr().matmul(&exact_x));
            assert!(weight_error < 1e-6, "{weight_error}");
        }
    }
}
