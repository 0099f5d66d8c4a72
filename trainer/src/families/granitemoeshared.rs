//! Granite MoE with a shared expert.

use super::{
    FamilyRules,
    granitemoe::{EXPERTS, GraniteMoe},
    moe_keys::shared_width,
    names::DECODER,
};
use crate::{
    Error,
    config::ModelConfig,
    hub::{
        config_json::ConfigJson,
        rule::{Names, named},
    },
};

const SHARED: Names = &[
    (
        "moe.shared.gate_up",
        &[&[named("shared_mlp.input_linear.weight")]],
    ),
    (
        "moe.shared.down",
        &[&[named("shared_mlp.output_linear.weight")]],
    ),
];

pub(super) struct GraniteMoeShared;

impl FamilyRules for GraniteMoeShared {
    fn model_type(&self) -> &'static str {
        "granitemoeshared"
    }

    fn architecture(&self) -> &'static str {
        "GraniteMoeSharedForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let mut model = GraniteMoe.read(config)?;
        let width: usize = config.get_or("shared_intermediate_size", 0)?;
        if let Some(moe) = &mut model.moe {
            moe.shared_ffn = (width > 0).then_some(width);
        }
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        GraniteMoe.write(model, config);
        let width = model.moe.as_ref().map_or(0, shared_width);
        config.set("shared_intermediate_size", width);
    }

    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        &["vLLM", "SGLang"]
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![SHARED, EXPERTS, DECODER]
    }
}
