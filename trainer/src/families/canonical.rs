//! One form for all configurations of the same function, in which models can be compared.

use super::layer_lists::{moe_layers, set_of};
use crate::config::{
    AttentionConfig, LayerSet, ModelConfig, MoeConfig, MultipliersConfig, RouterBias,
};
use serde_json::Value;

/// Returns the keys that decide what the model computes, with sets of layers as lists, factors of
/// maximal update parametrization as multipliers, and no keys of training.
pub(crate) fn canonical(model: &ModelConfig) -> Value {
    let mut plain = model.clone();
    let heads = model.attention(0).head_keys();
    plain.kv_heads = heads.kv_heads;
    plain.head_dim = heads.head_dim;
    plain.multipliers = MultipliersConfig {
        embedding: model.embedding_factor(),
        residual: model.residual_factor(),
        attention: Some(model.attention_scale()),
        logits: 1.0 / model.logits_divisor(),
    };
    plain.from = None;
    plain.mup = None;
    plain.init_std = 1.0;
    if !model.has_dense_layers() {
        plain.ffn = None;
    }
    if let AttentionConfig::Grouped(grouped) = &mut plain.attention
        && let Some(window) = &mut grouped.window
    {
        window.layers = as_list(model, |layer| window.layers.contains(layer));
    }
    let rotary = model.attention(0).rotary_part();
    plain.rope.fraction = model.rope.exact_fraction(rotary.width);
    plain.rope.layers = as_list(model, |layer| model.rope.layers.contains(layer));
    plain.dense_layers = 0;
    plain.moe_every = 1;
    plain.moe = model.moe.as_ref().map(|moe| MoeConfig {
        layers: Some(set_of(&moe_layers(model))),
        ..canonical_moe(moe)
    });
    let value = serde_json::to_value(plain);
    value.expect("a configuration is plain data")
}

fn canonical_moe(moe: &MoeConfig) -> MoeConfig {
    let mut plain = MoeConfig::new(moe.experts, moe.top_k, moe.ffn);
    plain.activation = moe.activation;
    plain.expert_bias = moe.expert_bias;
    plain.shared_ffn = Some(super::moe_keys::shared_width(moe)).filter(|&width| width > 0);
    plain.shared_gate = moe.shared_gate;
    plain.router = moe.router.clone();
    if moe.has_selection_bias() {
        plain.router.bias = Some(RouterBias::Frozen);
    }
    plain.resolve();
    plain.router.force_balance = false;
    plain
}

fn as_list(model: &ModelConfig, has: impl Fn(usize) -> bool) -> LayerSet {
    let layers: Vec<bool> = (0..model.layers).map(has).collect();
    set_of(&layers)
}
