//! A configuration as its file and `--set` give it, before it is complete.

use super::{
    forms::Forms,
    key_path::{KeyPath, Step},
    locate::{excerpt, locate},
    suggest::{nearest, nearest_known_name, suggest},
    value::{BadValue, BadValues, read},
};
use crate::hint::{WithHint, hinted, one_line};
use anyhow::{Context, Error, Result, anyhow, bail};
use serde_json::{Map, Value};
use std::path::Path;
use trainer::config::{Config, ModelConfig};

/// Values of a file and of `--set`, with what is wrong about them.
pub(super) struct Draft<'a> {
    /// Name of the file.
    file: String,
    text: &'a str,
    value: Value,
    bad_values: Vec<BadValue>,
    /// Places that `--set` has changed.
    changed: Vec<KeyPath>,
}

impl<'a> Draft<'a> {
    /// Reads the text of a file.
    pub(super) fn of_file(file: String, text: &'a str) -> Result<Draft<'a>> {
        let bad_values = BadValues::default();
        let value = read(text, Forms::of_config(), KeyPath::default(), &bad_values);
        let value = value.map_err(|error| {
            let message = error.to_string().replace("<input>", &file);
            let message = message.strip_prefix("error: ").unwrap_or(&message);
            anyhow!("{file}: {message}")
        })?;
        Ok(Draft {
            file,
            text,
            // An empty file is a section without keys.
            value: if value.is_null() {
                Map::new().into()
            } else {
                value
            },
            bad_values: bad_values.into_inner(),
            changed: Vec::new(),
        })
    }

    /// Applies one `--set KEY=VALUE`.
    ///
    /// # Errors
    /// If the key does not exist, or the value is no YAML.
    pub(super) fn set(&mut self, change: &str) -> Result<()> {
        let Some((key, text)) = change.split_once('=') else {
            let change = one_line(change);
            return Err(anyhow!("--set {change}: no value"))
                .hint("write KEY=VALUE, such as train.steps=100");
        };
        let mut target = Target {
            value: &mut self.value,
            forms: Forms::of_config(),
            path: KeyPath::default(),
        };
        let named = |error: Error| error.context(format!("--set {}", one_line(key)));
        let (sections, last) = match key.rsplit_once('.') {
            Some((sections, last)) => (sections.split('.').collect(), last),
            None => (Vec::new(), key),
        };
        for section in sections {
            target = target.enter(section).map_err(named)?;
        }
        let Child { forms, path, step } = target.child(last).map_err(named)?;
        let bad_values = BadValues::default();
        let value = read(text, forms, path.clone(), &bad_values).map_err(|error| {
            let change = one_line(change);
            anyhow!("--set {change}: the value is not YAML: {error}")
        })?;
        target.put(&step, value);
        self.bad_values.retain(|bad| !path.contains(&bad.path));
        self.bad_values.extend(bad_values.into_inner());
        self.changed.push(path);
        Ok(())
    }

    /// Returns the configuration, and a message for each value that its key does not allow.
    ///
    /// # Errors
    /// If a key is unknown or missing, or has a value of another type: where it is, and the nearest
    /// name that exists.
    pub(super) fn finish(mut self) -> Result<FinishedDraft> {
        let folder = self.complete_model()?;
        let result = serde_path_to_error::deserialize(self.value.clone());
        let config: Config = result.map_err(|error| {
            let path = KeyPath::of_error(error.path());
            self.explain(&path, &error.into_inner().to_string())
        })?;
        let problems = self.bad_values.iter().map(|bad| self.describe(bad));
        let mut problems: Vec<String> = problems.collect();
        if let Some(folder) = folder {
            problems.extend(trainer::contradictions(&folder, &config.model));
        }
        Ok(FinishedDraft { problems, config })
    }

    /// Completes the section `model` by the model of the folder `model.from`, and returns that.
    ///
    /// # Errors
    /// If the folder cannot be read, or moerun cannot compute its model.
    fn complete_model(&mut self) -> Result<Option<ModelConfig>> {
        let Some(Value::Object(section)) = self.value.get_mut("model") else {
            return Ok(None);
        };
        let Some(from) = section.get("from").and_then(Value::as_str) else {
            return Ok(None);
        };
        let folder = trainer::folder_model(Path::new(from)).context("model.from")?;
        let complete = trainer::complete_section(&folder, section);
        self.value["model"] = complete;
        Ok(Some(folder))
    }

    fn is_changed(&self, path: &KeyPath) -> bool {
        self.changed.iter().any(|changed| changed.contains(path))
    }

    /// Returns an error with the place of a value.
    fn explain(&self, path: &KeyPath, message: &str) -> Error {
        let name = one_line(&path.to_string());
        let shown = one_line(message);
        let place = locate(self.text, path);
        let error = match place {
            Some(place) if !self.is_changed(path) => {
                let file = &self.file;
                let line = place.line;
                let column = place.column;
                let excerpt = excerpt(self.text, place);
                let key = if name.is_empty() {
                    name
                } else {
                    format!("{name}: ")
                };
                anyhow!("{file}: line {line} column {column}: {key}{shown}{excerpt}")
            }
            _ if path.0.is_empty() => anyhow!("{}: {shown}", self.file),
            _ => anyhow!("--set {name}: {shown}"),
        };
        suggest(error, nearest_known_name(message))
    }

    /// Returns a sentence about a value that its key does not allow.
    fn describe(&self, bad: &BadValue) -> String {
        let BadValue { path, reason } = bad;
        let place = match locate(self.text, path) {
            _ if self.is_changed(path) => " (--set)".to_string(),
            Some(place) => format!(" (line {})", place.line),
            None => String::new(),
        };
        one_line(&format!("{path} {reason}{place}"))
    }
}

/// A configuration whose keys were all read, and what is wrong with them.
pub(super) struct FinishedDraft {
    /// With other values in place of those that `problems` names.
    pub(super) config: Config,
    pub(super) problems: Vec<String>,
}

/// The value that a change walks through.
struct Target<'a> {
    value: &'a mut Value,
    forms: Forms,
    path: KeyPath,
}

/// A value inside a target.
struct Child {
    step: Step,
    forms: Forms,
    path: KeyPath,
}

impl<'a> Target<'a> {
    /// Returns the value at `key`, which the schema or the list must have.
    fn child(&self, key: &str) -> Result<Child> {
        let child = |step: Step, forms: Forms| Child {
            path: self.path.with(step.clone()),
            step,
            forms,
        };
        if let Some(list) = self.value.as_array() {
            let index = key.parse().ok().filter(|&index| index < list.len());
            let index = index.ok_or_else(|| self.no_entry(list.len(), key));
            return Ok(child(Step::Index(index?), self.forms.item()));
        }
        let forms = self.forms.key(key);
        if !forms.is_empty() {
            return Ok(child(Step::Key(key.to_string()), forms));
        }
        let here = match self.path.to_string() {
            path if path.is_empty() => "the configuration".to_string(),
            path => path,
        };
        let keys = self.forms.keys();
        let shown = one_line(key);
        if self.forms.allows("array") {
            return Err(self.no_entry(0, key));
        }
        if keys.is_empty() {
            bail!("{here} is a value and has no key {shown}");
        }
        let error = anyhow!("{here} has no key {shown}, only {}", keys.join(", "));
        Err(suggest(error, nearest(key, keys.into_iter())))
    }

    fn no_entry(&self, len: usize, key: &str) -> Error {
        let path = &self.path;
        let key = one_line(key);
        let error = anyhow!("{path} is a list of {len} and has no {key}");
        hinted(error, "write a position from 0, or give the whole list")
    }

    /// Enters the section or list at `key`, which becomes a section if it is unset.
    fn enter(self, key: &str) -> Result<Target<'a>> {
        let Child { step, forms, path } = self.child(key)?;
        let value = match (self.value, step) {
            (Value::Array(list), Step::Index(index)) => &mut list[index],
            (value, _) => {
                let section = as_section(value, &self.forms, key);
                section.entry(key).or_insert(Value::Null)
            }
        };
        Ok(Target { value, forms, path })
    }

    /// Sets the value of a child; null resets it.
    fn put(self, step: &Step, value: Value) {
        match (self.value, step) {
            (Value::Array(list), Step::Index(index)) => list[*index] = value,
            (section, Step::Key(key)) => {
                let section = as_section(section, &self.forms, key);
                section.shift_remove(key);
                if !value.is_null() {
                    section.insert(key.clone(), value);
                }
            }
            (_, Step::Index(_)) => {}
        }
    }
}

/// Makes a value a section that may have `key`: a word or another alternative is replaced.
fn as_section<'a>(value: &'a mut Value, forms: &Forms, key: &str) -> &'a mut Map<String, Value> {
    if !value.is_object() {
        *value = Map::new().into();
    }
    let section = value.as_object_mut().expect("it is a section");
    section.retain(|other, _| !forms.are_alternatives(other, key));
    section
}
