//! Lists with an entry per layer, as `config.json` has them, and moerun's sets of layers.

use crate::{
    Error,
    config::{LayerSet, ModelConfig},
    hub::config_json::ConfigJson,
};

/// A layer with a window in the key `layer_types`.
pub(super) const SLIDING: &str = "sliding_attention";
/// A layer without one.
pub(super) const FULL: &str = "full_attention";

/// Returns the set of the layers whose entry is true.
pub(super) fn set_of(layers: &[bool]) -> LayerSet {
    if !layers.contains(&false) {
        return LayerSet::ALL;
    }
    if !layers.contains(&true) {
        return LayerSet::NONE;
    }
    let chosen = layers.iter().enumerate().filter(|(_, is_in)| **is_in);
    LayerSet::Layers(chosen.map(|(layer, _)| layer).collect())
}

/// Reads the key `layer_types`: true for layers with a window.
///
/// # Errors
/// If a layer is of another kind, or their number is not that of the layers.
pub(super) fn sliding_layers(
    config: &ConfigJson,
    layers: usize,
) -> Result<Option<Vec<bool>>, Error> {
    let Some(types) = config.get::<Vec<String>>("layer_types")? else {
        return Ok(None);
    };
    if types.len() != layers {
        let reason = format!("it has {} entries for {layers} layers", types.len());
        return Err(config.error("layer_types", reason));
    }
    let is_sliding = |kind: &String| match kind.as_str() {
        SLIDING => Ok(true),
        FULL => Ok(false),
        other => Err(config.error(
            "layer_types",
            format!("moerun has no layers of the kind {other:?}"),
        )),
    };
    let sliding: Result<Vec<bool>, Error> = types.iter().map(is_sliding).collect();
    sliding.map(Some)
}

/// Returns the value of the key `layer_types`.
pub(super) fn layer_types(model: &ModelConfig) -> Vec<&'static str> {
    let kind = |layer| match model.attention(layer).core_plan().window {
        Some(_) => SLIDING,
        None => FULL,
    };
    (0..model.layers).map(kind).collect()
}

/// Makes the layers whose entry is true MoE layers, in the form that a user would choose.
pub(super) fn set_moe_layers(model: &mut ModelConfig, layers: &[bool]) {
    let dense = layers.iter().take_while(|is_moe| !**is_moe).count();
    let rest = &layers[dense..];
    if rest.contains(&false) {
        model.dense_layers = 0;
        if let Some(moe) = &mut model.moe {
            moe.layers = Some(set_of(layers));
        }
    } else {
        model.dense_layers = dense;
    }
}

/// Returns the layers that are MoE layers.
pub(super) fn moe_layers(model: &ModelConfig) -> Vec<bool> {
    let is_moe = |layer| model.moe_config(layer).is_some();
    (0..model.layers).map(is_moe).collect()
}
