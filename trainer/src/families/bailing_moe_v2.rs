//! Ling 2 and Ring 2: one matrix for queries, keys and values; groups of experts.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    deepseek_keys,
    moe_keys::{self, Sizes},
    names::{DECODER, DEEPSEEK_EXPERTS, MLP_EXPERTS, is_of_later_layer},
    rope_keys::{self, RopeRules},
};
use crate::{
    Error,
    config::{ModelConfig, QkNorm},
    hub::{
        config_json::ConfigJson,
        rule::{Names, RowOrder, named},
    },
};
use serde_json::{Value, json};

const NAMES: Names = &[
    ("embedding", &[&[named("model.word_embeddings.weight")]]),
    (
        "attention.query",
        &[&[named("attention.query_key_value.weight").ordered(RowOrder::FusedQueries)]],
    ),
    (
        "attention.key",
        &[&[named("attention.query_key_value.weight").ordered(RowOrder::FusedKeys)]],
    ),
    (
        "attention.value",
        &[&[named("attention.query_key_value.weight").ordered(RowOrder::FusedValues)]],
    ),
    ("attention.output", &[&[named("attention.dense.weight")]]),
    (
        "attention.query_norm",
        &[&[named("attention.query_layernorm.weight")]],
    ),
    (
        "attention.key_norm",
        &[&[named("attention.key_layernorm.weight")]],
    ),
    ("moe.bias", &[&[named("mlp.gate.expert_bias")]]),
];

pub(super) struct BailingMoeV2;

impl FamilyRules for BailingMoeV2 {
    fn model_type(&self) -> &'static str {
        "bailing_moe"
    }

    fn architecture(&self) -> &'static str {
        "BailingMoeV2ForCausalLM"
    }

    fn describes(&self, model_type: &str, architecture: &str) -> bool {
        architecture == self.architecture() || model_type == "bailing_moe_v2"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("use_bias", &[json!(false)])?;
        config.expect("use_qkv_bias", &[json!(false)])?;
        config.expect("use_rmsnorm", &[json!(true)])?;
        config.expect("score_function", &[json!("sigmoid")])?;
        config.expect("moe_router_enable_expert_bias", &[json!(true)])?;
        // Its class comes with each folder, so the defaults are not known.
        for key in ["num_key_value_heads", "head_dim", "use_qk_norm"] {
            config.require::<Value>(&[key])?;
        }
        let rope = RopeRules {
            fraction: Some(1.0),
            ..RopeRules::with_theta(6e5)
        };
        let defaults = Defaults {
            rope,
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        if config.get_or("use_qk_norm", true)? {
            model.qk_norm = QkNorm::Head;
        }
        let normalize = config.get_or("norm_topk_prob", true)?;
        let scale = config.get_or("routed_scaling_factor", 1.0)?;
        let mut router = moe_keys::sigmoid(normalize, scale);
        router.groups = config.require(&["n_group"])?;
        router.top_groups = config.require(&["topk_group"])?;
        let sizes = Sizes {
            experts: config.require(&["num_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["moe_intermediate_size"])?,
        };
        let mut moe = moe_keys::section(sizes, router);
        let shared = moe_keys::shared_experts(config, "num_shared_experts", None)?;
        let width: usize = config.get_or("moe_shared_expert_intermediate_size", moe.ffn)?;
        moe.shared_ffn = Some(shared * width);
        model.moe = Some(moe);
        let dense = config.require(&["first_k_dense_replace"])?;
        deepseek_keys::set_dense_layers(config, &mut model, dense)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        rope_keys::write_fraction(model, config);
        deepseek_keys::write_experts(model, config);
        if let Some(moe) = &model.moe {
            let width = moe_keys::shared_width(moe);
            config.set("num_experts", moe.experts);
            config.set("num_shared_experts", usize::from(width > 0));
            config.set("moe_shared_expert_intermediate_size", width);
        }
        config.set("use_qk_norm", model.qk_norm == QkNorm::Head);
        config.set("embedding_dropout", 0.0);
        config.set("use_bias", false);
        config.set("use_qkv_bias", false);
        config.set("use_rmsnorm", true);
        config.set("score_function", "sigmoid");
        config.set("moe_router_enable_expert_bias", true);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![NAMES, DEEPSEEK_EXPERTS, MLP_EXPERTS, DECODER]
    }

    fn carries(&self, name: &str, model: &ModelConfig) -> bool {
        is_of_later_layer(name, model.layers)
    }
}
