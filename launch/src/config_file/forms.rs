//! The forms that the JSON schema of configurations allows for a value.

use serde_json::Value;
use trainer::config::{NumberRange, resolve_schema, schema};

/// Numbers that stand in for refused ones: each range of the schema contains one of them.
const STAND_INS: [i32; 4] = [1, 0, -1, 2];

/// All forms of one value, without references. Empty if the schema does not know the key.
#[derive(Clone)]
pub(super) struct Forms(Vec<&'static Value>);

impl Forms {
    /// Returns the forms of a whole configuration.
    pub(super) fn of_config() -> Forms {
        Forms::new(schema())
    }

    fn new(schema: &'static Value) -> Forms {
        let mut forms = Vec::new();
        collect(schema, &mut forms);
        Forms(forms)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the forms of a key's value.
    pub(super) fn key(&self, name: &str) -> Forms {
        let values = self
            .0
            .iter()
            .filter_map(|form| form["properties"].get(name));
        Forms(values.flat_map(|value| Forms::new(value).0).collect())
    }

    /// Returns the forms of a list's entries.
    pub(super) fn item(&self) -> Forms {
        let items = self.0.iter().filter_map(|form| form.get("items"));
        Forms(items.flat_map(|item| Forms::new(item).0).collect())
    }

    /// Returns all keys of the forms that are sections.
    pub(super) fn keys(&self) -> Vec<&'static str> {
        let sections = self
            .0
            .iter()
            .filter_map(|form| form["properties"].as_object());
        sections
            .flat_map(|section| section.keys().map(String::as_str))
            .collect()
    }

    /// Returns true if one form has the first key and another form the second, but none has both.
    pub(super) fn are_alternatives(&self, one: &str, other: &str) -> bool {
        let has = |form: &Value, key: &str| form["properties"].get(key).is_some();
        let some_has = |key: &str| self.0.iter().any(|form| has(form, key));
        let both = self.0.iter().any(|form| has(form, one) && has(form, other));
        some_has(one) && some_has(other) && !both
    }

    /// Returns true if a value of this JSON type is allowed.
    pub(super) fn allows(&self, kind: &str) -> bool {
        self.0.iter().any(|form| is_of_type(form, kind))
    }

    /// Returns true if only text is allowed.
    pub(super) fn is_text(&self) -> bool {
        let other = ["boolean", "integer", "number", "array", "object"];
        self.allows("string") && !other.iter().any(|kind| self.allows(kind))
    }

    /// Returns true if the value is the path of a file or folder.
    pub(super) fn is_path(&self) -> bool {
        self.0.iter().any(|form| form["format"] == "path")
    }

    /// Returns the form that is a number, if there is one.
    pub(super) fn number(&self) -> Option<NumberForm> {
        let is_number = |form: &&&Value| is_of_type(form, "integer") || is_of_type(form, "number");
        self.0.iter().find(is_number).map(|form| NumberForm(form))
    }
}

/// Adds the forms of a schema, except null.
fn collect(schema: &'static Value, forms: &mut Vec<&'static Value>) {
    let schema = resolve_schema(schema);
    let lists = ["anyOf", "oneOf"]
        .iter()
        .filter_map(|list| schema[list].as_array());
    let alternatives: Vec<&'static Value> = lists.flatten().collect();
    if alternatives.is_empty() && schema["type"] != "null" {
        forms.push(schema);
    }
    for alternative in alternatives {
        collect(alternative, forms);
    }
}

pub(super) fn is_of_type(form: &Value, kind: &str) -> bool {
    match &form["type"] {
        Value::Array(kinds) => kinds.iter().any(|other| other == kind),
        other => other == kind,
    }
}

/// A form that is a number.
pub(super) struct NumberForm(&'static Value);

impl NumberForm {
    pub(super) fn is_integer(&self) -> bool {
        is_of_type(self.0, "integer")
    }

    /// Returns true if the number is within the declared range and that of the key's type.
    pub(super) fn contains(&self, number: &Value) -> bool {
        let fits_type = match self.0["format"].as_str() {
            Some("uint8") => number
                .as_u64()
                .is_some_and(|number| number <= u64::from(u8::MAX)),
            Some("uint32") => number
                .as_u64()
                .is_some_and(|number| number <= u64::from(u32::MAX)),
            Some("uint" | "uint64") => number.is_u64(),
            _ => true,
        };
        fits_type && self.range().is_none_or(|range| range.contains(number))
    }

    fn range(&self) -> Option<NumberRange> {
        NumberRange::new(self.0)
    }

    /// Returns the range in words, such as `from 1 to 4`.
    pub(super) fn range_words(&self) -> String {
        match (self.range(), self.0["format"].as_str()) {
            (Some(range), Some("uint32")) if self.0["maximum"].is_null() => {
                format!("{range} and at most {}", u32::MAX)
            }
            (Some(range), _) => range.to_string(),
            (None, _) => "finite".to_string(),
        }
    }

    /// Returns a number in the range.
    pub(super) fn stand_in(&self) -> Value {
        let numbers = STAND_INS.iter().map(|&number| Value::from(number));
        let mut fitting = numbers.filter(|number| self.contains(number));
        fitting.next().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(key: &str) -> Forms {
        key.split('.')
            .fold(Forms::of_config(), |forms, key| forms.key(key))
    }

    #[test]
    fn forms_are_found_through_references_and_alternatives() {
        assert!(at("run.dir").is_text() && at("run.dir").is_path());
        assert!(at("data.tokenizer").is_path() && at("parallel.schedule.file").is_path());
        assert!(at("run.backend").is_text() && !at("run.backend").is_path());
        assert!(at("parallel.data").number().is_some() && !at("parallel.data").is_text());
        assert!(at("schedule.constant.lr").number().is_some());
        assert!(
            at("model.mup.width")
                .number()
                .is_some_and(|form| !form.is_integer())
        );
        assert!(at("data.train").item().key("path").is_path());
        assert!(at("run.nothing").is_empty());
        assert!(at("schedule").are_alternatives("cosine", "constant"));
        assert!(!at("train").are_alternatives("steps", "micro_batch"));
    }

    /// Each number of the schema has a stand-in.
    #[test]
    fn every_range_contains_a_stand_in() {
        fn walk(node: &'static Value, checked: &mut usize) {
            match node {
                Value::Object(map) => {
                    if let Some(form) = Forms(vec![node]).number() {
                        assert!(form.contains(&form.stand_in()), "{node}");
                        *checked += 1;
                    }
                    for child in map.values() {
                        walk(child, checked);
                    }
                }
                Value::Array(list) => {
                    for child in list {
                        walk(child, checked);
                    }
                }
                _ => {}
            }
        }
        let mut checked = 0;
        walk(schema(), &mut checked);
        assert!(checked > 50, "{checked}");
    }
}
