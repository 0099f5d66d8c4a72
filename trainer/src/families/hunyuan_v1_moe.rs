//! Hunyuan-A13B: norms of queries and keys after rotary embedding, shared expert.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    moe_keys::{self, Sizes},
    names::{DECODER, MLP_EXPERTS},
    rope_keys::{RopeRules, Scalings},
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, QkNorm},
    hub::{
        config_json::ConfigJson,
        rule::{Names, named},
    },
};
use serde::Deserialize;
use serde_json::json;

const NAMES: Names = &[
    (
        "attention.query_norm",
        &[&[named("self_attn.query_layernorm.weight")]],
    ),
    (
        "attention.key_norm",
        &[&[named("self_attn.key_layernorm.weight")]],
    ),
    ("moe.gate", &[&[named("mlp.gate.wg.weight")]]),
    (
        "moe.shared.gate_up",
        &[&[
            named("mlp.shared_mlp.gate_proj.weight"),
            named("mlp.shared_mlp.up_proj.weight"),
        ]],
    ),
    (
        "moe.shared.down",
        &[&[named("mlp.shared_mlp.down_proj.weight")]],
    ),
];

/// A number, or one for each layer.
#[derive(Deserialize)]
#[serde(untagged)]
enum PerLayer {
    All(usize),
    Each(Vec<usize>),
}

/// Reads a number that may be given for each layer.
///
/// # Errors
/// If layers differ.
fn uniform(config: &ConfigJson, key: &str) -> Result<Option<usize>, Error> {
    match config.get(key)? {
        None => Ok(None),
        Some(PerLayer::All(number)) => Ok(Some(number)),
        Some(PerLayer::Each(numbers)) => match numbers.split_first() {
            Some((first, rest)) if rest.iter().all(|number| number == first) => Ok(Some(*first)),
            _ => Err(config.error(key, "moerun needs the same number in all layers")),
        },
    }
}

pub(super) struct HunyuanV1Moe;

impl FamilyRules for HunyuanV1Moe {
    fn model_type(&self) -> &'static str {
        "hunyuan_v1_moe"
    }

    fn architecture(&self) -> &'static str {
        "HunYuanMoEV1ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("use_qk_norm", &[json!(true)])?;
        config.expect("use_mixed_mlp_moe", &[json!(true)])?;
        config.expect("use_cla", &[json!(false)])?;
        config.expect("mlp_bias", &[json!(false)])?;
        config.expect("moe_layer_num_skipped", &[json!(0)])?;
        let rope = RopeRules {
            scalings: Scalings::CommonAndAlpha,
            ..RopeRules::default()
        };
        let defaults = Defaults {
            rope,
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        model.qk_norm = QkNorm::HeadAfterRope;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        let ffn: usize = config.require(&["intermediate_size"])?;
        let missing = |key| config.error(key, "the key is missing");
        let sizes = Sizes {
            experts: uniform(config, "num_experts")?.ok_or_else(|| missing("num_experts"))?,
            top_k: uniform(config, "moe_topk")?.ok_or_else(|| missing("moe_topk"))?,
            ffn: uniform(config, "moe_intermediate_size")?.unwrap_or(ffn),
        };
        let mut moe = moe_keys::section(sizes, moe_keys::softmax(true));
        moe.shared_ffn = Some(ffn * uniform(config, "num_shared_expert")?.unwrap_or(1));
        model.moe = Some(moe);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        config.set("use_qk_norm", true);
        config.set("use_mixed_mlp_moe", true);
        if let Some(moe) = &model.moe {
            config.set("num_experts", moe.experts);
            config.set("moe_topk", moe.top_k);
            config.set("moe_intermediate_size", moe.ffn);
            config.set("intermediate_size", moe_keys::shared_width(moe));
            config.set("num_shared_expert", 1);
        }
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![NAMES, MLP_EXPERTS, DECODER]
    }
}
