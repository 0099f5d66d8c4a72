//! Sums over the microbatches of one step on one rank.

use moe::MoeStats;
use parallel::pipeline::{PassKind, simulate::Span};
use std::collections::VecDeque;
use tch::Tensor;

/// Most statistics that are kept until a device has counted their tokens.
const MAX_PENDING: usize = 1024;

/// Losses, MoE statistics and times of one step on this rank.
pub(crate) struct StepSums {
    pub(crate) losses: LossTerms,
    /// By MoE layer of the model; zero for layers of other ranks.
    pub(crate) moe_layers: Vec<MoeLayerSums>,
    /// Statistics that are not yet in `moe_layers`, oldest first.
    pending: VecDeque<LayerStats>,
    /// Fraction of the time in which this rank waited for others, `None` if it was not measured.
    pub(crate) wait_ratio: Option<f64>,
    /// Times of each kind of pass in each chunk, `[kinds * chunks]`.
    pub(crate) passes: Vec<PassTime>,
    /// The largest attention logit by layer and query head of the model, negative infinity for
    /// heads of other ranks. Empty if they are not measured.
    pub(crate) largest_logits: Vec<f32>,
}

/// Statistics of one MoE layer of the model in one pass.
struct LayerStats {
    moe_layer: usize,
    stats: MoeStats,
}

/// Contributions of passes to the losses, `[]` fp32 on the device. The host fetches all at the end
/// of the step, so that no pass waits for the device.
#[derive(Default)]
pub(crate) struct LossTerms {
    pub(crate) cross_entropy: Vec<Tensor>,
    /// Load-balancing losses without their weight.
    pub(crate) load_balance: Vec<Tensor>,
    /// Router z-losses without their weight.
    pub(crate) z: Vec<Tensor>,
}

/// Routed tokens and transfers of one MoE layer.
#[derive(Clone)]
pub(crate) struct MoeLayerSums {
    /// `[E]`.
    pub(crate) tokens_per_expert: Vec<f64>,
    /// Routed tokens that this rank computed.
    pub(crate) computed_tokens: f64,
    pub(crate) transfers: Transfers,
}

/// Transfers of an MoE layer between ranks, and the time to plan them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Transfers {
    pub(crate) lent_tokens: f64,
    pub(crate) lent_bytes: f64,
    pub(crate) internode_bytes: f64,
    pub(crate) plan_seconds: f64,
}

/// Total time of one kind of pass in one chunk.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PassTime {
    pub(crate) seconds: f64,
    pub(crate) count: f64,
}

impl MoeLayerSums {
    fn add(&mut self, stats: &MoeStats) {
        let tokens = stats.tokens_per_expert.get();
        for (sum, tokens) in self.tokens_per_expert.iter_mut().zip(tokens) {
            *sum += tokens as f64;
        }
        self.computed_tokens += stats.computed_tokens as f64;
        self.transfers.lent_tokens += stats.lent_tokens as f64;
        self.transfers.lent_bytes += stats.lent_bytes as f64;
        self.transfers.internode_bytes += stats.internode_bytes as f64;
        self.transfers.plan_seconds += stats.plan_seconds;
    }
}

impl StepSums {
    pub(crate) fn new(moe_layers: usize, experts: usize) -> StepSums {
        let layer = MoeLayerSums {
            tokens_per_expert: vec![0.0; experts],
            computed_tokens: 0.0,
            transfers: Transfers::default(),
        };
        StepSums {
            losses: LossTerms::default(),
            moe_layers: vec![layer; moe_layers],
            pending: VecDeque::new(),
            wait_ratio: None,
            passes: Vec::new(),
            largest_logits: Vec::new(),
        }
    }

    /// Returns the number of experts of an MoE layer; 0 without MoE layers.
    pub(crate) fn num_experts(&self) -> usize {
        let first = self.moe_layers.first();
        first.map_or(0, |layer| layer.tokens_per_expert.len())
    }

    /// Takes the statistics of one MoE layer and microbatch. They are added later, so that no pass
    /// waits for the device that counts tokens.
    pub(crate) fn add_moe_stats(&mut self, moe_layer: usize, stats: MoeStats) {
        self.pending.push_back(LayerStats { moe_layer, stats });
        if self.pending.len() > MAX_PENDING {
            self.add_oldest();
        }
    }

    /// Adds all statistics that are left. Waits for the device to count their tokens.
    pub(crate) fn finish(&mut self) {
        while !self.pending.is_empty() {
            self.add_oldest();
        }
    }

    fn add_oldest(&mut self) {
        if let Some(LayerStats { moe_layer, stats }) = self.pending.pop_front() {
            self.moe_layers[moe_layer].add(&stats);
        }
    }

    /// Adds the times of passes of `chunks` chunks; none if they were not measured.
    pub(crate) fn record_spans(&mut self, spans: &[Span], chunks: usize) {
        let total = spans.last().map_or(0.0, |span| span.end);
        let busy: f64 = spans.iter().map(|span| span.end - span.start).sum();
        self.wait_ratio = (total > 0.0).then(|| 1.0 - busy / total);
        self.passes = vec![PassTime::default(); PassKind::NAMES.len() * chunks];
        for Span { pass, start, end } in spans {
            let kind = PassKind::NAMES
                .iter()
                .position(|(kind, _)| *kind == pass.kind)
                .expect("all kinds are listed");
            let time = &mut self.passes[kind * chunks + pass.chunk];
            time.seconds = time.seconds + end - start;
            time.count += 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layers_statistics_are_added_once() {
        let mut sums = StepSums::new(2, 0);
        for pass in 0..MAX_PENDING + 10 {
            let stats = MoeStats {
                computed_tokens: pass as i64,
                ..MoeStats::default()
            };
            sums.add_moe_stats(pass % 2, stats);
        }
        assert_eq!(sums.pending.len(), MAX_PENDING);
        sums.finish();
        let of_layer = |first: usize| {
            let passes = (first..MAX_PENDING + 10).step_by(2);
            passes.sum::<usize>() as f64
        };
        let computed = [0, 1].map(|layer| sums.moe_layers[layer].computed_tokens);
        assert_eq!(computed, [of_layer(0), of_layer(1)]);
    }
}
