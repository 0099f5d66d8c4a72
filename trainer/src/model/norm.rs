//! RMSNorm (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps) * gain` over the last dimension, in fp32,
//! and the norms around the blocks of a layer.
//!
//! Backward needs only the input and one number per row.

use super::spec::{Dim, ParamSpec, Role, Split};
use config_derive::ResumeKeys;
use kernels::Gain;
use parallel::{Activation, Communicator, ReduceOp, Weight};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tch::{Kind, Tensor};
use torch_ext::{Error, attach_backward};

/// Placement and weights of the norms.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ResumeKeys,
)]
#[serde(deny_unknown_fields, default)]
pub struct NormConfig {
    /// Norms around attention and feed-forward. After the last layer there is always one.
    #[on_resume(refused)]
    pub placement: NormPlacement,
    /// Stores each weight minus one: norms multiply by `1 + weight`, which starts as one (Gemma,
    /// Qwen3-Next). That includes the norms of queries and keys, and of the vectors of latent
    /// attention.
    #[on_resume(refused)]
    pub zero_centered: bool,
}

/// Norms around a block of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// Normalizes the block's input: `x + block(norm(x))`.
    #[default]
    Pre,
    /// Normalizes the block's output: `x + norm(block(x))` (OLMo 2, arXiv 2501.00656).
    Post,
    /// Normalizes the block's input and its output: `x + norm(block(norm(x)))` (Gemma 2, arXiv
    /// 2408.00118).
    Sandwich,
}

impl NormPlacement {
    /// Returns true if a block reads normalized tokens.
    fn has_input_norms(self) -> bool {
        self != NormPlacement::Post
    }

    /// Returns true if a block's output is normalized.
    fn has_output_norms(self) -> bool {
        self != NormPlacement::Pre
    }

    /// Returns the number of tensors `[T, D]` that a layer saves for the norms and as the inputs of
    /// its blocks.
    pub(crate) fn saved_tensors(self, saves_outputs: bool) -> u64 {
        // The inputs of both blocks, or of the norms before them.
        let mut saved = 2;
        if self.has_input_norms() && saves_outputs {
            saved += 2;
        }
        if self.has_output_norms() {
            saved += 2;
        }
        saved
    }
}

/// Names of the norms of a block: of its input and of its output.
#[derive(Clone, Copy)]
pub(crate) struct NormNames {
    input: &'static str,
    output: &'static str,
}

impl NormNames {
    pub(crate) const ATTENTION: NormNames = NormNames {
        input: "attention_norm",
        output: "attention_post_norm",
    };
    pub(crate) const FEED_FORWARD: NormNames = NormNames {
        input: "feed_forward_norm",
        output: "feed_forward_post_norm",
    };
}

/// The norms of a block's input and of its output, or their descriptions.
pub(crate) struct BlockNorms<T> {
    pub(crate) input: Option<T>,
    pub(crate) output: Option<T>,
}

impl BlockNorms<ParamSpec> {
    /// Describes the norms of a block in the layer with this global name.
    pub(crate) fn specs(
        placement: NormPlacement,
        layer: &str,
        names: NormNames,
        hidden: Dim,
    ) -> BlockNorms<ParamSpec> {
        let spec = |part| norm_spec(layer, part, hidden, Split::Whole);
        BlockNorms {
            input: placement.has_input_norms().then(|| spec(names.input)),
            output: placement.has_output_norms().then(|| spec(names.output)),
        }
    }
}

impl BlockNorms<Norm> {
    /// Returns a block's input for `x`; backward recomputes it unless `save` is true.
    pub(crate) fn input(&self, x: &Tensor, save: bool) -> Result<Activation, Error> {
        match &self.input {
            None => Ok(Activation::kept(x)),
            Some(norm) => norm.activation(x, save),
        }
    }

    /// Returns the contribution to the residual stream of a block with the output `x`.
    pub(crate) fn output(&self, x: Tensor) -> Result<Tensor, Error> {
        match &self.output {
            None => Ok(x),
            Some(norm) => norm.apply(&x),
        }
    }
}

/// Returns the weight of a norm over `dim`, of which `split` gives the division.
pub(crate) fn norm_spec(block: &str, part: &'static str, dim: Dim, split: Split) -> ParamSpec {
    ParamSpec::single(block, part, &[dim], split, Role::Norm)
}

/// A norm on this rank.
#[derive(Clone)]
pub(crate) struct Norm {
    /// `[D]`.
    pub(crate) weight: Weight,
    /// Number that is added to the weight.
    pub(crate) offset: f32,
    /// Term added to the mean square.
    pub(crate) eps: f64,
}

impl Norm {
    /// Normalizes `x` `[..., D]`, in its dtype.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor, Error> {
        let (out, scale) = tch::no_grad(|| {
            kernels::rms_norm(&x.detach(), self.gain(&self.weight.value()), self.eps)
        });
        let saved = x.detach();
        let norm = self.clone();
        let mut out = attach_backward(&[x, &self.weight.tracker()], vec![out], move |grads| {
            let Some(grad) = &grads[0] else {
                return Ok(vec![None, None]);
            };
            let value = norm.weight.value();
            let gain = norm.gain(&value);
            let (grad_x, grad_weight) =
                kernels::rms_norm_backward(&grad.contiguous(), &saved, &scale, gain);
            norm.add_gradient(grad_weight)?;
            Ok(vec![Some(grad_x), None])
        })?;
        Ok(out.remove(0))
    }

    /// As [`Norm::apply`], for rows of which each rank of `group` has an equal part.
    ///
    /// # Collective
    /// All ranks of the group, forward and backward.
    pub(crate) fn apply_split(
        &self,
        x: &Tensor,
        group: &Arc<dyn Communicator>,
    ) -> Result<Tensor, Error> {
        if group.size() == 1 {
            return self.apply(x);
        }
        let kind = x.kind();
        let (out, scale) = tch::no_grad(|| {
            let wide = x.detach().to_kind(Kind::Float);
            let scale = (mean(&wide.square(), group)? + self.eps).rsqrt();
            let normed = &wide * &scale;
            // As in the kernel: without an offset, rows are rounded before the product, too.
            let out = if self.offset == 0.0 {
                normed.to_kind(kind) * self.weight.value()
            } else {
                (normed * self.wide_gain()).to_kind(kind)
            };
            Ok::<_, Error>((out, scale))
        })?;
        let saved = x.detach();
        let norm = self.clone();
        let group = group.clone();
        let mut out = attach_backward(&[x, &self.weight.tracker()], vec![out], move |grads| {
            let Some(grad) = &grads[0] else {
                return Ok(vec![None, None]);
            };
            let grad = grad.to_kind(Kind::Float);
            let normed = saved.to_kind(Kind::Float) * &scale;
            let rows: Vec<i64> = (0..grad.dim() as i64 - 1).collect();
            let by_element = &grad * &normed;
            let grad_weight = by_element.sum_dim_intlist(rows.as_slice(), false, Kind::Float);
            norm.add_gradient(grad_weight)?;
            let grad_normed = grad * norm.wide_gain();
            let along = mean(&(&grad_normed * &normed), &group)?;
            let grad_x = (grad_normed - normed * along) * &scale;
            Ok(vec![Some(grad_x.to_kind(kind)), None])
        })?;
        Ok(out.remove(0))
    }

    /// Returns the normalized `x`; backward recomputes it unless `save` is true.
    fn activation(&self, x: &Tensor, save: bool) -> Result<Activation, Error> {
        let out = self.apply(x)?;
        if save {
            return Ok(Activation::kept(&out));
        }
        let x = x.detach();
        let norm = self.clone();
        Ok(Activation::recomputable(out, move || norm.apply(&x)))
    }

    fn gain<'a>(&self, value: &'a Tensor) -> Gain<'a> {
        Gain {
            weight: value,
            offset: self.offset,
        }
    }

    /// Returns the gain of each column in fp32.
    fn wide_gain(&self) -> Tensor {
        self.weight.value().to_kind(Kind::Float) + f64::from(self.offset)
    }

    fn add_gradient(&self, gradient: Tensor) -> Result<(), Error> {
        self.weight.add_gradient(move |sum| {
            let _ = sum.tensor().shallow_clone().g_add_(&gradient);
            Ok(())
        })
    }
}

/// Returns the mean over the last dimension, of all ranks.
fn mean(x: &Tensor, group: &Arc<dyn Communicator>) -> Result<Tensor, Error> {
    let mut mean = x.mean_dim([-1i64].as_slice(), true, Kind::Float);
    group
        .all_reduce(&mean, ReduceOp::Sum)
        .and_then(parallel::Work::wait)?;
    mean /= group.size() as f64;
    Ok(mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::{Accelerator, Cpu, GradientBuckets, Replication, run_on_threads};
    use std::time::Duration;
    use tch::kind::FLOAT_CPU;

    #[test]
    fn the_gradients_are_those_of_the_formula() {
        for offset in [0.0, 1.0] {
            let random = |shape: &[i64]| Cpu.empty(shape, Kind::Float).uniform_(-1.0, 1.0);
            let mut x = random(&[2, 3, 8]).set_requires_grad(true);
            let value = random(&[8]);
            let probe = random(&[2, 3, 8]);
            let norm = Norm {
                weight: Weight::new(value.copy()),
                offset,
                eps: 1e-5,
            };
            let alone = [Replication::alone()];
            let weights = [(norm.weight.clone(), 0)];
            let gradients = GradientBuckets::new(&weights, &alone, 1 << 20, true, &Cpu).unwrap();
            gradients.begin(1);
            let ours = norm.apply(&x).unwrap();
            (&ours * &probe).sum(Kind::Float).backward();
            let grad_x = x.grad().copy();
            x.zero_grad();
            let weight = value.set_requires_grad(true);
            let mean = x.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
            let plain = &x * (mean + 1e-5).rsqrt() * (&weight + f64::from(offset));
            (&plain * &probe).sum(Kind::Float).backward();
            assert!(ours.allclose(&plain, 1e-6, 1e-6, false));
            assert!(grad_x.allclose(&x.grad(), 1e-5, 1e-6, false));
            let gradient = gradients.gradient(0).flatten(0, -1);
            assert!(gradient.allclose(&weight.grad(), 1e-5, 1e-6, false));
        }
    }

    #[test]
    fn rows_that_ranks_split_are_normalized_as_whole_ones() {
        let norm = |value: Tensor| Norm {
            weight: Weight::new(value),
            offset: 1.0,
            eps: 1e-5,
        };
        let whole = || Tensor::arange(24, FLOAT_CPU).view([3, 8]).sin();
        let value = || Tensor::arange(8, FLOAT_CPU).cos();
        let expected = norm(value()).apply(&whole()).unwrap();
        let parts = run_on_threads(2, Duration::from_secs(60), move |world| {
            let group = world.group("norm", &[0, 1]).unwrap();
            let start = 4 * group.rank() as i64;
            let own = |x: Tensor| x.narrow(-1, start, 4).contiguous();
            norm(own(value()))
                .apply_split(&own(whole()), &group)
                .unwrap()
        });
        assert!(Tensor::cat(&parts, 1).allclose(&expected, 1e-6, 1e-6, false));
    }

    #[test]
    fn split_rows_with_an_offset_are_rounded_once() {
        let kind = Kind::BFloat16;
        let whole = move || {
            Tensor::arange(4096, FLOAT_CPU)
                .view([8, 512])
                .sin()
                .to_kind(kind)
        };
        let weight = move || (Tensor::arange(512, FLOAT_CPU).cos() * 0.1).to_kind(kind);
        let wide = whole().to_kind(Kind::Float);
        let mean = wide
            .square()
            .mean_dim([-1i64].as_slice(), true, Kind::Float);
        let gain = weight().to_kind(Kind::Float) + 1.0;
        let once = wide * (mean + 1e-5).rsqrt() * gain;
        let parts = run_on_threads(2, Duration::from_secs(60), move |world| {
            let group = world.group("norm", &[0, 1]).unwrap();
            let start = 256 * group.rank() as i64;
            let own = |x: Tensor| x.narrow(-1, start, 256).contiguous();
            let norm = Norm {
                weight: Weight::new(own(weight())),
                offset: 1.0,
                eps: 1e-5,
            };
            norm.apply_split(&own(whole()), &group).unwrap()
        });
        // The sums of parts differ from a whole one in the last bits of fp32, which decide few
        // roundings; two roundings change many elements.
        let differ = Tensor::cat(&parts, 1).ne_tensor(&once.to_kind(kind));
        assert!(i64::try_from(differ.sum(Kind::Int64)).unwrap() < 10);
    }

    #[test]
    fn every_placement_saves_what_its_backward_needs() {
        let saved = |placement: NormPlacement| [false, true].map(|s| placement.saved_tensors(s));
        assert_eq!(saved(NormPlacement::Pre), [2, 4]);
        assert_eq!(saved(NormPlacement::Post), [4, 4]);
        assert_eq!(saved(NormPlacement::Sandwich), [4, 6]);
    }
}
