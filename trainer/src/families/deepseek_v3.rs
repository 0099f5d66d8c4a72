//! DeepSeek-V3 and R1 (arXiv 2412.19437), Moonlight: latent attention, sigmoid router with groups.

use super::{
    FamilyRules,
    deepseek_keys::{self, ExpertDefaults, RouterDefaults},
    names::{DECODER, DEEPSEEK_EXPERTS, DIRECT_QUERY, LATENT, MLP_EXPERTS, is_of_later_layer},
};
use crate::{
    Error,
    config::{AttentionConfig, ModelConfig},
    hub::{config_json::ConfigJson, rule::Names},
};
use serde_json::json;

pub(super) struct DeepseekV3;

impl FamilyRules for DeepseekV3 {
    fn model_type(&self) -> &'static str {
        "deepseek_v3"
    }

    fn architecture(&self) -> &'static str {
        "DeepseekV3ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("scoring_func", &[json!("sigmoid")])?;
        config.expect("topk_method", &[json!("noaux_tc")])?;
        let mut model = deepseek_keys::read_latent(config, 1536)?;
        let defaults = RouterDefaults {
            scale: 2.5,
            groups: 8,
            top_groups: 4,
            ..RouterDefaults::default()
        };
        let experts = ExpertDefaults {
            dense: 3,
            shared: Some(1),
        };
        deepseek_keys::read_sigmoid_experts(config, &mut model, defaults, experts)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        deepseek_keys::write_latent(model, config);
        deepseek_keys::write_experts(model, config);
        config.set("scoring_func", "sigmoid");
        config.set("topk_method", "noaux_tc");
        config.set("moe_layer_freq", 1);
    }

    fn names(&self, model: &ModelConfig) -> Vec<Names> {
        latent_names(model)
    }

    fn carries(&self, name: &str, model: &ModelConfig) -> bool {
        is_of_later_layer(name, model.layers)
    }
}

/// Returns the names of the DeepSeek families.
pub(super) fn latent_names(model: &ModelConfig) -> Vec<Names> {
    let mut names = vec![LATENT, DEEPSEEK_EXPERTS, MLP_EXPERTS, DECODER];
    if let AttentionConfig::Latent(latent) = &model.attention
        && latent.query_rank.is_none()
    {
        names.insert(0, DIRECT_QUERY);
    }
    names
}
