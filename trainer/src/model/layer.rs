//! One layer: attention and feed-forward, with norms around them.
// Shapes: T tokens (of a microbatch, on this rank), D hidden.

use super::{
    attention::Attention,
    batch::BatchContext,
    feed_forward::DenseFeedForward,
    moe_block::MoeBlock,
    norm::{BlockNorms, Norm},
    rope::Rope,
};
use crate::{Error, model::parameters::Unit};
use moe::{MoeOutput, MoeStats, RoutingReplay, balance::RouterStats};
use parallel::{recompute::recomputed, sharding::before_backward};
use parking_lot::Mutex;
use std::sync::Arc;
use tch::Tensor;

pub(crate) struct Layer {
    pub(crate) attention: Box<dyn Attention>,
    pub(crate) attention_norms: BlockNorms<Norm>,
    pub(crate) feed_forward: FeedForward,
    pub(crate) feed_forward_norms: BlockNorms<Norm>,
    /// `None` if queries and keys do not rotate.
    pub(crate) rope: Option<Arc<Rope>>,
    /// Factor on each branch before it joins the residual stream.
    pub(crate) residual: f64,
    /// True if the normalized inputs of attention and feed-forward are saved for backward.
    pub(crate) save_norms: bool,
    /// False if backward recomputes the whole layer from its input.
    pub(crate) save_activations: bool,
}

pub(crate) enum FeedForward {
    Dense(DenseFeedForward),
    Moe(Box<MoeBlock>),
}

/// Output `[T, D]` of a layer, and the statistics of an MoE layer.
type LayerOutput = (Tensor, Option<(RouterStats, MoeStats)>);

impl Layer {
    /// Maps `x` `[T, D]`, tokens of the microbatch `batch`.
    ///
    /// # Collective
    /// All ranks that work on the layer.
    pub(crate) fn forward(
        self: &Arc<Layer>,
        x: &Tensor,
        batch: &BatchContext,
    ) -> Result<LayerOutput, Error> {
        if self.save_activations {
            let replay = RoutingReplay::default();
            return Ok(self.compute(x, batch, &replay)?);
        }
        // Statistics without a gradient leave the recomputed function through this variable.
        let aux_output = Arc::new(Mutex::new(None));
        let aux_sink = aux_output.clone();
        let layer = self.clone();
        let batch = batch.clone();
        let replay = RoutingReplay::default();
        let mut outputs = recomputed(&[x], move |x| {
            let (out, stats) = layer.compute(&x[0], &batch, &replay)?;
            let Some((router_stats, moe_stats)) = stats else {
                return Ok(vec![out]);
            };
            let RouterStats {
                prob_sums_ge,
                z_sum,
                ..
            } = &router_stats;
            let outputs = vec![out, prob_sums_ge.shallow_clone(), z_sum.shallow_clone()];
            *aux_sink.lock() = Some((router_stats, moe_stats));
            Ok(outputs)
        })?;
        let out = outputs.remove(0);
        let aux_output = aux_output.lock().take();
        let stats = aux_output.map(|(router_stats, moe_stats)| {
            let router_stats = RouterStats {
                prob_sums_ge: outputs.remove(0),
                z_sum: outputs.remove(0),
                ..router_stats
            };
            (router_stats, moe_stats)
        });
        Ok((out, stats))
    }

    fn compute(
        &self,
        x: &Tensor,
        batch: &BatchContext,
        replay: &RoutingReplay,
    ) -> Result<LayerOutput, torch_ext::Error> {
        let input = self.attention_norms.input(x, self.save_norms)?;
        let branch = self
            .attention
            .forward(&input, batch, self.rope.as_deref())?;
        let x = self.add_branch(x, self.attention_norms.output(branch)?);
        let norms = &self.feed_forward_norms;
        let input = norms.input(&x, self.save_norms)?;
        match &self.feed_forward {
            FeedForward::Dense(network) => {
                let branch = norms.output(network.forward(&input)?)?;
                Ok((self.add_branch(&x, branch), None))
            }
            FeedForward::Moe(moe) => {
                let MoeOutput {
                    hidden_td,
                    stats,
                    moe_stats,
                } = moe
                    .layer
                    .forward(&input, batch.sequences as usize, replay)?;
                let out = self.add_branch(&x, norms.output(hidden_td)?);
                Ok((out, Some((stats, moe_stats))))
            }
        }
    }

    fn add_branch(&self, x: &Tensor, branch: Tensor) -> Tensor {
        match self.residual {
            1.0 => x + branch,
            factor => x + branch * factor,
        }
    }
}

/// Calls `compute` with the weights of `unit` gathered, in forward and again in backward.
///
/// Meanwhile it prefetches the weights of `next` in forward and those of `previous` in backward.
///
/// # Collective
/// All ranks that shard the weights.
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
    if let Some(next) = next {
        next.prefetch()?;
    }
    let used = unit.clone();
    let x = before_backward(x, move || {
        used.release();
        Ok(())
    })?;
    let (out, aux_output) = compute(&x)?;
    unit.release();
    let unit = unit.clone();
    let previous = previous.cloned();
    let out = before_backward(&out, move || {
        unit.gather()?;
        match &previous {
            Some(previous) => previous.prefetch(),
            None => Ok(()),
        }
    })?;
    Ok((out, aux_output))
}
