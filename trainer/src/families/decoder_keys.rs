//! Keys of `config.json` that all families have: sizes, heads, norms and the output layer.

use super::{
    layer_lists::set_of,
    rope_keys::{self, RopeRules},
};
use crate::{
    Error,
    config::{AttentionBias, AttentionConfig, GroupedConfig, ModelConfig, WindowConfig},
    hub::config_json::ConfigJson,
};
use serde_json::json;

/// Values of absent keys, which each family's class decides.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Defaults {
    pub(super) rope: RopeRules,
    pub(super) tied: bool,
    /// Heads of keys and values; `None` if there are as many as of queries.
    pub(super) kv_heads: Option<usize>,
    /// Width of a head; `None` if it follows from `hidden_size`.
    pub(super) head_dim: Option<usize>,
}

/// Reads a decoder with grouped-query attention and no layer's feed-forward network.
///
/// # Errors
/// If a key is missing or has a value that moerun cannot compute.
pub(super) fn read(config: &ConfigJson, defaults: Defaults) -> Result<ModelConfig, Error> {
    let mut model = read_without_heads(config, defaults)?;
    let kv_heads = config.nullable("num_key_value_heads", defaults.kv_heads)?;
    model.kv_heads = Some(kv_heads.unwrap_or(model.heads));
    if model.heads == 0 {
        return Err(config.error("num_attention_heads", "a model has at least one head"));
    }
    let head_dim = match config.nullable("head_dim", defaults.head_dim)? {
        Some(head_dim) => head_dim,
        None if !model.hidden.is_multiple_of(model.heads) => {
            return Err(config.error(
                "head_dim",
                format!(
                    "it is missing, and hidden_size {} is not a multiple of num_attention_heads {}",
                    model.hidden, model.heads
                ),
            ));
        }
        None => model.hidden / model.heads,
    };
    model.head_dim = Some(head_dim);
    let rotating = model.rope.fraction * head_dim as f64;
    if rotating.floor() as usize != model.rope.width(head_dim) {
        let reason = format!("it makes {rotating} of {head_dim} elements of a head rotate");
        return Err(config.error("partial_rotary_factor", reason));
    }
    Ok(model)
}

/// Reads what a decoder has besides the heads of its attention.
///
/// # Errors
/// As [`read`].
pub(super) fn read_without_heads(
    config: &ConfigJson,
    defaults: Defaults,
) -> Result<ModelConfig, Error> {
    config.expect("hidden_act", &[json!("silu")])?;
    let mut model = ModelConfig::new(
        config.require(&["vocab_size"])?,
        config.require(&["hidden_size"])?,
        config.require(&["num_hidden_layers"])?,
        config.require(&["num_attention_heads"])?,
    );
    model.norm_eps = config.require(&["rms_norm_eps"])?;
    model.tie_embeddings = config.get_or("tie_word_embeddings", defaults.tied)?;
    model.init_std = config.get_or("initializer_range", model.init_std)?;
    (model.rope_theta, model.rope) = rope_keys::read(config, defaults.rope)?;
    Ok(model)
}

/// Sets the keys that [`read`] reads.
pub(super) fn write(model: &ModelConfig, config: &mut ConfigJson) {
    let heads = model.attention(0).head_keys();
    config.set("vocab_size", model.vocab_size);
    config.set("hidden_size", model.hidden);
    config.set("num_hidden_layers", model.layers);
    config.set("num_attention_heads", model.heads);
    if let (Some(kv_heads), Some(head_dim)) = (heads.kv_heads, heads.head_dim) {
        config.set("num_key_value_heads", kv_heads);
        config.set("head_dim", head_dim);
    }
    config.set("hidden_act", "silu");
    config.set("rms_norm_eps", model.norm_eps);
    config.set("tie_word_embeddings", model.tie_embeddings);
    config.set("initializer_range", model.init_std);
    config.set("attention_dropout", 0.0);
    config.set("use_cache", true);
    rope_keys::write(model, config);
}

/// Returns the section of grouped-query attention, which it adds if there is none.
pub(super) fn grouped(model: &mut ModelConfig) -> &mut GroupedConfig {
    if let AttentionConfig::Latent(_) = model.attention {
        model.attention = AttentionConfig::default();
    }
    match &mut model.attention {
        AttentionConfig::Grouped(config) => config,
        AttentionConfig::Latent(_) => unreachable!("the section was replaced"),
    }
}

/// Returns the section of grouped-query attention, if the model has it.
pub(super) fn grouped_of(model: &ModelConfig) -> Option<&GroupedConfig> {
    match &model.attention {
        AttentionConfig::Grouped(config) => Some(config),
        AttentionConfig::Latent(_) => None,
    }
}

/// Reads the key `attention_bias` of families in which it means these biases.
///
/// # Errors
/// If it is no boolean.
pub(super) fn read_bias(
    config: &ConfigJson,
    model: &mut ModelConfig,
    biases: AttentionBias,
) -> Result<(), Error> {
    if config.get_or("attention_bias", false)? {
        grouped(model).bias = biases;
    }
    Ok(())
}

/// Sets the key `attention_bias`.
pub(super) fn write_bias(model: &ModelConfig, config: &mut ConfigJson) {
    let bias = grouped_of(model).map(|grouped| grouped.bias);
    config.set(
        "attention_bias",
        bias.unwrap_or_default() != AttentionBias::None,
    );
}

/// Sets the window of the layers that `slides` selects. Without any there is no window.
pub(super) fn set_window(model: &mut ModelConfig, size: usize, slides: impl Fn(usize) -> bool) {
    let slides: Vec<bool> = (0..model.layers).map(slides).collect();
    let window = slides.contains(&true).then(|| WindowConfig {
        size,
        layers: set_of(&slides),
    });
    grouped(model).window = window;
}

/// Reads the key `sliding_window`. If it is absent, `absent` is the size.
///
/// # Errors
/// If it is null or no number.
pub(super) fn required_window(config: &ConfigJson, absent: usize) -> Result<usize, Error> {
    let size = config.nullable("sliding_window", Some(absent))?;
    size.ok_or_else(|| config.error("sliding_window", "it is null, and layers have a window"))
}

/// Returns the size of the window, if layers have one.
pub(super) fn window_size(model: &ModelConfig) -> Option<usize> {
    let window = grouped_of(model)?.window.as_ref()?;
    Some(window.size)
}
