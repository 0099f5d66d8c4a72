//! OLMo 3, dense: OLMo 2 with windows in most layers.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    layer_lists::{FULL, SLIDING, layer_types, sliding_layers},
    names::{DECODER, POST_NORMS},
    olmo2::{self, Olmo2},
    rope_keys::{RopeRules, Scalings},
};
use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};
use serde_json::json;

const PARAMETERS: &str = "rope_parameters";
/// Theta if no key says it.
const THETA: f64 = 5e5;

pub(super) struct Olmo3;

impl FamilyRules for Olmo3 {
    fn model_type(&self) -> &'static str {
        "olmo3"
    }

    fn architecture(&self) -> &'static str {
        "Olmo3ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        check_rope(config)?;
        let rope = RopeRules {
            scalings: Scalings::None,
            ..RopeRules::with_theta(THETA)
        };
        let defaults = Defaults {
            rope,
            ..Defaults::default()
        };
        let mut model = olmo2::read_blocks(config, defaults)?;
        let slides = sliding_layers(config, model.layers)?;
        let size = decoder_keys::required_window(config, 4096)?;
        decoder_keys::set_window(&mut model, size, |layer| match &slides {
            Some(slides) => slides[layer],
            None => !(layer + 1).is_multiple_of(4),
        });
        model.ffn = Some(config.require(&["intermediate_size"])?);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        Olmo2.write(model, config);
        config.set("sliding_window", decoder_keys::window_size(model));
        config.set("layer_types", layer_types(model));
        if let Some(parameters) = config.keys().get(PARAMETERS).cloned() {
            let both = json!({FULL: parameters, SLIDING: parameters});
            config.set(PARAMETERS, both);
        }
    }

    fn readers_without_head_dim(&self) -> &'static [&'static str] {
        Olmo2.readers_without_head_dim()
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![POST_NORMS, DECODER]
    }
}

/// Refuses keys that transformers obeys in layers without a window only: moerun has one rotary
/// embedding in all layers.
///
/// # Errors
/// If there is such a key.
fn check_rope(config: &ConfigJson) -> Result<(), Error> {
    let only = "transformers obeys it in layers without a window only, and moerun needs the same \
                rotary embedding in all";
    let scaling = config.section("rope_scaling")?;
    if scaling.is_some_and(|scaling| !scaling.keys().is_empty()) {
        return Err(config.error("rope_scaling", only));
    }
    let mut has_theta = false;
    if let Some(parameters) = config.section(PARAMETERS)? {
        has_theta = true;
        for kind in [FULL, SLIDING] {
            let reason = "moerun needs it, the same as for the other layers";
            let section = parameters.section(kind)?;
            let section = section.ok_or_else(|| parameters.error(kind, reason))?;
            has_theta &= section.has("rope_theta");
        }
    }
    if !has_theta && config.get_or("rope_theta", THETA)? != THETA {
        return Err(config.error("rope_theta", only));
    }
    Ok(())
}
