//! dots.llm1 (arXiv 2506.05767): norms of queries and keys per head, sigmoid router.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    deepseek_keys::{self, ExpertDefaults, RouterDefaults},
    layer_lists::{layer_types, sliding_layers},
    names::{DECODER, DEEPSEEK_EXPERTS, MLP_EXPERTS},
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, QkNorm},
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct Dots1;

impl FamilyRules for Dots1 {
    fn model_type(&self) -> &'static str {
        "dots1"
    }

    fn architecture(&self) -> &'static str {
        "Dots1ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            kv_heads: Some(32),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        model.qk_norm = QkNorm::Head;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        if let Some(size) = config.nullable("sliding_window", Some(4096))? {
            let first: usize = config.get_or("max_window_layers", 62)?;
            let slides = sliding_layers(config, model.layers)?;
            decoder_keys::set_window(&mut model, size, |layer| match &slides {
                Some(slides) => slides[layer],
                None => layer >= first,
            });
        }
        let defaults = RouterDefaults {
            normalize: false,
            ..RouterDefaults::default()
        };
        let experts = ExpertDefaults {
            dense: 0,
            shared: None,
        };
        deepseek_keys::read_sigmoid_experts(config, &mut model, defaults, experts)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        config.set("sliding_window", decoder_keys::window_size(model));
        config.set("layer_types", layer_types(model));
        deepseek_keys::write_experts(model, config);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![DEEPSEEK_EXPERTS, MLP_EXPERTS, DECODER]
    }
}
