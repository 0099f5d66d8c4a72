//! Qwen3 (arXiv 2505.09388), dense: norms of queries and keys per head.

use super::{
    FamilyRules,
    decoder_keys::{self, Defaults},
    layer_lists::{layer_types, sliding_layers},
    names::DECODER,
};
use crate::{
    Error,
    config::{AttentionBias, ModelConfig, QkNorm},
    hub::{config_json::ConfigJson, rule::Names},
};

pub(super) struct Qwen3;

impl FamilyRules for Qwen3 {
    fn model_type(&self) -> &'static str {
        "qwen3"
    }

    fn architecture(&self) -> &'static str {
        "Qwen3ForCausalLM"
    }

    fn read(&self, config: &ConfigJson) -> Result<ModelConfig, Error> {
        let defaults = Defaults {
            kv_heads: Some(32),
            head_dim: Some(128),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        model.qk_norm = QkNorm::Head;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        let first = config.get_or("max_window_layers", 28)?;
        read_window(config, &mut model, |layer| layer >= first)?;
        model.ffn = Some(config.require(&["intermediate_size"])?);
        Ok(model)
    }

    fn write(&self, model: &ModelConfig, config: &mut ConfigJson) {
        decoder_keys::write(model, config);
        decoder_keys::write_bias(model, config);
        write_window(model, config);
        config.set("intermediate_size", model.ffn);
    }

    fn names(&self, _model: &ModelConfig) -> Vec<Names> {
        vec![DECODER]
    }
}

/// Size of the window if no key says it.
pub(super) const WINDOW: usize = 4096;

/// Reads the window of families with `use_sliding_window`. Layers have it for which `slides` is
/// true, unless `layer_types` names them.
///
/// # Errors
/// If a key has another type, a layer is of an unknown kind, or `layer_types` names layers although
/// there is no window.
pub(super) fn read_window(
    config: &ConfigJson,
    model: &mut ModelConfig,
    slides: impl Fn(usize) -> bool,
) -> Result<(), Error> {
    let named = sliding_layers(config, model.layers)?;
    let has_window = config.get_or("use_sliding_window", false)?;
    let size = config.nullable("sliding_window", Some(WINDOW))?;
    let size = size.filter(|_| has_window);
    match (size, named) {
        (Some(size), Some(named)) => decoder_keys::set_window(model, size, |layer| named[layer]),
        (Some(size), None) => decoder_keys::set_window(model, size, slides),
        (None, Some(named)) if named.contains(&true) => {
            let reason = "layers have a window, but use_sliding_window or sliding_window is off";
            return Err(config.error("layer_types", reason));
        }
        (None, _) => {}
    }
    Ok(())
}

/// Sets the keys that [`read_window`] reads.
pub(super) fn write_window(model: &ModelConfig, config: &mut ConfigJson) {
    let size = decoder_keys::window_size(model);
    config.set("use_sliding_window", size.is_some());
    config.set("sliding_window", size);
    config.set("layer_types", layer_types(model));
}
