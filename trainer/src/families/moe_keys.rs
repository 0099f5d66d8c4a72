//! Keys of `config.json` about experts and routers.

use super::layer_lists::moe_layers;
use crate::{
    Error,
    config::{ModelConfig, MoeConfig, RouterBias, RouterConfig},
    hub::config_json::ConfigJson,
};
use moe::Score;

/// Sizes of an MoE layer.
pub(crate) struct Sizes {
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) ffn: usize,
}

/// Returns an MoE section for training from loaded weights: without a load-balancing loss and
/// without updates of biases, as other tools fine-tune.
pub(crate) fn section(sizes: Sizes, router: RouterConfig) -> MoeConfig {
    MoeConfig {
        router,
        load_balance: 0.0,
        bias_update_rate: 0.0,
        ..MoeConfig::new(sizes.experts, sizes.top_k, sizes.ffn)
    }
}

/// Returns a router with softmax scores.
pub(crate) fn softmax(normalize: bool) -> RouterConfig {
    RouterConfig {
        normalize: Some(normalize),
        ..RouterConfig::default()
    }
}

/// Returns a router with sigmoid scores, and a bias that only selects (DeepSeek-V3).
pub(super) fn sigmoid(normalize: bool, scale: f64) -> RouterConfig {
    RouterConfig {
        score: Score::Sigmoid,
        normalize: Some(normalize),
        scale,
        bias: Some(RouterBias::Frozen),
        ..RouterConfig::default()
    }
}

/// Returns true if the routing weights of a token are scaled to a sum of 1.
pub(super) fn normalizes(moe: &MoeConfig) -> bool {
    moe.router.normalize.unwrap_or(moe.top_k > 1)
}

/// Returns the number of dense layers before the first MoE layer.
pub(super) fn leading_dense_layers(model: &ModelConfig) -> usize {
    let layers = moe_layers(model);
    layers.iter().take_while(|is_moe| !**is_moe).count()
}

/// Returns the width of all shared experts of a layer together.
pub(super) fn shared_width(moe: &MoeConfig) -> usize {
    moe.shared_ffn.unwrap_or(moe.shared_experts * moe.ffn)
}

/// Reads the number of shared experts of families that always have some. If the key is absent,
/// `absent` is the number.
///
/// # Errors
/// If it is 0 or missing.
pub(super) fn shared_experts(
    config: &ConfigJson,
    key: &str,
    absent: Option<usize>,
) -> Result<usize, Error> {
    let count = config.nullable(key, absent)?;
    match count {
        None => Err(config.error(key, "the key is missing")),
        Some(0) => {
            // transformers would make matrices without elements, which no file has.
            let reason = "it is 0, and models of this model_type have at least one";
            Err(config.error(key, reason))
        }
        Some(count) => Ok(count),
    }
}

/// Sets both spellings of the number of experts: readers differ in which they know.
pub(super) fn write_experts(moe: &MoeConfig, config: &mut ConfigJson) {
    config.set("num_experts", moe.experts);
    config.set("num_local_experts", moe.experts);
    config.set("num_experts_per_tok", moe.top_k);
    config.set("output_router_logits", false);
    config.set(
        "router_aux_loss_coef",
        moe.load_balance / moe.top_k.max(1) as f64,
    );
}
