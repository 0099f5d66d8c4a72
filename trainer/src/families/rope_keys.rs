//! Keys of `config.json` about rotary position embedding.
//!
//! Version 5 of transformers writes `rope_parameters`; earlier ones wrote `rope_theta` and
//! `rope_scaling`. Both are read, and both are written, because readers of each exist.

use crate::{
    Error,
    config::{ModelConfig, RopeConfig, RopeScaling},
    hub::config_json::ConfigJson,
    model::rope_scaling::{
        DynamicScaling, LinearScaling, Llama3Scaling, LongropeScaling, NtkAlphaScaling, YarnScaling,
    },
};
use serde_json::{Map, Value, json};

/// Values of absent keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeDefaults {
    pub(super) theta: f64,
    /// Part of a head that rotates.
    pub(super) fraction: f64,
}

/// Reads theta and the section `model.rope`.
///
/// # Errors
/// If the kind of scaling is unknown, or a key of it is missing.
pub(super) fn read(
    config: &ConfigJson,
    defaults: RopeDefaults,
) -> Result<(f64, RopeConfig), Error> {
    let scaling = config.section("rope_scaling")?;
    let parameters = match scaling.filter(|scaling| !scaling.keys().is_empty()) {
        Some(scaling) => Some(scaling),
        None => uniform(config.section("rope_parameters")?)?,
    };
    let Some(parameters) = parameters else {
        let theta = config.get_or("rope_theta", defaults.theta)?;
        let fraction = config.get_or("partial_rotary_factor", defaults.fraction)?;
        return Ok((theta, rope(fraction, None)));
    };
    let theta = match parameters.get("rope_theta")? {
        Some(theta) => theta,
        None => config.get_or("rope_theta", defaults.theta)?,
    };
    let fraction = match parameters.get("partial_rotary_factor")? {
        Some(fraction) => fraction,
        None => config.get_or("partial_rotary_factor", defaults.fraction)?,
    };
    let scaling = read_scaling(config, &parameters)?;
    Ok((theta, rope(fraction, scaling)))
}

/// Returns the one section of parameters that are given for each kind of layer.
fn uniform(parameters: Option<ConfigJson>) -> Result<Option<ConfigJson>, Error> {
    let Some(parameters) = parameters else {
        return Ok(None);
    };
    let mut kinds = parameters
        .keys()
        .iter()
        .filter(|(_, value)| value.is_object());
    let Some((kind, first)) = kinds.next() else {
        return Ok(Some(parameters));
    };
    if let Some((other, _)) = kinds.find(|(_, value)| *value != first) {
        return Err(parameters.error(
            other,
            format!("moerun needs the same rotary embedding as for {kind}"),
        ));
    }
    parameters.section(kind)
}

fn rope(fraction: f64, scaling: Option<RopeScaling>) -> RopeConfig {
    RopeConfig {
        fraction,
        scaling,
        ..RopeConfig::default()
    }
}

fn read_scaling(
    config: &ConfigJson,
    parameters: &ConfigJson,
) -> Result<Option<RopeScaling>, Error> {
    let kind = match parameters.get::<String>("rope_type")? {
        Some(kind) => kind,
        None => parameters.get_or("type", "default".to_string())?,
    };
    let original = || -> Result<usize, Error> {
        let key = "original_max_position_embeddings";
        let given = match parameters.get(key)? {
            Some(length) => Some(length),
            None => config.get(key)?,
        };
        given.ok_or_else(|| {
            parameters.error(
                key,
                format!("it is missing, and scaling of the type {kind:?} depends on it"),
            )
        })
    };
    // Without a factor, the model's length decides.
    let factor = || -> Result<Option<f64>, Error> {
        if let Some(factor) = parameters.get("factor")? {
            return Ok(Some(factor));
        }
        let longest: Option<f64> = config.get("max_position_embeddings")?;
        Ok(longest
            .zip(original().ok())
            .map(|(longest, original)| longest / original as f64))
    };
    let missing_factor = || parameters.error("factor", "the key is missing");
    Ok(Some(match kind.as_str() {
        "default" => return Ok(None),
        "linear" => RopeScaling::Linear(LinearScaling {
            factor: parameters.require(&["factor"])?,
        }),
        "dynamic" if parameters.has("alpha") => RopeScaling::NtkAlpha(NtkAlphaScaling {
            alpha: parameters.require(&["alpha"])?,
        }),
        "dynamic" => RopeScaling::Dynamic(DynamicScaling {
            factor: parameters.require(&["factor"])?,
            original_length: match original() {
                Ok(length) => length,
                Err(_) => config.require(&["max_position_embeddings"])?,
            },
        }),
        "llama3" => RopeScaling::Llama3(Llama3Scaling {
            factor: parameters.require(&["factor"])?,
            low: parameters.require(&["low_freq_factor"])?,
            high: parameters.require(&["high_freq_factor"])?,
            original_length: original()?,
        }),
        "yarn" => RopeScaling::Yarn(YarnScaling {
            factor: factor()?.ok_or_else(missing_factor)?,
            original_length: original()?,
            beta_fast: parameters.get_or("beta_fast", 32.0)?,
            beta_slow: parameters.get_or("beta_slow", 1.0)?,
            truncate: parameters.get_or("truncate", true)?,
            attention_factor: parameters.get("attention_factor")?,
            mscale: parameters.get("mscale")?.filter(|mscale| *mscale != 0.0),
            mscale_all_dim: parameters
                .get("mscale_all_dim")?
                .filter(|mscale| *mscale != 0.0),
        }),
        "longrope" | "su" => RopeScaling::Longrope(LongropeScaling {
            short: parameters.require(&["short_factor"])?,
            long: parameters.require(&["long_factor"])?,
            original_length: original()?,
            factor: factor()?,
            attention_factor: parameters.get("attention_factor")?,
        }),
        other => {
            let key = if parameters.has("rope_type") {
                "rope_type"
            } else {
                "type"
            };
            let known = "default, linear, dynamic, llama3, yarn and longrope";
            let reason = format!("moerun does not know {other:?}; it knows {known}");
            return Err(parameters.error(key, reason));
        }
    }))
}

/// Sets the keys of both versions.
pub(super) fn write(model: &ModelConfig, config: &mut ConfigJson) {
    let mut parameters = Map::new();
    let kind = match &model.rope.scaling {
        None => "default",
        Some(scaling) => write_scaling(scaling, &mut parameters),
    };
    config.set("rope_theta", model.rope_theta);
    if kind == "default" {
        config.set("rope_scaling", Value::Null);
    } else {
        let mut scaling = parameters.clone();
        scaling.insert("type".into(), json!(kind));
        scaling.insert("rope_type".into(), json!(kind));
        scaling.insert("rope_theta".into(), json!(model.rope_theta));
        if model.rope.fraction != 1.0 {
            scaling.insert("partial_rotary_factor".into(), json!(model.rope.fraction));
        }
        config.set("rope_scaling", scaling);
    }
    parameters.insert("rope_type".into(), json!(kind));
    parameters.insert("rope_theta".into(), json!(model.rope_theta));
    if model.rope.fraction != 1.0 {
        parameters.insert("partial_rotary_factor".into(), json!(model.rope.fraction));
        config.set("partial_rotary_factor", model.rope.fraction);
    }
    config.set("rope_parameters", parameters);
}

/// Adds the keys of a scaling, and returns its type.
fn write_scaling(scaling: &RopeScaling, keys: &mut Map<String, Value>) -> &'static str {
    let mut set = |key: &str, value: Value| {
        if !value.is_null() {
            keys.insert(key.into(), value);
        }
    };
    const ORIGINAL: &str = "original_max_position_embeddings";
    match scaling {
        RopeScaling::Linear(LinearScaling { factor }) => {
            set("factor", json!(factor));
            "linear"
        }
        RopeScaling::Dynamic(DynamicScaling {
            factor,
            original_length,
        }) => {
            set("factor", json!(factor));
            set(ORIGINAL, json!(original_length));
            "dynamic"
        }
        RopeScaling::NtkAlpha(NtkAlphaScaling { alpha }) => {
            set("alpha", json!(alpha));
            set("factor", json!(1.0));
            "dynamic"
        }
        RopeScaling::Llama3(Llama3Scaling {
            factor,
            low,
            high,
            original_length,
        }) => {
            set("factor", json!(factor));
            set("low_freq_factor", json!(low));
            set("high_freq_factor", json!(high));
            set(ORIGINAL, json!(original_length));
            "llama3"
        }
        RopeScaling::Yarn(yarn) => {
            set("factor", json!(yarn.factor));
            set(ORIGINAL, json!(yarn.original_length));
            set("beta_fast", json!(yarn.beta_fast));
            set("beta_slow", json!(yarn.beta_slow));
            set("truncate", json!(yarn.truncate));
            set("attention_factor", json!(yarn.attention_factor));
            set("mscale", json!(yarn.mscale));
            set("mscale_all_dim", json!(yarn.mscale_all_dim));
            "yarn"
        }
        RopeScaling::Longrope(longrope) => {
            set("short_factor", json!(longrope.short));
            set("long_factor", json!(longrope.long));
            set(ORIGINAL, json!(longrope.original_length));
            set("factor", json!(longrope.factor));
            set("attention_factor", json!(longrope.attention_factor));
            "longrope"
        }
    }
}
