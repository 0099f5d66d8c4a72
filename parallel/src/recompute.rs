//! Activation recomputation (arXiv 1604.06174; selective: arXiv 2205.05198, section 5): what backward needs is computed again
//! instead of being kept.

use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

type RecomputeFn = Arc<Mutex<dyn Fn() -> Result<Tensor, Error> + Send>>;

/// How backward comes by a tensor of forward.
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
            Source::Recompute(make) => Source::Recompute(make.clone()),
        }
    }
}

impl SavedTensor {
    /// The tensor.
    ///
    /// # Errors
    /// That of making it again.
    pub fn get(&self) -> Result<Tensor, Error> {
        match &self.0 {
            Source::Kept(tensor) => Ok(tensor.shallow_clone()),
            Source::Recompute(make) => {
                let make = make.lock();
                tch::no_grad(&*make)
            }
        }
    }
}

/// A layer's input, and how its backward comes by it.
pub struct Activation {
    /// The tensor, part of the graph.
    pub value: Tensor,
    saved: SavedTensor,
}

impl Activation {
    /// One that is kept until backward.
    pub fn kept(value: &Tensor) -> Activation {
        Activation {
            value: value.shallow_clone(),
            saved: SavedTensor(Source::Kept(value.detach())),
        }
    }

    /// One that `make` makes again, without gradient, as often as backward asks.
    pub fn recomputable(
        value: Tensor,
        make: impl Fn() -> Result<Tensor, Error> + Send + 'static,
    ) -> Activation {
        Activation {
            value,
            saved: SavedTensor(Source::Recompute(Arc::new(Mutex::new(make)))),
        }
    }

    /// For backward.
    pub fn saved(&self) -> SavedTensor {
        self.saved.clone()
    }
}

/// `compute` of `inputs`, of which only the inputs are kept: backward computes it again, with gradient.
///
/// # Collective
/// Where `compute` is, backward is twice.
///
/// # Errors
/// Those of `compute`.
pub fn recomputed<F>(inputs: &[&Tensor], compute: F) -> Result<Vec<Tensor>, Error>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>, Error> + Send + 'static,
{
    let kept: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
    let outputs = tch::no_grad(|| compute(&kept))?;
    attach_backward(inputs, outputs, move |grads| {
        tch::with_grad(|| {
            let leaves: Vec<Tensor> = kept
                .iter()
                .map(|input| input.detach().set_requires_grad(true))
                .collect();
            let outputs = compute(&leaves)?;
            // A scalar whose gradient with respect to each output is the one that came.
            let (reached, given): (Vec<&Tensor>, Vec<Tensor>) = outputs
                .iter()
                .zip(grads)
                .filter_map(|(output, grad)| Some((output, grad.as_ref()?.shallow_clone())))
                .filter(|(output, _)| output.requires_grad())
                .unzip();
            if let Some(first) = reached.first() {
                let root = Tensor::zeros([], (Kind::Float, first.device()));
                let root = attach_backward(&reached, vec![root], move |_| {
                    Ok(given
                        .iter()
                        .map(|grad| Some(grad.shallow_clone()))
                        .collect())
                })?;
                root[0]
                    .f_backward()
                    .map_err(|e| Error::new(e.to_string()))?;
            }
            let of_input = |leaf: &Tensor| {
                let grad = leaf.grad();
                grad.defined().then_some(grad)
            };
            Ok(leaves.iter().map(of_input).collect())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accelerator, Cpu, GradientBuckets, Replication, Weight, linear};

    #[test]
    fn computing_again_gives_the_same_gradients_also_inside_of_itself() {
        let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
        let x = random(&[5, 4]);
        let value = random(&[4, 4]);
        let run = |how: usize| {
            let weight = Weight::new(value.copy());
            let alone = [Replication::alone()];
            let gradients =
                GradientBuckets::new(&[(weight.clone(), 0)], &alone, 1 << 20, true, &Cpu).unwrap();
            gradients.begin(1);
            let x = x.copy().set_requires_grad(true);
            let layer = move |x: &[Tensor]| {
                let y = linear(&x[0], &weight)?.silu();
                Ok(vec![y.shallow_clone(), y.square().sum(Kind::Float)])
            };
            let outputs = match how {
                0 => layer(&[x.shallow_clone()]),
                1 => recomputed(&[&x], layer),
                _ => {
                    let layer = Arc::new(Mutex::new(layer));
                    recomputed(&[&x], move |x| {
                        let layer = layer.clone();
                        recomputed(&[&x[0]], move |x| layer.lock()(x))
                    })
                }
            };
            let outputs = outputs.unwrap();
            (outputs[0].sin().sum(Kind::Float) + &outputs[1]).backward();
            (x.grad().copy(), gradients.gradient(0).copy())
        };
        let kept = run(0);
        assert_eq!(run(1), kept);
        assert_eq!(run(2), kept);
    }
}
