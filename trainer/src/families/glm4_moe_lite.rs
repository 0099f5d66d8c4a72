//! GLM-4.7-Flash: latent attention, and the experts of GLM-4.5.

use super::{
    FamilyRules,
    deepseek_keys::{self, ExpertDefaults, RouterDefaults},
    deepseek_v3::latent_names,
    layer_lists::{moe_layers, set_moe_layers},
    moe_keys,
    names::is_of_later_layer,
};
use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};

const DENSE: &str = "dense";
const SPARSE: &str = "sparse";

pub(super) struct Glm4MoeLite;

impl FamilyRules for Glm4MoeLite {
    fn model_type(&self) -> &'static str {
        "glm4_moe_lite"
    }

    fn architecture(&self) -> &'static str {
        "Glm4MoeLiteForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let mut model = deepseek_keys::read_latent(config, 768)?;
        let defaults = RouterDefaults {
            scale: 1.8,
            ..RouterDefaults::default()
        };
        let experts = ExpertDefaults {
            dense: 1,
            shared: Some(1),
        };
        deepseek_keys::read_sigmoid_experts(config, &mut model, defaults, experts)?;
        let types: Option<Vec<String>> = config.get("mlp_layer_types")?;
        if let Some(types) = types {
            let known = types.iter().all(|kind| kind == DENSE || kind == SPARSE);
            if types.len() != model.layers || !known {
                let reason = format!("it needs {} entries, {DENSE} or {SPARSE}", model.layers);
                return Err(config.error("mlp_layer_types", reason));
            }
            let layers: Vec<bool> = types.iter().map(|kind| kind == SPARSE).collect();
            set_moe_layers(&mut model, &layers);
            if layers.contains(&false) {
                model.ffn = Some(config.require(&["intermediate_size"])?);
            }
        } else if moe_keys::leading_dense_layers(&model) != 1 {
            let reason = "transformers makes the first layer dense without mlp_layer_types, \
                          whatever it says";
            return Err(config.error("first_k_dense_replace", reason));
        }
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        deepseek_keys::write_latent(model, config);
        deepseek_keys::write_experts(model, config);
        config.set("moe_layer_freq", 1);
        let kind = |is_moe: bool| if is_moe { SPARSE } else { DENSE };
        let types: Vec<&str> = moe_layers(model).into_iter().map(kind).collect();
        config.set("mlp_layer_types", types);
    }

    fn names(&self, model: &ModelConfig) -> Vec<Names> {
        latent_names(model)
    }

    fn carries(&self, name: &str, model: &ModelConfig) -> bool {
        is_of_later_layer(name, model.layers)
    }
}
