//! The section `model` of a run that starts from a folder.

use super::config_json::ConfigJson;
use crate::{
    Error,
    config::ModelConfig,
    families::{Family, canonical::canonical, expression::differences},
};
use serde_json::{Map, Value};
use std::path::Path;

/// Returns the model that the `config.json` of a folder describes.
///
/// # Errors
/// If it cannot be read, or moerun cannot compute the model.
pub fn folder_model(folder: &Path) -> Result<ModelConfig, Error> {
    let config = ConfigJson::read(folder)?;
    let (_, mut model) = Family::read(&config)?;
    model.from = Some(folder.to_path_buf());
    Ok(model)
}

/// Returns a section `model` with the keys of the folder's model that `section` does not set.
pub fn complete_section(folder: &ModelConfig, section: &Map<String, Value>) -> Value {
    let mut complete = serde_json::to_value(folder).expect("a configuration is plain data");
    // An updated bias takes the place of the frozen one, and starts from its values.
    let moe = section.get("moe");
    let rate = moe.and_then(|moe| moe.get("bias_update_rate")?.as_f64());
    if rate.is_some_and(|rate| rate > 0.0) && complete["moe"]["router"]["bias"] == "frozen" {
        complete["moe"]["router"]["bias"] = Value::Null;
    }
    overlay(&mut complete, &Value::Object(section.clone()));
    complete
}

/// Replaces the values that `changes` has.
fn overlay(target: &mut Value, changes: &Value) {
    match (target, changes) {
        (Value::Object(target), Value::Object(changes)) => {
            for (key, change) in changes {
                overlay(target.entry(key.clone()).or_insert(Value::Null), change);
            }
        }
        (target, change) => *target = change.clone(),
    }
}

/// Returns the keys of `model` that contradict the folder's model, one message each.
pub fn contradictions(folder: &ModelConfig, model: &ModelConfig) -> Vec<String> {
    let path = folder.from.as_deref().unwrap_or(Path::new("")).display();
    let differences = differences(&canonical(model), &canonical(folder));
    let message = |difference: String| {
        format!("{difference} is not the model of {path}: leave it out, or leave out model.from")
    };
    differences.into_iter().map(message).collect()
}
