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

/// Which rotary embeddings a family has.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeRules {
    /// Theta if no key says it.
    pub(super) theta: f64,
    /// Part of a head that rotates if no key says it; `None` if heads rotate whole, whatever
    /// `partial_rotary_factor` says.
    pub(super) fraction: Option<f64>,
    pub(super) scalings: Scalings,
    /// True if YaRN scales the softmax too (`mscale_all_dim`).
    pub(super) scales_softmax: bool,
}

/// Kinds of scaling that a family has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scalings {
    /// No kind that all layers share.
    None,
    /// All kinds that transformers has for every family.
    Common,
    /// All kinds that transformers has, and `dynamic` is constant with `alpha`.
    CommonAndAlpha,
}

impl Default for RopeRules {
    fn default() -> RopeRules {
        RopeRules {
            theta: 10_000.0,
            fraction: None,
            scalings: Scalings::Common,
            scales_softmax: false,
        }
    }
}

impl RopeRules {
    /// Returns the rules of a family that differs in theta alone.
    pub(super) fn with_theta(theta: f64) -> RopeRules {
        RopeRules {
            theta,
            ..RopeRules::default()
        }
    }
}

const PARTIAL: &str = "partial_rotary_factor";
const ORIGINAL: &str = "original_max_position_embeddings";
const LONGEST: &str = "max_position_embeddings";

/// Reads theta and the section `model.rope`.
///
/// # Errors
/// If the family has no such embedding, the kind of scaling is unknown, or a key of it is missing.
pub(super) fn read(config: &ConfigJson, rules: RopeRules) -> Result<(f64, RopeConfig), Error> {
    let scaling = config.section("rope_scaling")?;
    let parameters = match scaling.filter(|scaling| !scaling.keys().is_empty()) {
        Some(scaling) => Some(scaling),
        None => uniform(config.section("rope_parameters")?)?,
    };
    let Some(parameters) = parameters else {
        let theta = config.get_or("rope_theta", rules.theta)?;
        return Ok((theta, rope(read_fraction(config, config, rules)?, None)));
    };
    let theta = match parameters.get("rope_theta")? {
        Some(theta) => theta,
        None => config.get_or("rope_theta", rules.theta)?,
    };
    let fraction = read_fraction(config, &parameters, rules)?;
    let scaling = read_scaling(config, &parameters, rules)?;
    Ok((theta, rope(fraction, scaling)))
}

/// Returns true if keys give parameters, or scaling in the older form.
///
/// # Errors
/// If they are no objects.
pub(super) fn is_given(config: &ConfigJson) -> Result<bool, Error> {
    let scaling = config.section("rope_scaling")?;
    Ok(config.has("rope_parameters") || scaling.is_some_and(|keys| !keys.keys().is_empty()))
}

/// Reads the part of a head that rotates.
fn read_fraction(
    config: &ConfigJson,
    parameters: &ConfigJson,
    rules: RopeRules,
) -> Result<f64, Error> {
    let given = match parameters.get(PARTIAL)? {
        Some(fraction) => Some(fraction),
        None => config.get(PARTIAL)?,
    };
    match (given, rules.fraction) {
        (Some(fraction), Some(_)) => Ok(fraction),
        (None, Some(fraction)) => Ok(fraction),
        (None | Some(1.0), None) => Ok(1.0),
        (Some(fraction), None) => Err(config.error(
            PARTIAL,
            format!("it is {fraction}, but transformers rotates whole heads of this model_type"),
        )),
    }
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
    rules: RopeRules,
) -> Result<Option<RopeScaling>, Error> {
    let kind = match parameters.get::<String>("rope_type")? {
        Some(kind) => kind,
        None => parameters.get_or("type", "default".to_string())?,
    };
    let original = || -> Result<usize, Error> {
        // As in transformers, the length outside of the section counts if there is one.
        let given = match config.get(ORIGINAL)? {
            Some(length) => Some(length),
            None => parameters.get(ORIGINAL)?,
        };
        given.ok_or_else(|| {
            parameters.error(
                ORIGINAL,
                format!("it is missing, and scaling of the type {kind:?} depends on it"),
            )
        })
    };
    // Without a factor, the model's length decides.
    let factor = || -> Result<Option<f64>, Error> {
        if let Some(factor) = parameters.get("factor")? {
            return Ok(Some(factor));
        }
        let longest: Option<f64> = config.get(LONGEST)?;
        Ok(longest
            .zip(original().ok())
            .map(|(longest, original)| longest / original as f64))
    };
    let missing_factor = || parameters.error("factor", "the key is missing");
    let strength = |key: &str| -> Result<Option<f64>, Error> {
        let strength: Option<f64> = parameters.get(key)?;
        Ok(strength.filter(|strength| *strength != 0.0))
    };
    if kind != "default" && rules.scalings == Scalings::None {
        let reason = format!("moerun knows only default for this model_type, not {kind:?}");
        return Err(parameters.error("rope_type", reason));
    }
    if kind != "yarn" && rules.scales_softmax && strength("mscale_all_dim")?.is_some() {
        let reason = format!("moerun knows it with the type yarn only, not {kind:?}");
        return Err(parameters.error("mscale_all_dim", reason));
    }
    Ok(Some(match kind.as_str() {
        "default" => return Ok(None),
        "linear" => RopeScaling::Linear(LinearScaling {
            factor: parameters.require(&["factor"])?,
        }),
        "dynamic" => match (strength("alpha")?, rules.scalings) {
            (Some(alpha), Scalings::CommonAndAlpha) => {
                RopeScaling::NtkAlpha(NtkAlphaScaling { alpha })
            }
            (Some(_), _) => {
                let reason = "transformers ignores it in models of this model_type";
                return Err(parameters.error("alpha", reason));
            }
            // transformers takes the longest sequence for the original one.
            (None, _) => RopeScaling::Dynamic(DynamicScaling {
                factor: parameters.require(&["factor"])?,
                original_length: config.require(&[LONGEST])?,
            }),
        },
        "llama3" => RopeScaling::Llama3(Llama3Scaling {
            factor: parameters.require(&["factor"])?,
            low: parameters.require(&["low_freq_factor"])?,
            high: parameters.require(&["high_freq_factor"])?,
            original_length: original()?,
        }),
        "yarn" => {
            let attention_factor = parameters.get("attention_factor")?;
            let all_dim = strength("mscale_all_dim")?;
            // Without effect if the other is missing, or the factor is given.
            let mscale =
                strength("mscale")?.filter(|_| attention_factor.is_none() && all_dim.is_some());
            RopeScaling::Yarn(YarnScaling {
                factor: factor()?.ok_or_else(missing_factor)?,
                original_length: original()?,
                beta_fast: parameters.get_or("beta_fast", 32.0)?,
                beta_slow: parameters.get_or("beta_slow", 1.0)?,
                truncate: parameters.get_or("truncate", true)?,
                attention_factor,
                mscale,
                mscale_all_dim: all_dim.filter(|_| mscale.is_some() || rules.scales_softmax),
            })
        }
        "longrope" | "su" => {
            let attention_factor: Option<f64> = parameters.get("attention_factor")?;
            RopeScaling::Longrope(LongropeScaling {
                short: parameters.require(&["short_factor"])?,
                long: parameters.require(&["long_factor"])?,
                original_length: original()?,
                // It only sets the attention factor, which is at least 1 then.
                factor: match attention_factor {
                    Some(_) => None,
                    None => factor()?.map(|factor| factor.max(1.0)),
                },
                attention_factor,
            })
        }
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

/// Sets the keys of both versions, but for those of [`write_fraction`].
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
        config.set("rope_scaling", scaling);
    }
    parameters.insert("rope_type".into(), json!(kind));
    parameters.insert("rope_theta".into(), json!(model.rope_theta));
    config.set("rope_parameters", parameters);
    if let Some(RopeScaling::Dynamic(dynamic)) = &model.rope.scaling {
        config.set(LONGEST, dynamic.original_length);
    }
}

/// Sets the part of a head that rotates, in families that have one.
pub(super) fn write_fraction(model: &ModelConfig, config: &mut ConfigJson) {
    let width = model.attention(0).rotary_part().width;
    let fraction = model.rope.exact_fraction(width);
    config.set(PARTIAL, fraction);
    for section in ["rope_scaling", "rope_parameters"] {
        if let Some(Value::Object(keys)) = config.keys().get(section) {
            let mut keys = keys.clone();
            keys.insert(PARTIAL.into(), json!(fraction));
            config.set(section, keys);
        }
    }
}

/// Adds the keys of a scaling, and returns its type.
fn write_scaling(scaling: &RopeScaling, keys: &mut Map<String, Value>) -> &'static str {
    let mut set = |key: &str, value: Value| {
        if !value.is_null() {
            keys.insert(key.into(), value);
        }
    };
    match scaling {
        RopeScaling::Linear(LinearScaling { factor }) => {
            set("factor", json!(factor));
            "linear"
        }
        RopeScaling::Dynamic(DynamicScaling { factor, .. }) => {
            set("factor", json!(factor));
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
