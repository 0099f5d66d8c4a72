//! Qwen3 MoE (arXiv 2505.09388): norms of queries and keys per head, softmax router.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    layer_lists::{moe_layers, set_moe_layers},
    moe_keys::{self, Sizes},
    names::{DECODER, MLP_EXPERTS},
    qwen3::WINDOW,
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, QkNorm},
    hub::{config_json::ConfigJson, rule::Names},
};
use std::collections::BTreeSet;

pub(super) struct Qwen3Moe;

impl FamilyRules for Qwen3Moe {
    fn model_type(&self) -> &'static str {
        "qwen3_moe"
    }

    fn architecture(&self) -> &'static str {
        "Qwen3MoeForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            kv_heads: Some(4),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        model.qk_norm = QkNorm::Head;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        if config.get_or("use_sliding_window", false)?
            && let Some(size) = config.nullable("sliding_window", Some(WINDOW))?
        {
            decoder_keys::set_window(&mut model, size, |_| true);
        }
        let sizes = Sizes {
            // If both are there, transformers takes the first.
            experts: config.require(&["num_local_experts", "num_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["moe_intermediate_size"])?,
        };
        let router = moe_keys::softmax(config.get_or("norm_topk_prob", false)?);
        model.moe = Some(moe_keys::section(sizes, router));
        set_sparse_layers(config, &mut model)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        config.set(
            "use_sliding_window",
            decoder_keys::window_size(model).is_some(),
        );
        config.set("sliding_window", decoder_keys::window_size(model));
        config.set("intermediate_size", model.ffn.unwrap_or(model.hidden));
        if let Some(moe) = &model.moe {
            moe_keys::write_experts(moe, config);
            config.set("moe_intermediate_size", moe.ffn);
            config.set("norm_topk_prob", moe_keys::normalizes(moe));
        }
        write_sparse_layers(model, config);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![MLP_EXPERTS, DECODER]
    }
}

/// Reads the layers with experts of the Qwen families: one in `decoder_sparse_step`, except for
/// `mlp_only_layers`.
///
/// # Errors
/// If a key has another type.
pub(super) fn set_sparse_layers(config: &ConfigJson, model: &mut ModelConfig) -> Result<(), Error> {
    let step: usize = config.get_or("decoder_sparse_step", 1)?;
    let dense: BTreeSet<usize> = config.get_or("mlp_only_layers", BTreeSet::new())?;
    let is_sparse =
        |layer: usize| !dense.contains(&layer) && step > 0 && (layer + 1).is_multiple_of(step);
    let sparse: Vec<bool> = (0..model.layers).map(is_sparse).collect();
    if sparse.contains(&false) {
        model.ffn = Some(config.require(&["intermediate_size"])?);
    }
    set_moe_layers(model, &sparse);
    Ok(())
}

/// Sets the keys that [`set_sparse_layers`] reads.
pub(super) fn write_sparse_layers(model: &ModelConfig, config: &mut ConfigJson) {
    let layers = moe_layers(model);
    let dense = layers.iter().enumerate().filter(|(_, is_moe)| !**is_moe);
    let dense: Vec<usize> = dense.map(|(layer, _)| layer).collect();
    config.set("decoder_sparse_step", 1);
    config.set("mlp_only_layers", dense);
}
