//! The family that can express a model that no folder gave.

use super::{Family, canonical::canonical};
use crate::{Error, config::ModelConfig, hub::config_json::ConfigJson};
use serde_json::Value;

/// Returns the first family that can express a model, and its `config.json`.
///
/// # Errors
/// If none can: the keys that the closest one cannot.
pub(crate) fn express(model: &ModelConfig) -> Result<(Family, ConfigJson), Error> {
    let expected = canonical(model);
    let mut closest: Option<(Family, Vec<String>)> = None;
    for &family in Family::ALL {
        let config = config_of(family, model);
        let Ok(read) = family.rules().read(&config) else {
            continue;
        };
        let lost = differences(&expected, &canonical(&read));
        if lost.is_empty() {
            return Ok((family, config));
        }
        if closest
            .as_ref()
            .is_none_or(|(_, best)| lost.len() < best.len())
        {
            closest = Some((family, lost));
        }
    }
    let reason = closest.map_or_else(String::new, |(family, lost)| {
        format!(
            ": the closest, {}, has no {}",
            family.name(),
            lost.join(", ")
        )
    });
    Err(Error::Folder(format!(
        "no model family of transformers can express this model{reason}"
    )))
}

/// Returns the `config.json` of a model, as far as the family can express it.
pub(crate) fn config_of(family: Family, model: &ModelConfig) -> ConfigJson {
    let rules = family.rules();
    let mut config = ConfigJson::empty("config.json".into());
    config.set("architectures", [rules.architecture()]);
    config.set("model_type", rules.model_type());
    rules.write(model, &mut config);
    config
}

/// Returns the keys of a canonical model, with their values, that another one lacks.
pub(crate) fn differences(expected: &Value, found: &Value) -> Vec<String> {
    let mut lost = Vec::new();
    compare("model", expected, found, &mut lost);
    lost
}

/// Adds the keys in which two values differ.
fn compare(key: &str, expected: &Value, found: &Value, lost: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            for (name, value) in expected {
                let other = found.get(name).unwrap_or(&Value::Null);
                compare(&format!("{key}.{name}"), value, other, lost);
            }
        }
        (Value::Number(expected), Value::Number(found)) => {
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs().max(b.abs());
            let equal = expected.as_f64().zip(found.as_f64());
            if !equal.is_some_and(|(a, b)| close(a, b)) {
                lost.push(format!("{key} {expected}"));
            }
        }
        _ if expected == found => {}
        _ => lost.push(format!("{key} {expected}")),
    }
}
