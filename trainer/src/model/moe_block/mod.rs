//! The MoE layer of a decoder: its configuration, parameters, memory, conflicts and construction.

mod experts;
#[cfg(test)]
mod golden;
mod router;
mod shared;

pub use experts::{ClampedGluConfig, ExpertActivation};
pub use router::{RouterBias, RouterConfig};

use super::{
    activations::{Activations, BlockShape, FP32_BYTES},
    experts::LocalExperts,
    feed_forward::DensePlan,
    spec::{Dim, ParamSpec},
    weights::WeightBuilder,
};
use crate::{
    config::{
        dispatch::{Dispatch, LeastLoadedConfig, PlacementConfig},
        layer_set::LayerSet,
        layout::RecomputedPart,
        limits::{MAX_EXPERTS, MAX_WIDTH},
    },
    problems::Problems,
};
use config_derive::ResumeKeys;
use experts::RoutedExperts;
use moe::{MoeLayer, MoeWeights, SavePolicy, balance::BalanceScope, dispatch::Dispatcher};
use parallel::MeshShape;
use parking_lot::Mutex;
use router::{RouterSpecs, Selection};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use shared::SharedPlan;
use tch::Kind;

/// Bytes of an index.
const INDEX_BYTES: u64 = 8;

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
    /// The MoE layers: `all`, a list of layer numbers, or a period such as `{every: 2, from: 1}` or
    /// `{all_but: {every: 4, from: 3}}`. Without it, `model.dense_layers` and `model.moe_every`
    /// decide.
    #[on_resume(refused)]
    #[serde(default)]
    pub layers: Option<LayerSet>,
    /// Activation of the experts, shared ones included: `swiglu`, or
    /// `{clamped_glu: {alpha: 1.702, limit: 7}}`.
    #[on_resume(refused)]
    #[serde(default)]
    pub activation: ExpertActivation,
    /// Adds biases to both products of an expert. Shared experts have none.
    #[on_resume(refused)]
    #[serde(default)]
    pub expert_bias: bool,
    /// Number of shared experts, which process every token. Each has the width `ffn`.
    #[on_resume(refused)]
    #[schemars(range(min = 0, max = MAX_EXPERTS))]
    #[serde(default)]
    pub shared_experts: usize,
    /// Inner width of all shared experts together, instead of `shared_experts`.
    #[on_resume(refused)]
    #[schemars(range(min = 1, max = MAX_WIDTH))]
    #[serde(default)]
    pub shared_ffn: Option<usize>,
    /// Scales the shared experts' result for each token by the sigmoid of a product with the token
    /// (Qwen2-MoE, arXiv 2407.10671).
    #[on_resume(refused)]
    #[serde(default)]
    pub shared_gate: bool,
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

/// Rows that a rank's experts compute.
#[derive(Debug, Clone, Copy)]
struct RoutedRows(u64);

impl MoeConfig {
    /// Returns a section with these sizes and the defaults of all other keys.
    pub fn new(experts: usize, top_k: usize, ffn: usize) -> MoeConfig {
        MoeConfig {
            experts,
            top_k,
            ffn,
            layers: None,
            activation: ExpertActivation::default(),
            expert_bias: false,
            shared_experts: 0,
            shared_ffn: None,
            shared_gate: false,
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

    /// Sets the values that unset keys stand for.
    pub(crate) fn resolve(&mut self) {
        self.router.resolve(self.top_k);
    }

    /// Returns true if a bias that is not trained takes part in the selection of experts.
    pub fn has_selection_bias(&self) -> bool {
        self.bias_update_rate > 0.0 || self.router.bias == Some(RouterBias::Frozen)
    }

    /// Returns the number of routed experts that compute each token.
    pub(crate) fn experts_per_token(&self) -> u64 {
        self.top_k as u64
    }

    fn selection(&self) -> Selection {
        Selection {
            experts: self.experts,
            top_k: self.top_k,
        }
    }

    fn routed(&self, hidden: usize) -> RoutedExperts {
        RoutedExperts {
            hidden,
            count: self.experts,
            ffn: self.ffn,
            activation: self.activation,
            biased: self.expert_bias,
        }
    }

    fn shared(&self, hidden: usize) -> Option<SharedPlan> {
        let width = match self.shared_ffn {
            Some(width) => Dim::new("model.moe.shared_ffn", width as u64),
            None => {
                let size = self.shared_experts.saturating_mul(self.ffn);
                Dim::new("model.moe.shared_experts x ffn", size as u64)
            }
        };
        (width.size > 0).then_some(SharedPlan {
            network: DensePlan { hidden, ffn: width },
            activation: self.activation,
            gated: self.shared_gate,
        })
    }

    /// Returns the inner width of the part of an expert that each of `slices` ranks holds.
    pub(crate) fn ffn_per_slice(&self, slices: usize) -> usize {
        self.routed(0).ffn_per_slice(slices)
    }

    /// Returns the descriptions of the parameters of the block with this global name, in the order
    /// of use.
    pub(crate) fn specs(&self, hidden: usize, block: &str) -> Vec<ParamSpec> {
        let router = self.router.specs(self.experts, hidden, block);
        let mut specs = router.into_list();
        specs.extend(self.expert_specs(hidden, block));
        let shared = self.shared(hidden).map(|shared| shared.specs(block));
        specs.extend(shared.unwrap_or_default());
        specs
    }

    /// Returns the descriptions of the routed experts in the block with this global name.
    pub(crate) fn expert_specs(&self, hidden: usize, block: &str) -> Vec<ParamSpec> {
        self.routed(hidden).specs(block).into_list()
    }

    /// Returns the rows at a rank's experts, which are as many as it gets back.
    fn routed_rows(&self, at: &BlockShape) -> RoutedRows {
        RoutedRows(at.own_tokens * (self.top_k * at.mesh.expert_tensor) as u64)
    }

    /// Returns the bytes of activations of one MoE layer on a rank, for an even load.
    pub(crate) fn activations(&self, hidden: usize, at: &BlockShape) -> Activations {
        let rows = self.routed_rows(at);
        let Activations {
            mut saved,
            mut transient,
        } = self.routed(hidden).activations(rows, at);
        if let Some(shared) = self.shared(hidden) {
            let shared = shared.activations(at);
            saved += shared.saved;
            transient = transient.max(shared.transient);
        }
        let row_bytes = rows.0 * hidden as u64 * at.element;
        // Rows at the experts.
        if at.recompute.keeps(RecomputedPart::Dispatch) {
            saved += row_bytes;
        } else {
            transient += row_bytes;
        }
        // Rows that come back, router scores, indices. Backward frees these rows before the
        // experts need memory.
        saved += row_bytes;
        transient = transient.saturating_sub(row_bytes);
        saved += 3 * at.own_tokens * self.experts as u64 * FP32_BYTES;
        saved += 4 * rows.0 * INDEX_BYTES;
        Activations { saved, transient }
    }

    /// Returns the bytes that a layer keeps of which only the input is saved: the experts of each
    /// token and the routes of the rows.
    pub(crate) fn replay_bytes(&self, at: &BlockShape) -> u64 {
        self.routed_rows(at).0 * (INDEX_BYTES + 4 * FP32_BYTES)
    }

    /// Returns the largest number of values that a token has on all `slices` ranks that split its
    /// experts.
    pub(crate) fn widest(&self, hidden: usize, slices: usize) -> usize {
        let routed = self.top_k * self.ffn.max(hidden) * slices;
        let shared = self
            .shared(hidden)
            .map_or(0, |shared| shared.network.ffn.size);
        routed.max(shared as usize).max(self.experts)
    }

    /// Adds the reasons why the section contradicts itself.
    pub(crate) fn problems(&self, problems: &mut Problems) {
        self.router.problems(self.selection(), problems);
        if let Some(width) = self.shared_ffn
            && self.shared_experts > 0
        {
            problems.add(format!(
                "model.moe.shared_ffn {width} is the width of all shared experts together, which \
                 model.moe.shared_experts {} also gives: leave one of them out",
                self.shared_experts
            ));
        }
        if self.shared_gate && self.shared(0).is_none() {
            problems.add(
                "model.moe.shared_gate scales the result of shared experts, and there are none: \
                 give model.moe.shared_ffn, or leave shared_gate out",
            );
        }
        if self.bias_update_rate > 0.0 && self.router.bias.is_some() {
            problems.add(
                "model.moe.bias_update_rate updates a bias of its own, and model.moe.router.bias \
                 is another one: leave one of them out",
            );
        }
        let is_default = self.least_loaded == LeastLoadedConfig::default();
        if !is_default && !self.dispatch.least_loaded() {
            problems.add(
                "model.moe.least_loaded has no effect with this model.moe.dispatch: use \
                 least_loaded or hierarchical_least_loaded",
            );
        }
    }

    /// Adds the reasons why ranks of this mesh cannot divide the layer.
    pub(crate) fn layout_problems(&self, hidden: usize, mesh: &MeshShape, problems: &mut Problems) {
        if let Some(shared) = self.shared(hidden) {
            shared.network.layout_problems(mesh, problems);
        }
        self.routed(hidden).layout_problems(mesh, problems);
    }

    /// Adds the reasons why `slices` ranks that split each expert cannot compute it in fp8.
    pub(crate) fn fp8_problems(&self, hidden: usize, slices: usize, problems: &mut Problems) {
        self.routed(hidden).fp8_problems(slices, problems);
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
    let RouterSpecs { gate, bias } = config.router.specs(config.experts, hidden, name);
    let router = builder.add(&gate);
    let router_bias = bias.map(|bias| builder.add(&bias));
    let first = builder.parameters.len();
    let networks = config.routed(hidden).build(builder, name);
    let experts = LocalExperts {
        name: name.to_string(),
        parameters: first..builder.parameters.len(),
    };
    let shared = config.shared(hidden);
    let shared = shared.map(|shared| shared.build(builder, name));
    let ctx = builder.ctx;
    let groups = ctx.groups;
    let zeros = || ctx.device.zeros(&[config.experts as i64], Kind::Float);
    let bias = config.has_selection_bias().then(zeros);
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
            router_bias,
            bias: Mutex::new(bias),
            experts: networks,
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn config(change: Value) -> MoeConfig {
        let mut config = json!({"experts": 8, "top_k": 2, "ffn": 12});
        config
            .as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        serde_json::from_value(config).unwrap()
    }

    fn problems(change: Value) -> String {
        let mut problems = Problems::default();
        config(change).problems(&mut problems);
        problems.into_list().join("\n")
    }

    #[test]
    fn keys_that_contradict_each_other_are_refused() {
        let limited = json!({"groups": 4, "top_groups": 2, "group_score": "top2_sum"});
        for accepted in [
            json!({}),
            json!({"shared_ffn": 20, "shared_gate": true}),
            json!({"shared_experts": 1, "shared_gate": true}),
            json!({"router": {"bias": "frozen"}}),
            json!({"router": limited}),
            json!({"router": {"force_balance": true, "bias": "trained"}}),
        ] {
            assert_eq!(problems(accepted.clone()), "", "{accepted}");
        }
        for (refused, reason) in [
            (
                json!({"shared_ffn": 20, "shared_experts": 1}),
                "model.moe.shared_experts 1 also gives",
            ),
            (json!({"shared_gate": true}), "there are none"),
            (
                json!({"router": {"bias": "trained"}, "bias_update_rate": 0.01}),
                "leave one of them out",
            ),
            (
                json!({"router": {"groups": 4, "top_groups": 4, "group_score": "max"}}),
                "model.moe.router.group_score has no effect",
            ),
            (
                json!({"router": {"force_balance": true, "bias": "frozen"}}),
                "model.moe.router.bias: frozen has no effect with force_balance",
            ),
            (
                json!({"router": {
                    "force_balance": true, "groups": 4, "top_groups": 2, "group_score": "max",
                }}),
                "model.moe.router.group_score has no effect with force_balance",
            ),
        ] {
            let problems = problems(refused.clone());
            assert!(problems.contains(reason), "{refused}: {problems}");
        }
    }

    #[test]
    fn biases_are_divided_like_the_experts_that_ranks_split() {
        let config = config(json!({"expert_bias": true}));
        let problems = |hidden: usize, expert_tensor: usize| {
            let mesh = MeshShape {
                data: 4,
                tensor: 1,
                pipeline: 1,
                context: 1,
                expert: 1,
                expert_tensor,
            };
            let mut problems = Problems::default();
            config.layout_problems(hidden, &mesh, &mut problems);
            problems.into_list().join("\n")
        };
        assert_eq!(problems(16, 4), "");
        assert!(problems(18, 4).contains("model.moe.expert_bias"));
    }

    #[test]
    fn an_activation_has_the_constants_of_gpt_oss() {
        let of = |activation: Value| config(json!({"activation": activation})).activation;
        let defaults = ClampedGluConfig {
            alpha: 1.702,
            limit: 7.0,
        };
        assert_eq!(of(json!("swiglu")), ExpertActivation::Swiglu);
        assert_eq!(
            of(json!({"clamped_glu": {}})),
            ExpertActivation::ClampedGlu(defaults)
        );
    }
}
