//! The MoE layer of a decoder: its configuration, parameters, memory, conflicts and construction.

mod router;

pub use router::RouterConfig;

use super::{
    activations::{Activations, BlockShape, FP32_BYTES},
    experts::LocalExperts,
    feed_forward::{self, Networks, SwigluSpecs},
    spec::{Dim, ParamSpec},
    weights::WeightBuilder,
};
use crate::{
    config::{
        dispatch::{Dispatch, LeastLoadedConfig, PlacementConfig},
        layout::RecomputedPart,
        limits::{MAX_EXPERTS, MAX_WIDTH},
    },
    problems::{Problems, Quantity},
};
use config_derive::ResumeKeys;
use moe::{MoeLayer, MoeWeights, SavePolicy, balance::BalanceScope, dispatch::Dispatcher};
use parallel::MeshShape;
use parking_lot::Mutex;
use router::Selection;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Kind;

/// Bytes of an index.
const INDEX_BYTES: u64 = 8;

/// Widths of fp8 matrices are multiples of this.
const FP8_WIDTH: usize = 16;

/// MoE layers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, ResumeKeys)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Number of experts per layer, without shared ones.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_EXPERTS))]
    pub experts: usize,
    /// Number of experts that the router chooses for each token.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_EXPERTS))]
    pub top_k: usize,
    /// Inner width of an expert.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    pub ffn: usize,
    /// Number of shared experts, which process every token.
    #[on_resume(refused)]
    #[schemars(range(min = 0, max = MAX_EXPERTS))]
    #[serde(default)]
    pub shared_experts: usize,
    /// The router's rule.
    #[on_resume(section)]
    #[serde(default)]
    pub router: RouterConfig,
    /// Weight of the load-balancing loss. The loss itself is 1 per layer at perfect balance; that
    /// of Hugging Face transformers is `top_k` times as large.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0, max = 1e6))]
    #[serde(default = "default_load_balance")]
    pub load_balance: f64,
    /// Tokens over which the load-balancing loss measures balance.
    #[on_resume(reported)]
    #[serde(default = "default_load_balance_over")]
    pub load_balance_over: BalanceScope,
    /// Computes the load-balancing loss once, from statistics averaged over layers, as Hugging Face
    /// transformers does.
    #[on_resume(reported)]
    #[serde(default)]
    pub load_balance_pool_layers: bool,
    /// Weight of the router z-loss (arXiv 2202.08906).
    #[on_resume(reported)]
    #[schemars(range(min = 0.0, max = 1e6))]
    #[serde(default)]
    pub z_loss: f64,
    /// Step size of the bias of loss-free balancing (arXiv 2408.15664). 0 disables it.
    #[on_resume(reported)]
    #[schemars(range(min = 0.0, max = 10.0))]
    #[serde(default)]
    pub bias_update_rate: f64,
    /// Transfer of routed tokens to their experts.
    #[on_resume(free)]
    #[serde(default)]
    pub dispatch: Dispatch,
    /// Parameters of least-loaded dispatch.
    #[on_resume(section)]
    #[serde(default)]
    pub least_loaded: LeastLoadedConfig,
    /// Placement of experts by load. Without this section they stay on their ranks.
    #[on_resume(section)]
    #[serde(default)]
    pub placement: Option<PlacementConfig>,
}

/// Descriptions of the parameters of one MoE layer.
struct MoeSpecs {
    router: ParamSpec,
    experts: SwigluSpecs,
    /// All shared experts as one network.
    shared: Option<SwigluSpecs>,
}

impl MoeSpecs {
    /// Returns the descriptions in the order of use.
    fn into_list(self) -> Vec<ParamSpec> {
        let mut list = vec![self.router];
        list.extend(self.experts.into_list());
        list.extend(self.shared.into_iter().flat_map(SwigluSpecs::into_list));
        list
    }
}

impl MoeConfig {
    /// Returns a section with these sizes and the defaults of all other keys.
    pub fn new(experts: usize, top_k: usize, ffn: usize) -> MoeConfig {
        MoeConfig {
            experts,
            top_k,
            ffn,
            shared_experts: 0,
            router: RouterConfig::default(),
            load_balance: default_load_balance(),
            load_balance_over: default_load_balance_over(),
            load_balance_pool_layers: false,
            z_loss: 0.0,
            bias_update_rate: 0.0,
            dispatch: Dispatch::default(),
            least_loaded: LeastLoadedConfig::default(),
            placement: None,
        }
    }

    /// Returns true if the routing weights of each token are scaled to a sum of 1.
    pub fn normalizes(&self) -> bool {
        self.router.normalizes(self.top_k)
    }

    fn selection(&self) -> Selection {
        Selection {
            experts: self.experts,
            top_k: self.top_k,
        }
    }

    /// Returns the inner width of all shared experts together, as one network.
    fn shared_width(&self) -> Option<usize> {
        let width = self.shared_experts.saturating_mul(self.ffn);
        (width > 0).then_some(width)
    }

    /// Returns the inner width of the part of an expert that each of `slices` ranks holds.
    pub(crate) fn ffn_per_slice(&self, slices: usize) -> usize {
        self.ffn / slices.max(1)
    }

    fn specs_by_part(&self, hidden: usize, block: &str) -> MoeSpecs {
        let experts = self.expert_specs(hidden, block);
        let hidden = Dim::hidden(hidden);
        let shared = self.shared_width().map(|width| {
            let ffn = Dim::new("model.moe.shared_experts x ffn", width as u64);
            SwigluSpecs::new(&format!("{block}.shared"), hidden, ffn, Networks::Dense)
        });
        MoeSpecs {
            router: self.router.specs(self.experts, hidden, block),
            experts,
            shared,
        }
    }

    /// Returns the descriptions of the parameters of the block with this global name, in the order
    /// of use.
    pub(crate) fn specs(&self, hidden: usize, block: &str) -> Vec<ParamSpec> {
        self.specs_by_part(hidden, block).into_list()
    }

    /// Returns the descriptions of the routed experts in the block with this global name.
    pub(crate) fn expert_specs(&self, hidden: usize, block: &str) -> SwigluSpecs {
        let hidden = Dim::hidden(hidden);
        let ffn = Dim::new("model.moe.ffn", self.ffn as u64);
        SwigluSpecs::new(block, hidden, ffn, Networks::Experts(self.experts as u64))
    }

    /// Returns the rows at a rank's experts, which are as many as it gets back.
    fn routed_rows(&self, at: &BlockShape) -> u64 {
        at.own_tokens * (self.top_k * at.mesh.expert_tensor) as u64
    }

    /// Returns the bytes of activations of one MoE layer on a rank, for an even load.
    pub(crate) fn activations(&self, hidden: usize, at: &BlockShape) -> Activations {
        let hidden = hidden as u64;
        let rows = self.routed_rows(at);
        let columns = self.ffn_per_slice(at.mesh.expert_tensor) as u64;
        let routed = feed_forward::activations(rows, hidden, columns, at);
        let mut saved = routed.saved;
        let mut transient = routed.transient;
        if let Some(width) = self.shared_width() {
            let columns = (width / at.mesh.tensor) as u64;
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
        saved += 3 * at.own_tokens * self.experts as u64 * FP32_BYTES;
        saved += 4 * rows * INDEX_BYTES;
        Activations { saved, transient }
    }

    /// Returns the bytes that a layer keeps of which only the input is saved: the experts of each
    /// token and the routes of the rows.
    pub(crate) fn replay_bytes(&self, at: &BlockShape) -> u64 {
        self.routed_rows(at) * (INDEX_BYTES + 4 * FP32_BYTES)
    }

    /// Returns the largest number of values that a token has on all `slices` ranks that split its
    /// experts.
    pub(crate) fn widest(&self, hidden: usize, slices: usize) -> usize {
        let routed = self.top_k * self.ffn.max(hidden) * slices;
        let shared = self.shared_width().unwrap_or(0);
        routed.max(shared).max(self.experts)
    }

    /// Adds the reasons why the section contradicts itself.
    pub(crate) fn problems(&self, problems: &mut Problems) {
        self.router.problems(self.selection(), problems);
        let is_default = self.least_loaded == LeastLoadedConfig::default();
        if !is_default && !self.dispatch.least_loaded() {
            problems.add(
                "model.moe.least_loaded has no effect with this model.moe.dispatch: use \
                 least_loaded or hierarchical_least_loaded",
            );
        }
    }

    /// Adds the reasons why ranks of this mesh cannot divide the layer.
    pub(crate) fn layout_problems(&self, mesh: &MeshShape, problems: &mut Problems) {
        if let Some(width) = self.shared_width() {
            problems.divides(
                Quantity::new("model.moe.shared_experts x ffn", width),
                Quantity::new("parallel.tensor", mesh.tensor),
                "each rank must hold an equal slice of a layer",
            );
        }
        problems.divides(
            Quantity::new("model.moe.ffn", self.ffn),
            Quantity::new("parallel.expert_tensor", mesh.expert_tensor),
            "each rank must hold an equal slice of every expert",
        );
        problems.divides(
            Quantity::new("model.moe.experts", self.experts),
            Quantity::new("parallel.expert", mesh.expert),
            "each rank must hold the same number of experts",
        );
    }

    /// Adds the reasons why `slices` ranks that split each expert cannot compute it in fp8.
    pub(crate) fn fp8_problems(&self, hidden: usize, slices: usize, problems: &mut Problems) {
        let widths = [hidden, self.ffn_per_slice(slices)];
        if widths.iter().any(|width| !width.is_multiple_of(FP8_WIDTH)) {
            problems.add(format!(
                "train.fp8_experts multiplies matrices whose widths are multiples of \
                 {FP8_WIDTH}; model.hidden and each rank's part of model.moe.ffn are {widths:?}"
            ));
        }
    }
}

/// An MoE layer and this rank's experts in it.
pub(crate) struct MoeBlock {
    pub(crate) layer: MoeLayer,
    pub(crate) experts: LocalExperts,
}

/// Builds an MoE layer with this rank's experts.
pub(crate) fn build(
    builder: &mut WeightBuilder,
    name: &str,
    hidden: usize,
    config: &MoeConfig,
) -> MoeBlock {
    let specs = config.specs_by_part(hidden, name);
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
        router: config.router.rule(config.selection()),
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

fn default_load_balance() -> f64 {
    0.01
}

fn default_load_balance_over() -> BalanceScope {
    BalanceScope::Sequence
}
