//! Kimi-K2 (arXiv 2507.20534): DeepSeek-V3 with other sizes, and code of its own for transformers.

use super::{FamilyRules, deepseek_v3::DeepseekV3};
use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct KimiK2;

impl FamilyRules for KimiK2 {
    fn model_type(&self) -> &'static str {
        "kimi_k2"
    }

    fn architecture(&self) -> &'static str {
        DeepseekV3.architecture()
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        DeepseekV3.read(config)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        DeepseekV3.write(model, config);
    }

    fn names(&self, model: &ModelConfig) -> Vec<Names> {
        DeepseekV3.names(model)
    }

    fn carries(&self, name: &str, model: &ModelConfig) -> bool {
        DeepseekV3.carries(name, model)
    }
}
