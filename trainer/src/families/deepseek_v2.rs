//! DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax router without normalization.

use super::{
    FamilyRules,
    deepseek_keys::{self, ExpertDefaults},
    deepseek_v3::latent_names,
    moe_keys,
};
use crate::{
    Error,
    config::{ModelConfig, RouterConfig},
    hub::{config_json::ConfigJson, rule::Names},
};
use serde_json::json;

pub(super) struct DeepseekV2;

impl FamilyRules for DeepseekV2 {
    fn model_type(&self) -> &'static str {
        "deepseek_v2"
    }

    fn architecture(&self) -> &'static str {
        "DeepseekV2ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("scoring_func", &[json!("softmax")])?;
        // Readers differ in whether they obey it.
        config.expect("norm_topk_prob", &[json!(false)])?;
        config.expect(
            "topk_method",
            &[json!("greedy"), json!("group_limited_greedy")],
        )?;
        let mut model = deepseek_keys::read_latent(config, 1536)?;
        let mut router = RouterConfig {
            scale: config.get_or("routed_scaling_factor", 1.0)?,
            ..moe_keys::softmax(false)
        };
        let method: String = config.get_or("topk_method", "greedy".into())?;
        if method == "group_limited_greedy" {
            router.groups = config.require(&["n_group"])?;
            router.top_groups = config.require(&["topk_group"])?;
        }
        let experts = ExpertDefaults {
            dense: 0,
            shared: Some(2),
        };
        deepseek_keys::read_experts(config, &mut model, router, experts)?;
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        deepseek_keys::write_latent(model, config);
        config.remove("rope_interleave");
        deepseek_keys::write_experts(model, config);
        let groups = model.moe.as_ref().map_or(1, |moe| moe.router.groups);
        let method = if groups > 1 {
            "group_limited_greedy"
        } else {
            "greedy"
        };
        config.set("topk_method", method);
        config.set("scoring_func", "softmax");
        config.set("moe_layer_freq", 1);
        config.remove("num_nextn_predict_layers");
    }

    fn names(&self, model: &ModelConfig) -> Vec<Names> {
        latent_names(model)
    }
}
