//! OLMo 3, dense: OLMo 2 with windows in most layers.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    layer_lists::{layer_types, sliding_layers},
    names::{DECODER, POST_NORMS},
    olmo2::{self, Olmo2},
};
use crate::{
    Error,
    config::ModelConfig,
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct Olmo3;

impl FamilyRules for Olmo3 {
    fn model_type(&self) -> &'static str {
        "olmo3"
    }

    fn architecture(&self) -> &'static str {
        "Olmo3ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let mut model = olmo2::read_blocks(config, Defaults::default())?;
        let slides = sliding_layers(config, model.layers)?;
        let size = config.get_or("sliding_window", 4096)?;
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
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![POST_NORMS, DECODER]
    }
}
