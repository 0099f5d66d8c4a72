//! One pre-norm transformer layer.
// Shapes: T tokens (of a microbatch, on this rank), D hidden.

use super::attention::{Attention, Documents};
use super::experts::LocalExperts;
use super::norm::rms_norm;
use super::rope::Rope;
use crate::Error;
use crate::model::parameters::Unit;
use moe::balance::RouterStats;
use moe::experts::grouped_swiglu;
use moe::{MoeLayer, MoeOutput, MoeStats, RoutingReplay};
use parallel::recompute::recomputed;
use parallel::sharding::before_backward;
use parallel::tensor::TensorParallel;
use parallel::{Activation, Weight};
use parking_lot::Mutex;
use std::sync::Arc;
use tch::Tensor;

pub(crate) struct Layer {
    pub(crate) attention_norm: Weight,
    pub(crate) attention: Attention,
    pub(crate) feed_forward_norm: Weight,
    pub(crate) feed_forward: FeedForward,
    pub(crate) norm_eps: f64,
    /// Factor on each branch before it joins the residual stream.
    pub(crate) residual: f64,
    /// Whether the norms' outputs are kept for backward.
    pub(crate) keep_norms: bool,
    /// Whether more than the input is.
    pub(crate) keep: bool,
}

pub(crate) enum FeedForward {
    Dense {
        /// `[1, 2F, D]` and `[1, D, F]`; of F this rank's part.
        gate_up: Weight,
        down: Weight,
        tensor: TensorParallel,
        /// Whether the gate-up product is kept for backward.
        keep: bool,
    },
    Moe(Box<MoeLayer>, LocalExperts),
}

impl Layer {
    /// `x` `[T, D]`, tokens of `batch` sequences.
    pub(crate) fn forward(
        self: &Arc<Layer>,
        x: &Tensor,
        batch: i64,
        rope: &Arc<Rope>,
        documents: Option<&Arc<Documents>>,
    ) -> Result<(Tensor, Option<(RouterStats, MoeStats)>), Error> {
        if self.keep {
            return Ok(self.compute(x, batch, rope, documents, &RoutingReplay::default())?);
        }
        // What is not differentiable is returned outside the graph.
        let aux_output = Arc::new(Mutex::new(None));
        let layer = self.clone();
        let rope = rope.clone();
        let documents = documents.cloned();
        let told = aux_output.clone();
        let replay = RoutingReplay::default();
        let mut outputs = recomputed(&[x], move |x| {
            let (out, moe_stats) =
                layer.compute(&x[0], batch, &rope, documents.as_ref(), &replay)?;
            let Some((
                RouterStats {
                    counts_ge,
                    prob_sums_ge,
                    z_sum,
                },
                moe_stats,
            )) = moe_stats
            else {
                return Ok(vec![out]);
            };
            *told.lock() = Some((counts_ge, moe_stats));
            Ok(vec![out, prob_sums_ge, z_sum])
        })?;
        let out = outputs.remove(0);
        let aux_output = aux_output.lock().take();
        let moe_stats = aux_output.map(|(counts_ge, moe_stats)| {
            let prob_sums_ge = outputs.remove(0);
            let z_sum = outputs.remove(0);
            (
                RouterStats {
                    counts_ge,
                    prob_sums_ge,
                    z_sum,
                },
                moe_stats,
            )
        });
        Ok((out, moe_stats))
    }

    fn compute(
        &self,
        x: &Tensor,
        batch: i64,
        rope: &Rope,
        documents: Option<&Arc<Documents>>,
        replay: &RoutingReplay,
    ) -> Result<(Tensor, Option<(RouterStats, MoeStats)>), torch_ext::Error> {
        let join = |x: &Tensor, branch: Tensor| match self.residual {
            1.0 => x + branch,
            factor => x + branch * factor,
        };
        let normed = self.normed(x, &self.attention_norm)?;
        let x = join(x, self.attention.forward(&normed, batch, rope, documents)?);
        let normed = self.normed(&x, &self.feed_forward_norm)?;
        match &self.feed_forward {
            FeedForward::Dense {
                gate_up,
                down,
                tensor,
                keep,
            } => {
                let branch = tensor.column_row_parallel(&normed, |x| {
                    grouped_swiglu(x, gate_up, down, &[x.value.size()[0]], *keep)
                })?;
                Ok((join(&x, branch), None))
            }
            FeedForward::Moe(moe, _) => {
                let MoeOutput {
                    hidden_td,
                    stats,
                    moe_stats,
                } = moe.forward(&normed, batch as usize, replay)?;
                Ok((join(&x, hidden_td), Some((stats, moe_stats))))
            }
        }
    }

    fn normed(&self, x: &Tensor, weight: &Weight) -> Result<Activation, torch_ext::Error> {
        let out = rms_norm(x, weight, self.norm_eps)?;
        if self.keep_norms {
            return Ok(Activation::kept(&out));
        }
        let x = x.detach();
        let weight = weight.clone();
        let eps = self.norm_eps;
        Ok(Activation::recomputable(out, move || {
            rms_norm(&x, &weight, eps)
        }))
    }
}

/// `compute` with the weights of `unit` there, forward and backward; those of `next` are on their way meanwhile, in backward
/// those of `previous`.
pub(crate) fn with_gathered_weights<T>(
    x: &Tensor,
    unit: &Arc<Unit>,
    previous: Option<&Arc<Unit>>,
    next: Option<&Arc<Unit>>,
    compute: impl FnOnce(&Tensor) -> Result<(Tensor, T), Error>,
) -> Result<(Tensor, T), Error> {
    if unit.is_empty() {
        return compute(x);
    }
    unit.gather()?;
    next.map_or(Ok(()), |next| next.prefetch())?;
    let done = unit.clone();
    let x = before_backward(x, move || {
        done.release();
        Ok(())
    })?;
    let (out, aux_output) = compute(&x)?;
    unit.release();
    let unit = unit.clone();
    let previous = previous.cloned();
    let out = before_backward(&out, move || {
        unit.gather()?;
        previous
            .as_ref()
            .map_or(Ok(()), |previous| previous.prefetch())
    })?;
    Ok((out, aux_output))
}
