//! GLM-4.5 to 4.7 (arXiv 2508.06471): partial rotary embedding, biases, sigmoid router.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    deepseek_keys::{self, ExpertDefaults, RouterDefaults},
    names::{DECODER, DEEPSEEK_EXPERTS, MLP_EXPERTS, is_of_later_layer},
    rope_keys::{self, RopeRules},
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, QkNorm},
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct Glm4Moe;

impl FamilyRules for Glm4Moe {
    fn model_type(&self) -> &'static str {
        "glm4_moe"
    }

    fn architecture(&self) -> &'static str {
        "Glm4MoeForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            rope: RopeRules {
                fraction: Some(0.5),
                ..RopeRules::default()
            },
            kv_heads: Some(8),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        decoder_keys::read_bias(config, &mut model, AttentionBias::Qkv)?;
        if config.get_or("use_qk_norm", false)? {
            model.qk_norm = QkNorm::Head;
        }
        let defaults = RouterDefaults::default();
        let experts = ExpertDefaults {
            dense: 1,
            shared: Some(1),
        };
        deepseek_keys::read_sigmoid_experts(config, &mut model, defaults, experts)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        config.set("use_qk_norm", model.qk_norm == QkNorm::Head);
        rope_keys::write_fraction(model, config);
        deepseek_keys::write_experts(model, config);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![DEEPSEEK_EXPERTS, MLP_EXPERTS, DECODER]
    }

    fn carries(&self, name: &str, model: &ModelConfig) -> bool {
        is_of_later_layer(name, model.layers)
    }
}
