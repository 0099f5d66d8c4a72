//! The MoE layer of a decoder: its parameters, its memory and its construction.

use super::{
    activations::{Activations, BlockShape, FP32_BYTES},
    experts::LocalExperts,
    feed_forward::{self, Networks, SwigluSpecs},
    spec::{Dim, ParamSpec, Role, Split, Stack},
    weights::WeightBuilder,
};
use crate::config::{ModelConfig, MoeConfig, RecomputedPart};
use moe::{MoeLayer, MoeWeights, Router, SavePolicy, dispatch::Dispatcher};
use parking_lot::Mutex;
use tch::Kind;

/// Bytes of an index.
const INDEX_BYTES: u64 = 8;

/// Descriptions of the parameters of one MoE layer.
pub(crate) struct MoeSpecs {
    router: ParamSpec,
    experts: SwigluSpecs,
    /// All shared experts as one network.
    shared: Option<SwigluSpecs>,
}

/// Returns the descriptions of the routed experts in the block with this global name.
pub(crate) fn expert_specs(config: &ModelConfig, moe: &MoeConfig, block: &str) -> SwigluSpecs {
    let hidden = Dim::hidden(config);
    let ffn = Dim::new("model.moe.ffn", moe.ffn as u64);
    SwigluSpecs::new(block, hidden, ffn, Networks::Experts(moe.experts as u64))
}

impl MoeSpecs {
    /// Describes the parameters of the block with this global name.
    pub(crate) fn new(config: &ModelConfig, moe: &MoeConfig, block: &str) -> MoeSpecs {
        let hidden = Dim::hidden(config);
        let shared = (moe.shared_experts > 0).then(|| {
            let width = (moe.shared_experts as u64).saturating_mul(moe.ffn as u64);
            let ffn = Dim::new("model.moe.shared_experts x ffn", width);
            SwigluSpecs::new(&format!("{block}.shared"), hidden, ffn, Networks::Dense)
        });
        MoeSpecs {
            router: ParamSpec {
                block: block.to_string(),
                part: "gate",
                dims: vec![Dim::new("model.moe.experts", moe.experts as u64), hidden],
                stack: Stack::Single,
                split: Split::Whole,
                role: Role::Router,
                writes_residual: false,
            },
            experts: expert_specs(config, moe, block),
            shared,
        }
    }

    /// Returns the descriptions in the order of use.
    pub(crate) fn into_list(self) -> Vec<ParamSpec> {
        let mut list = vec![self.router];
        list.extend(self.experts.into_list());
        list.extend(self.shared.into_iter().flat_map(SwigluSpecs::into_list));
        list
    }
}

/// Returns the rows at a rank's experts, which are as many as it gets back.
fn routed_rows(moe: &MoeConfig, at: &BlockShape) -> u64 {
    at.own_tokens * (moe.top_k * at.mesh.expert_tensor) as u64
}

/// Returns the bytes of activations of one MoE layer on a rank, for an even load.
pub(crate) fn activations(config: &ModelConfig, moe: &MoeConfig, at: &BlockShape) -> Activations {
    let hidden = config.hidden as u64;
    let rows = routed_rows(moe, at);
    let columns = (moe.ffn / at.mesh.expert_tensor) as u64;
    let routed = feed_forward::activations(rows, hidden, columns, at);
    let mut saved = routed.saved;
    let mut transient = routed.transient;
    if moe.shared_experts > 0 {
        let columns = (moe.shared_experts * moe.ffn / at.mesh.tensor) as u64;
        let shared = feed_forward::activations(at.tokens, hidden, columns, at);
        saved += shared.saved;
        transient = transient.max(shared.transient);
    }
    // Rows at the experts.
    if at.recompute.keeps(RecomputedPart::Dispatch) {
        saved += rows * hidden * at.element;
    }
    // Rows that come back, router scores, indices.
    saved += rows * hidden * at.element;
    saved += 3 * at.own_tokens * moe.experts as u64 * FP32_BYTES;
    saved += 4 * rows * INDEX_BYTES;
    Activations { saved, transient }
}

/// Returns the bytes that a layer keeps of which only the input is saved: the experts of each token
/// and the routes of the rows.
pub(crate) fn replay_bytes(moe: &MoeConfig, at: &BlockShape) -> u64 {
    routed_rows(moe, at) * (INDEX_BYTES + 4 * FP32_BYTES)
}

/// An MoE layer and this rank's experts in it.
pub(crate) struct MoeBlock {
    pub(crate) layer: MoeLayer,
    pub(crate) experts: LocalExperts,
}

/// Builds an MoE layer with this rank's experts.
pub(crate) fn build(builder: &mut WeightBuilder, name: &str, config: &MoeConfig) -> MoeBlock {
    let specs = MoeSpecs::new(builder.config, config, name);
    let router = builder.add(&specs.router);
    let experts = LocalExperts {
        name: name.to_string(),
        gate_up: builder.parameters.len(),
        down: builder.parameters.len() + 1,
    };
    let gate_up_proj = builder.add(&specs.experts.gate_up);
    let down_proj = builder.add(&specs.experts.down);
    let shared = specs
        .shared
        .map(|specs| (builder.add(&specs.gate_up), builder.add(&specs.down)));
    let ctx = builder.ctx;
    let groups = ctx.groups;
    let zeros = || ctx.device.zeros(&[config.experts as i64], Kind::Float);
    let bias = (config.bias_update_rate > 0.0).then(zeros);
    let dispatcher = Dispatcher::new(
        groups.experts.clone(),
        config.experts,
        groups.topology.clone(),
        groups.least_loaded.clone(),
        groups.hierarchy.clone(),
        groups.expert_chunks,
    );
    let layer = MoeLayer {
        router: router_rule(config),
        dispatcher,
        balance_scope: config.load_balance_over,
        tensor: groups.tensor.clone(),
        sequence: groups.sequence.clone(),
        gemm: ctx.expert_gemm.for_layer(),
        save: SavePolicy {
            dispatched: ctx.recompute.keeps(RecomputedPart::Dispatch),
            experts: ctx.recompute.keeps(RecomputedPart::Experts),
        },
        weights: MoeWeights {
            router,
            bias: Mutex::new(bias),
            gate_up_proj,
            down_proj,
            shared,
        },
    };
    MoeBlock { layer, experts }
}

fn router_rule(config: &MoeConfig) -> Router {
    let router = &config.router;
    Router {
        num_experts: config.experts,
        top_k: config.top_k,
        score: router.score,
        normalize: config.normalizes(),
        scale: router.scale,
        groups: router.groups,
        top_groups: router.top_groups,
        even_groups: router.even_groups,
        force_balance: router.force_balance,
    }
}
