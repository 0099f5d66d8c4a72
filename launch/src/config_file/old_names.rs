//! Keys and values of the previous version.

use super::value::yaml_options;
use crate::{cli::ConfigArgs, hint::hinted};
use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use trainer::config::{Renamed, renamed_keys};

/// Refuses keys and values of the previous version, with all their new names in one message.
pub(super) fn refuse_old_names(args: &ConfigArgs, text: &str) -> Result<()> {
    // The typed parser reports text that is no YAML, with the position.
    let file: Value = serde_saphyr::from_str_with_options(text, yaml_options()).unwrap_or_default();
    let mut found = renamed_keys(&file);
    let mut sources = Vec::new();
    if !found.is_empty() {
        sources.push(args.config.display().to_string());
    }
    let changes = args.set.iter().filter_map(|change| change_alone(change));
    let in_changes: Vec<Renamed> = changes.flat_map(|change| renamed_keys(&change)).collect();
    if !in_changes.is_empty() {
        sources.push("--set".to_string());
    }
    for renamed in in_changes {
        if !found.contains(&renamed) {
            found.push(renamed);
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    let count = match found.len() {
        1 => "1 key has a new name".to_string(),
        count => format!("{count} keys have new names"),
    };
    let list: String = found
        .iter()
        .map(|renamed| format!("\n  {renamed}"))
        .collect();
    let error = anyhow!("{}: {count}{list}", sources.join(" and "));
    Err(hinted(error, "rename them; nothing else changed"))
}

/// Returns a configuration with nothing but this change, or None if its value is no YAML.
fn change_alone(change: &str) -> Option<Value> {
    let (path, text) = change.split_once('=')?;
    let mut value: Value = serde_saphyr::from_str(text).ok()?;
    for key in path.rsplit('.') {
        value = match key.parse::<usize>() {
            Ok(_) => json!([value]),
            Err(_) => json!({ key: value }),
        };
    }
    Some(value)
}
