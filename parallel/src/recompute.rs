//! Activation recomputation: backward computes tensors of forward again instead of keeping them.
//!
//! Whole layers: arXiv 1604.06174. Selective: arXiv 2205.05198, section 5.

use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

type RecomputeFn = Arc<Mutex<dyn Fn() -> Result<Tensor, Error> + Send>>;

/// A tensor of forward that backward keeps or recomputes.
#[derive(Clone)]
pub struct SavedTensor(Source);

enum Source {
    Kept(Tensor),
    Recompute(RecomputeFn),
}

impl Clone for Source {
    fn clone(&self) -> Source {
        match self {
            Source::Kept(tensor) => Source::Kept(tensor.shallow_clone()),
            Source::Recompute(recompute) => Source::Recompute(recompute.clone()),
        }
    }
}

impl SavedTensor {
    /// Returns the tensor, recomputed if it was not kept.
    ///
    /// # Errors
    /// If recomputing fails.
    pub fn get(&self) -> Result<Tensor, Error> {
        match &self.0 {
            Source::Kept(tensor) => Ok(tensor.shallow_clone()),
            Source::Recompute(recompute) => {
                let recompute = recompute.lock();
                tch::no_grad(&*recompute)
            }
        }
    }
}

/// A layer's input, and the way in which its backward obtains it.
pub struct Activation {
    /// The tensor, part of the autograd graph.
    pub value: Tensor,
    saved: SavedTensor,
}

impl Activation {
    /// Creates an activation that is kept until backward.
    pub fn kept(value: &Tensor) -> Activation {
        Activation {
            value: value.shallow_clone(),
            saved: SavedTensor(Source::Kept(value.detach())),
        }
    }

    /// Creates an activation that `recompute` computes again, without gradient, at each use.
    pub fn recomputable(
        value: Tensor,
        recompute: impl Fn() -> Result<Tensor, Error> + Send + 'static,
    ) -> Activation {
        let recompute = Arc::new(Mutex::new(recompute));
        Activation {
            value,
            saved: SavedTensor(Source::Recompute(recompute)),
        }
    }

    /// Returns the tensor for backward.
    pub fn saved(&self) -> SavedTensor {
        self.saved.clone()
    }
}

/// Returns `compute` of `inputs` and keeps only the inputs; backward runs `compute` again.
///
/// # Collective
/// If `compute` is collective, it is so in forward and in backward.
///
/// # Errors
/// The errors of `compute`.
pub fn recomputed<F>(inputs: &[&Tensor], compute: F) -> Result<Vec<Tensor>, Error>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>, Error> + Send + 'static,
{
    let kept = inputs
        .iter()
        .map(|input| input.detach())
        .collect::<Vec<Tensor>>();
    let outputs = tch::no_grad(|| compute(&kept))?;
    attach_backward(inputs, outputs, move |grads| {
        tch::with_grad(|| {
            let leaves: Vec<Tensor> = kept
                .iter()
                .map(|input| input.detach().set_requires_grad(true))
                .collect();
            let outputs = compute(&leaves)?;
            backward(&outputs, grads)?;
            let grad_of = |leaf: &Tensor| Some(leaf.grad()).filter(Tensor::defined);
            Ok(leaves.iter().map(grad_of).collect())
        })
    })
}

/// Runs backward from `outputs` with the given gradients.
fn backward(outputs: &[Tensor], grads: &[Option<Tensor>]) -> Result<(), Error> {
    let mut reached: Vec<&Tensor> = Vec::new();
    let mut given: Vec<Tensor> = Vec::new();
    for (output, grad) in outputs.iter().zip(grads) {
        if let Some(grad) = grad
            && output.requires_grad()
        {
            reached.push(output);
            given.push(grad.shallow_clone());
        }
    }
    let Some(first) = reached.first() else {
        return Ok(());
    };
    // A scalar whose gradient with respect to each output is the given one.
    let root = Tensor::zeros([], (Kind::Float, first.device()));
    let root = attach_backward(&reached, vec![root], move |_| {
        let grads = given.iter().map(|grad| Some(grad.shallow_clone()));
        Ok(grads.collect())
    })?;
    root[0].f_backward().map_err(|e| Error::new(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accelerator, Cpu, GradientBuckets, Replication, Weight, linear};

    enum Recompute {
        Nothing,
        Once,
        Nested,
    }

    #[test]
    fn recomputing_gives_the_same_gradients_also_if_nested() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let x = random(&[5, 4]);
        let value = random(&[4, 4]);
        let run = |what: Recompute| {
            let weight = Weight::new(value.copy());
            let alone = [Replication::alone()];
            let weights = [(weight.clone(), 0)];
            let gradients = GradientBuckets::new(&weights, &alone, 1 << 20, true, &Cpu).unwrap();
            gradients.begin(1);
            let x = x.copy().set_requires_grad(true);
            let layer = move |x: &[Tensor]| {
                let y = linear(&x[0], &weight)?.silu();
                Ok(vec![y.shallow_clone(), y.square().sum(Kind::Float)])
            };
            let outputs = match what {
                Recompute::Nothing => layer(&[x.shallow_clone()]),
                Recompute::Once => recomputed(&[&x], layer),
                Recompute::Nested => {
                    let layer = Arc::new(Mutex::new(layer));
                    recomputed(&[&x], move |x| {
                        let layer = layer.clone();
                        recomputed(&[&x[0]], move |x| layer.lock()(x))
                    })
                }
            };
            let outputs = outputs.unwrap();
            let loss = outputs[0].sin().sum(Kind::Float) + &outputs[1];
            loss.backward();
            (x.grad().copy(), gradients.gradient(0).copy())
        };
        let kept = run(Recompute::Nothing);
        assert_eq!(run(Recompute::Once), kept);
        assert_eq!(run(Recompute::Nested), kept);
    }
}
