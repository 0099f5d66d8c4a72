//! Qwen2 MoE (arXiv 2407.10671): biases of queries, keys and values, gated shared expert.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    moe_keys::{self, Sizes},
    names::{DECODER, MLP_EXPERTS},
    qwen3::{read_window, write_window},
    qwen3_moe::{set_sparse_layers, write_sparse_layers},
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig},
    hub::{
        config_json::ConfigJson,
        rule::{Names, named},
    },
};

const SHARED: Names = &[
    (
        "moe.shared.gate_up",
        &[&[
            named("mlp.shared_expert.gate_proj.weight"),
            named("mlp.shared_expert.up_proj.weight"),
        ]],
    ),
    (
        "moe.shared.down",
        &[&[named("mlp.shared_expert.down_proj.weight")]],
    ),
    (
        "moe.shared_gate",
        &[&[named("mlp.shared_expert_gate.weight")]],
    ),
];

pub(super) struct Qwen2Moe;

impl FamilyRules for Qwen2Moe {
    fn model_type(&self) -> &'static str {
        "qwen2_moe"
    }

    fn architecture(&self) -> &'static str {
        "Qwen2MoeForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            kv_heads: Some(16),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        if config.get_or("qkv_bias", true)? {
            decoder_keys::grouped(&mut model).bias = AttentionBias::Qkv;
        }
        let last = config.get_or("max_window_layers", 28)?;
        read_window(config, &mut model, |layer| {
            layer.is_multiple_of(2) && layer < last
        })?;
        let sizes = Sizes {
            experts: config.require(&["num_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["moe_intermediate_size"])?,
        };
        let router = moe_keys::softmax(config.get_or("norm_topk_prob", false)?);
        let mut moe = moe_keys::section(sizes, router);
        moe.shared_ffn = Some(config.require(&["shared_expert_intermediate_size"])?);
        moe.shared_gate = true;
        model.moe = Some(moe);
        set_sparse_layers(config, &mut model)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        let bias = decoder_keys::grouped_of(model).map(|grouped| grouped.bias);
        config.set("qkv_bias", bias == Some(AttentionBias::Qkv));
        write_window(model, config);
        config.set("intermediate_size", model.ffn.unwrap_or(model.hidden));
        if let Some(moe) = &model.moe {
            moe_keys::write_experts(moe, config);
            config.set("moe_intermediate_size", moe.ffn);
            config.set("norm_topk_prob", moe_keys::normalizes(moe));
            config.set(
                "shared_expert_intermediate_size",
                moe_keys::shared_width(moe),
            );
        }
        write_sparse_layers(model, config);
    }

    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        &["vLLM", "SGLang"]
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![SHARED, MLP_EXPERTS, DECODER]
    }
}
