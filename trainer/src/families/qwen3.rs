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
            head_dim: Some(128),
            ..Defaults::default()
        };
        let mut model = decoder_keys::read(config, defaults)?;
        model.qk_norm = QkNorm::Head;
        decoder_keys::read_bias(config, &mut model, AttentionBias::All)?;
        read_window(config, &mut model)?;
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

/// Reads the window of families with `use_sliding_window`, which layers from `max_window_layers` on
/// have, unless `layer_types` names them.
///
/// # Errors
/// If a key has another type, or a layer is of an unknown kind.
pub(super) fn read_window(config: &ConfigJson, model: &mut ModelConfig) -> Result<(), Error> {
    let size: Option<usize> = config.get("sliding_window")?;
    let slides = config.get_or("use_sliding_window", false)?;
    let Some(size) = size.filter(|_| slides) else {
        return Ok(());
    };
    let slides = match sliding_layers(config, model.layers)? {
        Some(slides) => slides,
        None => {
            let first: usize = config.get_or("max_window_layers", 28)?;
            (0..model.layers).map(|layer| layer >= first).collect()
        }
    };
    decoder_keys::set_window(model, size, |layer| slides[layer]);
    Ok(())
}

/// Sets the keys that [`read_window`] reads.
pub(super) fn write_window(model: &ModelConfig, config: &mut ConfigJson) {
    let size = decoder_keys::window_size(model);
    config.set("use_sliding_window", size.is_some());
    config.set("sliding_window", size);
    config.set("layer_types", layer_types(model));
}
