//! Sums over the microbatches of one step on one rank.

use moe::MoeStats;
use parallel::pipeline::{PassKind, simulate::Span};

/// Losses, MoE statistics and times of one step on this rank.
pub(crate) struct StepSums {
    pub(crate) cross_entropy: f64,
    pub(crate) load_balance: f64,
    pub(crate) z: f64,
    /// By MoE layer of the model; zero for layers of other ranks.
    pub(crate) moe_layers: Vec<MoeLayerSums>,
    /// Fraction of the time in which this rank waited for others.
    pub(crate) wait_ratio: f64,
    /// Times of each kind of pass in each chunk, `[kinds * chunks]`.
    pub(crate) passes: Vec<PassTime>,
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
        let tokens = &stats.tokens_per_expert;
        for (sum, &tokens) in self.tokens_per_expert.iter_mut().zip(tokens) {
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
            cross_entropy: 0.0,
            load_balance: 0.0,
            z: 0.0,
            moe_layers: vec![layer; moe_layers],
            wait_ratio: 0.0,
            passes: Vec::new(),
        }
    }

    /// Adds what one MoE layer did for one microbatch.
    pub(crate) fn add_moe_stats(&mut self, moe_layer: usize, stats: &MoeStats) {
        self.moe_layers[moe_layer].add(stats);
    }

    /// Adds the times of passes of `chunks` chunks.
    pub(crate) fn record_spans(&mut self, spans: &[Span], chunks: usize) {
        let total = spans.last().map_or(0.0, |span| span.end);
        let busy: f64 = spans.iter().map(|span| span.end - span.start).sum();
        self.wait_ratio = if total > 0.0 { 1.0 - busy / total } else { 0.0 };
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
