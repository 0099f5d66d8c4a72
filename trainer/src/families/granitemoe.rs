//! Granite MoE (arXiv 2408.13359): factors on embedding, branches, attention and logits.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    moe_keys::{self, Sizes},
    names::DECODER,
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, MultipliersConfig},
    hub::{
        config_json::ConfigJson,
        rule::{Names, named},
    },
};

/// Names of experts of the Granite families, in stacks.
pub(super) const EXPERTS: Names = &[
    (
        "moe.gate",
        &[&[named("block_sparse_moe.router.layer.weight")]],
    ),
    (
        "moe.experts.gate_up",
        &[&[named("block_sparse_moe.input_linear.weight").of_experts()]],
    ),
    (
        "moe.experts.down",
        &[&[named("block_sparse_moe.output_linear.weight").of_experts()]],
    ),
];

pub(super) struct GraniteMoe;

impl FamilyRules for GraniteMoe {
    fn model_type(&self) -> &'static str {
        "granitemoe"
    }

    fn architecture(&self) -> &'static str {
        "GraniteMoeForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let mut model = decoder_keys::read(config, Defaults::default())?;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        model.multipliers = MultipliersConfig {
            embedding: config.get_or("embedding_multiplier", 1.0)?,
            residual: config.get_or("residual_multiplier", 1.0)?,
            attention: Some(config.get_or("attention_multiplier", 1.0)?),
            logits: 1.0 / config.get_or("logits_scaling", 1.0)?,
        };
        let sizes = Sizes {
            experts: config.require(&["num_local_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["intermediate_size"])?,
        };
        // The softmax over the chosen logits is that over all, normalized.
        model.moe = Some(moe_keys::section(sizes, moe_keys::softmax(true)));
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        config.set("embedding_multiplier", model.embedding_factor());
        config.set("residual_multiplier", model.residual_factor());
        config.set("attention_multiplier", model.attention_scale());
        config.set("logits_scaling", model.logits_divisor());
        if let Some(moe) = &model.moe {
            moe_keys::write_experts(moe, config);
            config.set("intermediate_size", moe.ffn);
        }
    }

    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        &["vLLM", "SGLang"]
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![EXPERTS, DECODER]
    }
}
