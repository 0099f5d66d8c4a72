//! MiniMax-M2: norms over all queries and all keys, partial rotary embedding, sigmoid router.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    moe_keys::{self, Sizes},
    names::{BLOCK_SPARSE_EXPERTS, DECODER, is_of_later_layer},
    rope_keys::{self, RopeRules},
};
use crate::{
    Error,
    config::{ModelConfig, QkNorm},
    hub::{
        config_json::ConfigJson,
        rule::{Names, named},
    },
};
use serde_json::json;

const BIAS: Names = &[(
    "moe.bias",
    &[&[named("block_sparse_moe.e_score_correction_bias")]],
)];

/// Width of a head if no key says it.
const HEAD_DIM: usize = 128;

pub(super) struct MiniMaxM2;

impl FamilyRules for MiniMaxM2 {
    fn model_type(&self) -> &'static str {
        "minimax_m2"
    }

    fn architecture(&self) -> &'static str {
        "MiniMaxM2ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("use_qk_norm", &[json!(true)])?;
        config.expect("qk_norm_type", &[json!("per_layer")])?;
        config.expect("scoring_func", &[json!("sigmoid")])?;
        config.expect("use_routing_bias", &[json!(true)])?;
        config.expect("shared_intermediate_size", &[json!(0)])?;
        let width: usize = config.get_or("head_dim", HEAD_DIM)?;
        let rotary: usize = config.get_or("rotary_dim", width)?;
        let rope = RopeRules {
            fraction: Some(rotary as f64 / width.max(1) as f64),
            ..RopeRules::with_theta(5e6)
        };
        let defaults = Defaults {
            rope,
            kv_heads: Some(8),
            head_dim: Some(HEAD_DIM),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        model.qk_norm = QkNorm::Full;
        let sizes = Sizes {
            experts: config.require(&["num_local_experts"])?,
            top_k: config.require(&["num_experts_per_tok"])?,
            ffn: config.require(&["intermediate_size"])?,
        };
        model.moe = Some(moe_keys::section(sizes, moe_keys::sigmoid(true, 1.0)));
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        if let Some(moe) = &model.moe {
            moe_keys::write_experts(moe, config);
            config.set("intermediate_size", moe.ffn);
        }
        rope_keys::write_fraction(model, config);
        let width = model.attention(0).rotary_part().width;
        config.set("rotary_dim", model.rope.width(width));
        config.set("use_qk_norm", true);
        config.set("qk_norm_type", "per_layer");
        config.set("scoring_func", "sigmoid");
        config.set("use_routing_bias", true);
        config.set("shared_intermediate_size", 0);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![BIAS, BLOCK_SPARSE_EXPERTS, DECODER]
    }

    fn carries(&self, name: &str, model: &ModelConfig) -> bool {
        is_of_later_layer(name, model.layers)
    }
}
