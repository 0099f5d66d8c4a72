//! The model's shape.

use super::dispatch::{Dispatch, LeastLoadedConfig, PlacementConfig};
use moe::Score;
use moe::balance::BalanceScope;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A decoder-only transformer with mixture-of-experts layers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Different tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; by default as many as query heads.
    #[serde(default)]
    pub kv_heads: Option<usize>,
    /// Width of a head; by default hidden / heads.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Inner width of dense feed-forward layers; needed where there are any.
    #[serde(default)]
    pub ffn: Option<usize>,
    /// The first this many layers are dense.
    #[serde(default)]
    pub dense_layers: usize,
    /// After those, every n-th layer is a mixture of experts and the others are dense.
    #[serde(default = "one")]
    pub moe_every: usize,
    /// The mixture of experts; without it all layers are dense.
    #[serde(default)]
    pub moe: Option<MoeConfig>,
    /// Base of the rotary embedding's wavelengths.
    #[serde(default = "ten_thousand")]
    pub rope_theta: f64,
    /// Added to the mean square in RMSNorm.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// RMSNorm on queries and keys.
    #[serde(default)]
    pub qk_norm: QkNorm,
    /// Whether the output layer is the embedding's transpose.
    #[serde(default)]
    pub tie_embeddings: bool,
    /// Standard deviation of initial weights.
    #[serde(default = "init_std")]
    pub init_std: f64,
    /// Multipliers that carry learning rates from one width to another.
    #[serde(default)]
    pub mup: Option<MupConfig>,
}

impl ModelConfig {
    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden / self.heads.max(1))
    }

    /// The mixture of layer `layer`, or None where it is dense.
    pub fn moe_config(&self, layer: usize) -> Option<&MoeConfig> {
        let after = layer.checked_sub(self.dense_layers)?;
        self.moe
            .as_ref()
            .filter(|_| after.is_multiple_of(self.moe_every.max(1)))
    }

    /// Whether any layer is dense.
    pub fn has_dense_layers(&self) -> bool {
        (0..self.layers).any(|layer| self.moe_config(layer).is_none())
    }

    /// Parameters of the model, and those of them that work on any one token.
    pub fn num_parameters(&self) -> (u64, u64) {
        let hidden = self.hidden as u64;
        let head_dim = self.head_dim() as u64;
        let heads = self.heads as u64;
        let kv_heads = self.kv_heads() as u64;
        let qk_norm = match self.qk_norm {
            QkNorm::None => 0,
            QkNorm::Full => (heads + kv_heads) * head_dim,
            QkNorm::Head => 2 * head_dim,
        };
        let attention = 2 * (heads + kv_heads) * head_dim * hidden + qk_norm;
        let vocabulary =
            (self.vocab_size * self.hidden) as u64 * if self.tie_embeddings { 1 } else { 2 };
        let mut total = vocabulary + hidden;
        let mut active = vocabulary + hidden;
        for layer in 0..self.layers {
            let (all, working) = match self.moe_config(layer) {
                None => (self.ffn.unwrap_or(0) as u64, self.ffn.unwrap_or(0) as u64),
                Some(moe) => {
                    let ffn = |experts: usize| (experts * moe.ffn) as u64;
                    let gate = moe.experts as u64 * hidden;
                    (total, active) = (total + gate, active + gate);
                    (
                        ffn(moe.experts + moe.shared_experts),
                        ffn(moe.top_k + moe.shared_experts),
                    )
                }
            };
            let rest = attention + 2 * hidden;
            total += rest + 3 * hidden * all;
            active += rest + 3 * hidden * working;
        }
        (total, active)
    }

    /// How many layers are MoE layers.
    pub fn num_moe_layers(&self) -> usize {
        (0..self.layers)
            .filter(|&layer| self.moe_config(layer).is_some())
            .count()
    }
}

/// Where RMSNorm is applied to queries and keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Nowhere.
    #[default]
    None,
    /// Over all heads together (OLMoE).
    Full,
    /// Over each head (Qwen3).
    Head,
}

/// The mixture of experts.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MoeConfig {
    /// Experts of a layer.
    pub experts: usize,
    /// Experts a token goes to.
    pub top_k: usize,
    /// Inner width of an expert.
    pub ffn: usize,
    /// Experts that every token goes to, beside the chosen ones.
    #[serde(default)]
    pub shared_experts: usize,
    /// How experts are chosen.
    #[serde(default)]
    pub router: RouterConfig,
    /// Weight of the load-balancing loss. (For balanced use the loss itself is 1 per layer; HF transformers' is
    /// top_k times that.)
    #[serde(default = "hundredth")]
    pub load_balance: f64,
    /// The tokens that balance is measured over.
    #[serde(default = "sequence")]
    pub load_balance_over: BalanceScope,
    /// Take the loss once, from statistics averaged over layers, as HF transformers does.
    #[serde(default)]
    pub load_balance_pool_layers: bool,
    /// Weight of the router z-loss.
    #[serde(default)]
    pub z_loss: f64,
    /// Step of the loss-free balancing bias; 0: none.
    #[serde(default)]
    pub bias_update_rate: f64,
    /// How tokens reach their experts.
    #[serde(default)]
    pub dispatch: Dispatch,
    /// Knobs of least-loaded dispatch.
    #[serde(default)]
    pub least_loaded: LeastLoadedConfig,
    /// Whether experts move between ranks over time; without it they stay.
    #[serde(default)]
    pub placement: Option<PlacementConfig>,
}

impl MoeConfig {
    /// `experts` experts of width `ffn`, of which a token goes to `top_k`; all else as by default.
    pub fn new(experts: usize, top_k: usize, ffn: usize) -> MoeConfig {
        MoeConfig {
            experts,
            top_k,
            ffn,
            shared_experts: 0,
            router: RouterConfig::default(),
            load_balance: hundredth(),
            load_balance_over: sequence(),
            load_balance_pool_layers: false,
            z_loss: 0.0,
            bias_update_rate: 0.0,
            dispatch: Dispatch::default(),
            least_loaded: LeastLoadedConfig::default(),
            placement: None,
        }
    }
}

/// How experts are chosen.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// Logits to scores.
    pub score: Score,
    /// Whether a token's weights are made to sum to one.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f64,
    /// Groups that experts are divided into.
    pub groups: usize,
    /// Groups that a token may choose from.
    pub top_groups: usize,
    /// Choose as many experts in each group (MoGE, arXiv 2505.21411): then groups are evenly loaded, whatever tokens
    /// choose.
    pub even_groups: bool,
    /// Choose experts in turns, whatever their scores are, so that all have as much to do: for measuring. It weighs them as always, but
    /// the model learns nothing of use.
    pub force_balance: bool,
}

impl Default for RouterConfig {
    fn default() -> RouterConfig {
        RouterConfig {
            score: Score::Softmax,
            normalize: true,
            scale: 1.0,
            groups: 1,
            top_groups: 1,
            even_groups: false,
            force_balance: false,
        }
    }
}

/// Maximal update parameterisation as PowerMoE and Granite use it (arXiv 2408.13359, table 1): the initial standard
/// deviation of hidden matrices is divided by the square root of the width ratio, their learning rate by the ratio,
/// attention logits are scaled by 1 / head_dim, and output logits are divided by the ratio.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MupConfig {
    /// Width ratio: hidden over the width that rates were tuned for.
    pub width: f64,
    /// Factor on the embedding's output.
    #[serde(default = "unit")]
    pub embedding: f64,
    /// Factor on each branch before it joins the residual stream.
    #[serde(default = "unit")]
    pub residual: f64,
}

fn one() -> usize {
    1
}
fn unit() -> f64 {
    1.0
}
fn ten_thousand() -> f64 {
    10_000.0
}
fn norm_eps() -> f64 {
    1e-5
}
fn init_std() -> f64 {
    0.02
}
fn hundredth() -> f64 {
    0.01
}
fn sequence() -> BalanceScope {
    BalanceScope::Sequence
}
