//! FlexOlmo (arXiv 2507.07024): the blocks of OLMo 2 with the experts of OLMoE.

use super::{
    FamilyRules,
    decoder_keys::Defaults,
    names::{DECODER, MLP_EXPERTS, POST_NORMS},
    olmo2,
    olmoe::{self, Olmoe},
    rope_keys::RopeRules,
};
use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct FlexOlmo;

impl FamilyRules for FlexOlmo {
    fn model_type(&self) -> &'static str {
        "flex_olmo"
    }

    fn architecture(&self) -> &'static str {
        "FlexOlmoForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            rope: RopeRules::with_theta(5e5),
            ..Defaults::default()
        };
        let mut model = olmo2::read_blocks(config, defaults)?;
        model.moe = Some(olmoe::read_experts(config)?);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        Olmoe.write(model, config);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![POST_NORMS, MLP_EXPERTS, DECODER]
    }
}
