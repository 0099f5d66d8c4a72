//! Llama (arXiv 2407.21783): the plain dense decoder.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    names::DECODER,
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig},
    hub::{config_json::ConfigJson, rule::Names},
};
use serde_json::json;

pub(super) struct Llama;

impl FamilyRules for Llama {
    fn model_type(&self) -> &'static str {
        "llama"
    }

    fn architecture(&self) -> &'static str {
        "LlamaForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        config.expect("mlp_bias", &[json!(false)])?;
        let mut model = decoder_keys::read(config, Defaults::default())?;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        model.ffn = Some(config.require(&["intermediate_size"])?);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        config.set("mlp_bias", false);
        config.set("intermediate_size", model.ffn);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![DECODER]
    }
}
