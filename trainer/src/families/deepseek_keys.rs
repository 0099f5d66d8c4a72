//! Keys of `config.json` of the DeepSeek families: latent attention, and their MoE layers, which
//! other families share.

use super::{
    decoder_keys::{self, Defaults},
    layer_lists::set_moe_layers,
    moe_keys::{self, Sizes},
    rope_keys::RopeRules,
};
use crate::{
    Error,
    config::{AttentionConfig, LatentConfig, ModelConfig, RouterConfig},
    hub::config_json::ConfigJson,
};
use serde_json::json;

/// Reads a decoder with latent attention and no layer's feed-forward network. If the key is absent,
/// `query_rank` is the rank of queries.
///
/// # Errors
/// If a key is missing or has a value that moerun cannot compute.
pub(super) fn read_latent(config: &ConfigJson, query_rank: usize) -> Result<ModelConfig, Error> {
    config.expect("attention_bias", &[json!(false)])?;
    config.expect("mlp_bias", &[json!(false)])?;
    config.expect("rope_interleave", &[json!(true)])?;
    let rope = RopeRules {
        scales_softmax: true,
        ..RopeRules::default()
    };
    let defaults = Defaults {
        rope,
        ..Defaults::default()
    };
    let mut model = decoder_keys::read_without_heads(config, defaults)?;
    model.attention = AttentionConfig::Latent(LatentConfig {
        query_rank: config.nullable("q_lora_rank", Some(query_rank))?,
        kv_rank: config.require(&["kv_lora_rank"])?,
        nope_dim: config.require(&["qk_nope_head_dim"])?,
        rope_dim: config.require(&["qk_rope_head_dim"])?,
        value_dim: config.require(&["v_head_dim"])?,
    });
    Ok(model)
}

/// Sets the keys that [`read_latent`] reads.
pub(super) fn write_latent(model: &ModelConfig, config: &mut ConfigJson) {
    decoder_keys::write(model, config);
    config.set("attention_bias", false);
    config.set("rope_interleave", true);
    config.set("num_key_value_heads", model.heads);
    if let AttentionConfig::Latent(latent) = &model.attention {
        config.set("q_lora_rank", latent.query_rank);
        config.set("kv_lora_rank", latent.kv_rank);
        config.set("qk_nope_head_dim", latent.nope_dim);
        config.set("qk_rope_head_dim", latent.rope_dim);
        config.set("qk_head_dim", latent.nope_dim + latent.rope_dim);
        config.set("v_head_dim", latent.value_dim);
    }
}

/// Values of absent keys of a sigmoid router.
pub(super) struct RouterDefaults {
    pub(super) normalize: bool,
    pub(super) scale: f64,
    /// Groups into which the experts are divided.
    pub(super) groups: usize,
    /// Groups from which a token may choose.
    pub(super) top_groups: usize,
}

impl Default for RouterDefaults {
    fn default() -> RouterDefaults {
        RouterDefaults {
            normalize: true,
            scale: 1.0,
            groups: 1,
            top_groups: 1,
        }
    }
}

/// Values of absent keys about kinds of experts.
pub(super) struct ExpertDefaults {
    /// Dense layers before the first MoE layer.
    pub(super) dense: usize,
    /// Shared experts; `None` if the key is required.
    pub(super) shared: Option<usize>,
}

/// Reads the MoE layers of DeepSeek-V3: a sigmoid router with groups, and experts as
/// [`read_experts`] reads them.
///
/// # Errors
/// If a key is missing or has another type.
pub(super) fn read_sigmoid_experts(
    config: &ConfigJson,
    model: &mut ModelConfig,
    defaults: RouterDefaults,
    experts: ExpertDefaults,
) -> Result<(), Error> {
    let normalize = config.get_or("norm_topk_prob", defaults.normalize)?;
    let scale = config.get_or("routed_scaling_factor", defaults.scale)?;
    let mut router = moe_keys::sigmoid(normalize, scale);
    // Released configurations have null for models without groups.
    let groups = config.nullable("n_group", Some(defaults.groups))?;
    router.groups = groups.unwrap_or(1);
    let top_groups = config.nullable("topk_group", Some(defaults.top_groups))?;
    router.top_groups = top_groups.unwrap_or(router.groups);
    read_experts(config, model, router, experts)
}

/// Reads experts that are divided into dense layers first, shared ones, and routed ones.
///
/// # Errors
/// If a key is missing or has another type.
pub(super) fn read_experts(
    config: &ConfigJson,
    model: &mut ModelConfig,
    router: RouterConfig,
    defaults: ExpertDefaults,
) -> Result<(), Error> {
    let dense: usize = config.get_or("first_k_dense_replace", defaults.dense)?;
    let sizes = Sizes {
        experts: config.require(&["n_routed_experts", "num_experts"])?,
        top_k: config.require(&["num_experts_per_tok"])?,
        ffn: config.require(&["moe_intermediate_size"])?,
    };
    config.expect("moe_layer_freq", &[json!(1)])?;
    let mut moe = moe_keys::section(sizes, router);
    moe.shared_experts = moe_keys::shared_experts(config, "n_shared_experts", defaults.shared)?;
    model.moe = Some(moe);
    set_dense_layers(config, model, dense)
}

/// Makes the first layers dense.
///
/// # Errors
/// If their width is missing.
pub(super) fn set_dense_layers(
    config: &ConfigJson,
    model: &mut ModelConfig,
    dense: usize,
) -> Result<(), Error> {
    let layers: Vec<bool> = (0..model.layers).map(|layer| layer >= dense).collect();
    set_moe_layers(model, &layers);
    if dense > 0 {
        model.ffn = Some(config.require(&["intermediate_size"])?);
    }
    Ok(())
}

/// Sets the keys that [`read_experts`] reads, and those of the router.
pub(super) fn write_experts(model: &ModelConfig, config: &mut ConfigJson) {
    let Some(moe) = &model.moe else {
        return;
    };
    let dense = moe_keys::leading_dense_layers(model);
    config.set("n_routed_experts", moe.experts);
    config.set(
        "n_shared_experts",
        moe_keys::shared_width(moe) / moe.ffn.max(1),
    );
    config.set("num_experts_per_tok", moe.top_k);
    config.set("moe_intermediate_size", moe.ffn);
    config.set("intermediate_size", model.ffn.unwrap_or(moe.ffn));
    config.set("first_k_dense_replace", dense);
    config.set("n_group", moe.router.groups);
    config.set("topk_group", moe.router.top_groups);
    config.set("norm_topk_prob", moe_keys::normalizes(moe));
    config.set("routed_scaling_factor", moe.router.scale);
    config.set("num_nextn_predict_layers", 0);
}
